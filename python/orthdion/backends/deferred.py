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
    #: Diagnostics, if they were asked for; those have waited already.
    figures: Report | None = None

    def report(self) -> Report:
        """Waits for the device."""
        from ..optim.step import Report

        if bool(self.skipped):
            return Report(True)
        return self.figures or Report(False, int(self.nulls))
