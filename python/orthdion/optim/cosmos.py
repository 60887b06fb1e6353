"""COSMOS (arXiv 2502.17410): Adam in the gradients' leading eigenspace, Muon's step in the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.adjust import adjusted
from ..core.factors import factor, warm_start
from ..core.optimizer import MatrixOptimizer
from ..core.options import flag, number, whole
from ..core.registry import register
from ..core.rule import States, StateSpec
from ..numerics.newton_schulz import JORDAN
from ..requests import ALONE, Body, Gram, MatMul, Matrix, NewtonSchulz, Outcome, Reduce, Report, Update, Whole
from .muon import MomentumRule

__all__ = ["COSMOS", "COSMOSRule"]


@register
@dataclass(frozen=True)
class COSMOSRule(MomentumRule):
    """A momentum's part in a tracked eigenspace, divided by Adam's deviations there, and the polar factor of the rest."""

    name: ClassVar[str] = "cosmos"
    summary: ClassVar[str] = "X −= η·scale·norm((M̂U/√V̂) Uᵀ + γ·norm(NS(M − MUUᵀ))), U: r eigenvectors of mean GᵀG"
    use: ClassVar[str] = "Adam's steps along the leading directions, beside Muon's; costs more than Muon"
    paper: ClassVar[str] = "arXiv 2502.17410"
    flops: ClassVar[str] = "20mn·min(m,n) + 12mnr"
    sent: ClassVar[str] = "mn + nr + r²"
    states: ClassVar[States] = {
        "momentum": StateSpec(),
        "U": StateSpec(("cols", "rank"), start="orthonormal"),
        "S": StateSpec(("rank", "rank")),
        "deviation": StateSpec(("rows", "rank")),
        "count": StateSpec(("rank",), dtype=torch.float32),
    }
    tall: ClassVar[bool] = True

    mu: float = number(0.9, 0.0, 1.0, open_high=True, doc="μ, the momentum.")
    nesterov: bool = flag(False, doc="Look ahead: take lerp(G, M, μ) in place of M.")
    beta2: float = number(0.95, 0.0, 1.0, open_high=True, doc="β₂, of GᵀG and of Adam's deviations.")
    gamma: float = number(0.2, 0.0, doc="γ, the norm of Muon's part; an entry of Adam's part is about 1.")
    rank_fraction: float = number(0.25, 0.0, 1.0, open_low=True, structural=True, doc="r over min(m, n), in (0, 1].")
    rank_multiple_of: int = whole(1, 1, structural=True, doc="r is rounded up to a multiple of this.")
    epsilon: float = number(1e-8, 0.0, doc="The guard of Adam's division, relative to the mean deviation.")

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``; the direction has a polar factor's norm."""
        return adjusted(self.adjust_lr, fan_out, fan_in, min(fan_out, fan_in))

    def step(self, w: Matrix) -> Body[Outcome]:
        """``U ← orth(β₂·U S + (1 − β₂)·GᵀG U)``, S and V in it, the direction's two parts, and its norm."""
        at, gate, noise, old = w.layout, w.precision.gate, w.precision.noise, w.read("U")
        r, width = old.shape[1], w.state["S"].shape[1]
        if 0 in (*w.shape, r):
            return Report()
        g, root = self.sign * w.gradient, w.read("S").double()[:, :r]
        ahead, m = self.lookahead(w)
        top = [t.abs().amax() if t.numel() else t.new_zeros(()) for t in (g, ahead)]
        top += [root.trace().clamp_max(torch.finfo(g.dtype).max).to(g.dtype)]
        top = yield Reduce(torch.stack(top).amax(), at.shards, "norms", op="max")
        size = torch.where(top > 0.0, top, 1.0)  # squares must neither vanish nor leave the range
        g, ahead, wide = g / size, ahead / size, size.double()
        s = root / wide * (root.trace() / wide)
        gu = yield Reduce((yield MatMul(g, old, w.precision)), at.cols, "GU")
        turn = yield Reduce((yield MatMul(g.T, gu, w.precision)), at.rows, "GGU")
        turn = self.beta2 * (old.double() @ s) + (1.0 - self.beta2) * turn.double()
        u, null, _ = yield from factor(
            turn.to(g.dtype), "qr", noise.right, over=ALONE, along=at.cols, what="U", copies=1, gate=gate
        )
        turn = yield Reduce(old.double().T @ u.double(), at.cols, "gram")
        both = yield Reduce((yield MatMul(torch.cat([g, ahead]), u, w.precision)), at.cols, "GU")
        gu, mu = both.tensor_split(2)
        s = self.beta2 * (turn.T @ s @ turn) + (1.0 - self.beta2) * (yield Reduce((yield Gram(gu)), at.rows, "gram"))
        squares = (w.read("deviation") / size).double().square()
        squares = self.beta2 * squares + (1.0 - self.beta2) * gu.double().square()
        count = w.state["count"].double() + 1.0
        left = self._adapted(w, mu.double(), squares, s.trace(), count)
        low, captured = (yield MatMul(torch.cat([left, mu]), u.T, w.precision)).tensor_split(2)
        rest = ahead - captured
        sums = torch.stack([rest.double().square().sum(), ahead.double().square().sum()])
        sums = yield Reduce(sums, at.shards, "norms")
        o = yield Whole(rest, w, partial(_polar, w))
        a, b = low.double(), o.double()
        parts = torch.stack([a.square().sum(), (a * b).sum(), b.square().sum()])
        parts = yield Reduce(parts, at.shards, "norms")
        # Where nothing but rounding is left, its polar factor would be noise of full size.
        weight = self.gamma * math.sqrt(math.prod(w.shape)) / parts[2].clamp_min(1e-300).sqrt()
        weight = torch.where(sums[0] > noise.residual * sums[1], weight, 0.0)
        norm = parts[0] + weight * (2.0 * parts[1] + weight * parts[2])
        d = ((a + weight * b) * (min(w.shape) / norm.clamp_min(1e-300)).sqrt()).to(g.dtype)
        kept = yield from warm_start("qr", u, null, old, at.cols, gate)
        s = s / s.trace().clamp_min(1e-300).sqrt() * wide
        states = {"momentum": m, "U": kept, "S": pad(s, (0, width - r)), "deviation": squares.sqrt() * wide}
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, {**states, "count": count}, w.scale)
        return done

    def _adapted(self, w: Matrix, mu: Tensor, squares: Tensor, energy: Tensor, count: Tensor) -> Tensor:
        """``M̂U / (√V̂ + ε·s)``, s the root of V̂'s mean, which S's trace tells."""
        first, second = 1.0 - self.mu ** (count + self.nesterov), 1.0 - self.beta2**count
        guard = self.epsilon * (energy / second / (w.shape[0] * len(count))).sqrt()
        found = mu / first / ((squares / second).sqrt() + guard)
        return torch.where(squares > 0.0, found, 0.0).clamp(-1e30, 1e30).to(w.precision.dtype)


