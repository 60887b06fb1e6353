"""A rule as a user writes one: nothing of the library knows of it."""

from dataclasses import dataclass
from typing import ClassVar

from orthdion import Rule, StateSpec, register
from orthdion.core.options import number
from orthdion.requests import Body, Matrix, Outcome, Update


@register
@dataclass(frozen=True)
class SignedMomentum(Rule):
    """Steps by the sign of a momentum."""

    name: ClassVar[str] = "signed-momentum-of-tests"
    states: ClassVar[dict[str, StateSpec]] = {"momentum": StateSpec()}

    mu: float = number(0.9, 0.0, 1.0, doc="μ, the momentum.")

    def step(self, w: Matrix) -> Body[Outcome]:
        """``M ← μM + G``, ``D = sign(M)``"""
        m = self.mu * w.read("momentum") + self.sign * w.gradient
        return (yield Update(w, m.sign(), self.lr, self.weight_decay, {"momentum": m}))
