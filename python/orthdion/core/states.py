"""The states of a parameter: how they start, how they lie over ranks, and how saved ones are fitted to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..distributed import Placed, is_dtensor, local
from .fold import Copies, Fold
from .rule import ON_DEMAND, Axis, Rule, States, StateSpec
from .starts import Orthonormal, generator

__all__ = ["Formats", "Sides", "Stored", "base_name", "fitted", "initial", "stored", "write_orthonormal"]

#: Ends the key of a state of those parts that are processed transposed, where others are not.
_WIDE = "_wide"


def base_name(key: str) -> str:
    """The rule's name of a state, from its key."""
    return key.removesuffix(_WIDE)


@dataclass(frozen=True)
class Formats:
    """What the user asked states to be stored in; None is the parameter's, or float32 for float16, whose range a
    momentum soon leaves.
    """

    momentum: torch.dtype | None = None
    q: torch.dtype | None = None

    def of(self, state: StateSpec, p: Tensor) -> torch.dtype:
        """The format of one state."""
        chosen = self.q if "rank" in state.axes else self.momentum
        return state.dtype or chosen or (torch.float32 if p.dtype == torch.float16 else p.dtype)


@dataclass(frozen=True)
class Sides:
    """Of each part of a parameter: whether the transposed matrix is processed, and its rank."""

    flips: tuple[bool, ...]
    ranks: tuple[int, ...]

    @staticmethod
    def of(fold: Fold, rule: Rule) -> Sides:
        """As a rule starts: one that is ``tall`` transposes what has more columns than rows."""
        flips = tuple(rule.tall and m < fold.cols for m in fold.sizes)
        return Sides(flips, tuple(rule.rank(m, fold.cols) for m in fold.sizes))

    @staticmethod
    def read_off(fold: Fold, rule: Rule, states: dict[str, Any]) -> Sides:
        """As states say, which may have another rank, or of a single matrix be the other side's.

        Raises:
            ValueError: where parts of unequal size would need unequal ranks that are not the rule's.
        """
        found = Sides.of(fold, rule)
        for key, kept in stored(fold, rule.kept, found, None).items():
            axes = kept.state.axes
            if "rank" not in axes or not isinstance(states.get(key), Tensor):
                continue
            shape = states[key].shape
            if len(shape) < len(axes):
                continue  # of another kind; told where states are compared with what they should be
            r = shape[axes.index("rank") - len(axes)]
            if r == max(found.ranks[k] for k in kept.parts):
                ranks = found.ranks
            elif len(set(fold.sizes)) == 1:
                ranks = (r,) * fold.parts
            else:
                raise ValueError(f"{key} has rank {r}; parts of unequal size cannot change their rank")
            flips = found.flips
            if fold.parts == 1 and axes == ("cols", "rank") and fold.rows != fold.cols:
                flips = (bool(rule.tall and shape[-2] == fold.rows),)
            found = Sides(flips, ranks)
        return found


@dataclass(frozen=True)
class Stored:
    """One tensor of a parameter's states.

    Attributes:
        name: the rule's name of it; parts that are processed transposed have a tensor of their own where not all are.
        state: its axes and start.
        parts: which parts of the parameter it is of.
        shape: over all ranks.
        axes: which of its axes go with which of the parameter's.
        width: how many entries belong to one of the parameter's there: the positions of a convolution's kernel.
        beside: parts lie side by side along this axis, counted from the first behind the stack's, as the parameter's
            rows do; None: one after the other along an axis of their own.
    """

    name: str
    state: StateSpec
    parts: tuple[int, ...]
    shape: torch.Size
    axes: dict[int, int]
    width: int = 1
    beside: int | None = None

    def lengths(self, placed: Placed) -> list[int]:
        """The shape of what this rank has of it."""
        found = list(self.shape)
        for axis, own in self.axes.items():
            first, last = placed.ranges[axis]
            found[own] = (last - first) * self.width
        return found

    def local_part(self, whole: Tensor, placed: Placed) -> Tensor:
        """The rank's part of the whole state."""
        for axis, own in self.axes.items():
            first, last = placed.ranges[axis]
            whole = whole.narrow(own, first * self.width, (last - first) * self.width)
        return whole

    def of(self, t: Tensor, fold: Fold, e: int, k: int, sides: Sides, span: tuple[int, int], copies: Copies) -> Tensor:
        """The state of part ``k`` of weight ``e``, from this rank's tensor."""
        t = t[e] if fold.stacked else t
        if fold.parts > 1:
            whole = self.beside is None
            t = t[self.parts.index(k)] if whole else fold.part(t, k, span, copies, self.beside or 0)
        if "rank" in self.state.axes:
            t = t.narrow(self.state.axes.index("rank"), 0, sides.ranks[k])
        return t


