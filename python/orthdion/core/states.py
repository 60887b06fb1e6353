"""The states of a parameter: how they start, how they lie over ranks, and how saved ones are fitted to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed import Placed, is_dtensor, local
from . import matrices
from .rule import Rule, StateSpec

__all__ = ["Formats", "Spec", "fitted", "initial", "orientation", "ranked_of", "single", "specs"]


@dataclass(frozen=True)
class Spec:
    """A state's whole shape, which of its axes are which of the parameter's, and how many of its entries belong to one
    of the parameter's there: the positions of a convolution's kernel.
    """

    shape: torch.Size
    axes: dict[int, int]
    width: int = 1

    def part(self, whole: Tensor, placed: Placed) -> Tensor:
        """The rank's part of the whole state."""
        for axis, own in self.axes.items():
            start, stop = placed.ranges[axis]
            whole = whole.narrow(own, start * self.width, (stop - start) * self.width)
        return whole


@dataclass(frozen=True)
class Formats:
    """What the user asked states to be stored in; None is the parameter's."""

    momentum: torch.dtype | None = None
    q: torch.dtype | None = None

    def of(self, state: StateSpec, p: Tensor) -> torch.dtype:
        """The format of one state."""
        chosen = self.q if "rank" in state.axes else self.momentum
        return state.dtype or chosen or p.dtype


