"""What is installed here, who serves which device, and how fast: the facts a bug report needs."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from . import __version__
from .backends import choose, rust_core_error

__all__ = ["Section", "examine"]


@dataclass(frozen=True)
class Section:
    """A titled list of findings."""

    title: str
    rows: list[tuple[str, str]]


def examine(speed: bool = True) -> list[Section]:
    """Everything `orthdion doctor` prints."""
    sections = [_installed(), _backends()]
    return [*sections, _speed()] if speed else sections


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _installed() -> Section:
    rows = [("orthdion", __version__), ("python", platform.python_version()), ("torch", str(torch.__version__))]
    rows += [(name, _version(name)) for name in ("numpy", "matplotlib", "rich", "typer")]
    cupy = [f"{n} {v}" for n in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if (v := _version(n)) != "not installed"]
    rows += [("cupy", ", ".join(cupy) or "not installed"), ("machine", f"{platform.system()} {platform.machine()}")]
    return Section("installed", rows)


def _backends() -> Section:
    rows = []
    error = rust_core_error()
    if error is None:
        from . import _core

        current, available, pairs = _core.instruction_sets()
        rows.append(
            ("instruction set", f"{current} (this processor has {', '.join(available)}; ORTHDION_ISA pins one)")
        )
        rows.append(("bfloat16 products", f"{pairs} (compute_dtype='bfloat16' asks for them)"))
        whose = {"openmp": "the OpenMP team that torch works in", "own": "the core's own: no OpenMP runtime is loaded"}
        rows.append(("whose threads", f"{whose[_core.thread_pool()]} (ORTHDION_POOL=own or openmp pins them)"))
    rows.append(("threads", f"{torch.get_num_threads()} (torch.set_num_threads changes it)"))
    devices = ["cpu"]
    devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    for device in devices:
        name, reason = choose("auto", torch.device(device), torch.float32)
        kind = f" {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
        rows.append((device + kind, f"{name}: {reason}"))
    return Section("backends", rows)


def _seconds(f: Callable[[], object], limit: float) -> float:
    """Median time of a call, over as many as fit into ``limit`` seconds, after a first one that does not count."""
    f()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < limit:
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return median(times)


def _speed() -> Section:
    """One GPT block of 4×512² + 2×2048×512 at r = 64, against torch's products and the torch backend."""
    from .optim import OrthDion

    shapes = [(512, 512)] * 4 + [(2048, 512), (512, 2048)]
    generator = torch.Generator().manual_seed(0)

    def block(backend: str) -> Callable[[], object]:
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        return OrthDion(params, rank_fraction=0.125, backend=backend).step

    a, b = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    rate = 2 * 1024**3 / _seconds(lambda: a @ b, 2.0) / 1e9
    flops = sum(8 * m * n * 64 for m, n in shapes)
    rows = [
        ("torch's float32 products", f"{rate:.0f} GF/s"),
        ("floor of a step at that rate", f"{flops / rate / 1e6:.2f} ms"),
    ]
    for backend in ("rust", "torch") if rust_core_error() is None else ("torch",):
        rows.append((f"step, {backend}", f"{1e3 * _seconds(block(backend), 3.0):.2f} ms"))
    return Section("speed: one GPT block 512 wide, Orth-Dion at r = 64", rows)
