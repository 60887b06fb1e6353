"""Timing in alternation: a busy neighbour then slows all candidates alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Sample", "alternate"]


@dataclass(frozen=True)
class Sample:
    """Times of one candidate in milliseconds: median and quartiles over ``count`` calls, and the first call."""

    median: float
    low: float
    high: float
    first: float
    count: int


def alternate(candidates: Mapping[str, Callable[[], object]], seconds: float, least: int = 5) -> dict[str, Sample]:
    """Calls the candidates in turn for about ``seconds`` altogether, at least ``least`` times each."""
    first = {name: _once(f) for name, f in candidates.items()}
    for f in candidates.values():
        f()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        while min(map(len, times.values())) < least or time.perf_counter() - began < seconds:
            for name, f in candidates.items():
                times[name].append(_once(f))
    finally:
        gc.enable()
    return {
        name: Sample(*np.quantile(t, [0.5, 0.25, 0.75]).tolist(), first=first[name], count=len(t))
        for name, t in times.items()
    }


def _once(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return 1e3 * (time.perf_counter() - start)
