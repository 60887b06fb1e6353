"""Matrices in one bit or four an entry, a byte string a row (docs/algorithms.md, 7b).

A row begins with its scales, in the working precision: at one bit the mean |entry| of the row, at four the largest
|entry| of each 64 columns over 7. Then come the entries, eight or two a byte, the first in the low bits: at one bit
whether an entry is negative, at four bits its multiple of the scale, −7 … 7, plus 8. A row of zeros stays zero.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["BLOCK", "average", "average_changes", "pack", "pack_change", "row_bytes", "unpack"]

#: Columns that share a scale at four bits.
BLOCK = 64
_LEVELS = 7
#: Times eight bytes of 0 or 1 as one number, it has the first byte's bit lowest in its highest byte.
_GATHERED = 0x0102040810204080


def _scales(columns: int, bits: int) -> int:
    return 1 if bits == 1 else -(-columns // BLOCK)


def row_bytes(columns: int, bits: int, dtype: torch.dtype) -> int:
    """Bytes of a row: ``scales·itemsize + ⌈columns·bits/8⌉``."""
    return _scales(columns, bits) * dtype.itemsize + -(-columns * bits // 8)


def pack(t: Tensor, bits: int) -> Tensor:
    """(m, n), finite → (m, row_bytes), uint8."""
    m, n = t.shape
    count, each = _scales(n, bits), 8 // bits
    width = -(-n // each)
    entries = torch.zeros(m, width * each, dtype=torch.uint8, device=t.device)
    if bits == 1:
        scales = t.abs().sum(1, dtype=torch.float64).div_(max(n, 1)).to(t.dtype)
        entries[:, :n] = t < 0
        packed = (entries.view(torch.int64) * _GATHERED >> 56).to(torch.uint8) if n else entries
    else:
        blocks = torch.nn.functional.pad(t, (0, count * BLOCK - n)).view(m, count, BLOCK)
        scales = blocks.abs().amax(2) / _LEVELS
        info = torch.finfo(t.dtype)
        # Means of few ranks lie halfway between two steps: then away from zero, whatever their rounding.
        steps = blocks / scales.clamp_min(info.tiny)[:, :, None] * (1.0 + 32.0 * info.eps)
        steps = steps.round_().clamp_(-_LEVELS, _LEVELS).add_(_LEVELS + 1)
        entries[:, :n] = steps.view(m, count * BLOCK)[:, :n]
        packed = entries[:, ::2] | entries[:, 1::2] << 4
    return torch.cat([scales.reshape(-1).view(torch.uint8).view(m, count * t.dtype.itemsize), packed], 1)


def unpack(packed: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The matrix (m, columns) that :func:`pack` has written."""
    m, count = len(packed), _scales(columns, bits)
    head = count * dtype.itemsize
    scales = packed[:, :head].reshape(-1).clone().view(dtype).view(m, count)
    width = (packed.shape[1] - head) * (8 // bits)
    entries: Tensor = _meanings(bits, dtype, packed.device)[packed[:, head:].int()].view(m, width)[:, :columns]
    each = scales if bits == 1 else scales.repeat_interleave(BLOCK, 1)[:, :columns]
    return entries * each


@cache
def _meanings(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The entries, without their scale, that each byte stands for: (256, 8 / bits)."""
    shifts = torch.arange(0, 8, bits, device=device)
    numbers = (torch.arange(256, device=device)[:, None] >> shifts) & (2**bits - 1)
    meanings: Tensor = 1 - 2 * numbers if bits == 1 else numbers - (_LEVELS + 1)
    return meanings.to(dtype)


def average(packed: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """(w, m, row_bytes) of w ranks → their mean, summed in the order of ranks and packed again: (m, row_bytes)."""
    total = unpack(packed[0], columns, bits, dtype)
    for one in packed[1:]:
        total = total + unpack(one, columns, bits, dtype)
    return pack(total / len(packed), bits)


def pack_change(t: Tensor, memory: Tensor, bits: int, fade: float) -> tuple[Tensor, Tensor]:
    """``(C(T − H) packed, fade·(H + C(T − H)))`` for T and H (m, n)."""
    packed = pack(t - memory, bits)
    return packed, (memory + unpack(packed, t.shape[1], bits, t.dtype)) * fade


def average_changes(
    packed: Tensor, t: Tensor, memory: Tensor, own: int, bits: int, fade: float
) -> tuple[Tensor, Tensor]:
    """``(C((T + (w − 1)·H')/w) packed, fade·H')``, where H' = H + the mean of the w − 1 other ranks' changes, summed in
    their order: T is rank ``own``'s, and H what the mean of the others' was known to be.
    """
    others = [unpack(one, t.shape[1], bits, t.dtype) for k, one in enumerate(packed) if k != own]
    if others:
        total = others[0]
        for one in others[1:]:
            total = total + one
        memory = memory + total / len(others)
    mean = (t + len(others) * memory) / (len(others) + 1)
    return pack(mean, bits), memory * fade
