"""FRUGAL (arXiv 2411.07837): Adam in r directions that stay for a while, and the sign of what they miss."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.factors import factor, warm_start
from ..core.optimizer import MatrixOptimizer
from ..core.options import number, whole
from ..core.registry import register
from ..core.rule import Rule, States, StateSpec
from ..requests import ALONE, Body, MatMul, Matrix, Outcome, Reduce, Report, Update

__all__ = ["FRUGAL", "FRUGALRule"]


@register
@dataclass(frozen=True)
class FRUGALRule(Rule):
    """Adam's step of a gradient's part in r directions, and a step without memory of the rest."""

    name: ClassVar[str] = "frugal"
    summary: ClassVar[str] = "X −= η·(Adam(GQ) Qᵀ + c·sign(G − GQQᵀ)), Q: r leading directions of a G now and then"
    use: ClassVar[str] = "little memory at AdamW's rates: nothing of the weight's size is kept"
    paper: ClassVar[str] = "arXiv 2411.07837"
    flops: ClassVar[str] = "6mnr"
    sent: ClassVar[str] = "0 (a refresh: nr + r²)"
    states: ClassVar[States] = {
        "momentum": StateSpec(("rows", "rank")),
        "deviation": StateSpec(("rows", "rank")),
        "Q": StateSpec(("cols", "rank"), start="orthonormal"),
        "count": StateSpec(("rank",), dtype=torch.float32),
    }
    tall: ClassVar[bool] = True

    lr: float = number(0.001, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    beta1: float = number(0.9, 0.0, 1.0, open_high=True, doc="β₁, of Adam's mean.")
    beta2: float = number(0.999, 0.0, 1.0, open_high=True, doc="β₂, of Adam's squares.")
    epsilon: float = number(1e-8, 0.0, doc="The guard of Adam's division.")
    rank_fraction: float = number(0.25, 0.0, 1.0, open_low=True, structural=True, doc="r over min(m, n), in (0, 1].")
    rank_multiple_of: int = whole(1, 1, structural=True, doc="r is rounded up to a multiple of this.")
    update_gap: int = whole(200, 1, doc="Steps that Q stays. With a new one Adam starts afresh.")
    residual_scale: float = number(1.0, 0.0, doc="c, the size of the entries of the rest's step.")

    def step(self, w: Matrix) -> Body[Outcome]:
        """``A = Adam(GQ)``, ``D = A Qᵀ + c·sign(G − GQQᵀ)``"""
        at, q = w.layout, w.read("Q")
        if 0 in (*w.shape, q.shape[1]):
            return Report()
        g, before = self.sign * w.gradient, w.state["count"].double()
        due = before % self.update_gap == 0.0
        # Where the host does not wait to know, directions are looked for at every step, and taken when they are due.
        if w.x.device.type == "cuda" or bool(due.any()):
            q = torch.where(due, (yield from self._directions(w, g, q)), q)
        low = yield Reduce((yield MatMul(g, q, w.precision)), at.cols, "GQ")
        norms = yield Reduce(g.double().clamp(-1e150, 1e150).square().sum(1), at.cols, "norms")
        # What is rounding of a row has a sign too, and Adam brings it to full size.
        unit = max(w.precision.noise.right, torch.finfo(w.state["Q"].dtype).eps)
        noise = unit * (norms[:, None] / w.shape[1]).sqrt()
        low = torch.where(low.abs() > noise, low, 0.0)
        wide, kept = low.double().clamp(-1e150, 1e150), (~due).double()
        mean = self.beta1 * kept * w.read("momentum").double() + (1.0 - self.beta1) * wide
        squares = (kept * w.read("deviation").double()).square()
        squares = self.beta2 * squares + (1.0 - self.beta2) * wide.square()
        count = kept * before + 1.0
        root = (squares / (1.0 - self.beta2**count)).sqrt() + self.epsilon
        a = torch.where(squares > 0.0, mean / (1.0 - self.beta1**count) / root, 0.0).to(low.dtype)
        step, captured = (yield MatMul(torch.cat([a, low]), q.T, w.precision)).tensor_split(2)
        rest = g - captured
        d = step + self.residual_scale * torch.where(rest.abs() > noise, rest.sign(), 0.0)
        states = {"momentum": mean, "deviation": squares.sqrt(), "Q": q, "count": count}
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, states, w.scale)
        return done

    def _directions(self, w: Matrix, g: Tensor, q: Tensor) -> Generator[Any, Any, Tensor]:
        """``orth(GᵀG Q)``: a power iteration from the old Q, which stays where G has nothing to say."""
        at, gate, tol = w.layout, w.precision.gate, w.precision.noise.right
        top = g.abs().amax() if g.numel() else g.new_zeros(())
        top = yield Reduce(top, at.shards, "norms", op="max")
        g = g / torch.where(top > 0.0, top, 1.0)  # squares must neither vanish nor leave the range
        left = yield Reduce((yield MatMul(g, q, w.precision)), at.cols, "GQ")
        back = yield Reduce((yield MatMul(g.T, left, w.precision)), at.rows, "GGQ")
        v, null, _ = yield from factor(back, "qr", tol, over=ALONE, along=at.cols, what="Q", copies=1, gate=gate)
        return (yield from warm_start("qr", v, null, q, at.cols, gate)).to(q.dtype)


class FRUGAL(MatrixOptimizer, rule=FRUGALRule):
    r"""FRUGAL: Adam where it has memory, sign descent where it has none.

    .. math::
        L &= G Q, \quad M \leftarrow \beta_1 M + (1 - \beta_1) L, \quad V \leftarrow \beta_2 V + (1 - \beta_2) L^{\circ 2} \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \Big( \frac{\hat M}{\sqrt{\hat V} + \epsilon}\, Q^\top
        + c\; \mathrm{sign}(G - G Q Q^\top) \Big)

    Every ``update_gap`` steps Q becomes orth(GᵀG Q) of the gradient then, and M and V start afresh. n is the shorter
    side: a wide matrix is seen transposed. Rates are AdamW's. M and V are (m, r), so with r = d/4 the states of a
    square weight are three quarters of it.

    **chosen**: of the paper's projections that on leading directions, by one power iteration from the old Q where the
    released code decomposes G; entries of the rest that are rounding move nothing; kept is √V, whose range is the
    gradients'. On CUDA Q is looked for at each step (4mnr flops more), as the host does not wait for the count.
    """
