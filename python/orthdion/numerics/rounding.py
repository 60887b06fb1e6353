"""Operands of single-precision products, rounded as bfloat16 units and tensor cores read them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rounded", "to_tf32"]


def to_tf32(t: Tensor) -> Tensor:
    """Single precision with 10 bits behind the point, as tensor cores read it; to nearest, ties to even."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def rounded(t: Tensor, rounding: str | None) -> Tensor:
    """A float32 operand rounded to "bfloat16" or "tf32", still float32; others as they are."""
    if rounding is None or t.dtype != torch.float32:
        return t
    return t.bfloat16().to(t.dtype) if rounding == "bfloat16" else to_tf32(t)
