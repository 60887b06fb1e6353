"""Tensors and arrays as rows of numbers, the form in which they cross into the Rust core without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DTYPES", "Words", "describe", "fixed_words", "operands"]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NUMPY = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.float16): 3}

View = tuple[int, int, int, int, int, int]
#: What stands before and behind G's view in a matrix's row of the core's table.
Words = tuple[tuple[int, ...], tuple[int, ...]]


def describe(t: Tensor) -> View:
    """``(address, dtype, row stride, column stride, allocation, its bytes)`` of a 2-D CPU tensor, strides in
    elements.
    """
    storage = t.untyped_storage()
    row, column = t.stride()
    return t.data_ptr(), DTYPES[t.dtype], row, column, storage.data_ptr(), storage.nbytes()


def fixed_words(x: Tensor, m: Tensor, q: Tensor) -> Words:
    """``m, n, r`` and X's view, and those of M and Q."""
    return (*x.shape, q.shape[1], *describe(x)), (*describe(m), *describe(q))


def _describe_array(a: np.ndarray[Any, Any]) -> View:
    """The same of a 2-D NumPy array, which is its own allocation: views reach no further than their elements."""
    row, column = (s // a.itemsize for s in a.strides)
    low, high = np.lib.array_utils.byte_bounds(a) if a.size else (0, 0)
    return a.ctypes.data, _NUMPY[a.dtype], row, column, low, high - low


def operands(*arrays: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The table of a call on a few matrices: ``[rows, columns, 0]`` and the view, a row each."""
    rows = [
        (a.shape[0], a.shape[1], 0, *(describe(a) if isinstance(a, Tensor) else _describe_array(a))) for a in arrays
    ]
    return np.array(rows, dtype=np.int64)
