"""Parameters, gradients and states as the matrices and rows that rules see: this rank's part of them.

What does not change from one step to the next is kept: to make views and describe them takes longer than the step of a
small matrix. It is made anew when a tensor has been replaced, or lies elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..distributed import Placed, local
from ..requests import Extent, Layout, Matrix
from . import matrices
from .rule import Rule
from .states import orientation, ranked_of

__all__ = ["Copies", "Entry"]


@dataclass
class Copies:
    """What strides allowed no view of: copies to be written back after the step."""

    made: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def write_back(self) -> None:
        """Copies them into the tensors that they were made from."""
        for t, matrix, like in self.made:
            matrices.write_back(t, matrix, like)


@dataclass(slots=True, eq=False)
class Entry:
    """One parameter of an optimizer, and the views that its steps see it by."""

    p: Tensor
    group: dict[str, Any]
    rule: type[Rule]
    index: int
    placed: Placed
    #: The layout of its matrices; replicas may average factors in place of gradients.
    layout: Layout
    #: Bytes that each rank has of it.
    bytes: int
    seen: list[Matrix] | None = None
    #: Which backend serves it, on which device.
    where: tuple[str, torch.device] | None = None
    _key: tuple[Any, ...] = ()
    #: Its states, and where they lie.
    _states: tuple[tuple[str, Tensor, int], ...] = ()
    _flip: bool = False
    _cut: list[tuple[int, int]] = field(default_factory=list)

    def matrices(
        self,
        g: Tensor,
        state: dict[str, Tensor],
        rule: Rule,
        layout: Layout,
        copies: Copies,
        deferred: bool = False,
    ) -> list[Matrix]:
        """Its matrices (one row, for an elementwise rule) with the local gradient ``g``. ``deferred``: numbers are kept
        where the device reads them.
        """
        made, known = self.seen, True
        if g.is_neg():
            g = g.resolve_neg()
        if made is None or not self._lies_as_before(state, layout):
            self._follow(state, deferred)
            made, known = self._look(g, state, rule, layout, copies), False
        if self.rule.elementwise:
            row = _row(g, made[0].x, local(self.p)) if known else made[0].g
            if row is None:  # the gradient lies otherwise than the weight
                return self._rows(g, state, layout, copies)
            made[0].g = row
            return made
        if len(made) == 1 and g.ndim == 2:
            made[0].g = g.T if self._flip else g
            return made
        parts = _cut(g, local(self.p), self.group["flatten"], self._cut, copies, True)
        for w, part in zip(made, parts, strict=True):
            w.g = part.T if self._flip else part
        return made

    def forget(self) -> None:
        """Drops the views: the group's options, from which they were made, have changed."""
        self.seen = None

    def _follow(self, state: dict[str, Tensor], deferred: bool) -> None:
        """Moves the states to where the model has been moved since they were made."""
        device = self.p.device
        for name, spec in self.rule.states.items():
            if state[name].device != device and (spec.axes or deferred):
                state[name] = state[name].to(device)

    def _lies_as_before(self, state: dict[str, Tensor], layout: Layout) -> bool:
        for name, t, address in self._states:
            if state.get(name) is not t or t.data_ptr() != address:
                return False
        p = self.p
        return self._key == (p.data_ptr(), p.shape, p.stride(), layout)

    def _look(self, g: Tensor, state: dict[str, Tensor], rule: Rule, layout: Layout, copies: Copies) -> list[Matrix]:
        p, before = self.p, len(copies.made)
        if rule.elementwise:
            found = self._rows(g, state, layout, copies)
        else:
            found = self._matrices(state, rule, layout, copies)
        # A DTensor's local part may be another object at each step.
        if self.placed.mesh is None and len(copies.made) == before:
            self._states = tuple((name, state[name], state[name].data_ptr()) for name in self.rule.states)
            self._key = (p.data_ptr(), p.shape, p.stride(), layout)
            self.seen = found
        return found

    def _matrices(self, state: dict[str, Tensor], rule: Rule, layout: Layout, copies: Copies) -> list[Matrix]:
        p, group = self.p, self.group
        x = local(p.detach())
        count, m, n = matrices.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
        ranked = ranked_of(self.rule, state)
        self._flip = orientation(p, group, self.rule, ranked)
        blocks = group["row_blocks"]
        self._cut = matrices.bounds(blocks, m, self.placed.ranges[0][0], len(x)) if blocks > 1 else [(0, len(x))]
        xs = _cut(x, x, group["flatten"], self._cut, copies, False)
        parts: dict[str, list[Tensor]] = {}
        for name, spec in self.rule.states.items():
            t = local(state[name])
            if spec.axes == ():
                parts[name] = [t] * len(xs)
            elif set(spec.axes) == {"rows", "cols"}:
                found = _cut(t, x, group["flatten"], self._cut, copies, False)
                parts[name] = [f.T for f in found] if self._flip else found
            elif len(spec.axes) == t.ndim and len(xs) > 1:  # rows of blocks, side by side
                parts[name] = [t[a:b] for a, b in self._cut]
            else:
                parts[name] = [t] if len(spec.axes) == t.ndim else list(t.unbind(0))
        shape, fan, scale = (n, m) if self._flip else (m, n), (m, n), rule.scale(m, n)
        layout = layout.transposed if self._flip else layout
        return [
            Matrix(
                x.T if self._flip else x,
                x,
                {name: part[k] for name, part in parts.items()},
                shape,
                fan,
                scale,
                layout,
                extents=partial(self._extents, k, count, m, n) if self.placed.mesh is not None else None,
            )
            for k, x in enumerate(xs)
        ]

    def _rows(self, g: Tensor, state: dict[str, Tensor], layout: Layout, copies: Copies) -> list[Matrix]:
        """A tensor of any shape as a row, or where it does not lie densely as what comes nearest."""
        x = local(self.p.detach())
        names = [name for name, spec in self.rule.states.items() if spec.axes]
        tensors = [x, g, *(local(state[name]) for name in names)]
        counters = {name: state[name] for name in self.rule.states if name not in names}
        found = matrices.flat(tensors)
        if found is None and x.ndim <= 2:
            found = [t if t.ndim == 2 else t.reshape(1, -1) if t.ndim == 0 else t[None] for t in tensors]
        if found is None:
            found = [matrices.as_matrix(t, x) for t in tensors]
            for k, (t, view) in enumerate(zip(tensors, found, strict=True)):
                if k != 1 and not matrices.is_view(view, t):
                    copies.made.append((t, view, x))
        rows, cols = found[0].shape
        states = dict(zip(names, found[2:], strict=True)) | counters
        return [Matrix(found[0], found[1], states, (rows, cols), (rows, cols), 1.0, layout)]

    def _extents(self, k: int, count: int, m: int, n: int) -> list[Extent]:
        """What each rank of the shards has of matrix ``k``."""
        found, first = [], 1 if self.p.ndim == 3 and not self.group["flatten"] else 0
        every = self.placed.ranges_over_shards()
        columns = _side_by_side({ranges[first + 1 :] for ranges in every})
        for ranges in every:
            (top, bottom), (left, right) = ranges[first], columns[ranges[first + 1 :]]
            if first == 0 and count > 1:
                ((a, b),) = matrices.bounds(count, m, top, bottom - top)[k : k + 1]
                top, bottom = top + a - k * m, top + b - k * m
                top, bottom = (top, bottom) if a < b else (0, 0)
            found.append((left, right, top, bottom) if self._flip else (top, bottom, left, right))
        return found


