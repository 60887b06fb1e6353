"""AdamW and Lion for the parameters that are no hidden matrices (docs/algorithms.md, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Rule", "step"]


@dataclass(frozen=True)
class Rule:
    """Which update, and its numbers; ``step`` counts from 1."""

    algorithm: Literal["adamw", "lion"]
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    step: int
    maximize: bool
    #: ``[lr, weight_decay]`` in double, and the steps so far, where they are read on the device.
    hyper: Tensor | None = None
    counter: Tensor | None = None


def step(tensors: Sequence[tuple[tuple[Tensor, ...], Rule]]) -> list[bool]:
    """Steps (X, G, M, V) or (X, G, M) in place, in plain torch; returns which were skipped for NaN or infinity."""
    return [_one(views, rule) for views, rule in tensors]


def _one(views: tuple[Tensor, ...], rule: Rule) -> bool:
    x, g, m = (t.to(torch.float64 if t.dtype == torch.float64 else torch.float32) for t in views[:3])
    if not bool(torch.isfinite(g).all()):
        return True
    if rule.maximize:
        g = -g
    decayed = (1.0 - rule.lr * rule.weight_decay) * x
    if rule.algorithm == "lion":
        u = torch.sign(rule.beta1 * m + (1.0 - rule.beta1) * g)
        views[0].copy_(decayed - rule.lr * u)
        views[2].copy_(rule.beta2 * m + (1.0 - rule.beta2) * g)
        return False
    v = views[3].to(x.dtype)
    m = rule.beta1 * m + (1.0 - rule.beta1) * g
    v = rule.beta2 * v + (1.0 - rule.beta2) * g * g
    correction1, correction2 = 1.0 - rule.beta1**rule.step, 1.0 - rule.beta2**rule.step
    root = v.sqrt() / correction2**0.5
    views[0].copy_(decayed - rule.lr / correction1 * m / (root + rule.epsilon))
    views[2].copy_(m)
    views[3].copy_(v)
    return False
