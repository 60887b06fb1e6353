"""What a step did, as the device knows it: read by the host only where somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...optim.step import Report, figures
from .arguments import addresses
from .device import Device
from .products import NULLS, SIZE, SKIP

__all__ = ["Pending", "Verdicts", "diagnose", "note"]


class Verdicts:
    """Flags and numbers of a bucket's matrices, and diagnostics [matrix, figure] if they were asked for."""

    def __init__(self, flags: Tensor, numbers: Tensor, figures: Tensor | None) -> None:
        self._flags, self._numbers, self._figures = flags, numbers, figures

    @cached_property
    def reports(self) -> list[Report]:
        """Of each matrix. Waits for the device."""
        nulls = self._numbers[:, NULLS].tolist()
        figures = self._figures.tolist() if self._figures is not None else [[]] * len(nulls)
        skipped = [bool(f & SKIP) for f in self._flags.tolist()]
        # A skipped matrix's numbers are whatever NaN made of them.
        return [
            Report(True) if skip else Report(False, int(n), *f)
            for skip, n, f in zip(skipped, nulls, figures, strict=True)
        ]


@dataclass(frozen=True)
class Pending:
    """The report of one matrix; of an empty one without verdicts."""

    verdicts: Verdicts | None = None
    index: int = 0

    def report(self) -> Report:
        """Waits for the device."""
        return Report(False) if self.verdicts is None else self.verdicts.reports[self.index]


def note(device: Device, flags: Tensor, mask: int, slots: Sequence[Tensor]) -> None:
    """Sets each matrix's slot, an int32 somewhere on the device, if it has one of the flags in ``mask``."""
    device.launch("note", (1,), 64, flags, mask, addresses(slots), len(slots))


def diagnose(numbers: Tensor, r: Tensor, v: Tensor, energies: Tensor) -> Tensor:
    """The figures of :class:`orthdion.optim.step.Report` after ``null``, [matrix, figure]. Waits for the device."""
    wide, head = (torch.nan_to_num(t.double()) for t in (r / numbers[:, SIZE, None, None], v))
    return figures(energies.sum(1), wide.mT @ wide, head.mT @ head, (wide * head).sum((1, 2)))