def stored(fold: Fold | None, states: States, sides: Sides, at: tuple[str, Tensor, Placed] | None) -> dict[str, Stored]:
    """Every tensor that a parameter's states are kept in. ``fold`` None: of an elementwise rule. ``at``: the name, the
    parameter and how it lies over ranks; None: as if on one.

    Raises:
        NotImplementedError: where a state would have to be split other than the parameter is.
    """
    found: dict[str, Stored] = {}
    for name, state in states.items():
        if state.axes == ():
            found[name] = Stored(name, state, (), torch.Size(()), {})
        elif fold is None or set(state.axes) == {"rows", "cols"}:
            shape = torch.Size(fold.shape) if fold is not None else at[1].shape if at is not None else torch.Size(())
            found[name] = Stored(name, state, (), shape, {a: a for a in range(len(shape))})
        else:
            for flip in sorted(set(sides.flips)):
                parts = tuple(k for k in range(fold.parts) if sides.flips[k] == flip)
                key = name if len(parts) == fold.parts or not flip else name + _WIDE
                found[key] = _stored(name, state, fold, parts, sides, flip, at)
    return found


def _stored(
    name: str,
    state: StateSpec,
    fold: Fold,
    parts: tuple[int, ...],
    sides: Sides,
    flip: bool,
    at: tuple[str, Tensor, Placed] | None,
) -> Stored:
    """Of a state of each matrix: the stack's axis, the parts', and then its own."""
    upright: Axis = "cols" if flip else "rows"
    across: Axis = "rows" if flip else "cols"
    state = replace(state, axes=tuple(upright if a == "out" else a for a in state.axes))
    several = fold.parts > 1
    rows = fold.rows if several else fold.sizes[0]
    sizes: dict[Axis, int] = {upright: rows, across: fold.cols, "rank": max(sides.ranks[k] for k in parts)}
    beside = state.axes.index(upright) if several and upright in state.axes else None
    lead = ((fold.stack,) if fold.stacked else ()) + ((len(parts),) if several and beside is None else ())
    shape = torch.Size((*lead, *(sizes[a] for a in state.axes)))
    if at is None:
        return Stored(name, state, parts, shape, {}, beside=beside)
    divided = [a for a in range(len(fold.shape)) if any(s.is_shard(a) for s in at[2].placements)]
    axes = {0: 0} if fold.stacked and 0 in divided else {}
    width = 1
    for own, axis in enumerate(state.axes, start=len(lead)):
        if axis == upright and fold.row_axis in divided:
            axes[fold.row_axis] = own
        if axis == across and any(a in divided for a in fold.col_axes):
            width = fold.cols // fold.shape[fold.col_axes[0]]
            if len(fold.col_axes) > 1:
                _check_convolution(*at, fold, divided)
            axes[fold.col_axes[0]] = own
    return Stored(name, state, parts, shape, axes, width, beside)


def _check_convolution(name: str, p: Tensor, placed: Placed, fold: Fold, divided: list[int]) -> None:
    """Refuses a convolution whose columns are not cut into whole input channels, alike on all ranks."""
    parts = 1
    for k, s in enumerate(placed.placements):
        parts *= placed.mesh.size(k) if s.is_shard(1) else 1
    late = [a for a in divided if a in fold.col_axes]
    if late != [1] or p.shape[1] % parts or not local(p).is_contiguous():
        raise NotImplementedError(
            f"{name} is sharded along axis {late} of a convolution's (out, in, kernel); shard its first axis"
        )


def write_orthonormal(
    made: Tensor, kept: Stored, fold: Fold, sides: Sides, placed: Placed, draws: torch.Generator
) -> None:
    """Fills this rank's part of a state that starts orthonormal in each matrix; zero beyond a part's rank."""
    stack = placed.ranges[0] if fold.stacked and 0 in kept.axes else (0, fold.stack)
    span, copies = placed.ranges[fold.row_axis], Copies()
    length, lead = kept.shape[-2], made.ndim - 2
    first = next((placed.ranges[a][0] * kept.width for a, own in kept.axes.items() if own == lead), 0)
    for e in range(fold.stack):
        for k in kept.parts:
            n = length if kept.beside is None else fold.sizes[k]
            whole = Orthonormal(n, sides.ranks[k], draws)
            if stack[0] <= e < stack[1]:
                row = first if kept.beside is None else fold.before(k, span[0])
                whole.write(kept.of(made, fold, e - stack[0], k, sides, span, copies), row)
    copies.write_back()


