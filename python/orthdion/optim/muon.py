"""Muon (Keller Jordan; torch.optim.Muon): momentum, orthogonalised."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..core.adjust import AdjustLr, adjust_lr, adjusted
from ..core.optimizer import MatrixOptimizer
from ..core.options import choice, flag, number
from ..core.registry import register
from ..core.rule import Rule, States, StateSpec
from ..numerics.newton_schulz import JORDAN, POLAR_EXPRESS
from ..requests import Body, Matrix, NewtonSchulz, Outcome, Polar, Request, Update, Whole

__all__ = ["MomentumRule", "Muon", "MuonRule"]


@dataclass(frozen=True)
class MomentumRule(Rule):
    """What rules of an averaged momentum share: its options and its look-ahead."""

    states: ClassVar[States] = {"momentum": StateSpec()}

    lr: float = number(0.02, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    mu: float = number(0.95, 0.0, 1.0, doc="μ, the momentum.")
    nesterov: bool = flag(True, doc="Look ahead: take lerp(G, M, μ) in place of M.")
    adjust_lr: AdjustLr | None = adjust_lr()

    def lookahead(self, w: Matrix) -> tuple[Tensor, Tensor]:
        """What the direction is made of, and the new momentum."""
        g = self.sign * w.gradient
        m = w.read("momentum").lerp(g, 1.0 - self.mu)
        return (g.lerp(m, self.mu) if self.nesterov else m), m


@register
@dataclass(frozen=True)
class MuonRule(MomentumRule):
    """The polar factor of a momentum, by Newton–Schulz iterations or exactly."""

    name: ClassVar[str] = "muon"
    summary: ClassVar[str] = "X −= η·scale·NS(lerp(G, M, μ)), M = lerp(M, G, 1−μ)"
    use: ClassVar[str] = "full-rank spectral steps, the field's measure"
    paper: ClassVar[str] = "kellerjordan.github.io/posts/muon, arXiv 2502.16982"
    advised: ClassVar[Any] = "full rank"
    flops: ClassVar[str] = "20mn·min(m,n)"
    sent: ClassVar[str] = "mn"

    polar: Literal["jordan", "polar-express", "exact"] = choice(
        "jordan",
        "jordan",
        "polar-express",
        "exact",
        doc='The polar factor: five of Jordan\'s quintics, Polar Express (arXiv 2505.16932), or "exact".',
    )
    epsilon: float = number(1e-7, 0.0, doc="The smallest norm that the momentum is divided by.")

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``; all d = min(m, n) singular values of the direction are 1."""
        return adjusted(self.adjust_lr, fan_out, fan_in, min(fan_out, fan_in))

    def step(self, w: Matrix) -> Body[Outcome]:
        """``M ← lerp(M, G, 1 − μ)``, ``D = polar(lerp(G, M, μ))``"""
        u, m = self.lookahead(w)
        d = yield from self.orthogonalized(w, u)
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, {"momentum": m}, w.scale)
        return done

    def orthogonalized(self, w: Matrix, u: Tensor) -> Generator[Any, Any, Tensor]:
        """The polar factor of the whole matrix whose part here is ``u``; of that, this rank's part."""
        d: Tensor = yield Whole(u, w, partial(self._polar, w))
        return d

    def _polar(self, w: Matrix, u: Tensor) -> Request:
        if self.polar == "exact":
            return Polar(u, w.precision.noise.right)
        jordan = self.polar == "jordan"
        coefficients, divisor = (JORDAN, 1.0) if jordan else (POLAR_EXPRESS, 1.02)
        return NewtonSchulz(u, coefficients, w.precision, divisor, self.epsilon)


class Muon(MatrixOptimizer, rule=MuonRule):
    r"""Muon: full-rank spectral descent on hidden matrices.

    .. math::
        M &\leftarrow \mu M + (1 - \mu) G, \quad U = (1 - \mu) G + \mu M \\
        X &\leftarrow (1 - \eta\lambda) X - \eta\,\mathrm{scale}\; U (U^\top U)^{-1/2}

    The polar factor is approximated by five Newton–Schulz iterations. With ``adjust_lr="original"`` it takes the steps
    of ``torch.optim.Muon``, whose products are rounded to bfloat16. Sharded matrices go to an owner and back.
    """
