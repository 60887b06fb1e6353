"""Tensors and arrays as rows of numbers, the form in which they cross into the Rust core without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..requests import Draws

__all__ = ["DTYPES", "VIEW", "Table", "describe", "drawn", "operands", "table"]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NUMPY = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.float16): 3}

#: Numbers of a view: address, dtype, row stride, column stride, allocation, its bytes; strides in elements.
VIEW = 6
View = tuple[int, int, int, int, int, int]
Table = NDArray[np.int64]


def describe(t: Tensor) -> View:
    """The numbers of a 2-D CPU tensor."""
    storage = t.untyped_storage()
    row, column = t.stride()
    return t.data_ptr(), DTYPES[t.dtype], row, column, storage.data_ptr(), storage.nbytes()


def _describe_array(a: np.ndarray[Any, Any]) -> View:
    """The same of a 2-D NumPy array, which is its own allocation: views reach no further than their elements."""
    row, column = (s // a.itemsize for s in a.strides)
    low, high = np.lib.array_utils.byte_bounds(a) if a.size else (0, 0)
    return a.ctypes.data, _NUMPY[a.dtype], row, column, low, high - low


def _view(a: Tensor | np.ndarray[Any, Any]) -> View:
    return describe(a) if isinstance(a, Tensor) else _describe_array(a)


def operands(*arrays: Tensor | np.ndarray[Any, Any]) -> Table:
    """The table of a call on a few matrices: ``[rows, columns, 0]`` and the view, a row each."""
    return np.array([(a.shape[0], a.shape[1], 0, *_view(a)) for a in arrays], dtype=np.int64)


def drawn(draws: Sequence[Draws | None]) -> Table:
    """How the first views of a call's rows are rounded: all by draws, or none."""
    found = [d for d in draws if d is not None]
    assert len(found) in (0, len(draws)), "weights of one call are rounded alike"
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def table(rows: Sequence[tuple[tuple[int, ...], tuple[Tensor | np.ndarray[Any, Any], ...]]]) -> Table:
    """The table of a list call: four numbers that say shapes and options, and the views, a row a matrix."""
    return np.array([(*head, *(n for a in views for n in _view(a))) for head, views in rows], dtype=np.int64)
