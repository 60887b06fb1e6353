"""Cases of ranks that follow the effective rank, over processes."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from cases import (
    LAYOUTS,
    Replicate,
    Shard,
    build,
    copies_agree,
    distance,
    full,
    mesh,
    randn,
    sharded,
    spread,
    state_errors,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import orthdion
from orthdion.checkpoints import LayoutPlanner

SHAPES = [(64, 48), (48, 80), (61, 43)]
STEPS = 8


def gradient(shape: tuple[int, ...], k: int, i: int, replica: int = 0) -> Tensor:
    """Of full rank, and after some steps of rank 4; each replica's noise is its own."""
    m, n = shape[-2:]
    u, v = randn(m, 4, seed=i, dtype=torch.float64), randn(4, n, seed=10 + i, dtype=torch.float64)
    noise = randn(*shape, seed=1000 * k + 100 * replica + i, dtype=torch.float64)
    return noise if k < 3 else 10.0 * u @ v + 0.1 * noise


def ranks(o: Any, params: list[Any]) -> list[int]:
    return [o.state[p]["Q"].shape[-1] for p in params]


def alone(options: dict[str, Any], replicas: int = 1) -> tuple[list[Any], Any, list[list[int]]]:
    """One process on the mean gradients: parameters, the optimizer, and the ranks of each step."""
    params = [torch.nn.Parameter(randn(*s, seed=5 + i, dtype=torch.float64)) for i, s in enumerate(SHAPES)]
    o = build(params, options, adaptive_rank=True)
    found = []
    for k in range(STEPS):
        found.append(ranks(o, params))
        for i, p in enumerate(params):
            p.grad = sum(gradient(SHAPES[i], k, i, r) for r in range(replicas)) / replicas
        o.step()
    return params, o, [*found, ranks(o, params)]


def as_on_one_process(layout: str, options: dict[str, Any], shared: bool) -> dict[str, Any]:
    """``shared``: factorisations are shared out among ranks, whose last digits of R then differ."""
    sizes, placements = LAYOUTS[layout]
    where = mesh(sizes)
    params = [
        torch.nn.Parameter(sharded(randn(*s, seed=5 + i, dtype=torch.float64), where, placements))
        for i, s in enumerate(SHAPES)
    ]
    o = build(params, options, adaptive_rank=True)
    found, sent = [], []
    with spread(shared):
        for k in range(STEPS):
            found.append(ranks(o, params))
            for i, p in enumerate(params):
                p.grad = sharded(gradient(SHAPES[i], k, i), where, placements)
            o.step()
            sent.append(dict(o.communication().last_step.by_content))
    found.append(ranks(o, params))
    return compared(o, params, found, sent, *alone(options))


def compared(
    o: Any, params: list[Any], found: Any, sent: Any, whole: list[Any], one: Any, expected: Any
) -> dict[str, Any]:
    states = [dict(o.state[p]) for p in params]
    plain = [{k: t for k, t in s.items() if k != "effective_rank"} for s in states]
    means = [float(s["effective_rank"]) for s in states]
    return {
        "ranks": (found, expected),
        "error": max(distance(p, q.detach()) for p, q in zip(params, whole, strict=True)),
        "states": state_errors(states, [dict(one.state[q]) for q in whole]),
        "same": copies_agree([*params, *(t for s in plain for t in s.values())]),
        "means": means,
        "sent": sent,
    }


