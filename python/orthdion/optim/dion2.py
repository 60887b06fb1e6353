"""Dion2 (arXiv 2512.16928): of a momentum with error feedback only the largest rows (or columns) are orthogonalised."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.adjust import AdjustLr, adjust_lr, adjusted
from ..core.optimizer import MatrixOptimizer
from ..core.options import number
from ..core.registry import register
from ..core.rule import Rule, States, StateSpec
from ..numerics.newton_schulz import JORDAN
from ..requests import Body, Extent, Matrix, NewtonSchulz, Outcome, Reduce, Update, Whole

__all__ = ["Dion2", "Dion2Rule", "largest", "summed"]


@register
@dataclass(frozen=True)
class Dion2Rule(Rule):
    """The polar factor of the momentum's slices with the largest ℓ₁ norms; these slices of it then decay.

    Slices are along the shorter side: rows where m ≤ n, else columns. Norms are summed over the shards, so all ranks
    select the same slices of the whole matrix, and only these go to the owner and back.
    """

    name: ClassVar[str] = "dion2"
    summary: ClassVar[str] = "X[S] −= η·sqrt(m/n)·NS(M[S]), M = M+G, S its ⌈f·min(m,n)⌉ largest slices; M[S] *= decay"
    use: ClassVar[str] = "Muon at a fraction of its flops and of its elements on the wire"
    paper: ClassVar[str] = "arXiv 2512.16928"
    flops: ClassVar[str] = "20f²·mn·min(m,n)"
    sent: ClassVar[str] = "f·mn + min(m,n)"
    states: ClassVar[States] = {"momentum": StateSpec()}

    fraction: float = number(0.25, 0.0, 1.0, open_low=True, doc="f, the share of slices that are stepped, in (0, 1].")
    ef_decay: float = number(0.95, 0.0, 1.0, doc="What M keeps of the slices that were stepped: the error feedback.")
    epsilon: float = number(1e-7, 0.0, doc="The smallest norm that the selected slices are divided by.")

    adjust_lr: AdjustLr | None = adjust_lr()

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``, of the whole matrix; the slices that are stepped have singular values of 1."""
        return adjusted(self.adjust_lr, fan_out, fan_in, self._count(min(fan_out, fan_in)))

    def check(self) -> None:
        """Rows that are not stepped have no variance: Dion3 leaves theirs alone."""
        super().check()
        if self.row_variance is not None:
            raise ValueError(
                "row_variance is for steps of all rows; dion3 is dion2 with the variance of those it steps"
            )

    def _count(self, length: int) -> int:
        return min(max(math.ceil(round(self.fraction * length, 9)), 1), length)

    def step(self, w: Matrix) -> Body[Outcome]:
        """``M ← M + G``, ``D[S] = polar(M[S])``, ``M[S] ← decay·M[S]``"""
        axis = 0 if w.shape[0] <= w.shape[1] else 1
        m, slices, o = yield from self.orthogonalized(w, axis)
        d = torch.zeros_like(m).index_copy_(axis, slices, o)
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, {"momentum": m}, w.scale)
        return done

    def orthogonalized(self, w: Matrix, axis: int) -> Generator[Any, Any, tuple[Tensor, Tensor, Tensor]]:
        """The new momentum; which of this rank's slices along ``axis`` are stepped, and of these the polar factor."""
        m = w.read("momentum") + self.sign * w.gradient
        m.clamp_(torch.finfo(m.dtype).min, torch.finfo(m.dtype).max)  # a sum, which may leave the range
        slices, part = yield from self._selected(w, m, axis)
        u = m.index_select(axis, slices)
        o = yield Whole(u, part, partial(self._polar, w))
        m.index_copy_(axis, slices, self.ef_decay * u)
        return m, slices, o

    def _selected(self, w: Matrix, m: Tensor, axis: int) -> Generator[Any, Any, tuple[Tensor, Matrix]]:
        """Which of this rank's slices are among the largest, ascending; and the matrix of all that are."""
        length, shards = w.shape[axis], w.layout.shards
        count = self._count(length)
        shape = (count, w.shape[1]) if axis == 0 else (w.shape[0], count)
        norms = m.abs().sum(1 - axis, dtype=torch.float64)
        if shards.size == 1:
            return largest(norms, count), replace(w, shape=shape)
        everywhere, first = yield from summed(w, norms, axis, "norms")
        assert w.extents is not None, "a sharded matrix knows where its parts lie"
        extents = w.extents()
        chosen = largest(everywhere, count)
        places = _places(chosen, length)
        found = [_among(places, extent, axis) for extent in extents]
        start, stop = found[shards.index][2 * axis : 2 * axis + 2]
        return chosen[start:stop] - first, replace(w, shape=shape, extents=lambda: found)

    def _polar(self, w: Matrix, u: Tensor) -> NewtonSchulz:
        return NewtonSchulz(u, JORDAN, w.precision, epsilon=self.epsilon)


def summed(w: Matrix, part: Tensor, axis: int, what: str) -> Generator[Any, Any, tuple[Tensor, int]]:
    """Of every slice of the whole matrix along ``axis`` the sum over all shards, from those of this rank's part; and
    which is the first of these.
    """
    shards = w.layout.shards
    if shards.size == 1:
        return part, 0
    assert w.extents is not None, "a sharded matrix knows where its parts lie"
    first = w.extents()[shards.index][2 * axis]
    everywhere = part.new_zeros(w.shape[axis])
    everywhere[first : first + len(part)] = part
    return (yield Reduce(everywhere, shards, what)), first


def largest(norms: Tensor, count: int) -> Tensor:
    """Where the largest are, ascending; of equal ones the first."""
    return norms.sort(descending=True, stable=True).indices[:count].sort().values


def _places(chosen: Tensor, length: int) -> list[int]:
    """What was chosen of so many, as numbers; as if it lay evenly where a step is only planned."""
    if chosen.is_meta:
        return [i * length // len(chosen) for i in range(len(chosen))]
    places: list[int] = chosen.tolist()
    return places


def _among(chosen: list[int], extent: Extent, axis: int) -> Extent:
    """An extent of the whole matrix as one of the matrix of the chosen slices."""
    top, bottom, left, right = extent
    if axis == 0:
        return bisect_left(chosen, top), bisect_left(chosen, bottom), left, right
    return top, bottom, bisect_left(chosen, left), bisect_left(chosen, right)


class Dion2(MatrixOptimizer, rule=Dion2Rule):
    r"""Dion2: Muon on the largest slices of a momentum with error feedback.

    .. math::
        M &\leftarrow M + G, \quad S = \text{the } \lceil f d \rceil \text{ slices of } M
        \text{ with the largest } \ell_1 \text{ norms} \\
        X &\leftarrow (1 - \eta\lambda) X, \quad X_S \leftarrow X_S - \eta \sqrt{m/n}\; \mathrm{NS}(M_S), \quad
        M_S \leftarrow \mathrm{decay} \cdot M_S

    Slices are rows where m ≤ n, else columns; d = min(m, n). The polar factor is approximated by five of Jordan's
    Newton–Schulz iterations. Of a sharded matrix the largest slices of the whole are stepped.
    """