def single(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether the parameter is one matrix, whose states have no leading axis."""
    return not (p.ndim == 3 and not group["flatten"]) and group["row_blocks"] == 1


def orientation(p: Tensor, group: dict[str, Any], rule: type[Rule], ranked: Tensor | None = None) -> bool:
    """Whether the transposed matrix is processed: for a rule that is ``tall``, where the columns are more; unless a
    state with axes (cols, rank) says already which side is which.
    """
    if not rule.tall:
        return False
    _, m, n = matrices.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
    return m < n if ranked is None or m == n else bool(ranked.shape[-2] == m)


def ranked_of(rule: type[Rule], states: dict[str, Any]) -> Any:
    """A state with axes (cols, rank), from which orientation and rank can be read; None if there is none."""
    return next((states[k] for k, s in rule.states.items() if s.axes == ("cols", "rank") and k in states), None)


def specs(
    name: str, p: Tensor, group: dict[str, Any], placed: Placed, rule: type[Rule], r: int, flip: bool
) -> dict[str, Spec]:
    """Of each state.

    Raises:
        NotImplementedError: where a state would have to be split other than the parameter is.
    """
    found = {}
    for key, state in rule.states.items():
        if state.axes == ():
            found[key] = Spec(torch.Size(()), {})
        elif rule.elementwise or set(state.axes) == {"rows", "cols"}:
            found[key] = Spec(p.shape, {a: a for a in range(p.ndim)})
        else:
            found[key] = _spec(name, p, group, placed, state, r, flip)
    return found


def _spec(name: str, p: Tensor, group: dict[str, Any], placed: Placed, state: StateSpec, r: int, flip: bool) -> Spec:
    """Of a state of each matrix: the stack's axis, or the blocks', and then its own."""
    blocks, stacked = group["row_blocks"], p.ndim == 3 and not group["flatten"]
    count, m, n = matrices.matrix_shape(p.shape, group["flatten"], blocks)
    upright, across = ("cols", "rows") if flip else ("rows", "cols")
    sizes = {upright: m, across: n, "rank": r}
    first = 1 if stacked else 0
    divided = [a for a in range(p.ndim) if any(s.is_shard(a) for s in placed.placements)]
    if blocks > 1 and state.axes == (upright,):  # blocks of rows stay side by side, as the parameter's are
        return Spec(torch.Size((p.shape[0],)), {0: 0} if 0 in divided else {})
    lead = () if single(p, group) else (count,)
    shape = torch.Size((*lead, *(sizes[a] for a in state.axes)))
    axes = {0: 0} if stacked and 0 in divided else {}
    width = 1
    for own, axis in enumerate(state.axes, start=len(lead)):
        if axis == upright and first in divided:
            if blocks > 1:
                raise NotImplementedError(
                    f"{name}: its {blocks} blocks of {m} rows are wider than tall, and its rows are sharded; "
                    "shard its columns, or give its group row_blocks=1"
                )
            axes[first] = own
        if axis == across and (late := [a for a in divided if a > first]):
            if p.ndim > 2 and not stacked:
                parts = 1
                for k, s in enumerate(placed.placements):
                    parts *= placed.mesh.size(k) if s.is_shard(1) else 1
                if late != [1] or p.shape[1] % parts or not local(p).is_contiguous():
                    raise NotImplementedError(
                        f"{name} is sharded along axis {late} of a convolution's (out, in, kernel); shard its first "
                        "axis"
                    )
                width = n // p.shape[1]
            axes[first + 1] = own
    return Spec(shape, axes, width)


def initial(
    p: Tensor, rule: type[Rule], placed: Placed, layout: dict[str, Spec], start: Tensor | None, formats: Formats
) -> dict[str, Tensor]:
    """A parameter's first states; ``start`` is the whole of those that start orthonormal."""
    here, state = local(p).detach(), {}
    for key, spec in rule.states.items():
        dtype = formats.of(spec, p)
        if spec.axes == ():
            # Counted for each parameter, as torch does: one that first gets a gradient late has a count of its own.
            state[key] = torch.zeros((), dtype=dtype, device="cpu")
            continue
        if spec.start == "orthonormal":
            assert start is not None
            part = layout[key].part(start.view(layout[key].shape), placed)
            # A copy of its own: nothing larger is kept alive, and nothing is shared.
            made = part.to(device=here.device, dtype=dtype, copy=True).contiguous()
        elif rule.elementwise or set(spec.axes) == {"rows", "cols"}:
            made = torch.zeros_like(here, dtype=dtype, memory_format=torch.preserve_format)
        else:
            lengths = list(layout[key].shape)
            for axis, own in layout[key].axes.items():
                first, last = placed.ranges[axis]
                lengths[own] = (last - first) * layout[key].width
            made = torch.zeros(lengths, dtype=dtype, device=here.device)
        state[key] = placed.wrap(made, layout[key].shape, layout[key].axes)
    return state


def fitted(
    name: str,
    p: Tensor,
    group: dict[str, Any],
    placed: Placed,
    rule: type[Rule],
    current: dict[str, Tensor],
    saved: dict[str, Any],
) -> dict[str, Tensor]:
    """The saved states on the parameter's device and ranks, in the dtypes of the current ones.

    Another rank is welcome, and so are ranked states on the matrix's other side.

    Raises:
        ValueError: for states that are missing, or that have other shapes.
    """
    own = {k: t for k, t in current.items() if k in rule.states}
    if missing := own.keys() - saved.keys():
        raise ValueError(
            f"the loaded state of {name} has no {', '.join(sorted(missing))} (it has {', '.join(saved)}); "
            "it is of another kind of optimizer"
        )
    new = {k: saved[k] if isinstance(saved[k], Tensor) else torch.as_tensor(saved[k]) for k in own}
    ranked = ranked_of(rule, new)
    if ranked is not None:
        flip, r = _ranked_like(name, p, group, rule, ranked, ranked_of(rule, own))
    else:
        flip, r = orientation(p, group, rule), _rank_in(rule, own)
    layout = specs(name, p, group, placed, rule, r, flip)
    result: dict[str, Any] = {k: v for k, v in saved.items() if k not in own}
    for key, tensor in own.items():
        if tuple(new[key].shape) != tuple(layout[key].shape):
            raise _misfit(name, key, new[key], layout[key].shape)
        result[key] = _fitted(placed, layout[key], tensor, new[key])
    return result


def _rank_in(rule: type[Rule], states: dict[str, Tensor]) -> int:
    """The length of the axis "rank" of any state; 0 where none has it."""
    ranks = [states[k].shape[s.axes.index("rank") - len(s.axes)] for k, s in rule.states.items() if "rank" in s.axes]
    return ranks[0] if ranks else 0


def _ranked_like(
    name: str, p: Tensor, group: dict[str, Any], rule: type[Rule], ranked: Tensor, current: Tensor
) -> tuple[bool, int]:
    """``(flip, rank)`` that a saved ranked state has."""
    m, n = matrices.matrix_shape(p.shape, group["flatten"], group["row_blocks"])[1:]
    fits = ranked.ndim == current.ndim and ranked.shape[:-2] == current.shape[:-2]
    if not fits or ranked.shape[-2] not in (m, n) or ranked.shape[-1] > min(m, n):
        key = next(k for k, s in rule.states.items() if s.axes == ("cols", "rank"))
        raise _misfit(name, key, ranked, current.shape)
    return orientation(p, group, rule, ranked), ranked.shape[-1]


def _misfit(name: str, key: str, new: Tensor, need: torch.Size) -> ValueError:
    return ValueError(
        f"the loaded {key} of {name} has shape {tuple(new.shape)}, but {tuple(need)} is needed; load it into the model "
        "that it was saved from"
    )


def _fitted(placed: Placed, spec: Spec, tensor: Tensor, new: Tensor) -> Tensor:
    own = local(tensor)
    if not is_dtensor(tensor):
        return _like(own, new.full_tensor() if is_dtensor(new) else new)  # type: ignore[attr-defined]
    alike = is_dtensor(new) and new.shape == tensor.shape
    if alike and (new.device_mesh, new.placements) == (tensor.device_mesh, tensor.placements):  # type: ignore[attr-defined]
        part = local(new)
    else:
        part = spec.part(new.full_tensor() if is_dtensor(new) else new, placed)  # type: ignore[attr-defined]
    return placed.wrap(_like(own, part), spec.shape, spec.axes)


def _like(own: Tensor, part: Tensor) -> Tensor:
    """A copy with the dtype, device and memory order of the present state."""
    target = torch.empty_like(own) if part.shape == own.shape else part.new_empty(part.shape)
    return target.to(own.dtype).to(own.device).copy_(part)
