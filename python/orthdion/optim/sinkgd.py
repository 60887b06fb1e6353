"""SinkGD (arXiv 2502.06742) with momentum: rows and columns brought to one norm in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.adjust import adjusted
from ..core.optimizer import MatrixOptimizer
from ..core.options import flag, number, whole
from ..core.registry import register
from ..requests import Body, Matrix, Outcome, Reduce, Update
from .muon import MomentumRule

__all__ = ["SinkGD", "SinkGDRule"]


@register
@dataclass(frozen=True)
class SinkGDRule(MomentumRule):
    """A momentum whose rows, then columns, are divided by their norms, so many times. Zeros stay zeros.

    What that makes of U is diag(√r) U diag(√c), so only r and c are iterated, on U's squares: Sinkhorn's algorithm.
    """

    name: ClassVar[str] = "sinkgd"
    summary: ClassVar[str] = "X −= η·scale·S(M), S: rows, then columns to unit norm, five times; M = lerp(M, G, 1−μ)"
    use: ClassVar[str] = "normalised steps for a few flops an entry; ends well above Muon's loss here"
    paper: ClassVar[str] = "arXiv 2502.06742"
    flops: ClassVar[str] = "O(mn)"
    sent: ClassVar[str] = "5n"

    lr: float = number(0.005, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    nesterov: bool = flag(False, doc="Look ahead: take lerp(G, M, μ) in place of M.")
    iterations: int = whole(5, 1, doc="How often rows and columns are normalised.")

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``; the direction has a polar factor's norm."""
        return adjusted(self.adjust_lr, fan_out, fan_in, min(fan_out, fan_in))

    def step(self, w: Matrix) -> Body[Outcome]:
        """``M ← lerp(M, G, 1 − μ)``, ``D`` its rows and columns at one norm. Sums run over the ranks of each."""
        u, m = self.lookahead(w)
        wide = u.double().clamp(-1e150, 1e150)
        squares = wide.square()
        r, c = wide.new_ones(wide.shape[0]), wide.new_ones(wide.shape[1])
        for _ in range(self.iterations):
            # c's own sum goes along: with c at one size no number leaves the range, however many iterations there are.
            sums = yield Reduce(torch.cat([squares @ c, c.sum().view(1)]), w.layout.cols, "norms")
            r = _over(sums[-1], sums[:-1])
            c = _over(1.0, (yield Reduce(squares.T @ r, w.layout.rows, "norms")))
        size = (min(w.shape) / max(w.shape[1], 1)) ** 0.5  # the columns have norm 1
        d = (wide * r.sqrt()[:, None] * (size * c.sqrt())).to(u.dtype)
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, {"momentum": m}, w.scale)
        return done


def _over(a: Tensor | float, b: Tensor) -> Tensor:
    """a/b, and 0 where b is 0."""
    return torch.where(b > 0.0, a / b, torch.zeros_like(b))


class SinkGD(MatrixOptimizer, rule=SinkGDRule):
    r"""SinkGD with momentum: rows and columns of one norm, by Sinkhorn's iterations.

    .. math::
        M &\leftarrow \mu M + (1 - \mu) G, \quad D^0 = M \\
        \tilde D_{i \cdot} &= D^k_{i \cdot} / \|D^k_{i \cdot}\|_2, \quad
        D^{k+1}_{\cdot j} = \tilde D_{\cdot j} / \|\tilde D_{\cdot j}\|_2 \\
        X &\leftarrow (1 - \eta\lambda) X - \eta\,\mathrm{scale}\, \sqrt{\min(m, n) / n}\; D^5

    The paper keeps no state, so it is ``mu=0`` here. **chosen**: the momentum, Muon's average without a look-ahead, as
    the noise of single gradients would be brought to full size otherwise; the norm of D, which is sqrt(mn) in the
    paper and that of a polar factor, sqrt(min(m, n)), here, so that rates and ``adjust_lr`` mean what they mean for
    Muon; η = 0.005; no ε: rows and columns of zeros stay zeros, and whatever else there is has its norm, as in the
    paper.
    """
