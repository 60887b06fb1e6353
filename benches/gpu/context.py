"""What a part is given: the device, the clock, how long it may take, and where its findings go."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .clock import Clock
from .record import Record

__all__ = ["Context", "run"]


@dataclass(frozen=True)
class Context:
    """Of one part.

    Attributes:
        part: its name.
        device: where steps run: CUDA, or the processor through the shim of the tests.
        record: where findings go.
        seconds: for which one timing is repeated.
        peers: a checkout of microsoft/dion.
    """

    part: str
    device: torch.device
    record: Record
    seconds: float = 0.4
    peers: Path | None = None

    @property
    def dry(self) -> bool:
        """Whether this is a rehearsal without a device."""
        return self.device.type != "cuda"

    @property
    def clock(self) -> Clock:
        """Of the device."""
        return Clock(self.device)

    @property
    def least(self) -> int:
        """How often a timing is repeated at least."""
        return 1 if self.dry else 3

    def found(self, kind: str, **figures: Any) -> None:
        """A finding, kept from here on whatever comes."""
        self.record.append({"part": self.part, "row": {"kind": kind, **figures}})

    def absent(self, what: str, why: str) -> None:
        """Something that could not be run, by name."""
        self.found("not run", what=what, why=why)


def run(
    name: str,
    work_of: Callable[[str], Callable[[Context], None]],
    record: Record,
    *,
    seconds: float,
    dry: bool,
    peers: Path | None,
) -> None:
    """A part's work in this process."""
    if dry:
        sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "gpu"))
        from shim import COMPILER, ShimDevice

        if COMPILER is None:
            raise SystemExit("a dry run compiles the kernels for this processor, and there is no g++")
        from orthdion.backends.cupy import register

        torch.set_num_threads(1)
        register(torch.device("cpu"), ShimDevice())
    elif not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; a driver and a CUDA build of torch are needed (or --dry)")
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        work_of(name)(Context(name, device, record, seconds, peers))