def _polar(w: Matrix, rest: Tensor) -> NewtonSchulz:
    return NewtonSchulz(rest, JORDAN, w.precision, epsilon=1e-30)


class COSMOS(MatrixOptimizer, rule=COSMOSRule):
    r"""COSMOS: Adam in r leading eigenvectors of the gradients' second moment, and Muon's step beside them.

    .. math::
        M &\leftarrow \mu M + (1 - \mu) G, \quad
        U \leftarrow \mathrm{orth}\big(\beta_2 U S + (1 - \beta_2) G^\top G U\big), \\
        S &\leftarrow U^\top \big(\beta_2 U' S U'^\top + (1 - \beta_2) G^\top G\big) U, \quad
        V \leftarrow \beta_2 V + (1 - \beta_2) (G U)^{\circ 2} \\
        A &= \big(\hat M U / (\sqrt{\hat V} + \epsilon)\big) U^\top, \quad O = \mathrm{NS}(M - M U U^\top) \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; \mathrm{norm}\big(A + \gamma \sqrt{mn}\, O/\|O\|\big)

    U' is the U before, and hats are Adam's corrections of the start. n is the shorter side: a wide matrix is seen
    transposed. **chosen**: the direction has a polar factor's norm, in the paper sqrt(mn), so that rates are Muon's;
    U starts random, not as the first gradient's singular vectors; ε is relative to V̂'s mean; what is left of M beside
    U counts as nothing where it is rounding; kept are √V and S/√tr S, whose range is the gradients'.
    """
