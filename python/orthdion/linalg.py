"""The library's factorisations on NumPy and CuPy arrays and torch tensors: same signature, same results.

CPU data goes to the Rust core without a copy; what is on other devices is served by the torch backend. Leading
axes are batches. Accuracy, for any conditioning: ``‖VᵀV − I‖`` and ``‖A − V T‖/‖A‖`` at most 30·√r·u on the
directions that are not null, u the roundoff of the input's precision (2⁻²⁴ for bfloat16 and float16 too, before their
result is rounded).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backends import rust_core_error
from .numerics import orthonormal as reference
from .numerics.orthonormal import unit_roundoff

__all__ = ["polar", "power_iteration", "qr"]

Array = TypeVar("Array", Tensor, NDArray[Any])
F = TypeVar("F", bound=Callable[..., Any])


def _of_cupy_too(f: F) -> F:
    """Has a function of torch tensors serve CuPy arrays, which change hands without a copy."""

    @wraps(f)
    def either(*arrays: Any, **rest: Any) -> Any:
        first = next(iter((*arrays, *rest.values())), None)
        if type(first).__module__.partition(".")[0] != "cupy":
            return f(*arrays, **rest)
        back = cast(Any, import_module("cupy")).from_dlpack

        def here(a: Any) -> Any:
            return torch.utils.dlpack.from_dlpack(a) if type(a) is type(first) else a

        result = f(*map(here, arrays), **{k: here(a) for k, a in rest.items()})
        return tuple(map(back, result)) if isinstance(result, tuple) else back(result)

    return cast(F, either)


_DTYPES = ("float64", "float32", "bfloat16", "float16")


@_of_cupy_too
def qr(a: Array, tol: float | None = None) -> tuple[Array, Array]:
    """Thin QR ``A = V T`` with diag(T) ≥ 0.

    Args:
        a: (…, n, r) with n ≥ r; floating point. Any strides.
        tol: a direction with ``T_jj ≤ tol·max_i ‖a_i‖`` is null: its column of V and row of T are zero. Default: the
            roundoff.

    Returns:
        V (…, n, r) and T (…, r, r) upper triangular, of A's kind, dtype and device.

    Raises:
        ValueError: a wide matrix, NaN or infinity, a negative tolerance.
        TypeError: no floating-point array.
    """
    _check("a", a)
    _tall(a)
    tol = _tolerance(tol, a)

    def one(a: Any) -> tuple[Any, ...]:
        n, r = a.shape
        if _native(a):
            v, t = _empty(a, (n, r)), np.zeros((r, r))
            _factor(a, v, t.reshape(-1), False, tol)
            return v, _like(t, a)
        wide = a.double()
        v, _ = reference.orthonormalize(_finite(wide), tol)
        return v.to(a.dtype), (v.T @ wide).triu().to(a.dtype)

    v, t = _batched(one, a)
    return v, t


@_of_cupy_too
def polar(a: Array, tol: float | None = None) -> Array:
    """Polar factor ``A (AᵀA)^(−1/2)``: the closest matrix with orthonormal columns; null directions contribute nothing.

    Args:
        a: (…, n, r) with n ≥ r; floating point. Any strides.
        tol: as in :func:`qr`.

    Returns:
        (…, n, r), of A's kind, dtype and device.

    Raises:
        ValueError, TypeError: as :func:`qr`.
    """
    _check("a", a)
    _tall(a)
    tol = _tolerance(tol, a)

    def one(a: Any) -> tuple[Any, ...]:
        if _native(a):
            v = _empty(a, tuple(a.shape))
            _factor(a, v, np.empty(0), True, tol)
            return (v,)
        return (reference.polar(_finite(a.double()), tol)[0].to(a.dtype),)

    (v,) = _batched(one, a)
    return cast(Array, v)


@_of_cupy_too
def power_iteration(a: Array, q: Array, tol: float | None = None) -> tuple[Array, Array]:
    """One power iteration: ``P = orth(A Q)``, ``R = Aᵀ P``, so that P Rᵀ is close to A's best rank-r approximation.

    Args:
        a: (…, m, n), floating point.
        q: (…, n, r) with r ≤ min(m, n), of the same kind and dtype; orthonormal columns are the usual start.
        tol: as in :func:`qr`; default 64 roundoffs, the noise of the product.

    Returns:
        P (…, m, r), orthonormal columns, and R (…, n, r); columns of null directions are zero in both.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity. TypeError: different kinds or dtypes.
    """
    _check("a", a)
    _check("q", q)
    if type(a) is not type(q) or a.dtype != q.dtype:
        raise TypeError(f"q must be of a's kind and dtype, {type(a).__name__} of {a.dtype}, not of {q.dtype}")
    m, n = a.shape[-2:]
    if a.shape[:-2] != q.shape[:-2] or q.shape[-2] != n or q.shape[-1] > min(m, n):
        raise ValueError(f"q must have shape (…, {n}, r) with r ≤ {min(m, n)} and a's batch axes, not {tuple(q.shape)}")
    tol = _tolerance(tol, a, 64.0)

    def one(a: Any, q: Any) -> tuple[Any, ...]:
        if _native(a):
            p, r = _empty(a, (m, q.shape[1])), _empty(a, tuple(q.shape))
            _call("power_iteration", (a, q, p, r), tol)
            return p, r
        wide = _finite(a.double())
        p, _ = reference.orthonormalize(wide @ q.double(), tol)
        return p.to(a.dtype), (wide.T @ p).to(a.dtype)

    p, r = _batched(one, a, q)
    return p, r


def _check(name: str, a: Any) -> None:
    if not isinstance(a, (Tensor, np.ndarray)):
        raise TypeError(f"{name} must be a NumPy or CuPy array or a torch tensor, not {type(a).__name__}")
    if str(a.dtype).removeprefix("torch.") not in _DTYPES:
        raise TypeError(f"{name} has dtype {a.dtype}; convert it to one of {', '.join(_DTYPES)}")
    if a.ndim < 2:
        raise ValueError(f"{name} must have at least two axes, but its shape is {tuple(a.shape)}")


def _tall(a: Tensor | NDArray[Any]) -> None:
    n, r = a.shape[-2:]
    if n < r:
        raise ValueError(f"a must have at least as many rows as columns, but it is {n} by {r}; pass its transpose")


def _unit(a: Tensor | NDArray[Any]) -> float:
    return unit_roundoff(torch.float64 if str(a.dtype).endswith("float64") else torch.float32)


def _tolerance(tol: float | None, a: Tensor | NDArray[Any], units: float = 1.0) -> float:
    if tol is None:
        return units * _unit(a)
    if not 0.0 <= tol < 1.0:
        raise ValueError(f"tol must be in [0, 1), but it is {tol}")
    return float(tol)


def _native(a: Tensor | NDArray[Any]) -> bool:
    return isinstance(a, np.ndarray) or (a.device.type == "cpu" and rust_core_error() is None)


def _finite(a: Tensor) -> Tensor:
    if not bool(torch.isfinite(a).all()):
        raise ValueError("the matrix holds NaN or infinity; replace those entries first")
    return a


def _empty(a: Any, shape: tuple[int, ...]) -> Any:
    return torch.empty(shape, dtype=a.dtype) if isinstance(a, Tensor) else np.empty(shape, a.dtype)


def _like(t: NDArray[np.float64], a: Any) -> Any:
    return torch.from_numpy(t).to(a.dtype) if isinstance(a, Tensor) else t.astype(a.dtype)


def _nearly_orthogonal(n: int, r: int) -> bool:
    """Whether columns of independent entries would be: ω of docs/algorithms.md, section 4, is (n − 2)/(n − r − 1)."""
    return n >= 3 * r


def _factor(a: Any, v: Any, triangle: NDArray[np.float64], polar: bool, tol: float) -> None:
    from . import _core
    from .backends.table import table

    n, r = a.shape
    views = tuple(_plain(x) for x in (a, v))
    double = str(a.dtype).endswith("float64")
    rows = table([((n, r, 0, 0), views)])
    _core.factors(rows, triangle, polar, _nearly_orthogonal(n, r), tol, double, torch.get_num_threads())


def _plain(a: Any) -> Any:
    return a.detach().resolve_neg() if isinstance(a, Tensor) else _whole_strides(a)


def _call(name: str, arrays: tuple[Any, ...], *rest: Any) -> None:
    from . import _core
    from .backends.table import operands

    double = str(arrays[0].dtype).endswith("float64")
    detached = tuple(_plain(a) for a in arrays)
    getattr(_core, name)(operands(*detached), *rest, double, torch.get_num_threads())


def _whole_strides(a: NDArray[Any]) -> NDArray[Any]:
    """A field of a structured array may have strides that are no multiple of its elements: then a copy."""
    return a if all(s % a.itemsize == 0 for s in a.strides) else np.ascontiguousarray(a)


def _batched(one: Callable[..., tuple[Any, ...]], *arrays: Any) -> Any:
    """``one`` over the leading axes, results stacked likewise."""
    if arrays[0].ndim == 2:
        return one(*arrays)
    lead = arrays[0].shape[:-2]
    flat = [a.reshape(-1, *a.shape[-2:]) for a in arrays]
    if 0 in lead:
        raise ValueError(f"the batch is empty: shape {tuple(arrays[0].shape)}")
    results = zip(*(one(*parts) for parts in zip(*flat, strict=True)), strict=True)
    stack: Any = torch.stack if isinstance(arrays[0], Tensor) else np.stack
    return tuple(stack(part).reshape(*lead, *part[0].shape) for part in map(list, results))
