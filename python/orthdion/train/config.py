"""What a run is: sizes, schedule, seeds. Runs with equal configurations have equal losses, bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["PRESETS", "Schedule", "TrainConfig", "learning_rate"]

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    A step sees ``accumulate`` micro-batches of ``batch`` sequences of ``context`` bytes. The learning rate rises over
    ``warmup`` of the steps and then falls to zero along ``schedule``. ``optimizer`` is a spec (:mod:`.specs`); ``lr``
    None is the spec's own, or that of its sweep on the demo. ``scalar_lr`` drives AdamW on what is no hidden matrix.
    """

    width: int = 96
    layers: int = 3
    heads: int = 3
    context: int = 96
    batch: int = 16
    accumulate: int = 1
    steps: int = 700
    optimizer: str = "completed-dion"
    lr: float | None = None
    scalar_lr: float = 0.01
    weight_decay: float = 0.01
    rank_fraction: float = 0.25
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 100
    eval_windows: int = 384
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in (
            "width",
            "layers",
            "heads",
            "context",
            "batch",
            "accumulate",
            "steps",
            "eval_every",
            "eval_windows",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of twice the heads ({self.heads}): "
                "rotary positions need pairs"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, not {self.seed!r}")
        if not 0 < self.rank_fraction <= 1:
            raise ValueError(f"rank_fraction must be in (0, 1], not {self.rank_fraction!r}")
        for name in ("scalar_lr", "weight_decay", "clip", "warmup"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"lr must be a number of at least 0, not {self.lr!r}")
        if self.warmup > 1:
            raise ValueError(f"warmup is a share of the steps, in [0, 1], not {self.warmup}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule must be 'cosine', 'linear' or 'constant', not {self.schedule!r}")

    def with_(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed; None leaves a field as it is."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})

    @property
    def tokens_per_step(self) -> int:
        """Bytes that one optimizer step has seen."""
        return self.batch * self.context * self.accumulate


def learning_rate(config: TrainConfig, step: int) -> float:
    """The factor on every group's learning rate at ``step`` = 0, 1, …, in (0, 1]."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(config.steps - warmup, 1)
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - done if config.schedule == "linear" else 1.0


#: ``demo`` takes about 40 seconds an optimizer on two cores; ``base`` wants a GPU.
PRESETS = {
    "demo": TrainConfig(),
    "small": TrainConfig(width=256, layers=6, heads=4, context=256, batch=16, steps=2000, checkpoint_every=100),
    "base": TrainConfig(width=768, layers=12, heads=12, context=512, batch=16, accumulate=4, steps=5000),
}
