"""Matrices in one bit or four an entry, a byte string a row (docs/algorithms.md, 7b).

A row begins with its scales, in the working precision: at one bit the mean |entry| of the row, at four the largest
|entry| of each 64 columns over 7. Then come the entries, eight or two a byte, the first in the low bits: at one bit
whether an entry is negative, at four bits its multiple of the scale, −7 … 7, plus 8. A row of zeros stays zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "average", "pack", "row_bytes", "unpack"]

#: Columns that share a scale at four bits.
BLOCK = 64
_LEVELS = 7


def _scales(columns: int, bits: int) -> int:
    return 1 if bits == 1 else -(-columns // BLOCK)


def row_bytes(columns: int, bits: int, dtype: torch.dtype) -> int:
    """Bytes of a row: ``scales·itemsize + ⌈columns·bits/8⌉``."""
    return _scales(columns, bits) * dtype.itemsize + -(-columns * bits // 8)


def pack(t: Tensor, bits: int) -> Tensor:
    """(m, n), finite → (m, row_bytes), uint8."""
    m, n = t.shape
    count = _scales(n, bits)
    if bits == 1:
        scales = t.double().abs().mean(1, keepdim=True).to(t.dtype) if n else t.new_zeros(m, 1)
        entries = (t < 0).to(torch.uint8)
    else:
        blocks = torch.nn.functional.pad(t, (0, count * BLOCK - n)).view(m, count, BLOCK)
        scales = blocks.abs().amax(2) / _LEVELS
        info = torch.finfo(t.dtype)
        # Means of few ranks lie halfway between two steps: then away from zero, whatever their rounding.
        steps = blocks / scales.clamp_min(info.tiny)[:, :, None] * (1.0 + 32.0 * info.eps)
        steps = steps.round().clamp(-_LEVELS, _LEVELS)
        entries = (steps.view(m, count * BLOCK)[:, :n] + (_LEVELS + 1)).to(torch.uint8)
    each = 8 // bits
    width = -(-n // each)
    entries = torch.nn.functional.pad(entries, (0, width * each - n)).view(m, width, each)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=t.device)
    packed = (entries << shifts).sum(2, dtype=torch.uint8)
    return torch.cat([scales.reshape(-1).view(torch.uint8).view(m, count * t.dtype.itemsize), packed], 1)


def unpack(packed: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The matrix (m, columns) that :func:`pack` has written."""
    m, count = len(packed), _scales(columns, bits)
    head = count * dtype.itemsize
    scales = packed[:, :head].reshape(-1).clone().view(dtype).view(m, count)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    width = (packed.shape[1] - head) * (8 // bits)
    wide = ((packed[:, head:, None] >> shifts) & (2**bits - 1)).reshape(m, width)[:, :columns].to(dtype)
    each = scales if bits == 1 else scales.repeat_interleave(BLOCK, 1)[:, :columns]
    return torch.mul(1.0 - 2.0 * wide if bits == 1 else wide - (_LEVELS + 1), each)


def average(packed: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """(w, m, row_bytes) of w ranks → their mean, summed in the order of ranks and packed again: (m, row_bytes)."""
    total = unpack(packed[0], columns, bits, dtype)
    for one in packed[1:]:
        total = total + unpack(one, columns, bits, dtype)
    return pack(total / len(packed), bits)
