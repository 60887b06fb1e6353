"""Kernels against their roofline: a step's launches one by one, by what they say they move."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import nn

import orthdion
from orthdion.backends.cupy.device import Device, device_for
from orthdion.backends.cupy.traffic import declared

from .cases import Model
from .clock import Clock

__all__ = ["kernels"]


class _Watch:
    """Times every launch of a device while it lasts."""

    def __init__(self, device: Device, clock: Clock) -> None:
        self._device, self._clock = device, clock
        self.times: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def __enter__(self) -> _Watch:
        launch = self._device.launch

        def watched(kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
            said = declared(kernel, grid, arguments)
            self._clock.wait()
            start = time.perf_counter()
            begin = end = None
            if self._clock.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
            launch(kernel, grid, threads, *arguments)
            if begin is not None and end is not None:
                end.record()
                self._clock.wait()
                taken = begin.elapsed_time(end)
            else:
                taken = 1e3 * (time.perf_counter() - start)
            self.times[kernel].append((taken, said.loaded + said.stored if said else 0))

        self._device.launch = watched  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self._device.launch


def kernels(clock: Clock, model: Model, copy: float, compute: str) -> list[dict[str, Any]]:
    """Milliseconds a step of each kernel (each launch waited for), its declared bytes over them, and the share of the
    copy rate. Loads of ``multiply`` come mostly from the cache.
    """
    params = [nn.Parameter(torch.randn(s, device=clock.device, dtype=torch.bfloat16)) for s in model.layer]
    vector = nn.Parameter(torch.randn(1 << 14, device=clock.device, dtype=torch.bfloat16))
    groups = [{"params": params}, {"params": [vector], "algorithm": "adamw"}]
    shared = {"momentum_dtype": torch.float32, "q_dtype": torch.float32, "compute_dtype": compute}
    o = orthdion.CompletedDion(groups, rank_fraction=0.125, backend="cupy", **shared)  # type: ignore[arg-type]
    for p in (*params, vector):
        p.grad = torch.randn_like(p)
    o.step()
    with _Watch(device_for(clock.device), clock) as watch:
        o.step()
    rows = []
    for kernel, launches in sorted(watch.times.items(), key=lambda kv: -sum(t for t, _ in kv[1])):
        ms, moved = (sum(x) for x in zip(*launches, strict=True))
        rate = moved / ms / 1e6
        rows.append({"kernel": kernel, "launches": len(launches), "ms": ms, "rate": rate, "share": rate / copy})
    return rows
