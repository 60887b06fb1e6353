"""NorMuon (arXiv 2510.05491): Muon with the variance of each row's update brought to one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.optimizer import MatrixOptimizer
from ..core.registry import register
from ..core.rule import row_variance
from .muon import MuonRule

__all__ = ["NorMuon", "NorMuonRule"]


@register
@dataclass(frozen=True)
class NorMuonRule(MuonRule):
    """Muon with ``row_variance``: its direction O, rows divided by a running root mean square, at O's norm."""

    name: ClassVar[str] = "normuon"
    summary: ClassVar[str] = "X −= η·scale·(O/√v)·‖O‖/‖O/√v‖, O = NS(lerp(G, M, μ)), v = lerp(v, rows' mean O², 1−β₂)"
    use: ClassVar[str] = "Muon where rows (neurons) learn at unlike speeds; usually a little better than Muon"
    paper: ClassVar[str] = "arXiv 2510.05491"
    sent: ClassVar[str] = "mn + 2m"

    row_variance: float | None = row_variance(0.95)


class NorMuon(MatrixOptimizer, rule=NorMuonRule):
    r"""NorMuon: Muon whose rows get steps of one size.

    .. math::
        O &= \mathrm{NS}((1 - \mu) G + \mu M), \quad
        v_i \leftarrow \beta_2 v_i + (1 - \beta_2)\,\mathrm{mean}_j O_{ij}^2 \\
        X &\leftarrow (1 - \eta\lambda) X - \eta\,\mathrm{scale}\; \hat O\, \|O\| / \|\hat O\|, \quad
        \hat O_{ij} = O_{ij} / (\sqrt{v_i} + \epsilon)

    It is :class:`orthdion.Muon` with ``row_variance`` = β₂, an option that other rules have too.
    """
