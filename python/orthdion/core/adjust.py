"""What η is multiplied by for a weight of some shape, under the names that the field gives these choices."""

from __future__ import annotations

import math
from typing import Any, Literal

from .options import choice

__all__ = ["RMS", "AdjustLr", "adjust_lr", "adjusted"]

AdjustLr = Literal["spectral", "original", "match_rms_adamw"]

#: The root mean square of AdamW's updates over η, as it is in training (arXiv 2502.16982, section 2.2).
RMS = 0.2


def adjust_lr() -> Any:
    """The option of a rule."""
    return choice(
        "spectral",
        "spectral",
        "original",
        "match_rms_adamw",
        None,
        doc='What η is multiplied by: "spectral" sqrt(m/n), so that η transfers across widths; "original" '
        'sqrt(max(1, m/n)); "match_rms_adamw", so that updates have the root mean square of AdamW\'s and η may be its, '
        "at any shape and rank; None: 1.",
    )


def adjusted(kind: AdjustLr | None, fan_out: int, fan_in: int, energy: float) -> float:
    """The factor for a weight (fan_out, fan_in) whose direction D has ‖D‖² = ``energy``."""
    m, n = max(fan_out, 1), max(fan_in, 1)
    if kind == "match_rms_adamw":
        return RMS * math.sqrt(m * n / energy) if energy > 0.0 else 1.0
    return {"spectral": math.sqrt(m / n), "original": math.sqrt(max(1.0, m / n)), None: 1.0}[kind]
