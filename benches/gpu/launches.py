"""A step's launches one by one: what each takes, and what it says it moves."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import nn

import orthdion
from orthdion.backends.cupy.device import Device, device_for
from orthdion.backends.cupy.traffic import declared

from .cases import Model, parameters
from .clock import Clock

__all__ = ["of_kernels"]


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


def of_kernels(clock: Clock, model: Model, compute: str) -> list[dict[str, Any]]:
    """Milliseconds a step of each kernel, its launches, and its declared bytes over them in 10⁹ a second. Loads of
    ``multiply`` come mostly from the cache.
    """
    params = parameters(model.shapes, clock.device)
    vector = nn.Parameter(torch.randn(1 << 14, device=clock.device).to(torch.bfloat16))
    vector.grad = torch.randn_like(vector)
    groups = [{"params": params}, {"params": [vector], "algorithm": "adamw"}]
    shared = {"momentum_dtype": torch.float32, "q_dtype": torch.float32, "compute_dtype": compute}
    o = orthdion.CompletedDion(groups, rank_fraction=0.125, backend="cupy", **shared)  # type: ignore[arg-type]
    o.step()
    with _Watch(device_for(clock.device), clock) as watch:
        o.step()
    rows = []
    for kernel, launches in sorted(watch.times.items(), key=lambda kv: -sum(t for t, _ in kv[1])):
        ms, moved = (sum(x) for x in zip(*launches, strict=True))
        rows.append({"kernel": kernel, "launches": len(launches), "ms": ms, "rate": moved / ms / 1e6})
    return rows
