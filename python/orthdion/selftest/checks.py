"""Checks within one process. Each returns what it found, or raises."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..backends import choose, entries, rust_core_error
from ..create import create, list_optimizers

__all__ = ["BOUNDS", "NAMES", "Skipped", "checkpoints", "core", "cupy", "factors", "made", "near", "rust", "step"]

SHAPES = [(96, 64), (24, 60), (9, 9), (4, 8, 6)]
NAMES = [known.name for known in list_optimizers()]
UNITS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-3}


class Skipped(Exception):
    """Why a check cannot be made here."""


def near(what: str, error: float, bound: float) -> float:
    """The error as a share of what it may be."""
    if not error <= bound:  # NaN is no small error
        raise ArithmeticError(f"{what} is off by {error:.1e}, more than {bound:.1e}")
    return error / bound


def randn(*shape: int, seed: int) -> Tensor:
    """Normal numbers in double precision."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name: str, dtype: torch.dtype, device: str = "cpu", **options: Any) -> tuple[list[Any], Any]:
    """Parameters of all kinds, and an optimizer of them."""
    params = [torch.nn.Parameter(randn(*s, seed=i).to(device, dtype)) for i, s in enumerate(SHAPES)]
    return params, create(name, params, lr=0.02, weight_decay=0.1, **options)


def step(params: list[Any], optimizer: Any, steps: range) -> None:
    """Steps with gradients that their numbers tell."""
    for k in steps:
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * k + i).to(p.device, p.dtype)
        optimizer.step()


def core() -> str:
    """The compiled core loads."""
    if (error := rust_core_error()) is not None:
        raise ImportError(error)
    from .. import _core

    current, available, pairs = _core.instruction_sets()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    serving = ", ".join(f"{d} by {choose('auto', torch.device(d), torch.float32)[0]}" for d in devices)
    return f"{current} of {', '.join(available)}; bfloat16 products by {pairs}; {serving}"


def factors() -> str:
    """QR and polar factors, for condition numbers up to 1e8, to the bounds that orthdion.linalg promises."""
    worst = 0.0
    for dtype, n, r, digits in [(d, *s, c) for d in UNITS for s in ((300, 40), (64, 64), (33, 1)) for c in (0, 4, 8)]:
        u, _, w = torch.linalg.svd(randn(n, r, seed=n), full_matrices=False)
        a = (u * torch.logspace(0, -digits, r, dtype=torch.float64) @ w).to(dtype)
        wide, eye = a.double(), torch.eye(r, dtype=torch.float64)
        (v, t), u = (x.double() for x in linalg.qr(a, tol=0.0)), linalg.polar(a, tol=0.0).double()
        errors = {"V'V": v.T @ v - eye, "U'U": u.T @ u - eye, "VT": (wide - v @ t) / wide.norm()}
        errors["the symmetry of U'A"] = (u.T @ wide - (u.T @ wide).T) / wide.norm()
        for what, error in errors.items():
            case = f"{what} of {n}x{r}, {dtype}, condition 1e{digits}"
            worst = max(worst, near(case, float(error.norm()), 30 * r**0.5 * UNITS[dtype]))
    return f"QR and polar residuals at most {worst:.2f} of 30 sqrt(r) u"


def rust(backend: str = "rust", device: str = "cpu", dtypes: tuple[torch.dtype, ...] = tuple(UNITS)) -> str:
    """Every rule's steps against plain torch."""
    threads = torch.get_num_threads()
    for name, dtype in [(name, dtype) for name in NAMES for dtype in dtypes]:
        results = []
        for one in (backend, "torch"):
            params, optimizer = made(name, dtype, device, backend=one)
            torch.set_num_threads(threads if one == backend else 1)  # torch is slower with more, on such matrices
            try:
                step(params, optimizer, range(3))
            finally:
                torch.set_num_threads(threads)
            results.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
        for a, b in zip(*results, strict=True):
            near(f"{name} in {dtype}", float((a - b).norm()) / max(1.0, float(b.norm())), BOUNDS[dtype])
    return f"as plain torch: {', '.join(NAMES)}"


def cupy() -> str:
    """The same on a CUDA device with CuPy."""
    if not torch.cuda.is_available():
        raise Skipped("no CUDA device")
    if (why := entries()["cupy"].why_not(torch.device("cuda"), torch.float32)) is not None:
        raise Skipped(why)
    return rust("cupy", "cuda", (torch.float32,))


def checkpoints() -> str:
    """A state_dict goes through a file, read with weights_only, and on to the same bits."""
    for name in NAMES:
        (params, optimizer), (others, other) = made(name, torch.float32), made(name, torch.float32, seed=7)
        step(params, optimizer, range(2))
        torch.save([optimizer.state_dict(), [p.data for p in params]], file := io.BytesIO())
        states, weights = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        other.load_state_dict(states)
        for p, saved in zip(others, weights, strict=True):
            p.data.copy_(saved)
        for k in (params, optimizer), (others, other):
            step(*k, range(2, 4))
        if not all(torch.equal(p, q) for p, q in zip(params, others, strict=True)):
            raise ArithmeticError(f"{name} goes on differently from its own checkpoint")
    return "every rule goes on to the same bits"
