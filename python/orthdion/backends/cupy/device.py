"""Devices that kernels are launched on: torch's CUDA devices through CuPy, and whatever a test registers.

A device launches kernels and multiplies matrices on torch's current stream. Memory is torch's: nothing here allocates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cublas import Products, library
from .source import FILES, OPTIONS, kernels, text

__all__ = ["Device", "device_for", "register", "unavailable"]

#: Blocks of a grid in y and in z; in x there may be 2³¹ − 1.
_GRID_LIMIT = 65535
#: What the probe compiles: the smallest module, by the way that the kernels take.
_PROBE = 'extern "C" __global__ void probe(float* x) { *x = 1.0f; }'
_REGISTERED: dict[torch.device, Device] = {}


class Device(ABC):
    """What the backend's host code needs of a device."""

    #: What panels of B, and of products with P, may take; what fits is multiplied as a whole.
    panel_bytes: int
    #: What is kept of B at the moment, from B Q to Bᵀ P; as much again as panels at most.
    kept_bytes: int = 0
    #: What the factors of matrices that are stepped together may take.
    factor_bytes: int

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, launches go to torch's current stream."""
        yield

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Launches a kernel; tensors, None, numbers and packed structs are matched to its C++ signature."""
        convert = _converters(kernel)
        if len(arguments) != len(convert):
            raise TypeError(f"kernel {kernel} takes {len(convert)} arguments, {len(arguments)} were given")
        if any(n > _GRID_LIMIT for n in grid[1:]):
            raise ValueError(f"kernel {kernel}: CUDA takes no more than {_GRID_LIMIT} blocks in y and z, not {grid}")
        if 0 not in grid:
            self._launch(kernel, grid, threads, [f(a) for f, a in zip(convert, arguments, strict=True)])

    @abstractmethod
    def _launch(self, kernel: str, grid: tuple[int, ...], threads: int, arguments: list[Any]) -> None: ...

    @abstractmethod
    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool = False, tf32: bool = False) -> None:
        """``out = A B``, or ``out += A B``: batches [matrix, row, column] of float32 or bfloat16, sums in float32. One
        of a matrix's strides is 1; ``out`` is row-major float32. ``tf32`` allows operands to be rounded to TF32.
        """


@cache
def _converters(kernel: str) -> tuple[Callable[[Any], Any], ...]:
    """What makes arguments of the types that a kernel declares; whole Python numbers are 8 bytes, as addresses are."""
    return tuple(
        _address if t.endswith("*") or t == "u64" else _NUMBERS.get(t, _struct) for t in kernels()[kernel].types
    )


def _address(argument: Any) -> int:
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, Tensor) else int(argument)


def _struct(argument: bytes) -> Any:
    return np.frombuffer(argument, dtype=f"V{len(argument)}")


_NUMBERS: dict[str, Callable[[Any], Any]] = {"int": np.int32, "i64": int, "double": float}


class _Stream:
    """A stream by its address, in CUDA's stream protocol."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class CupyDevice(Device):
    """A CUDA device: kernels compiled by CuPy (which keeps them on disk), products by cuBLAS."""

    def __init__(self, index: int) -> None:
        import cupy

        self._index, self._cupy = index, cupy
        self._device = cupy.cuda.Device(index)
        self._products = Products(torch.device("cuda", index))
        properties = torch.cuda.get_device_properties(index)
        self.panel_bytes = self.factor_bytes = int(properties.total_memory) // 32
        self._functions: dict[str, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, launches go to torch's current stream of this device."""
        stream = torch.cuda.current_stream(self._index).cuda_stream
        with self._device, self._stream(stream):
            self._products.on(stream)
            yield

    def _stream(self, address: int) -> Any:
        """A stream of torch as CuPy's."""
        kind = self._cupy.cuda.Stream
        if hasattr(kind, "from_external"):  # from CuPy 14 on, which warns of the other way
            return kind.from_external(_Stream(address))
        return self._cupy.cuda.ExternalStream(address, self._index)

    def _function(self, name: str) -> Any:
        if not self._functions:
            # All at once and side by side: the first step then waits for the largest file only, and later ones never.
            with ThreadPoolExecutor(len(FILES)) as pool:
                parts = list(pool.map(self._compiled, FILES))
            self._functions = {name: function for part in parts for name, function in part.items()}
        return self._functions[name]

    def _compiled(self, file: str) -> dict[str, Any]:
        with self._device:
            module = self._cupy.RawModule(code=text(file), options=OPTIONS)
            return {k.name: module.get_function(k.name) for k in kernels().values() if k.file == file}

    def _launch(self, kernel: str, grid: tuple[int, ...], threads: int, arguments: list[Any]) -> None:
        self._function(kernel)(grid, (threads,), tuple(arguments))

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool = False, tf32: bool = False) -> None:
        """See :meth:`Device.multiply`."""
        self._products.multiply(out, a, b, add, tf32)


def register(where: torch.device, device: Device) -> Callable[[], None]:
    """Has a device serve tensors that CuPy does not know; returns what undoes it."""
    before = _REGISTERED.pop(where, None)
    _REGISTERED[where] = device

    def undo() -> None:
        _REGISTERED.pop(where, None)
        if before is not None:
            _REGISTERED[where] = before

    return undo


def device_for(where: torch.device) -> Device:
    """The device that serves tensors there."""
    return _REGISTERED.get(where) or _cuda(torch.cuda.current_device() if where.index is None else where.index)


@cache
def _cuda(index: int) -> CupyDevice:
    return CupyDevice(index)


def unavailable(where: torch.device) -> str | None:
    """Why tensors there cannot be served, or None if they can."""
    if where in _REGISTERED:
        return None
    if where.type != "cuda":
        return f"the CuPy kernels serve CUDA tensors, these are on {where.type}"
    return _cupy_error(
        torch.cuda.current_device() if where.index is None and torch.cuda.is_available() else where.index
    )


@cache
def _cupy_error(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "the CuPy kernels are CUDA's, this torch is built for ROCm"
    major = (torch.version.cuda or "13").split(".")[0]
    try:
        import cupy
    except ImportError as e:
        return f"CuPy is not installed ({e}); pip install cupy-cuda{major}x"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        return f"CuPy finds no CUDA device ({e}); install the CuPy of this driver, cupy-cuda{major}x"
    try:
        library()
    except OSError as e:
        return f"torch has not brought cuBLAS ({e})"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the CuPy kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    try:
        with cupy.cuda.Device(index):
            cupy.RawModule(code=_PROBE, options=OPTIONS).get_function("probe")
    except Exception as e:  # NVRTC or CUDA's headers are missing, or of another version: CuPy has many words for it
        return f"CuPy cannot compile here ({type(e).__name__}: {e}); pip install 'cupy-cuda{major}x[ctk]'"
    return None