def _row(g: Tensor, x: Tensor, p: Tensor) -> Tensor | None:
    """The gradient as the row that its weight is seen as, if it lies as that does."""
    if x.shape[0] != 1 or x.shape[1] != p.numel():
        return None
    if g.is_contiguous() and p.is_contiguous():
        return g.view(1, -1)
    found = matrices.flat([p, g])
    return None if found is None else found[1]


def _side_by_side(parts: set[tuple[tuple[int, int], ...]]) -> dict[tuple[tuple[int, int], ...], tuple[int, int]]:
    """Columns for the parts into which ranks cut the axes of the columns. A convolution's come in the order of the
    parts: nothing that is done with a whole matrix knows an order of its columns.
    """
    order = sorted(parts)
    ends = list(accumulate(math.prod(b - a for a, b in part) for part in order))
    return dict(zip(order, zip([0, *ends], ends, strict=False), strict=True))


def _cut(
    t: Tensor, like: Tensor, flatten: bool | None, cut: list[tuple[int, int]], copies: Copies, read_only: bool
) -> list[Tensor]:
    """The 2-D views of a tensor; ``cut`` are the row ranges of its blocks, of which this rank may hold a part."""
    if t.ndim == 3 and not flatten:
        return list(t.unbind(0))
    if t.ndim == 2 and len(cut) == 1:
        return [t]
    matrix = matrices.as_matrix(t, like)
    if not read_only and not matrices.is_view(matrix, t):
        copies.made.append((t, matrix, like))
    return [matrix] if len(cut) == 1 else [matrix[a:b] for a, b in cut]
