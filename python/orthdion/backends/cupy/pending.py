"""What a step did, as the device knows it: read by the host only where somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...optim.step import Report
from .arguments import addresses
from .device import Device
from .products import SKIP

if TYPE_CHECKING:
    from .bucket import Bucket

__all__ = ["Pending", "Verdicts", "diagnose", "note"]


class Verdicts:
    """Flags and numbers of a bucket's matrices, and diagnostics [matrix, figure] if they were asked for."""

    def __init__(self, flags: Tensor, numbers: Tensor, figures: Tensor | None) -> None:
        self._flags, self._numbers, self._figures = flags, numbers, figures

    @cached_property
    def reports(self) -> list[Report]:
        """Of each matrix. Waits for the device."""
        nulls = self._numbers[:, 5].tolist()
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


def diagnose(b: Bucket, numbers: Tensor, r: Tensor, v: Tensor, energies: Tensor) -> Tensor:
    """The figures of :class:`orthdion.optim.step.Report` after ``null``, [matrix, figure], in plain torch."""
    size = numbers[:, :1, None]
    wide, head = (torch.nan_to_num(t.double()) for t in (r / size, v))
    gram, own = wide.mT @ wide, head.mT @ head
    share = gram.diagonal(dim1=1, dim2=2).sqrt()
    share = share / share.sum(1, keepdim=True).clamp_min(1e-300)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(1)
    return torch.stack(
        [
            energies.sum(1),
            gram.diagonal(dim1=1, dim2=2).sum(1),
            torch.linalg.eigvalsh(own)[:, -1].clamp_min(0.0).sqrt(),
            (wide * head).sum((1, 2)),
            torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().sum(1),
            torch.where(share.sum(1) > 0, entropy.exp(), 0.0),
        ],
        1,
    )
