"""Backends: who answers a rule's requests, and why.

``torch`` is plain torch on any device, in double precision too, and the oracle of every test. ``rust`` serves CPU
tensors, and has the whole step of the low-rank and elementwise rules in one call. ``cupy`` serves CUDA tensors and
launches what like matrices ask for together. Another one is registered with :func:`register`.
"""

from __future__ import annotations

import torch

from .base import Backend, Entry, choose, entries, get, passed_over, register

__all__ = ["Backend", "Entry", "choose", "entries", "get", "passed_over", "register", "rust_core_error"]

_RUST_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CUPY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rust_core_error() -> str | None:
    """Why the Rust core cannot be used, or None if it can."""
    try:
        from orthdion import _core  # noqa: F401
    except ImportError as e:  # an editable checkout that was never built
        return f"the Rust core is not built ({e}); run `maturin develop --release`"
    return None


def _rust_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the Rust core serves CPU tensors, these are on {device.type}"
    if dtype not in _RUST_DTYPES:
        return f"the Rust core knows float32, float64, bfloat16 and float16, not {dtype}"
    return rust_core_error()


def _cupy_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    from .cupy.device import unavailable

    if dtype not in _CUPY_DTYPES:
        return f"the CuPy kernels know float32, bfloat16 and float16 weights, not {dtype}"
    return unavailable(device)


def _torch() -> Backend:
    from .torch import TorchBackend

    return TorchBackend()


def _rust() -> Backend:
    from .rust import RustBackend

    return RustBackend()


def _cupy() -> Backend:
    from .cupy import CupyBackend

    return CupyBackend()


register(Entry("torch", "plain torch", None, lambda device, dtype: None, _torch))
register(Entry("rust", "CPU tensors", ("cpu",), _rust_cannot, _rust))
register(Entry("cupy", "CUDA tensors", ("cuda",), _cupy_cannot, _cupy))
