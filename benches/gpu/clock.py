"""Time on a device that works asynchronously: events on its stream, and the host's own time beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

__all__ = ["Clock", "Timing"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median and quartiles of a step, its first call, the host's share, and the calls."""

    median: float
    low: float
    high: float
    first: float
    host: float
    calls: int


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda = device, device.type == "cuda"

    def wait(self) -> None:
        """Until the device is done."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def _once(self, f: Callable[[], object]) -> tuple[float, float]:
        """``(device, host)`` milliseconds of one call."""
        if not self._cuda:
            start = time.perf_counter()
            f()
            taken = 1e3 * (time.perf_counter() - start)
            return taken, taken
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        begin.record()
        start = time.perf_counter()
        f()
        host = 1e3 * (time.perf_counter() - start)
        end.record()
        self.wait()
        return begin.elapsed_time(end), host

    def captured(self, f: Callable[[], object]) -> Callable[[], object]:
        """Replays of a call, captured into a CUDA graph after two ordinary ones."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            f()
            f()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            f()
        return graph.replay

    def time(self, f: Callable[[], object], seconds: float, least: int = 3, most: int = 200) -> Timing:
        """Repeats a call for about so long, at least three times. The first call, with all that it compiles, is timed
        on its own.
        """
        start = time.perf_counter()
        f()
        self.wait()
        first = 1e3 * (time.perf_counter() - start)
        f()
        times, hosts, began = list[float](), list[float](), time.perf_counter()
        while len(times) < least or (time.perf_counter() - began < seconds and len(times) < most):
            taken, host = self._once(f)
            times.append(taken)
            hosts.append(host)
        ordered = sorted(times)
        quarter = len(ordered) // 4
        return Timing(median(times), ordered[quarter], ordered[-1 - quarter], first, median(hosts), len(times))
