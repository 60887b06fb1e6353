"""RMNP (arXiv 2603.20527): the momentum's rows at unit norm, in place of an orthogonal momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.adjust import adjusted
from ..core.optimizer import MatrixOptimizer
from ..core.options import flag, number
from ..core.registry import register
from ..requests import Body, Matrix, Outcome, Reduce, Update
from .muon import MomentumRule

__all__ = ["RMNP", "RMNPRule"]


@register
@dataclass(frozen=True)
class RMNPRule(MomentumRule):
    """A momentum whose rows, along fan-in, are divided by their norms. A row of zeros stays one."""

    name: ClassVar[str] = "rmnp"
    summary: ClassVar[str] = "X −= η·scale·M with rows of unit ℓ₂ norm, M = lerp(M, G, 1−μ)"
    use: ClassVar[str] = "normalised steps for a few flops an entry; ends well above Muon's loss here"
    paper: ClassVar[str] = "arXiv 2603.20527"
    flops: ClassVar[str] = "O(mn)"
    sent: ClassVar[str] = "0"

    lr: float = number(0.002, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    nesterov: bool = flag(False, doc="Look ahead: take lerp(G, M, μ) in place of M.")
    epsilon: float = number(1e-8, 0.0, doc="The smallest norm that a row is divided by.")

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``; each of the m rows of the direction has norm 1."""
        return adjusted(self.adjust_lr, fan_out, fan_in, fan_out)

    def step(self, w: Matrix) -> Body[Outcome]:
        """``M ← lerp(M, G, 1 − μ)``, ``D_i = M_i / max(‖M_i‖, ε)``. Squares are summed over the ranks of a row."""
        u, m = self.lookahead(w)
        squares = yield Reduce(u.double().square().sum(1), w.layout.cols, "norms")
        limits = torch.finfo(u.dtype)
        norms = squares.sqrt().clamp(max(self.epsilon, limits.tiny), limits.max).to(u.dtype)
        done: Outcome = yield Update(w, u / norms[:, None], self.lr, self.weight_decay, {"momentum": m}, w.scale)
        return done


class RMNP(MatrixOptimizer, rule=RMNPRule):
    r"""RMNP: the rows of a momentum, each at unit norm.

    .. math::
        M &\leftarrow \mu M + (1 - \mu) G, \quad D_i = M_i / \max(\|M_i\|_2, \epsilon) \\
        X &\leftarrow (1 - \eta\lambda) X - \eta\,\mathrm{scale}\; D

    Rows are those of the weight (fan-out, fan-in). The paper does not look ahead and has no scale:
    ``adjust_lr=None`` is its step. **chosen**: ``adjust_lr`` is "spectral" as everywhere here, so that η means the same
    across rules; η itself is 0.002, since rates near AdamW's, far below Muon's, were the better ones in our runs; a row
    is divided by max(norm, ε) and not by norm + ε, so that what is not tiny has unit norm exactly.
    """
