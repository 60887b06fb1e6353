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

from .source import FILES, OPTIONS, kernels, text

__all__ = ["Device", "device_for", "register", "unavailable"]

_REGISTERED: dict[torch.device, Device] = {}


class Device(ABC):
    """What the backend's host code needs of a device."""

    #: Bytes of the second-level cache, and how many blocks run at once: panels and splits are sized by them.
    l2_bytes: int
    multiprocessors: int

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, launches go to torch's current stream."""
        yield

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Launches a kernel; tensors, None, numbers and packed structs are matched to its C++ signature."""
        found = kernels()[kernel]
        if len(arguments) != len(found.types):
            raise TypeError(f"kernel {kernel} takes {len(found.types)} arguments, {len(arguments)} were given")
        if 0 in grid:
            return
        self._launch(kernel, grid, threads, [_convert(t, a) for t, a in zip(found.types, arguments, strict=True)])

    @abstractmethod
    def _launch(self, kernel: str, grid: tuple[int, ...], threads: int, arguments: list[Any]) -> None: ...

    @abstractmethod
    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool = False, tf32: bool = False) -> None:
        """``out = A B``, or ``out += A B``: batches [matrix, row, column] of float32 or bfloat16, sums in float32. One
        of a matrix's strides is 1; ``out`` is row-major float32. ``tf32`` allows operands to be rounded to TF32.
        """


def _convert(c_type: str, argument: Any) -> Any:
    if c_type.endswith("*") or c_type == "u64":
        address = 0 if argument is None else argument.data_ptr() if isinstance(argument, Tensor) else argument
        return np.uint64(address)
    if c_type == "int":
        return np.int32(argument)
    if c_type == "i64":
        return np.int64(argument)
    if c_type == "double":
        return np.float64(argument)
    return np.frombuffer(argument, dtype=f"V{len(argument)}")


class _Stream:
    """A stream by its address, in CUDA's stream protocol."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class CupyDevice(Device):
    """A CUDA device: kernels by NVRTC through CuPy (which caches them on disk), products by cuBLAS."""

    def __init__(self, index: int) -> None:
        import cupy
        from cupy_backends.cuda.libs import cublas

        self._index, self._cupy, self._cublas = index, cupy, cublas
        self._device = cupy.cuda.Device(index)
        properties = torch.cuda.get_device_properties(index)
        self.l2_bytes = int(properties.L2_cache_size)
        self.multiprocessors = int(properties.multi_processor_count)
        self._functions: dict[str, Any] = {}
        self._handle = 0
        self._one, self._zero = np.ones(1, np.float32), np.zeros(1, np.float32)

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, launches go to torch's current stream of this device."""
        with self._device, self._stream(torch.cuda.current_stream(self._index).cuda_stream):
            self._handle = self._cupy.cuda.device.get_cublas_handle()
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
                for part in pool.map(self._compiled, FILES):
                    self._functions |= part
        return self._functions[name]

    def _compiled(self, file: str) -> dict[str, Any]:
        with self._device:
            module = self._cupy.RawModule(code=text(file), options=OPTIONS)
            return {k.name: module.get_function(k.name) for k in kernels().values() if k.file == file}

    def _launch(self, kernel: str, grid: tuple[int, ...], threads: int, arguments: list[Any]) -> None:
        self._function(kernel)(grid, (threads,), tuple(arguments))

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool = False, tf32: bool = False) -> None:
        """See :meth:`Device.multiply`. cuBLAS counts columns first: it is asked for ``outᵀ = Bᵀ Aᵀ``."""
        cublas, kinds = self._cublas, {torch.float32: 0, torch.bfloat16: 14}  # CUDA_R_32F, CUDA_R_16BF
        compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if tf32 else cublas.CUBLAS_COMPUTE_32F
        count, m, n = out.shape
        left, right = _layout(b), _layout(a)
        head = (self._handle, left[0], right[0], n, m, a.shape[2], self._one.ctypes.data)
        beta, default = (self._one if add else self._zero).ctypes.data, cublas.CUBLAS_GEMM_DEFAULT
        if count == 1:
            cublas.gemmEx(
                *head,
                b.data_ptr(),
                kinds[b.dtype],
                left[1],
                a.data_ptr(),
                kinds[a.dtype],
                right[1],
                beta,
                out.data_ptr(),
                0,
                out.stride(1),
                compute,
                default,
            )
            return
        cublas.gemmStridedBatchedEx(
            *head,
            b.data_ptr(),
            kinds[b.dtype],
            left[1],
            b.stride(0),
            a.data_ptr(),
            kinds[a.dtype],
            right[1],
            a.stride(0),
            beta,
            out.data_ptr(),
            0,
            out.stride(1),
            out.stride(0),
            count,
            compute,
            default,
        )


def _layout(t: Tensor) -> tuple[int, int]:
    """CuBLAS's operation and leading dimension of a row-major matrix (0: as it is), or of a transposed one (1)."""
    row, col = t.stride()[1:]
    if col == 1 or t.shape[2] == 1:
        return 0, max(row, t.shape[2], 1)
    return 1, max(col, t.shape[1], 1)


def register(where: torch.device, device: Device | None) -> Callable[[], None]:
    """Has a device serve tensors that CuPy does not know; returns what undoes it."""
    before = _REGISTERED.pop(where, None)
    if device is not None:
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
    return _cupy_error()


@cache
def _cupy_error() -> str | None:
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
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < (8, 0):
        return f"the CuPy kernels need compute capability 8.0, this device has {oldest[0]}.{oldest[1]}"
    return None
