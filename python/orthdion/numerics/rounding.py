"""Rounding: of single-precision products' operands, as bfloat16 units and tensor cores read them; of weights, by draws.

A draw is the upper half of SplitMix64's word (Steele, Lea, Flood 2014) for a counter: a key, and the number of the
entry in the whole weight. So it does not depend on who asks, or in which order.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NARROW", "STEP", "drawn", "key_of", "rounded", "to_tf32", "words"]

#: Formats that weights are rounded to by draws; others hold what they are computed in.
NARROW = (torch.bfloat16, torch.float16)

#: The distance of SplitMix64's counters.
STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LOW = 0xFFFFFFFF


def to_tf32(t: Tensor) -> Tensor:
    """Single precision with 10 bits behind the point, as tensor cores read it; to nearest, ties to even."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def rounded(t: Tensor, rounding: str | None) -> Tensor:
    """A float32 operand rounded to "bfloat16" or "tf32", still float32; others as they are."""
    if rounding is None or t.dtype != torch.float32:
        return t
    return t.bfloat16().to(t.dtype) if rounding == "bfloat16" else to_tf32(t)


# ---------------------------------------------------------------- by draws


def _signed(word: int) -> int:
    """Of 64 bits the number that they are in int64."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def key_of(*numbers: int) -> int:
    """64 bits, as an int64, that all the numbers have a part in."""
    z = 0
    for n in numbers:
        z = (z ^ n) + STEP & (1 << 64) - 1
        z = (z ^ (z >> 30)) * _FIRST & (1 << 64) - 1
        z = (z ^ (z >> 27)) * _SECOND & (1 << 64) - 1
        z ^= z >> 31
    return _signed(z)


def words(key: int, first: int, row: int, col: int, shape: torch.Size, device: torch.device) -> Tensor:
    """32 bits for each entry of an m×n matrix, as int64; entry (i, j) has the number ``first + i·row + j·col``."""
    i, j = (torch.arange(n, device=device) for n in shape)
    counters = (i * _signed(row * STEP))[:, None] + j * _signed(col * STEP)
    z = counters + _signed(key + (first + 1) * STEP)
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(_FIRST)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(_SECOND)
    return (z ^ (z >> 31 & (1 << 33) - 1)) >> 32 & _LOW


def drawn(t: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Each entry of a float32 tensor as one of its two neighbours in a format of :data:`NARROW`: up with the
    probability that is right on average. What is beyond the range becomes the largest number.
    """
    bits = t.contiguous().view(torch.int32).long()
    size, most = bits & 0x7FFFFFFF, torch.tensor(torch.finfo(dtype).max, dtype=torch.float32).view(torch.int32).item()
    lost, size = size > 0x7F800000, size.clamp_max(int(most))
    if dtype == torch.bfloat16:
        found = ((size + (words >> 16) & ~0xFFFF).int().view(torch.float32)).to(dtype)
    else:
        # Multiples of 2⁻²⁴ below the normal numbers: ``drop`` bits of the significand go.
        drop = (126 - (size >> 23)).clamp(13, 33)
        normal = (size + (words >> 19) & ~0x1FFF).int().view(torch.float32)
        significand = size & 0x7FFFFF | 0x800000
        small = (significand + (words >> (32 - drop).clamp_min(0)) >> drop) * (drop < 33)
        found = torch.where(size >> 23 >= 113, normal, small.float() * 2.0**-24).to(dtype)
    found = torch.where(bits < 0, -found, found)
    return torch.where(lost, torch.nan, found)