def replicas_of_their_own(options: dict[str, Any]) -> dict[str, Any]:
    """Factors in place of gradients: what travels follows the rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    params = [torch.nn.Parameter(randn(*s, seed=5 + i, dtype=torch.float64)) for i, s in enumerate(SHAPES)]
    o = build(params, options, adaptive_rank=True, replicate_mesh=dist.group.WORLD)
    found, sent = [], []
    for k in range(STEPS):
        found.append(ranks(o, params))
        for i, p in enumerate(params):
            p.grad = gradient(SHAPES[i], k, i, rank)
        o.step()
        sent.append(dict(o.communication().last_step.by_content))
    found.append(ranks(o, params))
    o.state_dict()  # averages momenta
    return compared(o, params, found, sent, *alone(options, size))


def continued_on_one_process(options: dict[str, Any], broken_off: int) -> tuple[list[int], float]:
    """A sharded run is saved as whole tensors and goes on alone: the ranks that it was saved with, and the distance
    from a run that nothing has broken off.
    """
    params = [
        torch.nn.Parameter(sharded(randn(*s, seed=5 + i, dtype=torch.float64), mesh((-1,)), (Shard(0),)))
        for i, s in enumerate(SHAPES)
    ]
    o = build(params, options, adaptive_rank=True)
    for k in range(broken_off):
        for i, p in enumerate(params):
            p.grad = sharded(gradient(SHAPES[i], k, i), mesh((-1,)), (Shard(0),))
        o.step()
    saved = o.state_dict()
    saved["state"] = {i: {k: full(t).clone() for k, t in s.items()} for i, s in saved["state"].items()}
    here = [torch.nn.Parameter(full(p).clone()) for p in params]
    other = build(here, options, adaptive_rank=True)
    other.load_state_dict(saved)
    kept = ranks(other, here)
    for k in range(broken_off, STEPS):
        for i, p in enumerate(here):
            p.grad = gradient(SHAPES[i], k, i)
        other.step()
    whole, one, _ = alone(options)
    states = state_errors([dict(other.state[p]) for p in here], [dict(one.state[q]) for q in whole])
    return kept, max(states, *(distance(p, q.detach()) for p, q in zip(here, whole, strict=True)))


#: shape, group keys, placement
TOGETHER: list[tuple[tuple[int, ...], dict[str, Any], Any]] = [
    ((3, 48, 60), {}, Shard(1)),
    ((3, 48, 60), {}, Shard(2)),
    ((96, 60), {"split_sizes": (48, 48)}, Shard(0)),  # wide parts: Q's rows are cut as the weight's
    ((120, 40), {"num_heads": 2}, Shard(1)),
    ((96, 60), {"split_sizes": (4, 4), "interleaved": 12}, Shard(0)),  # Q's rows are brought together by a copy
]


def matrices_with_one_rank() -> list[tuple[float, list[int], list[int]]]:
    """Stacks and fused parts: the largest error of weights and states, and the ranks here and on one process."""
    where, found = mesh((-1,)), []
    for (i, (shape, keys, at)), fraction in product(enumerate(TOGETHER), (1.0, 0.4)):  # to fall, and to rise
        whole = torch.nn.Parameter(randn(*shape, seed=i, dtype=torch.float64))
        part = torch.nn.Parameter(sharded(whole.detach(), where, (at,)))
        one, spread_out = (
            orthdion.OrthDion([{"params": [p], **keys}], lr=0.05, rank_fraction=fraction, adaptive_rank=True)
            for p in (whole, part)
        )
        ranks_here, ranks_alone = ranks(spread_out, [part]), ranks(one, [whole])
        for k in range(4):
            whole.grad = gradient(shape, 2 * k, i)
            part.grad = sharded(whole.grad, where, (at,))
            one.step()
            spread_out.step()
            ranks_here += ranks(spread_out, [part])
            ranks_alone += ranks(one, [whole])
        states = state_errors([dict(spread_out.state[part])], [dict(one.state[whole])])
        found.append((max(states, distance(part, whole.detach())), ranks_here, ranks_alone))
    return found


def a_stack_that_is_shared_out() -> str:
    p = torch.nn.Parameter(sharded(randn(4, 24, 32, seed=1, dtype=torch.float64), mesh((-1,)), (Shard(0),)))
    copies = torch.nn.Parameter(sharded(randn(4, 24, 32, seed=1, dtype=torch.float64), mesh((-1,)), (Replicate(),)))
    orthdion.OrthDion([copies], adaptive_rank=True)
    try:
        orthdion.OrthDion([p], adaptive_rank=True)
    except NotImplementedError as e:
        return str(e)
    return ""


def through_dcp(folder: str, broken_off: int) -> tuple[list[int], float, str]:
    """A sharded run is saved by torch.distributed.checkpoint and goes on in an optimizer made anew, which has other
    ranks: the ranks loaded, the distance from the unbroken run, and what is said where the planner is torch's own.
    """

    def made(adaptive: bool = True) -> tuple[torch.nn.Module, Any]:
        model = torch.nn.Module()
        for i, s in enumerate(SHAPES):
            x = sharded(randn(*s, seed=5 + i, dtype=torch.float64), mesh((-1,)), (Shard(0),))
            model.register_parameter(f"p{i}", torch.nn.Parameter(x))
        options = {"optimizer": "orth-dion", "rank_fraction": 0.5, "feedback": "pure"}
        return model, build(list(model.parameters()), options, adaptive_rank=adaptive)

    def run(model: torch.nn.Module, o: Any, steps: range) -> None:
        for k in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = sharded(gradient(SHAPES[i], k, i), mesh((-1,)), (Shard(0),))
            o.step()

    first, o = made()
    run(first, o, range(broken_off))
    weights, states = get_state_dict(first, o)
    dcp_save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    again, p = made()
    weights, states = get_state_dict(again, p)
    state = {"model": weights, "optimizer": states}
    try:
        dcp_load(dict(state), checkpoint_id=folder)
        said = ""
    except CheckpointException as e:  # no Exception
        said = str(e)
    dcp_load(state, checkpoint_id=folder, planner=LayoutPlanner())
    set_state_dict(again, p, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = ranks(p, list(again.parameters()))
    for model, optimizer in ((first, o), (again, p)):
        run(model, optimizer, range(broken_off, STEPS))
    return loaded, max(distance(x, full(y)) for x, y in zip(again.parameters(), first.parameters(), strict=True)), said


def late_states_through_dcp(folder: str) -> tuple[bool, str]:
    """From an optimizer without ``adaptive_rank`` into one with it: whether the running mean starts afresh, and what is
    said of a state that must not be missing.
    """
    model = torch.nn.Module()
    x = sharded(randn(64, 48, seed=1, dtype=torch.float64), mesh((-1,)), (Shard(0),))
    model.register_parameter("p", torch.nn.Parameter(x))
    options = {"optimizer": "orth-dion", "rank_fraction": 0.5}
    for adaptive in (False, True):
        o = build(list(model.parameters()), options, adaptive_rank=adaptive)
        model.p.grad = sharded(gradient((64, 48), 0, 0), mesh((-1,)), (Shard(0),))
        o.step()
        weights, states = get_state_dict(model, o)
        state = {"model": weights, "optimizer": states}
        if not adaptive:
            dcp_save(state, checkpoint_id=folder)
    dcp_load(state, checkpoint_id=folder, planner=LayoutPlanner())
    set_state_dict(model, o, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    afresh = "effective_rank" not in o.state[model.p] or float(o.state[model.p]["effective_rank"]) == 0.0
    o = build(list(model.parameters()), options, row_variance=0.9)
    weights, states = get_state_dict(model, o)
    try:
        dcp_load({"model": weights, "optimizer": states}, checkpoint_id=folder, planner=LayoutPlanner())
        return afresh, ""
    except CheckpointException as e:
        return afresh, str(e)
