"""Whole steps that a backend may have in one piece: what it is told of a group, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Elementwise", "Form", "LowRank"]


@dataclass(frozen=True)
class Form:
    """Options of a fused step; two groups with equal forms are stepped alike."""

    lr: float
    weight_decay: float
    maximize: bool
    cautious: bool


@dataclass(frozen=True)
class LowRank(Form):
    """Sections 1 to 3b of docs/algorithms.md: states "momentum" and "Q".

    ``a`` and ``b`` are kept of the residual and of the captured part, ``kappa`` is the look-ahead's; ``residual`` is
    None where it is withheld.
    """

    a: float
    b: float
    right_factor: Literal["qr", "column", "polar"]
    residual: Literal["linear", "normalized"] | None
    residual_scale: float
    kappa: float | None
    epsilon: float
    diagnostics: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class Elementwise(Form):
    """Section 6: AdamW (states "momentum", "variance" and the counter "step") or Lion ("momentum").

    ``compensate``: what rounding X loses goes into AdamW's momentum (section 12).
    """

    rule: Literal["adamw", "lion"]
    beta1: float
    beta2: float
    epsilon: float
    compensate: bool = False
