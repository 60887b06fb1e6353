"""The orthonormal cosine transform (DCT-II) of any length, and parts of its basis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["basis", "transform"]


def basis(n: int, rows: Tensor, frequencies: Tensor) -> Tensor:
    """``C_jk = √(2/n)·cos(π(2j + 1)k/2n)`` (√(1/n) for k = 0) for the given j and k, in double: the columns of all
    n rows and frequencies are orthonormal.
    """
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    angles = torch.outer(2.0 * rows.to(wide) + 1.0, frequencies.to(wide)) * (math.pi / (2 * n))
    lengths = angles.new_full((len(frequencies),), math.sqrt(2.0 / n))
    return angles.cos() * torch.where(frequencies > 0, lengths, math.sqrt(0.5) * lengths)


def transform(x: Tensor) -> Tensor:
    """``X C`` of X (…, n), by one real Fourier transform of its reordered columns (Makhoul 1980): the even ones, then
    the odd ones backwards. Costs O(n log n) a row for any n.
    """
    n = x.shape[-1]
    if x.numel() == 0:
        return x.clone()
    spectrum = torch.fft.rfft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1))
    half = torch.arange(n // 2 + 1, device=x.device, dtype=x.dtype)
    turned = spectrum * torch.polar(torch.full_like(half, math.sqrt(2.0 / n)), half * (-math.pi / (2 * n)))
    upper = turned.imag[..., 1 : (n + 1) // 2].flip(-1)  # conjugates of the lower half, turned on by a quarter
    found = torch.cat([turned.real, -upper], -1)
    found[..., 0] *= math.sqrt(0.5)
    return found
