"""Whether an installed orthdion computes what it should on this machine: ``python -m orthdion.selftest``.

Needs NumPy and torch only, and takes seconds. Prints a line a check; the exit status is 1 if any has failed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from .. import __version__
from .checks import Skipped, checkpoints, core, cupy, factors, rust
from .processes import processes

__all__ = ["CHECKS", "main"]

CHECKS: tuple[Callable[[], str], ...] = (core, factors, rust, cupy, checkpoints, processes)


def main() -> int:
    """Makes every check; 1 if any has failed."""
    print(f"orthdion {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}, {sys.platform}")
    failed = 0
    for check in CHECKS:
        began = time.perf_counter()
        try:
            verdict, words = "ok", check()
        except Skipped as why:
            verdict, words = "skip", str(why)
        except Exception as e:
            verdict, words, failed = "FAIL", f"{type(e).__name__}: {e}", 1
        seconds = time.perf_counter() - began
        line = f"{verdict:<5}{check.__name__:<12}{seconds:5.1f} s  {words}"
        encoding = sys.stdout.encoding or "utf-8"  # a console may know few letters
        print(line.encode(encoding, "replace").decode(encoding), flush=True)
    return failed
