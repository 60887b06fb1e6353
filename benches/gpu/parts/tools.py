"""NVIDIA's tools around small programs of ours: compute-sanitizer, and ncu."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable

from ..context import Context
from .machine import tool
from .timing import model_of

__all__ = ["counters", "dram", "memcheck", "racecheck", "synccheck"]

#: Bytes, and the busiest pipes in percent.
_METRICS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "sm__inst_executed_pipe_fp64.sum",
    "gpu__time_duration.sum",
)
_UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3}
_UNITS |= {"nsecond": 1e-6, "usecond": 1e-3, "msecond": 1.0, "second": 1e3, "inst": 1.0, "%": 1.0, "": 1.0}


def memcheck(context: Context) -> None:
    """No access outside of what was allocated."""
    _sanitized(context, "memcheck")


def racecheck(context: Context) -> None:
    """No two threads at one place of shared memory without a barrier between."""
    _sanitized(context, "racecheck")


def synccheck(context: Context) -> None:
    """Every thread at every barrier."""
    _sanitized(context, "synccheck")


def _program(context: Context, what: str) -> list[str]:
    return [sys.executable, "-m", "benches.gpu.tiny", what, *(["--dry"] if context.dry else [])]


def _sanitized(context: Context, check: str) -> None:
    wrapper: list[str] = []
    if context.dry:
        context.absent(f"compute-sanitizer {check}", "it watches devices; its program runs without it")
    elif (at := tool("compute-sanitizer")) is None:
        context.absent(f"compute-sanitizer {check}", "it is not installed")
        return
    else:
        wrapper = [at, "--tool", check, "--error-exitcode", "99"]
    done = subprocess.run([*wrapper, *_program(context, "steps")], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    print(said)
    if wrapper or done.returncode:
        holds = done.returncode == 0 and "stepped" in said
        context.found("check", name=f"{check} finds nothing", holds=holds, said=said[-1000:])
    else:
        context.found("rehearsed", program="steps", said=said)


def dram(context: Context) -> None:
    """Findings ``dram``, one a kernel and one in all: bytes of a step of one layer, and what of them an entry."""
    entries = model_of(context, "llama-3-8b").with_layers(1).entries
    if context.dry:
        done = subprocess.run(_program(context, "layer"), capture_output=True, text=True, check=True)
        context.absent("ncu", "it counts on devices; its program runs without it")
        context.found("rehearsed", program="layer", said=done.stdout.strip())
        return
    at = tool("ncu")
    if at is None:
        context.absent("ncu", "it is not installed")
        return
    options = ["--csv", "--page", "raw", "--profile-from-start", "off", "--metrics", ",".join(_METRICS)]
    done = subprocess.run([at, *options, *_program(context, "layer")], capture_output=True, text=True, check=False)
    if done.returncode:
        context.absent("ncu", (done.stdout + done.stderr).strip()[-500:])
        return
    found, total = counters(done.stdout.splitlines()), 0.0
    for kernel, of_kernel in found.items():
        context.found("dram", kernel=kernel, **of_kernel)
        total += of_kernel.get("dram__bytes_read.sum", 0.0) + of_kernel.get("dram__bytes_write.sum", 0.0)
    context.found("dram in all", bytes_an_entry=total / entries, entries=entries)


def counters(lines: Iterable[str]) -> dict[str, dict[str, float]]:
    """Sums by kernel of ncu's raw page: bytes, milliseconds and counts; percentages as means over launches."""
    start = [line for line in lines if line.startswith('"')]
    head, units, *launches = csv.reader(start)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for launch in launches:
        row, unit = dict(zip(head, launch, strict=True)), dict(zip(head, units, strict=True))
        of_kernel = sums[row["Kernel Name"]]
        of_kernel["launches"] += 1
        for metric in _METRICS:
            if row.get(metric):
                of_kernel[metric] += float(row[metric].replace(",", "")) * _UNITS[unit[metric]]
    for of_kernel in sums.values():
        for metric in list(of_kernel):
            if metric.endswith(".pct"):
                of_kernel[metric] /= of_kernel["launches"]
    return {kernel: dict(of_kernel) for kernel, of_kernel in sums.items()}
