"""What one step costs a rank: the optimizer's own groups, layouts and states, and the rules' own bodies, counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..core.control import body
from ..core.entries import Entry, extents_of
from ..core.gradients import arrive, checked_by_the_step
from ..core.members import compressed
from ..core.optimizer import MatrixOptimizer
from ..core.rule import Rule
from ..core.runtime import BUCKET_BYTES, Runtime
from ..core.states import Sides, Stored, stored
from ..create import create, optimizer_of, rule_of
from ..distributed import Placed, Traffic, lay, unsharded
from ..requests import Body, Elementwise, Extent, LowRank, Matrix, Precision
from ..requests import Layout as Lies
from .costs import Cost
from .counting import CountingBackend, CountingCommunicator, Sent, Trace, traced
from .layouts import GridGroups, Spread
from .models import Model, Weight

__all__ = ["Count", "count"]

#: Whole steps that the compiled backends have in one piece.
_FUSED = (LowRank, Elementwise)


@dataclass(frozen=True)
class Count:
    """What one step costs one rank.

    Attributes:
        work: how often each cost, its flops and bytes, arises.
        traffic: bytes in collectives, as :meth:`orthdion.MatrixOptimizer.communication` counts them.
        sent: how often each collective, with its ranks and bytes.
        state_bytes: of the states that the rank keeps.
        weight_bytes: of the weights that it keeps.
        backward: bytes of gradients that something else averages before the step, as DDP does for a rule that cannot
            take gradients apart; in units of an all-reduce.
    """

    work: Counter[Cost]
    traffic: Traffic
    sent: Counter[Sent]
    state_bytes: int
    weight_bytes: int
    backward: int = 0

    @property
    def flops(self) -> int:
        """Of all kinds."""
        return sum(n * c.flops for c, n in self.work.items())

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(n * c.bytes for c, n in self.work.items())

    def flops_by_kind(self) -> dict[str, int]:
        """The same by kind of work."""
        found = Counter[str]()
        for c, n in self.work.items():
            found[c.kind] += n * c.flops
        return dict(found)


@dataclass
class _Part:
    """One parameter on this rank."""

    entry: Entry
    rule: Rule
    placed: Placed
    at: Lies
    sides: Sides
    offset: int = 0
    #: The dtype of the gradient that the step sees: wide, where replicas' gradients were averaged.
    gradient: torch.dtype = torch.float32

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of what the rank has of it."""
        return tuple(b - a for a, b in self.placed.ranges)


