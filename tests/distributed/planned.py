"""What was sent, held to what is planned for the same step: every collective's bytes, on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from orthdion.core.groups import MATRIX
from orthdion.core.optimizer import MatrixOptimizer
from orthdion.plan.layouts import Grid, Spread
from orthdion.plan.models import Model, Weight
from orthdion.plan.planner import count
from orthdion.requests import Group

__all__ = ["check", "on_replicas", "over"]

#: Rules that choose by their numbers what a rank sends: all ranks together send what is planned for all.
BY_NUMBERS = ("dion2", "dion3")
#: Rules that send either of some contents, as the conditioning has it: the plan is for good ones, and the
#: rest of what is sent is held to the plan.
BY_CONDITION = {"mofasgd": ("gram", "triangles")}
#: How many checks there were.
_turns = [0]


def over(sizes: Sequence[int], placements: tuple[Any, ...], rank: int) -> Spread:
    """Placements on a mesh over all ranks."""
    return Spread(Grid(tuple(sizes), rank), placements)


def on_replicas(hybrid: bool, rank: int) -> Spread:
    """Replicas with gradients of their own, sharded over a second mesh dimension or not."""
    from torch.distributed.tensor import Shard

    size = dist.get_world_size()
    if not hybrid:
        return Spread(None, (), Group(tuple(range(size)), rank))
    half = size // 2
    copies = Group((rank % half, rank % half + half), rank // half)
    return Spread(Grid((half,), rank, rank // half * half), (Shard(0),), copies)


def check(
    o: MatrixOptimizer,
    shapes: Sequence[tuple[int, ...]],
    options: dict[str, Any],
    where: Any,
    dtype: torch.dtype,
    keys: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Asserts that the last step has sent what is planned; ``where(i, rank)`` says how parameter i lies. The ranks
    take turns: in each case one of them is held to its plan.

    ``options`` are the constructor's, ``keys`` those of a group for each parameter.
    """
    if options.get("backend") == "cupy":
        return  # there the host does not know whether a second Cholesky QR is needed, and its sums always travel
    rule = o._own if type(o) is MatrixOptimizer else type(o)
    known = {k: v for k, v in options.items() if k not in ("optimizer", "backend", "replicate_mesh")}
    groups = [{"algorithm": MATRIX, **k} for k in keys] if keys else [{"algorithm": MATRIX}] * len(shapes)
    model = Model("", tuple(Weight(str(i), tuple(s), k) for i, (s, k) in enumerate(zip(shapes, groups, strict=True))))
    rank, sent = dist.get_rank(), o.communication().last_step
    _turns[0] += 1
    own = _turns[0] % dist.get_world_size() == rank

    def planned(of: int) -> Any:
        return count(model, rule, lambda w, _: where(int(w.name), of), options=known, dtype=dtype).traffic

    if o._own.name in BY_NUMBERS:
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (sent.by_collective, sent.by_content))
        plans = [planned(k) for k in range(len(everywhere))] if own else []
        for part in range(2) if own else ():
            found = sum((one[part] for one in everywhere), Counter())
            expected = sum(((p.by_collective, p.by_content)[part] for p in plans), Counter())
            assert found == expected, (o._own.name, found, expected)
        return
    if not own:
        return
    plan = planned(rank)
    if either := BY_CONDITION.get(o._own.name):
        ours, theirs = ({k: n for k, n in t.by_content.items() if k not in either} for t in (plan, sent))
        assert ours == theirs, (o._own.name, ours, theirs)
        return
    assert plan.by_content == sent.by_content, (o._own.name, plan.by_content, sent.by_content)
    assert plan.by_collective == sent.by_collective, (o._own.name, plan.by_collective, sent.by_collective)
    assert plan.collectives == sent.collectives, (o._own.name, plan.collectives, sent.collectives)
