"""Orthonormal factors on the device: Cholesky QR, the polar factor by products only, completions (algorithms.md, 4).

Gram matrices are taken in double precision, so for single-precision A the null rule can be read off the pivots, and two
passes are as good as a Householder QR for every condition that the null rule leaves: no other path is needed. One pass
serves up to the gate. Which it is, is decided on the device, matrix by matrix: kernels of the second pass return at
once where it is not due. Nothing here reads a number on the host.

A chain of small kernels is as long as r says, whatever the matrices' heights and number: matrices of one r, whatever
their n, take it together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .arguments import operand
from .device import Device
from .products import SYMMETRIC, UPPER_A, UPPER_B, UPPER_C, When, multiply

__all__ = ["GATE", "Factored", "complete", "orthonormalize", "polar", "quintics", "triangles"]

#: Condition up to which one Cholesky QR of single-precision data is orthonormal to single precision: κ²·2⁻⁵³ < 2⁻²⁴/8².
GATE = 2.0**14.5 / 8.0
_TILE = 64
_BOUNDS, _NORMS = 4, 8


@dataclass(frozen=True)
class Factored:
    """``A = V T`` of batches of one r: V (n, r) a batch, and of all matrices in a row T (r, r) double, null flags (r)
    and norm bounds.
    """

    v: tuple[Tensor, ...]
    t: Tensor
    null: Tensor
    bounds: Tensor

    def of_each(self, rows: Tensor) -> Iterator[Tensor]:
        """What there is of all matrices, by batch."""
        return iter(rows.split([v.shape[0] for v in self.v]))


def triangles(
    device: Device,
    gram: Tensor,
    tol: float,
    *,
    due: Tensor | None = None,
    gate: float = float("inf"),
    again: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(T, S, null, bounds)`` with ``TᵀT = gram`` and S = T⁻¹, without null directions; what is below the diagonals of
    T and S is left as it is.

    ``due``: only of matrices whose flag is 1. ``again``: flags that say whether the condition is beyond ``gate``.
    """
    count, r = gram.shape[:2]
    new, where, only = gram.new_empty, _only(due), (due, 0 if due is None else 1)
    scaled, t, s = (new(count, r, r) for _ in range(3))
    diagonal, least = new(count, r), new(count, r)
    null = torch.empty(count, r, dtype=torch.int32, device=gram.device)
    bounds, norms = new(count, _BOUNDS), new(count, _NORMS)
    strips = (-(-r // _TILE), count)
    device.launch("equilibrate", strips, 256, gram, scaled, diagonal, least, norms, r, tol, *only)
    g, top, inverse = operand(scaled), operand(t), operand(s)
    for j in range(0, r, _TILE):
        device.launch("cholesky_tile", (count,), 256, scaled, t, s, null, least, r, j, *only)
        rest, n = r - j - _TILE, min(_TILE, r - j)
        if rest <= 0:
            continue
        row = top.at(j, j + n)
        multiply(device, row, inverse.at(j, j).T, g.at(j, j + n), sizes=(n, rest, n), when=where)
        corner = g.at(j + n, j + n)
        multiply(
            device,
            corner,
            row.T,
            row,
            alpha=-1.0,
            beta=1.0,
            add=corner,
            shape=UPPER_C,
            sizes=(rest, rest, n),
            when=where,
        )
    # [T₁ T₁₂; 0 T₂]⁻¹ = [S₁ −S₁T₁₂S₂; 0 S₂]: pairs of neighbours in one launch, then pairs of pairs.
    product, size = operand(new(count, r, r)) if r > _TILE else inverse, _TILE
    while size < r:
        whole, pitch = r // (2 * size), 2 * size * (r + 1)
        left = r - 2 * size * whole - size  # what the last pair's second block has, if there is such a pair
        for first, pairs, n in ((0, whole, size), (2 * size * whole, 1, left)):
            if pairs > 0 and n > 0:
                a, b = first, first + size
                blocks = [o.at(i, j, pitch) for o, i, j in ((top, a, b), (inverse, b, b), (inverse, a, a))]
                between, target = product.at(a, b, pitch), inverse.at(a, b, pitch)
                multiply(device, between, *blocks[:2], shape=UPPER_B, pairs=pairs, sizes=(size, n, n), when=where)
                multiply(
                    device,
                    target,
                    blocks[2],
                    between,
                    alpha=-1.0,
                    shape=UPPER_A,
                    pairs=pairs,
                    sizes=(size, n, size),
                    when=where,
                )
        size *= 2
    device.launch("measure", strips, 256, t, s, diagonal, norms, r, *only)
    device.launch("finish", strips, 256, t, s, diagonal, norms, bounds, r, gate, again, *only)
    return t, s, null, bounds


def _only(due: Tensor | None) -> When:
    """The matrices whose flag is 1; all, where there are no flags."""
    return When() if due is None else When(due, 1)


def orthonormalize(device: Device, batches: Sequence[Tensor], tol: float, due: Tensor | None = None) -> Factored:
    """``A = V T`` of batches of one r (n, r) in single precision; T has a non-negative diagonal, null columns of V are
    zero.

    Matrices beyond the gate take a second pass. ``due``: only of matrices whose flag is 1, which take one.
    """
    r, where, counts = batches[0].shape[2], batches[0].device, [a.shape[0] for a in batches]
    gram = torch.empty(sum(counts), r, r, dtype=torch.float64, device=where)
    v = tuple(torch.empty_like(a) for a in batches)
    _grams(device, gram, batches, due)
    if due is not None:
        t, s, null, bounds = triangles(device, gram, tol, due=due)
        _through(device, batches, s, v, [_only(flag) for flag in due.split(counts)])
        return Factored(v, t, null, bounds)
    again = torch.empty(sum(counts), dtype=torch.int32, device=where)
    t, s, null, bounds = triangles(device, gram, tol, gate=GATE, again=again)
    once, flags = [torch.empty_like(a) for a in batches], again.split(counts)
    whens = [When(flag, elsewhere=1, other=other) for flag, other in zip(flags, once, strict=True)]
    _through(device, batches, s, v, whens)
    _grams(device, gram, once, again)
    t2, s2, both = (torch.empty_like(t) for _ in range(3))
    device.launch("refine", (-(-r * r // 4096), sum(counts)), 256, gram, t2, s2, r, again)
    _through(device, once, s2, v, [_only(flag) for flag in flags])
    multiply(device, both, t2, t, shape=UPPER_A | UPPER_B | UPPER_C, when=_only(again))
    return Factored(v, torch.where((again != 0)[:, None, None], both, t), null, bounds)


def _grams(device: Device, gram: Tensor, batches: Sequence[Tensor], due: Tensor | None) -> None:
    """``AᵀA`` of all matrices, in a row."""
    counts = [a.shape[0] for a in batches]
    flags = [None] * len(batches) if due is None else due.split(counts)
    for a, out, flag in zip(batches, gram.split(counts), flags, strict=True):
        n, r = a.shape[1:]
        multiply(device, out, operand(a).T, operand(a), shape=SYMMETRIC, sizes=(r, r, n), when=_only(flag))


def _through(
    device: Device, batches: Sequence[Tensor], s: Tensor, out: Sequence[Tensor], whens: Sequence[When]
) -> None:
    """``A S`` of each batch, for upper triangles S of all matrices in a row."""
    of_each = s.split([a.shape[0] for a in batches])
    for a, own, to, when in zip(batches, of_each, out, whens, strict=True):
        multiply(device, to, a, own, shape=UPPER_B, when=when)


def polar(device: Device, f: Factored) -> tuple[Tensor, ...]:
    """``R (RᵀR)^(−1/2) = V·polar(T)`` of factored batches; null directions contribute nothing.

    polar(T) by X ← X(aI + bXᵀX + c(XᵀX)²), the best odd quintics for where its singular values can be
    (:func:`quintics`). A matrix starts at the round that its condition asks for.
    """
    count, r = f.t.shape[:2]
    rounds = torch.empty(count, dtype=torch.int32, device=f.t.device)
    x, y, square, z = (torch.empty_like(f.t) for _ in range(4))
    coefficients, lows = quintics()
    table = _table(f.t.device)
    device.launch("polar_start", (-(-r // _TILE), count), 256, f.t, f.bounds, x, y, rounds, table, len(lows), r)
    for i, (a, b, c) in enumerate(coefficients):
        due = When(rounds, 1 << i)
        multiply(device, square, operand(x).T, operand(x), shape=SYMMETRIC, sizes=(r, r, r), when=due)
        multiply(device, z, square, square, alpha=c, beta=b, delta=a, add=square, shape=SYMMETRIC, when=due)
        multiply(device, y, x, z, when=due)
        x, y = y, x
    found = tuple(torch.empty_like(v) for v in f.v)
    for v, turn, out in zip(f.v, f.of_each(x), found, strict=True):
        multiply(device, out, v, turn)
    return found


@cache
def quintics(low: float = 1e-7) -> tuple[tuple[tuple[float, float, float], ...], tuple[float, ...]]:
    """Coefficients (a, b, c) of odd quintics that in turn lift singular values in [low, 1] to 1, and each one's own
    low.

    Each is the best for its interval: max |1 − p| is least, at four points of equal error (Remez; for this use Amsel et
    al., arXiv 2505.16932), divided by its maximum, so that the next interval ends at 1 again.
    """
    coefficients, lows = [], []
    while 1.0 - low > 1e-8:
        a, b, c, error = _best_quintic(low)
        lows.append(low)
        coefficients.append((a / (1.0 + error), b / (1.0 + error), c / (1.0 + error)))
        low = (1.0 - error) / (1.0 + error)
    # The error of what follows is its cube.
    lows.append(low)
    coefficients.append((15.0 / 8.0, -10.0 / 8.0, 3.0 / 8.0))
    return tuple(coefficients), tuple(lows)


def _best_quintic(low: float) -> tuple[float, float, float, float]:
    """(a, b, c, error) of ax + bx³ + cx⁵ that is nearest to 1 on [low, 1]."""
    inner = np.array([0.75 * low + 0.25, 0.25 * low + 0.75])
    for _ in range(50):
        points = np.array([low, *inner, 1.0])
        signs = np.array([1.0, -1.0, 1.0, -1.0])  # p falls short of 1 at the lower end
        a, b, c, error = np.linalg.solve(np.stack([points, points**3, points**5, signs], 1), np.ones(4))
        roots = np.sqrt((-3.0 * b + np.array([-1.0, 1.0]) * np.sqrt(max(9.0 * b * b - 20.0 * a * c, 0.0))) / (10.0 * c))
        if np.allclose(roots, inner, rtol=1e-12):
            break
        inner = np.sort(roots)
    return float(a), float(b), float(c), float(abs(error))


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(quintics()[1], dtype=torch.float64).to(device)


def complete(device: Device, v: Tensor, null: Tensor, old: Tensor, due: Tensor) -> Tensor:
    """V with its null columns filled from the old Q's, of matrices whose flag ``due`` is 1; otherwise undefined. Some
    columns are null, not all.

    The old column itself, made orthonormal to the rest, or where that lies in their span, the one with the largest
    remainder. Which, and by what coefficients, is found in r×r numbers: the remainders' Gram matrix QᵀQ − CᵀC, C = VᵀQ.
    """
    count, n, r = v.shape
    where = When(due, 1)
    c, h, e, y, ce = (torch.empty(count, r, r, dtype=torch.float64, device=v.device) for _ in range(5))
    turn, listed = (torch.empty(count, size, dtype=torch.int32, device=v.device) for size in (r, 2 * r))
    multiply(device, c, operand(v).T, operand(old), sizes=(r, r, n), when=where)
    multiply(device, h, operand(old).T, operand(old), shape=SYMMETRIC, sizes=(r, r, n), when=where)
    multiply(device, h, operand(c).T, operand(c), alpha=-1.0, beta=1.0, add=h, sizes=(r, r, r), when=where)
    device.launch("complete", (count,), 256, h, e, y, turn, listed, null, r, due)
    multiply(device, ce, c, e, when=where)
    out, filled = torch.empty_like(v), torch.empty_like(v)
    multiply(device, out, old, e, beta=1.0, add=v, when=where)
    multiply(device, filled, v, ce, alpha=-1.0, beta=1.0, add=out, when=where)
    return filled
