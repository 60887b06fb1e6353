"""Reports of steps whose device has not been waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..optim.step import Report

__all__ = ["Deferred"]


@dataclass(frozen=True)
class Deferred:
    """The report of a step whose flags are still on the device."""

    skipped: Tensor
    nulls: Tensor

    def report(self) -> Report:
        """Waits for the device."""
        from ..optim.step import Report

        skipped = bool(self.skipped)
        return Report(skipped, 0 if skipped else int(self.nulls))
