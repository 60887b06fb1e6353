"""cuBLAS's batched product, called as C: CuPy's own wrappers refuse a stream that is being captured into a graph."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Products", "library"]

#: cudaDataType_t and cublasComputeType_t.
_KINDS = {torch.float32: 0, torch.bfloat16: 14}
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32 = 68, 77
_WORKSPACE = 32 << 20


@cache
def library() -> ctypes.CDLL:
    """The cuBLAS that torch has loaded, with the signatures of what is called.

    Raises:
        OSError: if there is none.
    """
    major = (torch.version.cuda or "13").split(".")[0]
    found = ctypes.CDLL(f"libcublas.so.{major}")
    pointer, whole, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    found.cublasCreate_v2.argtypes = [ctypes.POINTER(pointer)]
    found.cublasSetStream_v2.argtypes = [pointer, pointer]
    found.cublasSetWorkspace_v2.argtypes = [pointer, pointer, ctypes.c_size_t]
    matrix: list[Any] = [pointer, whole, whole, long]
    product: list[Any] = [pointer, *[whole] * 5, pointer, *matrix, *matrix, pointer, *matrix, whole, whole, whole]
    found.cublasGemmStridedBatchedEx.argtypes = product
    return found


class Products:
    """One device's handles, a thread each, and workspaces, a stream of a thread each: products on two streams may run
    at once, and a captured graph may keep using what it was captured with.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._local = device, threading.local()
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def on(self, stream: int) -> None:
        """Sends what follows to a stream. The device must be the current one."""
        lib = library()
        if not hasattr(self._local, "handle"):
            handle = ctypes.c_void_p()
            _check(lib.cublasCreate_v2(ctypes.byref(handle)), "cublasCreate")
            self._local.handle = handle
            self._local.workspaces = {}
        handle, workspaces = self._local.handle, self._local.workspaces
        if stream not in workspaces:
            workspaces[stream] = torch.empty(_WORKSPACE, dtype=torch.uint8, device=self._device)
        _check(lib.cublasSetStream_v2(handle, stream), "cublasSetStream")
        # Setting a stream gives up the workspace that was set before.
        _check(lib.cublasSetWorkspace_v2(handle, workspaces[stream].data_ptr(), _WORKSPACE), "cublasSetWorkspace")

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool, tf32: bool) -> None:
        """``out (+)= A B``; see :meth:`Device.multiply`. cuBLAS counts columns first: it is asked for ``outᵀ = Bᵀ
        Aᵀ``.
        """
        count, m, n = out.shape
        left, right = _layout(b), _layout(a)
        scale = self._one if add else self._zero
        status = library().cublasGemmStridedBatchedEx(
            self._local.handle, left[0], right[0], n, m, a.shape[2], ctypes.addressof(self._one),
            b.data_ptr(), _KINDS[b.dtype], left[1], b.stride(0), a.data_ptr(), _KINDS[a.dtype], right[1], a.stride(0),
            ctypes.addressof(scale), out.data_ptr(), _KINDS[out.dtype], max(out.stride(1), n), out.stride(0), count,
            _COMPUTE_32F_FAST_TF32 if tf32 else _COMPUTE_32F, -1,
        )  # fmt: skip
        _check(status, "cublasGemmStridedBatchedEx")


def _layout(t: Tensor) -> tuple[int, int]:
    """CuBLAS's operation and leading dimension of a row-major matrix (0: as it is), or of a transposed one (1)."""
    row, col = t.stride()[1:]
    if col == 1 or t.shape[2] == 1:
        return 0, max(row, t.shape[2], 1)
    return 1, max(col, t.shape[1], 1)


def _check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} failed with status {status}")
