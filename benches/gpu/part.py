"""``python -m benches.gpu.part NAME``: one part, in this process; what it finds is appended to the record at once."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
from collections.abc import Callable
from pathlib import Path

from .context import Context, run
from .record import Record

__all__ = ["PLACES", "work_of"]

#: Where a part's work is defined: the module in ``parts/`` and its function.
PLACES = {
    "machine": ("machine", "machine"),
    "memcheck": ("tools", "memcheck"),
    "racecheck": ("tools", "racecheck"),
    "synccheck": ("tools", "synccheck"),
    "correct": ("correct", "correct"),
    "asynchronous": ("correct", "asynchronous"),
    "llama-3-8b": ("steps", "llama_3_8b"),
    "microsoft-dion": ("peers", "microsoft_dion"),
    "microsoft-dion2": ("peers", "microsoft_dion2"),
    "torch-muon": ("peers", "torch_muon"),
    "ceilings": ("ceilings", "ceilings"),
    "factors": ("ceilings", "factors"),
    "dram": ("tools", "dram"),
    "spectra": ("steps", "spectra"),
    "forms": ("steps", "forms"),
    "kernels": ("ceilings", "kernels"),
    "gpt-2-small": ("steps", "gpt_2_small"),
    "llama-3.2-1b": ("steps", "llama_3_2_1b"),
    "moe": ("steps", "moe"),
    "layers": ("steps", "layers"),
    "cpu-tests": ("suite", "cpu_tests"),
}


def work_of(name: str) -> Callable[[Context], None]:
    """The function of a part."""
    module, function = PLACES[name]
    found: Callable[[Context], None] = getattr(importlib.import_module(f"benches.gpu.parts.{module}"), function)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PLACES)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True, help="seconds after which somebody ends this process")
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--microsoft-dion", type=Path)
    given = parser.parse_args()
    # Where a part hangs is the finding then: its stack is what the log ends with.
    faulthandler.dump_traceback_later(max(given.limit - 1.0, 0.5))
    options = {"seconds": given.seconds, "dry": given.dry, "peers": given.microsoft_dion}
    run(given.name, work_of, Record(given.record), **options)