def initial(
    p: Tensor,
    fold: Fold | None,
    sides: Sides,
    placed: Placed,
    layout: dict[str, Stored],
    formats: Formats,
    seed: int | None,
    index: int,
) -> dict[str, Tensor]:
    """A parameter's first states; ``seed`` None: on a device that holds no numbers."""
    here, states = local(p).detach(), {}
    for key, kept in layout.items():
        dtype = formats.of(kept.state, p)
        if kept.state.axes == ():
            # Counted for each parameter, as torch does: one that first gets a gradient late has a count of its own.
            states[key] = torch.zeros((), dtype=dtype, device="cpu")
            continue
        if not kept.parts:
            made = torch.zeros_like(here, dtype=dtype, memory_format=torch.preserve_format)
        else:
            made = torch.zeros(kept.lengths(placed), dtype=dtype, device=here.device)
        if kept.state.start == "orthonormal" and fold is not None and seed is not None:
            write_orthonormal(made, kept, fold, sides, placed, generator(seed, index))
        states[key] = placed.wrap(made, kept.shape, kept.axes)
    return states


def fitted(
    name: str,
    p: Tensor,
    fold: Fold | None,
    placed: Placed,
    rule: Rule,
    states: States,
    formats: Formats,
    current: dict[str, Tensor],
    saved: dict[str, Any],
) -> dict[str, Tensor]:
    """The saved states on the parameter's device and ranks, in the dtypes of the current ones. ``states``: what the
    rule keeps here.

    Another rank is welcome, and so are ranked states on the matrix's other side. What a rule keeps in some layouts only
    starts afresh where it was not saved.

    Raises:
        ValueError: for states that are missing, or that have other shapes.
    """
    usual_sides = Sides((), ()) if fold is None else Sides.of(fold, rule)
    usual = stored(fold, states, usual_sides, (name, p, placed))
    # What only some layouts need, and what only the host follows, starts afresh where it was not saved.
    late = {k for k, kept in usual.items() if kept.state.host or kept.name not in rule.kept} - saved.keys()
    if absent := {k: kept for k, kept in usual.items() if k in late or k not in current}:
        fresh = initial(p, fold, usual_sides, placed, absent, formats, None, 0)
        current, saved = {**fresh, **current}, {**{k: fresh[k] for k in late}, **saved}
    if missing := usual.keys() - saved.keys():
        raise ValueError(
            f"the loaded state of {name} has no {', '.join(sorted(missing))} (it has {', '.join(saved)}); "
            "it is of another kind of optimizer"
        )
    new = {k: saved[k] if isinstance(saved[k], Tensor) else torch.as_tensor(saved[k]) for k in usual}
    layout = usual
    if fold is not None and all(new[k].ndim == len(usual[k].shape) for k in usual):
        try:
            sides = Sides.read_off(fold, rule, new)
        except ValueError as e:
            raise ValueError(f"the loaded state of {name}: {e}") from None
        if all(r <= min(m, fold.cols) for r, m in zip(sides.ranks, fold.sizes, strict=True)):
            layout = stored(fold, states, sides, (name, p, placed))
    others = usual.keys() | ON_DEMAND
    result: dict[str, Any] = {k: v for k, v in saved.items() if base_name(k) not in others and k not in usual}
    for key, kept in layout.items():
        if tuple(new[key].shape) != tuple(kept.shape):
            raise ValueError(
                f"the loaded {key} of {name} has shape {tuple(new[key].shape)}, but {tuple(kept.shape)} is needed; "
                "load it into the model that it was saved from"
            )
        result[key] = _fitted(placed, kept, current[key], new[key])
    return result


def _fitted(placed: Placed, kept: Stored, tensor: Tensor, new: Tensor) -> Tensor:
    own = local(tensor)
    if not is_dtensor(tensor):
        return _like(own, new.full_tensor() if is_dtensor(new) else new)  # type: ignore[attr-defined]
    alike = is_dtensor(new) and new.shape == tensor.shape
    if alike and (new.device_mesh, new.placements) == (tensor.device_mesh, tensor.placements):  # type: ignore[attr-defined]
        part = local(new)
    else:
        part = kept.local_part(new.full_tensor() if is_dtensor(new) else new, placed)  # type: ignore[attr-defined]
    return placed.wrap(_like(own, part), kept.shape, kept.axes)


def _like(own: Tensor, part: Tensor) -> Tensor:
    """A copy with the dtype, device and memory order of the present state."""
    target = torch.empty_like(own) if part.shape == own.shape else part.new_empty(part.shape)
    return target.to(own.dtype).to(own.device).copy_(part)
