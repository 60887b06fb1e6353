"""Orthonormal starts: random columns of a cosine transform with random signs, of which a rank makes its own rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Orthonormal", "generator", "start"]

#: Rows that are made at once: on a CPU few enough to stay in its cache, for any rank.
_ROWS, _ROWS_ELSEWHERE = 32, 4096


def generator(seed: int, index: int) -> torch.Generator:
    """Of parameter ``index``: every rank draws the same, and the user's random stream is untouched."""
    return torch.Generator(device="cpu").manual_seed((seed * 1_000_003 + index) % 2**63)


class Orthonormal:
    """An orthonormal (n, r), any rows of it at a time, with the same bits in every layout::

        Q_ij = s_i · √(2/n) · cos(π (2p_i + 1) k_j / 2n)        (√(1/n) for k_j = 0)

    with random signs s, a random permutation p and r random distinct frequencies k. As a start of a power iteration it
    is as good as an orthonormalised Gaussian matrix (Halko, Martinsson, Tropp 2011, section 4.6, on subsampled random
    transforms), and costs O(1) an entry, where factorising takes O(r) and the whole matrix.
    """

    def __init__(self, n: int, r: int, draws: torch.Generator) -> None:
        """Takes 3n numbers from ``draws``."""
        signs = torch.randint(0, 2, (n,), generator=draws, device="cpu")
        self._signs = 2.0 * signs.double() - 1.0
        self._order = torch.randperm(n, generator=draws, device="cpu")
        frequencies = torch.randperm(n, generator=draws, device="cpu")[:r].double()
        self._angles = frequencies * (math.pi / (2 * max(n, 1)))
        self._lengths = torch.full_like(frequencies, math.sqrt(2.0 / max(n, 1)))
        self._lengths[frequencies == 0] = math.sqrt(1.0 / max(n, 1))

    def write(self, to: Tensor, first: int) -> None:
        """Rows ``first`` and on, as many as ``to`` has."""
        device = to.device if to.device.type != "mps" else torch.device("cpu")  # which has no double precision
        rows = slice(first, first + to.shape[0])
        order, signs = self._order[rows].to(device), self._signs[rows, None].to(device)
        angles, lengths = self._angles.to(device), self._lengths.to(device)
        # cos of a sum, p = ca + b: cosines of 2ca·θ and of (2b + 1)·θ are 2√n·r in place of nr.
        n = len(self._order)
        c = math.isqrt(n) + 1
        coarse = torch.arange(0, 2 * n, 2 * c, dtype=torch.float64, device=device)
        fine = torch.arange(1, 2 * c, 2, dtype=torch.float64, device=device)
        coarse, fine = torch.outer(coarse, angles), torch.outer(fine, angles)
        cosines, sines = (coarse.cos(), fine.cos() * lengths), (coarse.sin(), fine.sin() * lengths)
        size = _ROWS if device.type == "cpu" else _ROWS_ELSEWHERE
        blocks = zip(order.split(size), signs.split(size), to.split(size), strict=True)
        for p, sign, rows_of_block in blocks if to.numel() else ():
            a, b = p // c, p % c
            made = cosines[0][a].mul_(cosines[1][b]).addcmul_(sines[0][a], sines[1][b], value=-1.0)
            rows_of_block.copy_(made.mul_(sign))


def start(shape: tuple[int, int, int], seed: int, index: int) -> Tensor:
    """The first Q of parameter ``index``: (count, n, r) orthonormal float64 on the CPU."""
    _, n, r = shape
    draws, found = generator(seed, index), torch.empty(shape, dtype=torch.float64, device="cpu")
    for q in found:
        Orthonormal(n, r, draws).write(q, 0)
    return found
