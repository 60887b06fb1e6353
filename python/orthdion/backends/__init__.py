"""Backends: who computes a step, and why.

A backend implements the primitives of :mod:`orthdion.optim.step` over matrices. ``reference`` is plain torch, on any
device, in double precision too, and the oracle of every test. ``rust`` serves CPU tensors and fuses the whole step of
all unsharded matrices into one call.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from .reference import Reference

__all__ = ["BackendName", "Reference", "choose", "rust_core_error"]

BackendName = Literal["auto", "rust", "reference"]

_RUST_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    if name not in ("auto", "rust"):
        raise ValueError(f"backend must be 'auto', 'rust' or 'reference', not {name!r}")
    why_not = None
    if device.type != "cpu":
        why_not = f"the Rust core serves CPU tensors, these are on {device.type}"
    elif dtype not in _RUST_DTYPES:
        why_not = f"the Rust core knows float32, float64, bfloat16 and float16, not {dtype}"
    else:
        why_not = rust_core_error()
    if why_not is None:
        return "rust", "CPU tensors"
    if name == "rust":
        raise ValueError(f"backend='rust' cannot serve these parameters: {why_not}; use backend='auto'")
    return "reference", why_not
