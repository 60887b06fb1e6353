"""Dion3 (arXiv 2608.11612): Dion2 with NorMuon's even rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.adjust import adjusted
from ..core.control import even_rows
from ..core.optimizer import MatrixOptimizer
from ..core.options import number
from ..core.registry import register
from ..core.rule import States, StateSpec
from ..requests import Body, Matrix, Outcome, Update
from .dion2 import Dion2Rule

__all__ = ["Dion3", "Dion3Rule"]


@register
@dataclass(frozen=True)
class Dion3Rule(Dion2Rule):
    """Dion2's polar factor of the largest rows, these divided by a running root mean square, at the factor's norm."""

    name: ClassVar[str] = "dion3"
    summary: ClassVar[str] = "X[S] −= η·scale·(O/√v)·‖O‖/‖O/√v‖, O = NS(M[S]), S: ⌈f·m⌉ largest rows; M[S] *= decay"
    use: ClassVar[str] = "NorMuon at a fraction of its flops and of its elements on the wire"
    paper: ClassVar[str] = "arXiv 2608.11612"
    flops: ClassVar[str] = "20f·mn·min(fm,n)"
    sent: ClassVar[str] = "f·mn + m"
    states: ClassVar[States] = {**Dion2Rule.states, "variance": StateSpec(("rows",))}

    beta2: float = number(0.95, 0.0, 1.0, open_high=True, doc="β₂, of the rows' variance.")

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``, of the whole matrix; the rows that are stepped keep the norm of their polar factor."""
        return adjusted(self.adjust_lr, fan_out, fan_in, min(self._count(fan_out), fan_in))

    def step(self, w: Matrix) -> Body[Outcome]:
        """Dion2's step of rows; ``v[S] ← lerp(v[S], mean_cols(O²), 1 − β₂)``."""
        m, rows, o = yield from self.orthogonalized(w, 0)
        v = w.read("variance")
        o, chosen = yield from even_rows(w.layout, w.shape[1], o, v.index_select(0, rows), self.beta2, self.epsilon)
        states = {"momentum": m, "variance": v.index_copy(0, rows, chosen)}
        d = torch.zeros_like(m).index_copy_(0, rows, o)
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, states, w.scale)
        return done


class Dion3(MatrixOptimizer, rule=Dion3Rule):
    r"""Dion3: Dion2 whose rows get steps of one size.

    .. math::
        M &\leftarrow M + G, \quad S = \text{the } \lceil f m \rceil \text{ rows of } M
        \text{ with the largest } \ell_1 \text{ norms} \\
        O &= \mathrm{NS}(M_S), \quad
        v_i \leftarrow \beta_2 v_i + (1 - \beta_2)\,\mathrm{mean}_j O_{ij}^2 \;\; (i \in S), \quad
        \hat O_{ij} = O_{ij} / (\sqrt{v_i} + \epsilon) \\
        X &\leftarrow (1 - \eta\lambda) X, \quad
        X_S \leftarrow X_S - \eta\,\mathrm{scale}\; \hat O\, \|O\| / \|\hat O\|, \quad
        M_S \leftarrow \mathrm{decay} \cdot M_S

    Options are :class:`orthdion.Dion2`'s, and β₂. Rows are selected whatever the shape, so that each has its variance;
    Dion2 selects along the shorter side. Rows that are not selected keep theirs. **chosen**: NorMuon's ε beside the
    root, and five of Jordan's iterations, so that the code is Dion2's and NorMuon's own.
    """