@dataclass
class _Planner:
    """The optimizer on "meta" that is planned, and what is shared between its parameters."""

    optimizer: MatrixOptimizer
    groups: GridGroups
    fused: bool
    traces: dict[Hashable, Trace] = field(default_factory=dict)
    _extents: dict[Hashable, list[Extent]] = field(default_factory=dict)
    _placed: dict[Hashable, Placed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rules = self.optimizer._rules()
        self.reduce_dtype = self.optimizer._comm.reduce_dtype
        self.buckets: dict[Hashable, tuple[CountingCommunicator, CountingBackend]] = {}
        self.traffic, self.sent, self.work = Traffic(), Counter[Sent](), Counter[Cost]()

    # ------------------------------------------------------------------ where things lie

    def part(self, weight: Weight, p: Tensor, where: Spread) -> _Part:
        """A parameter as its entry would be in a process of this rank.

        Raises:
            ValueError: where its rule cannot step what lies so.
        """
        entry = self.optimizer._entries[id(p)]
        rule = self.rules[id(entry.group)]
        fold = entry.fold
        sides = Sides((), ()) if fold is None else Sides.of(fold, rule)
        placed = self.placed(weight.name, entry, where)
        at = compressed(placed.layout, rule, fold, sides)
        if (why := rule.unsupported(at)) is not None:
            raise ValueError(f"{weight.name}: {why}")
        return _Part(entry, rule, placed, at, sides, gradient=p.dtype)

    def placed(self, name: str, entry: Entry, where: Spread) -> Placed:
        """Its place, the same object for weights that lie alike."""
        shape, fold = tuple(entry.p.shape), entry.fold
        roles = None if fold is None else tuple(fold.roles)
        key = (shape, roles, where)
        if key not in self._placed:
            if where.grid is None:
                whole = tuple((0, s) for s in shape)
                self._placed[key] = Placed(None, (), whole, unsharded(where.replicas), shape)
            else:
                own = None if roles is None else list(roles)
                self._placed[key] = lay(where.grid, where.placements, shape, name, own, where.replicas, self.groups)
        return self._placed[key]

    def stored(self, part: _Part, name: str) -> dict[str, Stored]:
        """Its states over all ranks."""
        lies = None if part.placed.mesh is None else (name, part.entry.p, part.placed)
        return stored(part.entry.fold, part.rule.kept_in(part.at), part.sides, lies)

    def bytes_of_states(self, part: _Part, name: str) -> int:
        """Of what the rank keeps."""
        total, formats = 0, self.optimizer._formats
        for kept in self.stored(part, name).values():
            lengths = [] if kept.state.axes == () else kept.lengths(part.placed) if kept.parts else part.sizes
            total += math.prod(lengths) * formats.of(kept.state, part.entry.p).itemsize
        return total

    # ------------------------------------------------------------------ matrices

    def matrices(self, part: _Part) -> list[tuple[Hashable, Callable[[], Matrix]]]:
        """The kinds of a parameter's matrices on this rank, and how each is made."""
        fold, placed, entry = part.entry.fold, part.placed, part.entry
        precision = Precision.of(entry.p.dtype, self.optimizer._rounding)
        rule = part.rule
        shared = (rule, entry.p.dtype, part.gradient, part.at, precision)
        if fold is None:
            size = math.prod(part.sizes)
            return [((shared, size), partial(self._row, part, size, precision))]
        first, last = placed.ranges[0] if fold.stacked else (0, 1)
        kinds: list[tuple[Hashable, Callable[[], Matrix]]] = []
        for k in range(fold.parts):
            key = (id(placed), fold, part.sides.flips, k)
            if key not in self._extents:
                self._extents[key] = extents_of(fold, placed, part.sides.flips, k)
            kinds.append(((shared, key), partial(self._matrix, part, k, self._extents[key], precision)))
        return kinds * (last - first)

    def _row(self, part: _Part, size: int, precision: Precision) -> Matrix:
        state = {name: self._state(part, name, (1, size) if spec.axes else ()) for name, spec in part.rule.kept.items()}
        return self._made(part, (1, size), state, (1, size), (1, size), 1.0, part.at, precision)

    def _matrix(self, part: _Part, k: int, extents: list[Extent], precision: Precision) -> Matrix:
        fold = part.entry.fold
        assert fold is not None
        m, n, r, flip = fold.sizes[k], fold.cols, part.sides.ranks[k], part.sides.flips[k]
        top, bottom, left, right = extents[part.at.shards.index]
        lengths = {"rows": bottom - top, "cols": right - left, "rank": r}
        lengths["out"] = lengths["cols" if flip else "rows"]
        state = {
            name: self._state(part, name, tuple(lengths[a] for a in spec.axes))
            for name, spec in part.rule.kept_in(part.at).items()
        }
        at = part.at.transposed if flip else part.at
        shape, here = (n, m) if flip else (m, n), (bottom - top, right - left)
        return self._made(part, here, state, shape, (m, n), part.rule.scale(m, n, r), at, precision, lambda: extents)

    def _state(self, part: _Part, name: str, shape: tuple[int, ...]) -> Tensor:
        dtype = self.optimizer._formats.of(part.rule.kept_in(part.at)[name], part.entry.p)
        return torch.empty(shape, dtype=dtype, device="meta")

    def _made(
        self,
        part: _Part,
        here: tuple[int, int],
        state: dict[str, Tensor],
        shape: tuple[int, int],
        fan: tuple[int, int],
        scale: float,
        at: Lies,
        precision: Precision,
        extents: Callable[[], list[Extent]] | None = None,
    ) -> Matrix:
        x = torch.empty(here, dtype=part.entry.p.dtype, device="meta")
        g = torch.empty(here, dtype=part.gradient, device="meta")
        cautious = part.rule.cautious_weight_decay
        return Matrix(x, g, state, shape, fan, scale, at, precision, diagnose=False, cautious=cautious, extents=extents)

    # ------------------------------------------------------------------ the step

    def whole_step(self, part: _Part) -> bool:
        """Whether a backend has this rule's step in one piece, for matrices that lie so."""
        return self.fused and part.at.trivial and isinstance(part.rule.in_one_piece(), _FUSED)

    def arrivals(self, parts: list[_Part]) -> None:
        """Gradients that ranks must agree upon, or average, before the rules see them."""
        asked: list[Any] = []
        for part in parts:
            alone = part.at.domain.size == 1
            if checked_by_the_step(part.rule, part.at) or (alone and self.whole_step(part)):
                continue
            kind = ("arrival", part.sizes, part.gradient, part.at)
            make = partial(_arrival, part.sizes, part.gradient, part.at)
            asked.append((kind, make, False, part.offset))
            if part.at.replicas.size > 1 and part.gradient != torch.float64:
                part.gradient = torch.float32
            part.at = part.at.synchronised()
        self.run(asked)

    def steps(self, parts: list[_Part]) -> None:
        """The rules' bodies."""
        asked: list[Any] = []
        for part in parts:
            fused = self.whole_step(part)
            for kind, make in self.matrices(part):
                asked.append((kind, partial(_step, part.rule, make), fused, part.offset))
        self.run(asked)

    def run(self, asked: list[tuple[Hashable, Callable[[], Body[Any]], bool, int]]) -> None:
        """Runs bodies, by their kinds, how they are made, whether fused, and their offsets, side by side as real ones
        are. Those of one bucket travel together; of buckets that hold the same kinds one is run.
        """
        for _, bucket in groupby(asked, key=lambda one: one[-1] // BUCKET_BYTES):
            kinds = []
            for kind, make, fused, _ in bucket:
                if kind not in self.traces:
                    self.traces[kind] = traced(make(), fused)
                self.work.update(self.traces[kind].work)
                kinds.append(kind)
            key = tuple(kinds)
            if key not in self.buckets:
                comm, backend = CountingCommunicator(self.reduce_dtype), CountingBackend()
                Runtime(comm, backend).run([self.traces[k].again() for k in kinds], [0] * len(kinds))
                self.buckets[key] = comm, backend
            comm, backend = self.buckets[key]
            self.traffic += comm.traffic
            self.sent.update(comm.sent)
            self.work.update(backend.work)


def _arrival(sizes: tuple[int, ...], dtype: torch.dtype, at: Lies) -> Body[Any]:
    return arrive(torch.empty(sizes, dtype=dtype, device="meta"), True, at)


def _step(rule: Rule, make: Callable[[], Matrix]) -> Body[Any]:
    return body(rule, make())


def count(
    model: Model,
    rule: str | type[Rule] | type[MatrixOptimizer],
    where: Callable[[Weight, GridGroups], Spread],
    *,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    fused: bool = True,
) -> Count:
    """Counts one step of a rank, without a process group of any size.

    Args:
        model: what is stepped.
        rule: of its hidden matrices.
        where: how each weight lies.
        options: the optimizer's keywords.
        dtype: of the weights.
        fused: whether the backend has whole steps in one piece, where rules have a form of them.

    Raises:
        ValueError: for options that the optimizer refuses, and layouts that its rule cannot step.
    """
    kind = rule_of(rule)
    if kind is not rule and optimizer_of(rule)._advance is not MatrixOptimizer._advance:
        raise ValueError(
            f"{rule} decides in each step what it sends, so its steps cannot be counted beforehand; plan its rule, "
            f"{kind.name!r}, for the steps in which all ranks meet"
        )
    groups = model.groups(dtype, kind.elementwise)
    optimizer = create(rule, [keys for keys, _ in groups], **dict(options or {}))
    planner = _Planner(optimizer, GridGroups(), fused)
    parts, offset, states, weights = [], 0, 0, 0
    for group, (_, named) in zip(optimizer.param_groups, groups, strict=True):
        for p, weight in zip(group["params"], named, strict=True):
            part = planner.part(weight, p, where(weight, planner.groups))
            part.offset = offset
            offset += p.numel() * p.element_size() // part.at.shards.size
            states += planner.bytes_of_states(part, weight.name)
            weights += math.prod(part.sizes) * p.element_size()
            parts.append(part)
    planner.arrivals(parts)
    planner.steps(parts)
    return Count(planner.work, planner.traffic, planner.sent, states, weights)
