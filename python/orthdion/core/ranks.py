"""Ranks that follow the effective rank of what they capture (docs/algorithms.md, section 10).

A step leaves the sums of squares of R's columns (:func:`observed`), the same numbers on every rank. The host makes the
next rank of them: at the end of the step on a CPU; from a device that it does not wait for at the start of the next
one, when they have long arrived, or when the state is saved. A parameter's Q is then made anew with more or fewer
columns; that it has another one than before is all that the rest of an optimizer has to know.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..distributed import Placed, local
from ..requests import Map, Matrix, Reduce
from .entries import Entry
from .fold import Copies, Fold
from .rule import Rule, StateSpec
from .starts import generator
from .states import Sides, stored, write_orthonormal

__all__ = ["EFFECTIVE", "Ranks", "effective_rank", "next_rank", "observed", "refuse"]

#: The state of a parameter whose rank changes: the running mean of its effective rank, on the host.
EFFECTIVE = {"effective_rank": StateSpec((), dtype=torch.float64, host=True)}
#: What the running mean keeps of itself, and the rank over it.
_KEPT, _ROOM = 0.9, 1.5
#: Ranks change in steps of so many columns, from the least to this share of the smaller side, by so many more at most.
_STEP, _LEAST, _MOST, _MORE = 8, 16, 0.7, 16


def observed(w: Matrix, r: Tensor) -> Generator[Any, Any, None]:
    """Leaves ‖R_j‖² of every column for the host. Where a factorisation was shared out, R's last digits differ between
    ranks, so that all of them agree on the largest.
    """
    sums = yield Reduce((yield Map(_column_squares, (r,))), w.layout.cols, "norms")
    w.spectrum = yield Reduce(sums, w.layout.domain, "norms", op="max")


def _column_squares(r: Tensor) -> Tensor:
    return r.double().square().sum(-2)


def effective_rank(squares: Sequence[float]) -> float:
    """``exp(entropy)`` of normalised column norms, from their squares; 0 where nothing is known."""
    norms = [math.sqrt(s) if math.isfinite(s) else math.inf for s in squares]
    total = sum(norms)
    if not 0.0 < total < math.inf:
        return 0.0
    return math.exp(-sum(n / total * math.log(n / total) for n in norms if n > 0.0))


def next_rank(r: int, d: int, mean: float, multiple: int = 1) -> int:
    """The rank after r for a matrix whose smaller side is d: 1.5 times the effective rank, in steps of 8 from 16 to
    0.7·d, at most 16 more or 8 fewer. With ``multiple`` a step is the least that both divide.
    """
    step = math.lcm(_STEP, multiple)
    most = step * math.floor(round(_MOST * d / step, 9))
    if most == 0:  # too small a matrix to have a choice
        return r
    least = min(step * math.ceil(_LEAST / step), most)
    wanted = min(max(step * round(_ROOM * mean / step), least), most)
    return min(max(wanted, r - step), r + step * max(_MORE // step, 1))


def refuse(name: str, rule: Rule, fold: Fold | None, placed: Placed) -> None:
    """Refuses parameters whose matrices cannot all have a new rank.

    Raises:
        ValueError: for parts of unequal sizes. NotImplementedError: for a stack that is shared out.
    """
    if not rule.adapts or fold is None:
        return
    rest = "give it a group of its own with adaptive_rank=False"
    if len(set(fold.sizes)) > 1:
        raise ValueError(f"{name}: adaptive_rank needs parts of one size, but they have {fold.sizes} rows; {rest}")
    if placed.stack_is_shared(fold.stacked):
        raise NotImplementedError(
            f"{name}: with adaptive_rank all matrices of a stack have one rank, which ranks that hold different ones "
            f"would have to agree on; {rest}"
        )


@dataclass
class Ranks:
    """What steps have observed and nobody has drawn conclusions from, by parameter, in the order of its matrices."""

    _seen: dict[Tensor, list[Tensor | None]] = field(default_factory=dict)
    _arriving: dict[torch.device, tuple[Tensor, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._seen)

    def take(self, bodies: Sequence[tuple[Tensor, Matrix, Rule]]) -> None:
        """What a step's bodies have left."""
        for p, w, rule in bodies:
            if rule.adapts:
                self._seen.setdefault(p, []).append(w.spectrum)
                w.spectrum = None

    def send(self) -> bool:
        """Sends what is on a device to the host; whether all of it is there at once."""
        there: dict[torch.device, list[Tensor]] = {}
        for t in (t for seen in self._seen.values() for t in seen if t is not None):
            if t.device.type == "cuda":
                there.setdefault(t.device, []).append(t)
        for device, spectra in there.items():
            with torch.cuda.device(device):
                numbers = torch.cat(spectra)
                here = torch.empty_like(numbers, device="cpu", pin_memory=True)
                here.copy_(numbers, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._arriving[device] = here, event
        return not there

    def settle(self, entries: dict[int, Entry], state: Any, rules: dict[int, Rule], seed: int) -> None:
        """Gives every parameter that was observed its next rank; waits for what was sent."""
        sent = {}
        for device, (here, event) in self._arriving.items():
            event.synchronize()
            sent[device] = iter(here.tolist())
        seen, self._seen, self._arriving = self._seen, {}, {}
        for p, spectra in seen.items():
            numbers = [_numbers(t, sent) for t in spectra]
            entry = entries.get(id(p))
            if entry is None or entry.p is not p or entry.fold is None or id(entry.group) not in rules:
                continue
            found = [e for e in map(effective_rank, numbers) if e > 0.0]
            if found:
                _follow(entry, rules[id(entry.group)], state[p], numbers, sum(found) / len(found), seed)


def _numbers(t: Tensor | None, sent: dict[torch.device, Iterator[float]]) -> list[float]:
    if t is None:
        return []
    if t.device.type == "cuda":
        return [next(sent[t.device]) for _ in range(t.numel())]
    found: list[float] = t.tolist()
    return found


def _follow(entry: Entry, rule: Rule, state: Any, squares: list[list[float]], found: float, seed: int) -> None:
    fold, mean = entry.fold, state["effective_rank"]
    assert fold is not None
    before = float(mean)
    mean.fill_(_KEPT * before + (1.0 - _KEPT) * found if before > 0.0 else found)
    r = Sides.read_off(fold, rule, state).ranks[0]
    new = next_rank(r, min(fold.sizes[0], fold.cols), float(mean), getattr(rule, "rank_multiple_of", 1))
    if new != r:
        _relay(entry, rule, state, squares, new, seed)


def _relay(entry: Entry, rule: Rule, state: Any, squares: list[list[float]], new: int, seed: int) -> None:
    """Ranked states with ``new`` columns: the largest of the old ones, and then random ones of the parameter's own."""
    p, fold, placed = entry.p, entry.fold, entry.placed
    assert fold is not None
    was = Sides.read_off(fold, rule, state)
    sides, at = Sides(was.flips, (new,) * fold.parts), ("", p, placed)
    span, count = placed.ranges[fold.row_axis], len(squares) // fold.parts
    old = stored(fold, rule.kept, was, at)
    for key, kept in stored(fold, rule.kept, sides, at).items():
        if "rank" not in kept.state.axes:
            continue
        there = local(state[key])
        made = torch.zeros(kept.lengths(placed), dtype=there.dtype, device=there.device)
        draws = generator(seed + 10_007 * int(entry.group["step"]), entry.index)
        write_orthonormal(made, kept, fold, sides, placed, draws)
        copies = Copies()
        for i, (e, k) in enumerate((e, k) for e in range(count) for k in range(fold.parts)):
            if k not in kept.parts:
                continue
            source = old[key].of(there, fold, e, k, was, span, Copies())
            target = kept.of(made, fold, e, k, sides, span, copies)
            columns = _largest(squares[i], source.shape[1], new)
            target[:, : len(columns)] = source[:, columns]
        copies.write_back()
        state[key] = placed.wrap(made, kept.shape, kept.axes)


def _largest(squares: list[float], r: int, count: int) -> list[int]:
    """Which of r columns to keep, ascending; the first ones where nothing is known of them."""
    if len(squares) != r or not all(map(math.isfinite, squares)):
        return list(range(min(r, count)))
    return sorted(sorted(range(r), key=lambda j: -squares[j])[:count])
