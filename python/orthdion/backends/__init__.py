"""Backends: who computes a step, and why.

A backend implements the primitives of :mod:`orthdion.optim.step` over matrices. ``reference`` is plain torch, on any
device, in double precision too, and the oracle of every test. ``rust`` serves CPU tensors and fuses the whole step of
all unsharded matrices into one call. ``cupy`` serves CUDA tensors and launches the step of like matrices together.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch

from .reference import Reference

__all__ = ["BACKENDS", "BackendName", "Reference", "choose", "rust_core_error"]

BackendName = Literal["auto", "rust", "cupy", "reference"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

_RUST_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CUPY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rust_core_error() -> str | None:
    """Why the Rust core cannot be used, or None if it can."""
    try:
        from orthdion import _core  # noqa: F401
    except ImportError as e:  # an editable checkout that was never built
        return f"the Rust core is not built ({e}); run `maturin develop --release`"
    return None


@cache
def choose(name: BackendName, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that serves tensors of this device and dtype, and the reason.

    Raises:
        ValueError: if ``name`` is unknown or forces a backend that cannot serve them.
    """
    if name == "reference":
        return "reference", "forced"
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, not {name!r}")
    if name == "cupy" or (name == "auto" and device.type == "cuda"):
        chosen, why, why_not = "cupy", "CUDA tensors", _cupy_cannot(device, dtype)
    else:
        chosen, why, why_not = "rust", "CPU tensors", _rust_cannot(device, dtype)
    if why_not is None:
        return chosen, why
    if name != "auto":
        raise ValueError(f"backend={name!r} cannot serve these parameters: {why_not}; use backend='auto'")
    return "reference", why_not


def _rust_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the Rust core serves CPU tensors, these are on {device.type}"
    if dtype not in _RUST_DTYPES:
        return f"the Rust core knows float32, float64, bfloat16 and float16, not {dtype}"
    return rust_core_error()


def _cupy_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    from . import cupy

    if dtype not in _CUPY_DTYPES:
        return f"the CuPy kernels know float32, bfloat16 and float16 weights, not {dtype}"
    return cupy.unavailable(device)
