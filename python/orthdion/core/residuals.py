"""What rank r misses, T = B − P Rᵀ, as it is added to the step (docs/algorithms.md, sections 3b and 7b).

A normalised residual has columns, then rows, of one norm. Columns and rows in which T is rounding noise fade out, and
all of it is left out where it is noise as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, Literal

import torch
from torch import Tensor

from ..requests import (
    CompressedMean,
    Energies,
    Gram,
    Map,
    Matrix,
    Reduce,
    Residual,
    ResidualMatrix,
    ResidualSums,
    Squares,
)
from .low_rank import Left

__all__ = ["MEMORY", "exact_residual", "sent_residual"]

Kind = Literal["normalized", "linear"]
Answer = Generator[Any, Any, Residual | None]
#: The state that a residual in one bit needs.
MEMORY = "memory"


def exact_residual(w: Matrix, left: Left, r: Tensor, kind: Kind, scale: float) -> Answer:
    """T's numbers, from ‖T‖² = ‖B‖² − ‖R‖² of the whole and of each column: P is orthonormal.

    ``scale`` is the root mean square that T's d − r singular values are to get; None where r = d.
    """
    at, spare, noise = w.layout, min(w.shape) - r.shape[1], w.precision.noise
    if spare == 0:
        return None
    goal = scale * math.sqrt(spare)
    rows, columns = yield Energies(left.b)
    of_columns = yield Map(_row_squares, (r,))
    if kind == "linear":
        total, captured = yield (
            Reduce(rows.sum(), at.shards, "residual"),
            Reduce(of_columns.sum(), at.cols, "residual"),
        )
        return Residual(alpha=(yield Map(_alpha, (total, captured), (noise.residual, goal))))
    columns, rows = yield Reduce(columns, at.rows, "residual"), Reduce(rows, at.cols, "residual")
    total, captured, count = yield (
        Reduce(columns.sum(), at.cols, "residual"),
        Reduce(of_columns.sum(), at.cols, "residual"),
        Reduce((rows > 0).sum().double(), at.rows, "residual"),
    )
    inverse = yield Map(_column_scales, (columns, of_columns), (noise.fade,))
    raw, scaled = yield ResidualSums(left.b, left.p, r, inverse)
    raw, scaled = yield Reduce(raw, at.cols, "residual"), Reduce(scaled, at.cols, "residual")
    numbers = (noise.residual, noise.fade, goal)
    lengths = yield Map(_row_scales, (raw, scaled, rows, total, captured, count), numbers)
    return Residual(columns=inverse, rows=lengths)


def sent_residual(
    w: Matrix, left: Left, r: Tensor, own: Tensor, kind: Kind, scale: float, bits: Literal[1, 4], fade: float
) -> Generator[Any, Any, tuple[Residual | None, dict[str, Tensor]]]:
    """The mean over replicas of ``T_i = B_i − P R_iᵀ``, which travels in few bits, and new states; R is the mean of the
    R_i (``own``). At one bit, replicas send by what their T_i differs from what they are known to have, which fades by
    ``fade``, as what T_i has of M does.

    B̄ is nowhere whole: its energies are those of P R̄ᵀ and of the mean residual together.
    """
    if min(w.shape) == r.shape[1] or scale == 0.0:
        return None, {}
    t = yield ResidualMatrix(left.b, left.p, own)
    of_columns = yield Map(_row_squares, (r,))
    if bits != 1:
        t = yield CompressedMean(t, w.layout.replicas, bits, "residual")
        return (yield from _known_residual(w, left, r, of_columns, t, kind, scale)), {}
    # T is at B's size, which changes; what is remembered is at M's.
    t, memory = yield CompressedMean(t, w.layout.replicas, bits, "residual", _times(w.read(MEMORY), left.b.size), fade)
    # One bit has no zero: where no replica has anything in a column, R̄'s row is zero, and so is the column.
    t = yield Map(_where_captured, (t, of_columns))
    return (yield from _known_residual(w, left, r, of_columns, t, kind, scale)), {
        MEMORY: _times(memory, 1.0 / left.b.size)
    }


def _known_residual(
    w: Matrix, left: Left, r: Tensor, of_columns: Tensor, t: Tensor, kind: Kind, scale: float
) -> Answer:
    """T's numbers, where all of it is known."""
    at, spare, noise = w.layout, min(w.shape) - r.shape[1], w.precision.noise
    goal = scale * math.sqrt(spare)
    rows, columns = yield Squares(t)
    gram = yield Reduce((yield Gram(r)), at.cols, "residual")
    missed, captured = yield (
        Reduce(rows.sum(), at.shards, "residual"),
        Reduce(of_columns.sum(), at.cols, "residual"),
    )
    if kind == "linear":
        return Residual(alpha=(yield Map(_alpha, (missed + captured, captured), (noise.residual, goal))), given=t)
    columns = yield Reduce(columns, at.rows, "residual")
    inverse = yield Map(_column_scales, (columns + of_columns, of_columns), (noise.fade,))
    scaled, _ = yield Squares(t, inverse)
    raw, scaled = yield Reduce(rows, at.cols, "residual"), Reduce(scaled, at.cols, "residual")
    rows = raw + (yield Map(_captured_of_rows, (left.p, gram)))
    count = yield Reduce((rows > 0).sum().double(), at.rows, "residual")
    numbers = (noise.residual, noise.fade, goal)
    lengths = yield Map(_row_scales, (raw, scaled, rows, missed + captured, captured, count), numbers)
    return Residual(columns=inverse, rows=lengths, given=t)


