"""What crosses into a launch: numbers, addresses, and structs that lie as the kernels' C++ declares them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...numerics.rounding import STEP
from ...requests import Draws

__all__ = ["MATRICES", "TYPES", "Operand", "addresses", "counters", "operand", "pack"]

#: Matrices in one launch; ``common.cuh`` has the same number.
MATRICES = 64
#: Number formats as the kernels number them.
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_LIST = struct.Struct(f"{MATRICES}Q")


def pack(*fields: int | float | bool | Tensor | None) -> bytes:
    """A struct of 8-byte fields: whole numbers and addresses, or doubles."""
    values = [f if type(f) is int or type(f) is float else _word(f) for f in fields]
    return struct.pack("".join(["d" if type(v) is float else "q" for v in values]), *values)


def _word(field: int | float | Tensor | None) -> int | float:
    if field is None:
        return 0
    return field.data_ptr() if isinstance(field, Tensor) else int(field)


def addresses(tensors: Sequence[Tensor]) -> bytes:
    """A ``List`` of up to 64 addresses.

    Raises:
        ValueError: for more.
    """
    if len(tensors) > MATRICES:
        raise ValueError(f"a launch takes at most {MATRICES} matrices, not {len(tensors)}")
    return _LIST.pack(*(t.data_ptr() for t in tensors), *[0] * (MATRICES - len(tensors)))


def counters(draws: Sequence[Draws | None], turned: bool = False) -> tuple[bytes, bytes]:
    """What up to 64 weights are rounded by, all by draws or none, as they lie (transposed: ``turned``): the start of
    a ``First``, and a ``Draws``.
    """
    found, most = [d for d in draws if d is not None], 1 << 64
    lists: list[list[int]] = [[], [], []]
    for d in found:
        steps = (d.col, d.row) if turned else (d.row, d.col)
        for numbers, n in zip(lists, ((d.first + 1) * STEP + d.key, *(n * STEP for n in steps)), strict=True):
            numbers.append(n % most)
    at, row, col = ([*numbers, *[0] * (MATRICES - len(numbers))] for numbers in lists)
    on = int(bool(found))
    return struct.pack(f"={MATRICES}Q", *at) + struct.pack("=q", on), struct.pack(
        f"={3 * MATRICES}Qq", *at, *row, *col, on
    )


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
