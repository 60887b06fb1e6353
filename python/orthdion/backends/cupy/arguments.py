"""What crosses into a launch: numbers, addresses, and structs that lie as the kernels' C++ declares them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["MATRICES", "TYPES", "Operand", "addresses", "operand", "pack"]

#: Matrices in one launch; ``common.cuh`` has the same number.
MATRICES = 64
#: Number formats as the kernels number them.
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_LIST = struct.Struct(f"{MATRICES}Q")
_CODES = {int: "q", float: "d"}


def pack(*fields: int | float | bool | Tensor | None) -> bytes:
    """A struct of 8-byte fields: whole numbers and addresses, or doubles."""
    values: list[Any] = [_word(f) for f in fields]
    return struct.pack("=" + "".join(_CODES[type(v)] for v in values), *values)


def _word(field: Any) -> int | float:
    if field is None:
        return 0
    if isinstance(field, Tensor):
        return field.data_ptr()
    return int(field) if isinstance(field, bool) else field


def addresses(tensors: Sequence[Tensor]) -> bytes:
    """A ``List`` of up to 64 addresses."""
    return _LIST.pack(*(t.data_ptr() for t in tensors), *[0] * (MATRICES - len(tensors)))


@dataclass(frozen=True)
class Operand:
    """A batch of matrices as ``multiply`` reads and writes it: address, strides in entries over matrices, over blocks
    of one matrix, over rows and columns, format.
    """

    p: int
    batch: int
    pair: int
    row: int
    col: int
    type: int
    tensor: Tensor

    @property
    def T(self) -> Operand:
        """The transposed matrices."""
        return replace(self, row=self.col, col=self.row)

    def at(self, row: int, col: int, pair: int = 0) -> Operand:
        """The same from an entry on; ``pair``: the stride from one block to the next."""
        size = self.tensor.element_size()
        return replace(self, p=self.p + size * (row * self.row + col * self.col), pair=pair)

    def words(self) -> tuple[int, ...]:
        """The struct's fields."""
        return self.p, self.batch, self.pair, self.row, self.col, self.type


def operand(t: Tensor) -> Operand:
    """Of a tensor [matrix, row, column] with any strides."""
    batch, row, col = t.stride()
    return Operand(t.data_ptr(), batch, 0, row, col, TYPES[t.dtype], t)
