"""Parameters, gradients and states as the matrices and rows that rules see: this rank's part of them.

What does not change from one step to the next is kept: to make views and describe them takes longer than the step of a
small matrix. It is made anew when a tensor has been replaced, or lies elsewhere.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..distributed import Placed, local
from ..requests import Extent, Layout, Matrix
from .fold import Copies, Fold, as_matrix, is_view, write_back
from .rule import Rule
from .states import Sides, base_name, stored

__all__ = ["Entry", "StateError", "extents_of", "flat", "has_no_data"]


class StateError(ValueError):
    """A parameter and its states do not fit; what is wrong, without the parameter's name."""


@dataclass(slots=True, eq=False)
class Entry:
    """One parameter of an optimizer, and the views that its steps see it by."""

    p: Tensor
    group: dict[str, Any]
    rule: type[Rule]
    index: int
    placed: Placed
    #: How it is matrices; None for an elementwise rule.
    fold: Fold | None
    #: The layout of its matrices; replicas may average factors in place of gradients.
    layout: Layout
    #: Bytes that each rank has of it.
    bytes: int
    #: Whether there were no numbers in it when the entry was made: on "meta", or fake.
    hollow: bool = False
    seen: list[Matrix] | None = None
    #: Which backend serves it, on which device.
    where: tuple[str, torch.device] | None = None
    #: The rule under which its gradient waits for nobody and is checked by the step itself.
    direct: Rule | None = None
    _key: tuple[Any, ...] = ()
    #: The shape, and the identities of the states, that were last found to fit.
    _fits: tuple[Any, ...] = ()
    #: Its states, and where they lie.
    _states: tuple[tuple[str, Tensor, int], ...] = ()
    #: Of each part: whether what is processed is the transpose of the upright matrix.
    _flips: tuple[bool, ...] = ()

    def matrices(
        self,
        g: Tensor,
        state: dict[str, Tensor],
        rule: Rule,
        layout: Layout,
        copies: Copies,
        known: bool,
        deferred: bool = False,
    ) -> list[Matrix]:
        """Its matrices (one row, for an elementwise rule) with the local gradient ``g``. ``known``: it and its states
        lie as before; ``deferred``: numbers are kept where the device reads them.
        """
        made = self.seen
        if g.is_neg():
            g = g.resolve_neg()
        if made is None or not known:
            self._follow(state, rule, deferred)
            made = self._look(g, state, rule, layout, copies)
        if self.rule.elementwise:
            row = _row(g, made[0].x, local(self.p)) if known else made[0].g
            if row is None:  # the gradient lies otherwise than the weight
                return self._rows(g, state, layout, copies)
            made[0].g = row
            return made
        fold = self.fold
        assert fold is not None
        if len(made) == 1 and g.ndim == 2:
            made[0].g = g.T if self._flips[0] != fold.transposed else g
            return made
        parts = self._parts(g, local(self.p), None)
        for i, (w, part) in enumerate(zip(made, parts, strict=True)):
            w.g = part.T if self._flips[i % fold.parts] else part
        return made

    def forget(self) -> None:
        """Drops the views: the group's options, from which they were made, have changed."""
        self.seen = None

    def check(self, state: dict[str, Tensor], rule: Rule) -> None:
        """Refuses a parameter that has got another shape, and states that are none of it.

        Raises:
            StateError: with what is wrong.
        """
        p, fold = self.p, self.fold
        if fold is not None and tuple(p.shape) != fold.shape:
            raise StateError(f"its shape is {tuple(p.shape)} now, but its states were made for {fold.shape}")
        now = (p.shape, *map(id, state.values()))
        if now == self._fits:
            return  # what is sharded, or has been copied, is looked at anew at each step
        sides = Sides((), ()) if fold is None else Sides.read_off(fold, rule, state)
        for key, kept in stored(fold, rule.kept_in(self.layout), sides, None).items():
            if key not in state:
                raise StateError(f"it has lost its state {key!r}")
            if not isinstance(state[key], Tensor):
                raise StateError(f"its state {key!r} is {state[key]!r}, no tensor")
            need = p.shape if fold is None and kept.state.axes else kept.shape
            if state[key].shape != need:
                raise StateError(f"its state {key!r} has shape {tuple(state[key].shape)}, not {tuple(need)}")
        self._fits = now

    def _follow(self, state: dict[str, Tensor], rule: Rule, deferred: bool) -> None:
        """Moves the states to where the model has been moved since they were made."""
        device, kept = self.p.device, rule.kept_in(self.layout)
        for key, t in state.items():
            if base_name(key) in kept and t.device != device and (t.ndim or deferred):
                state[key] = t.to(device)

    def lies_as_before(self, state: dict[str, Tensor], layout: Layout) -> bool:
        """Whether the views that are kept are still of the parameter and its states."""
        if self.seen is None:
            return False
        for name, t, address in self._states:
            if state.get(name) is not t or t.data_ptr() != address:
                return False
        p = self.p
        return self._key == (p.data_ptr(), p.stride(), layout)  # its shape is held to the gradient's

    def _look(self, g: Tensor, state: dict[str, Tensor], rule: Rule, layout: Layout, copies: Copies) -> list[Matrix]:
        p, before = self.p, len(copies.made)
        if rule.elementwise:
            found = self._rows(g, state, layout, copies)
        else:
            found = self._matrices(state, rule, layout, copies)
        # A DTensor's local part may be another object at each step.
        if self.placed.mesh is None and len(copies.made) == before:
            kept = rule.kept_in(self.layout)
            own = ((key, t) for key, t in state.items() if base_name(key) in kept)
            self._states = tuple((key, t, t.data_ptr()) for key, t in own)
            self._key = (p.data_ptr(), p.stride(), layout)
            self.seen = found
        return found

    def _parts(self, t: Tensor, like: Tensor, copies: Copies | None) -> list[Tensor]:
        """The upright matrices of a local tensor that lies as the weight does; ``copies`` None: to be read only."""
        fold = self.fold
        assert fold is not None
        weights, span = fold.weights(t, like, copies), self.placed.ranges[fold.row_axis]
        return [fold.part(u, k, span, copies) for u in weights for k in range(fold.parts)]

    def _matrices(self, state: dict[str, Tensor], rule: Rule, layout: Layout, copies: Copies) -> list[Matrix]:
        p, fold = self.p, self.fold
        assert fold is not None
        x, n = local(p.detach()), fold.cols
        sides = Sides.read_off(fold, rule, state)
        self._flips = sides.flips
        span = self.placed.ranges[fold.row_axis]
        xs = self._parts(x, x, copies)
        found: list[dict[str, Tensor]] = [{} for _ in xs]
        which = [(e, k) for e in range(len(xs) // fold.parts) for k in range(fold.parts)]
        for key, kept in stored(fold, rule.kept_in(self.layout), sides, None).items():
            t = local(state[key])
            if not kept.parts:
                parts = self._parts(t, x, copies) if kept.state.axes else [t] * len(xs)
                for i, part in enumerate(parts):
                    flip = sides.flips[which[i][1]] and bool(kept.state.axes)
                    found[i][kept.name] = part.T if flip else part
                continue
            for i, (e, k) in enumerate(which):
                if k in kept.parts:
                    found[i][kept.name] = kept.of(t, fold, e, k, sides, span, copies)
        made = []
        for i, (e, k) in enumerate(which):
            m, flip = fold.sizes[k], sides.flips[k]
            extents = partial(extents_of, fold, self.placed, sides.flips, k) if self.placed.mesh is not None else None
            made.append(
                Matrix(
                    xs[i].T if flip else xs[i],
                    xs[i],
                    found[i],
                    (n, m) if flip else (m, n),
                    (m, n),
                    rule.scale(m, n, sides.ranks[k]),
                    layout.transposed if flip else layout,
                    extents=extents,
                    place=self._place(e, k, flip),
                )
            )
        return made

    def _place(self, e: int, k: int, flip: bool) -> tuple[int, int, int]:
        """Which numbers the entries of part ``k`` of this rank's weight ``e`` have in the parameter."""
        fold, placed = self.fold, self.placed
        assert fold is not None
        (top, _, left, _), n = (0, 0, 0, 0), fold.cols
        if placed.mesh is not None:
            upright = extents_of(fold, placed, (False,) * fold.parts, k)
            top, _, left, _ = upright[placed.layout.shards.index]
        before = (e + placed.ranges[0][0] if fold.stacked else 0) * fold.rows + sum(fold.sizes[:k])
        return (before + top) * n + left, *((1, n) if flip else (n, 1))

    def _place_of_rows(self, shape: torch.Size) -> tuple[int, int, int]:
        """The same of an elementwise rule's rows; where an axis behind the second is cut, it depends on the layout."""
        starts = [first for first, _ in self.placed.ranges]
        widths = [math.prod(self.p.shape[axis + 1 :]) for axis in range(self.p.ndim)]
        return sum(map(math.prod, zip(starts, widths, strict=True))), widths[0] if shape[0] > 1 else 0, 1

    def _rows(self, g: Tensor, state: dict[str, Tensor], layout: Layout, copies: Copies) -> list[Matrix]:
        """A tensor of any shape as a row, or where it does not lie densely as what comes nearest."""
        x = local(self.p.detach())
        names = [name for name, spec in self.rule.states.items() if spec.axes]
        tensors = [x, g, *(local(state[name]) for name in names)]
        counters = {name: state[name] for name in self.rule.states if name not in names}
        # Entries of a part that is cut behind the first axis have no numbers in a row.
        cut = any(self.placed.ranges[a] != (0, n) for a, n in enumerate(self.p.shape) if a)
        found = None if cut else flat(tensors)
        if found is None and x.ndim <= 2:
            found = [t if t.ndim == 2 else t.reshape(1, -1) if t.ndim == 0 else t[None] for t in tensors]
        if found is None:
            found = [as_matrix(t, x) for t in tensors]
            for k, (t, view) in enumerate(zip(tensors, found, strict=True)):
                if k != 1 and not is_view(view, t):
                    copies.made.append(partial(write_back, t, view, x))
        rows, cols = found[0].shape
        states = dict(zip(names, found[2:], strict=True)) | counters
        place = self._place_of_rows(found[0].shape) if self.p.ndim else (0, 0, 1)
        return [Matrix(found[0], found[1], states, (rows, cols), (rows, cols), 1.0, layout, place=place)]


def extents_of(fold: Fold, placed: Placed, flips: tuple[bool, ...], k: int) -> list[Extent]:
    """What each rank of the shards has of the matrix that part ``k`` is."""
    found = []
    every = placed.ranges_over_shards()
    columns = _side_by_side({tuple(ranges[a] for a in fold.col_axes) for ranges in every})
    for ranges in every:
        top, bottom = (fold.before(k, row) for row in ranges[fold.row_axis])
        left, right = columns[tuple(ranges[a] for a in fold.col_axes)]
        found.append((left, right, top, bottom) if flips[k] else (top, bottom, left, right))
    return found


def _row(g: Tensor, x: Tensor, p: Tensor) -> Tensor | None:
    """The gradient as the row that its weight is seen as, if it lies as that does."""
    if x.shape[0] != 1 or x.shape[1] != p.numel():
        return None
    if g.is_contiguous() and p.is_contiguous():
        return g.view(1, -1)
    found = flat([p, g])
    return None if found is None else found[1]


def _side_by_side(parts: set[tuple[tuple[int, int], ...]]) -> dict[tuple[tuple[int, int], ...], tuple[int, int]]:
    """Columns for the parts into which ranks cut the axes of the columns. A convolution's come in the order of the
    parts: nothing that is done with a whole matrix knows an order of its columns.
    """
    order = sorted(parts)
    ends = list(accumulate(math.prod(b - a for a, b in part) for part in order))
    return dict(zip(order, zip([0, *ends], ends, strict=False), strict=True))


def has_no_data(p: Tensor) -> bool:
    """Whether it holds no numbers: on the "meta" device, or fake."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return p.is_meta or (fake is not None and isinstance(p, fake.FakeTensor))


def flat(tensors: list[Tensor]) -> list[Tensor] | None:
    """The tensors as single rows, all in one order of memory; None unless they are dense and lie alike."""
    first = tensors[0]
    strides = first.stride()
    order = sorted(range(first.ndim), key=lambda d: (-strides[d], d))
    rows = [t.permute(order) for t in tensors]
    return [t.view(1, -1) for t in rows] if all(t.is_contiguous() for t in rows) else None
