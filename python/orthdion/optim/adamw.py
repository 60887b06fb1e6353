"""AdamW (arXiv 1711.05101), for what is no hidden matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.optimizer import MatrixOptimizer
from ..core.options import number
from ..core.registry import register
from ..core.rule import Rule, States, StateSpec
from ..requests import Body, Elementwise, Matrix, Outcome, Update

__all__ = ["AdamW", "AdamWRule"]


@register
@dataclass(frozen=True)
class AdamWRule(Rule):
    """Adam with decoupled decay."""

    name: ClassVar[str] = "adamw"
    summary: ClassVar[str] = "X −= η·m̂/(√v̂ + ε)"
    use: ClassVar[str] = "embeddings, heads, norms, biases"
    paper: ClassVar[str] = "arXiv 1711.05101"
    flops: ClassVar[str] = "O(mn)"
    sent: ClassVar[str] = "0"
    states: ClassVar[States] = {
        "momentum": StateSpec(),
        "variance": StateSpec(),
        "step": StateSpec((), dtype=torch.float32),
    }
    elementwise: ClassVar[bool] = True
    compensates: ClassVar[bool] = True

    lr: float = number(0.001, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    beta1: float = number(0.9, 0.0, 1.0, open_high=True, doc="β₁.")
    beta2: float = number(0.95, 0.0, 1.0, open_high=True, doc="β₂.")
    epsilon: float = number(1e-8, 0.0, doc="ε.")

    def fused(self, *, diagnostics: bool = False, bfloat16: bool = False) -> Elementwise:
        """What the core is told."""
        compensate = self.weight_rounding == "eco"
        return Elementwise(*self.shared, "adamw", self.beta1, self.beta2, self.epsilon, compensate)

    def check(self) -> None:
        """Errors are paid back through a momentum."""
        super().check()
        if self.weight_rounding == "eco" and self.beta1 == 0.0:
            raise ValueError("weight_rounding='eco' needs a momentum, but beta1 is 0; use 'stochastic'")

    def step(self, w: Matrix) -> Body[Outcome]:
        """``m ← β₁m + (1−β₁)g``, ``v ← β₂v + (1−β₂)g²``, ``D = (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)``"""
        g, t = self.sign * w.gradient, w.state["step"].to(w.x.device) + 1.0
        m = self.beta1 * w.read("momentum") + (1.0 - self.beta1) * g
        v = self.beta2 * w.read("variance") + (1.0 - self.beta2) * g * g
        first, second = (1.0 - beta ** t.double() for beta in (self.beta1, self.beta2))
        below = (v / second.to(v.dtype)).sqrt() + self.epsilon
        d, error = (m / first.to(m.dtype)) / below, None
        if self.weight_rounding == "eco":
            lr = torch.tensor(self.lr, dtype=m.dtype) if w.rates is None else w.rates[0].to(m.dtype)
            share = torch.where(lr > 0.0, (1.0 / self.beta1 - 1.0) / lr, 0.0)
            error = -share * first.to(m.dtype) * below
        states = {"momentum": m, "variance": v, "step": t}
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, states, error=error)
        return done


class AdamW(MatrixOptimizer, rule=AdamWRule):
    r"""AdamW for every parameter, with this library's states, checkpoints and backends.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        x &\leftarrow (1 - \eta\lambda) x - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
    """