def _times(t: Tensor, size: float | Tensor) -> Tensor:
    """In the format of ``t``; a number that is 1 takes no pass."""
    if isinstance(size, Tensor):
        return t * size.to(t.dtype)
    return t if size == 1.0 else t * size


def _where_captured(t: Tensor, of_columns: Tensor) -> Tensor:
    """In place: T has just been unpacked."""
    return t.mul_((of_columns > 0).to(t.dtype)[..., None, :])


def _captured_of_rows(p: Tensor, gram: Tensor) -> Tensor:
    """‖(P Rᵀ)_i‖² of each row, from RᵀR."""
    return ((p @ gram.to(p.dtype)) * p).sum(-1, dtype=torch.float64).clamp_min(0.0)


def _row_squares(r: Tensor) -> Tensor:
    """What P captures of each column's energy."""
    return r.double().square().sum(-1)


def _weight(total: Tensor, captured: Tensor, least: float, goal: float) -> tuple[Tensor, Tensor]:
    """The residual's energy, and the norm that it is to get: 0 where it is rounding noise."""
    energy = total - captured
    return energy, (energy > least * total).to(energy.dtype) * goal


def _alpha(total: Tensor, captured: Tensor, least: float, goal: float) -> Tensor:
    """α that gives T the norm ``goal``."""
    energy, weight = _weight(total, captured, least, goal)
    return weight / energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt()


def _column_scales(columns: Tensor, captured: Tensor, fade: float) -> Tensor:
    """The inverse norm of each of T's columns; one that is noise fades out."""
    norms = torch.maximum(columns - captured, fade * columns).sqrt()
    return torch.where(norms > 0, 1.0 / norms.clamp_min(1e-300), 0.0)


def _row_scales(
    raw: Tensor,
    scaled: Tensor,
    rows: Tensor,
    total: Tensor,
    captured: Tensor,
    count: Tensor,
    least: float,
    fade: float,
    goal: float,
) -> Tensor:
    """What each row of T with scaled columns is multiplied by: rows in which T is noise fade out; every other row gets
    one norm, and all together ``goal``.
    """
    _, weight = _weight(total, captured, least, goal)
    share = (raw / (fade * rows).clamp_min(1e-300)).clamp_max(1.0).sqrt()
    lengths = torch.where(scaled > 0, share / scaled.sqrt().clamp_min(1e-300), 0.0)
    return lengths * (weight / count.clamp_min(1.0).sqrt())[..., None]
