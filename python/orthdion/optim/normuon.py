"""NorMuon (arXiv 2510.05491): Muon with the variance of each row's update brought to one size."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.optimizer import MatrixOptimizer
from ..core.options import number
from ..core.registry import register
from ..core.rule import States, StateSpec
from ..requests import Body, Matrix, Outcome, Reduce, Update
from .muon import MuonRule

__all__ = ["NorMuon", "NorMuonRule", "even_rows"]


@register
@dataclass(frozen=True)
class NorMuonRule(MuonRule):
    """Muon's direction O, its rows divided by a running root mean square, at O's norm."""

    name: ClassVar[str] = "normuon"
    summary: ClassVar[str] = "X −= η·scale·(O/√v)·‖O‖/‖O/√v‖, O = NS(lerp(G, M, μ)), v = lerp(v, rows' mean O², 1−β₂)"
    use: ClassVar[str] = "Muon where rows (neurons) learn at unlike speeds; usually a little better than Muon"
    paper: ClassVar[str] = "arXiv 2510.05491"
    sent: ClassVar[str] = "mn + 2m"
    states: ClassVar[States] = {**MuonRule.states, "variance": StateSpec(("rows",))}

    beta2: float = number(0.95, 0.0, 1.0, open_high=True, doc="β₂, of the rows' variance.")

    def step(self, w: Matrix) -> Body[Outcome]:
        """Muon's momentum and direction; ``v ← lerp(v, mean_cols(O²), 1 − β₂)``."""
        u, m = self.lookahead(w)
        o = yield from self.orthogonalized(w, u)
        d, v = yield from even_rows(w, o, w.read("variance"), self.beta2, self.epsilon)
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, {"momentum": m, "variance": v}, w.scale)
        return done


def even_rows(
    w: Matrix, o: Tensor, v: Tensor, beta2: float, epsilon: float
) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """O, or those rows of it whose variance is v, with even rows; and the new variance. Squares are summed over the
    ranks with the other columns. A row of zeros that has had no other stays zeros.
    """
    squares = yield Reduce(o.double().square().sum(1), w.layout.cols, "variance")
    v = beta2 * v + (1.0 - beta2) * (squares / max(w.shape[1], 1)).to(o.dtype)
    scales = torch.where(v > 0.0, 1.0 / (v.double().sqrt() + epsilon), 0.0)
    before, after = yield (
        Reduce(squares.sum(), w.layout.rows, "norms"),
        Reduce((squares * scales.square()).sum(), w.layout.rows, "norms"),
    )
    scales = scales * (before / after.clamp_min(1e-300)).sqrt()
    return o * scales.to(o.dtype)[:, None], v


class NorMuon(MatrixOptimizer, rule=NorMuonRule):
    r"""NorMuon: Muon whose rows get steps of one size.

    .. math::
        O &= \mathrm{NS}((1 - \mu) G + \mu M), \quad
        v_i \leftarrow \beta_2 v_i + (1 - \beta_2)\,\mathrm{mean}_j O_{ij}^2 \\
        X &\leftarrow (1 - \eta\lambda) X - \eta\,\mathrm{scale}\; \hat O\, \|O\| / \|\hat O\|, \quad
        \hat O_{ij} = O_{ij} / (\sqrt{v_i} + \epsilon)

    Options are :class:`orthdion.Muon`'s, and β₂.
    """
