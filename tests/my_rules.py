"""Rules as a user would write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import orthdion
from orthdion.core.options import number
from orthdion.core.rule import States
from orthdion.requests import Body, Matrix, Outcome, Update

__all__ = ["SignedMomentum"]


@orthdion.register
@dataclass(frozen=True)
class SignedMomentum(orthdion.Rule):
    """``M ← μM + G``, ``D = sign(M)``"""

    name: ClassVar[str] = "signed-momentum"
    states: ClassVar[States] = {"momentum": orthdion.StateSpec()}

    mu: float = number(0.9, 0.0, 1.0, doc="μ, the momentum.")

    def step(self, w: Matrix) -> Body[Outcome]:
        m = self.mu * w.read("momentum") + w.gradient
        return (yield Update(w, m.sign(), self.lr, self.weight_decay, {"momentum": m}))
