"""Lion (arXiv 2302.06675), for what is no hidden matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.optimizer import MatrixOptimizer
from ..core.options import number
from ..core.registry import register
from ..core.rule import Rule, States, StateSpec
from ..requests import Body, Elementwise, Matrix, Outcome, Update

__all__ = ["Lion", "LionRule"]


@register
@dataclass(frozen=True)
class LionRule(Rule):
    """The sign of a momentum that looks ahead."""

    name: ClassVar[str] = "lion"
    summary: ClassVar[str] = "X −= η·sign(β₁m + (1−β₁)G)"
    use: ClassVar[str] = "embeddings, heads, norms, biases, in half of AdamW's memory"
    paper: ClassVar[str] = "arXiv 2302.06675"
    flops: ClassVar[str] = "O(mn)"
    sent: ClassVar[str] = "0"
    states: ClassVar[States] = {"momentum": StateSpec()}
    elementwise: ClassVar[bool] = True

    lr: float = number(0.0001, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    beta1: float = number(0.9, 0.0, 1.0, open_high=True, doc="β₁.")
    beta2: float = number(0.95, 0.0, 1.0, open_high=True, doc="β₂.")

    def fused(self, *, diagnostics: bool = False, bfloat16: bool = False) -> Elementwise:
        """What the core is told."""
        return Elementwise(*self.shared, "lion", self.beta1, self.beta2, 0.0)

    def step(self, w: Matrix) -> Body[Outcome]:
        """``D = sign(β₁m + (1−β₁)g)``, ``m ← β₂m + (1−β₂)g``"""
        g, m = self.sign * w.gradient, w.read("momentum")
        d = (self.beta1 * m + (1.0 - self.beta1) * g).sign()
        kept = self.beta2 * m + (1.0 - self.beta2) * g
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, {"momentum": kept})
        return done


class Lion(MatrixOptimizer, rule=LionRule):
    r"""Lion for every parameter, with this library's states, checkpoints and backends.

    .. math::
        x \leftarrow (1 - \eta\lambda) x - \eta\,\mathrm{sign}(\beta_1 m + (1 - \beta_1) g), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) g
    """
