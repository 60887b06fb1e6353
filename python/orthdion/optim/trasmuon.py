"""TrasMuon (arXiv 2602.13498): NorMuon's even rows, and columns of unusual energy damped."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.control import even_rows
from ..core.optimizer import MatrixOptimizer
from ..core.options import flag, number
from ..core.registry import register
from ..core.rule import States, StateSpec
from ..requests import Body, Matrix, Outcome, Update
from .dion2 import summed
from .muon import MuonRule

__all__ = ["TrasMuon", "TrasMuonRule"]


@register
@dataclass(frozen=True)
class TrasMuonRule(MuonRule):
    """NorMuon's direction, its columns multiplied by what the momentum's energy in each allows."""

    name: ClassVar[str] = "trasmuon"
    summary: ClassVar[str] = "X −= η·scale·Ô diag(c), Ô NorMuon's, c_j = clip(1/(1 + α·log(1 + ‖M_j‖²/E_ref)))"
    use: ClassVar[str] = "NorMuon where single inputs have bursts of energy"
    paper: ClassVar[str] = "arXiv 2602.13498"
    sent: ClassVar[str] = "mn + 2m + n"
    states: ClassVar[States] = {**MuonRule.states, "variance": StateSpec(("rows",)), "reference": StateSpec(("rank",))}

    beta2: float = number(0.95, 0.0, 1.0, open_high=True, doc="β₂, of the rows' variance.")
    nesterov: bool = flag(False, doc="Look ahead: take lerp(G, M, μ) in place of M.")
    alpha: float = number(1.0, 0.0, doc="α, how much columns are damped.")
    c_min: float = number(0.1, 0.0, 1.0, doc="The least that a column is multiplied by.")
    beta_reference: float = number(0.95, 0.0, 1.0, open_high=True, doc="β_E, of the columns' median energy.")

    def rank(self, m: int, n: int) -> int:
        """One number a matrix."""
        return min(1, m, n)

    def step(self, w: Matrix) -> Body[Outcome]:
        """NorMuon's step with ``D = Ô diag(c)``; ``E_ref ← lerp(E_ref, median_j E_j, 1 − β_E)``."""
        u, m = self.lookahead(w)
        o = yield from self.orthogonalized(w, u)
        o, v = yield from even_rows(w.layout, w.shape[1], o, w.read("variance"), self.beta2, self.epsilon)
        c, reference = yield from self._damping(w, m)
        states = {"momentum": m, "variance": v, "reference": reference}
        done: Outcome = yield Update(w, o * c.to(o.dtype), self.lr, self.weight_decay, states, w.scale)
        return done

    def _damping(self, w: Matrix, m: Tensor) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
        """``c`` of this rank's columns, and √E_ref: a norm, which no format loses as it would a square."""
        own = m.double().clamp(-1e150, 1e150).square().sum(0)
        energies, first = yield from summed(w, own, 1, "energies")
        own = energies[first : first + len(own)]
        median, before = energies.median() if len(energies) else energies.sum(), w.read("reference").double().square()
        reference = torch.where(before > 0.0, torch.lerp(median, before, self.beta_reference), median)
        ratio = torch.where(own > 0.0, own / reference.sum(), 0.0).clamp_max(1e300)
        c = (1.0 / (1.0 + self.alpha * torch.log1p(ratio))).clamp(self.c_min, 1.0)
        return c, reference.sqrt().to(m.dtype)


class TrasMuon(MatrixOptimizer, rule=TrasMuonRule):
    r"""TrasMuon: NorMuon with a trust region on columns.

    .. math::
        M &\leftarrow \mu M + (1 - \mu) G, \quad E_j = \textstyle\sum_i M_{ij}^2, \quad
        E_\mathrm{ref} \leftarrow \beta_E E_\mathrm{ref} + (1 - \beta_E)\, \mathrm{median}_j E_j \\
        c_j &= \mathrm{clip}\big(1 / (1 + \alpha \log(1 + E_j / E_\mathrm{ref})),\; c_{\min},\; 1\big) \\
        X &\leftarrow (1 - \eta\lambda) X - \eta\,\mathrm{scale}\; \hat O\, \frac{\|O\|}{\|\hat O\|}\, \mathrm{diag}(c)

    with O and Ô of :class:`orthdion.NorMuon`. Options are :class:`orthdion.Muon`'s, and β₂, α, c_min, β_E. A column
    whose energy is the reference's is multiplied by 1/(1 + α·log 2). **chosen**: the step before damping has O's norm,
    in the paper sqrt(mn), so that rates are Muon's; E_ref starts as the first median (its start is not told), and the
    median of an even number is the lower of the middle two; no ε, so that the step does not see the gradient's scale: a
    column of zeros has E_j/E_ref = 0, and any other where E_ref is 0 gets c_min; with a look-ahead E_j is still M's.
    """
