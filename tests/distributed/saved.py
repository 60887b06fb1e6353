"""Cases of checkpoints: states that one process saved go on over several, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import own_rules  # noqa: F401  # registers them
import torch
import torch.distributed as dist
from cases import Shard, build, distance, full, mesh, randn, sharded, state_errors
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

#: shape, group keys, placement
SAVED: list[tuple[tuple[int, ...], dict[str, Any], Any]] = [
    ((13, 7), {}, Shard(0)),
    ((7, 13), {}, Shard(0)),
    ((9, 12), {}, Shard(1)),
    ((12, 9), {}, Shard(1)),
    ((1, 6), {}, Shard(0)),  # a rank has nothing of it
    ((5, 8, 5), {}, Shard(0)),  # a stack, shared out
    ((3, 9, 5), {}, Shard(1)),
    ((3, 5, 9), {}, Shard(2)),
    ((15, 4), {"split_sizes": (5, 5, 5)}, Shard(0)),  # a part is cut inside a shard
    ((12, 10), {"split_sizes": (4, 4, 4)}, Shard(1)),
    ((12, 10), {"split_sizes": (4, 4, 4)}, Shard(0)),
    ((13, 5), {"split_sizes": (8, 3, 2)}, Shard(0)),  # one tall, two wide
    ((18, 5), {"split_sizes": (4, 1, 1), "interleaved": 3}, Shard(0)),
    ((4, 14), {"transposed": True, "split_sizes": (9, 5)}, Shard(1)),
    ((3, 4, 12), {"transposed": True, "split_sizes": (1, 1), "interleaved": 6}, Shard(2)),
    ((12, 3, 2, 2), {}, Shard(0)),
    ((9,), {"algorithm": "adamw"}, Shard(0)),
    ((7, 3), {"algorithm": "lion"}, Shard(0)),
]
STEPS, BROKEN_OFF = 6, 3


def model(spread: bool) -> nn.Module:
    """The parameters of :data:`SAVED`, whole or over the ranks."""
    made = nn.Module()
    for i, (shape, _, at) in enumerate(SAVED):
        x = randn(*shape, seed=5 + i, dtype=torch.float64)
        made.register_parameter(f"p{i}", nn.Parameter(sharded(x, mesh((-1,)), (at,)) if spread else x))
    return made


def optimizer(of: nn.Module, name: str) -> Any:
    groups = [{"params": [p], **keys} for p, (_, keys, _) in zip(of.parameters(), SAVED, strict=True)]
    return build(groups, {"optimizer": name})


def run(of: nn.Module, o: Any, spread: bool, start: int, stop: int) -> None:
    for k in range(start, stop):
        for i, (p, (shape, _, at)) in enumerate(zip(of.parameters(), SAVED, strict=True)):
            g = randn(*shape, seed=1000 * k + i, dtype=torch.float64)
            p.grad = sharded(g, mesh((-1,)), (at,)) if spread else g
        o.step()


def unbroken(name: str) -> tuple[nn.Module, Any]:
    whole = model(False)
    o = optimizer(whole, name)
    run(whole, o, False, 0, STEPS)
    return whole, o


def gathered(o: Any, of: nn.Module) -> dict[str, Any]:
    """Weights and states of a sharded run as whole tensors."""
    state = o.state_dict()
    states = {i: {k: full(t).clone() for k, t in s.items()} for i, s in state["state"].items()}
    weights = {name: full(p).clone() for name, p in of.named_parameters()}
    return {"model": weights, "optimizer": {**state, "state": states}}


def pass_on_whole(before: nn.Module, o: Any, after: nn.Module, p: Any, file: Path) -> None:
    """By torch.save of whole tensors, which every process loads."""
    state = gathered(o, before)
    if dist.get_rank() == 0:
        torch.save(state, file)
    dist.barrier()
    state = torch.load(file, weights_only=True)
    with torch.no_grad():
        for name, x in after.named_parameters():
            whole = state["model"][name]
            x.copy_(sharded(whole, x.device_mesh, x.placements) if hasattr(x, "placements") else whole)
    p.load_state_dict(state["optimizer"])


def pass_on_dcp(before: nn.Module, o: Any, after: nn.Module, p: Any, folder: Path) -> None:
    """By torch.distributed.checkpoint; a process by itself saves on rank 0, and each one loads for itself."""
    spread = [any(hasattr(x, "placements") for x in m.parameters()) for m in (before, after)]
    if spread[0] or dist.get_rank() == 0:
        weights, states = get_state_dict(before, o)
        dcp_save({"model": weights, "optimizer": states}, checkpoint_id=str(folder), no_dist=not spread[0])
    dist.barrier()
    weights, states = get_state_dict(after, p)
    state: dict[str, Any] = {"model": weights, "optimizer": states}
    dcp_load(state, checkpoint_id=str(folder), no_dist=not spread[1])
    set_state_dict(after, p, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def continued(name: str, how: str, first_spread: bool, folder: str) -> list[float]:
    """Errors of weights and states of a run that was broken off, saved, and continued in the other layout."""
    models = [model(first_spread), model(not first_spread)]
    optimizers = [optimizer(m, name) for m in models]
    run(models[0], optimizers[0], first_spread, 0, BROKEN_OFF)
    run(models[1], optimizers[1], not first_spread, 0, 1)  # what is loaded replaces what was there
    pass_on = {"whole": pass_on_whole, "dcp": pass_on_dcp}[how]
    pass_on(models[0], optimizers[0], models[1], optimizers[1], Path(folder) / how)
    run(models[1], optimizers[1], not first_spread, BROKEN_OFF, STEPS)
    whole, alone = unbroken(name)
    return [
        max(distance(p, q.detach()), state_errors([optimizers[1].state[p]], [alone.state[q]]))
        for p, q in zip(models[1].parameters(), whole.parameters(), strict=True)
    ]


def states_along_rows() -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Whether states of one axis lie where the rule's axis lies: name, whole and local shape, of each parameter."""
    found = []
    for name in ("row-variance", "tall-row-variance"):
        spread = model(True)
        o = optimizer(spread, name)
        for p in list(spread.parameters())[:-2]:
            v = o.state[p]["variance"]
            found.append((name, tuple(v.shape), tuple(v.to_local().shape)))
    return found


def swapped(name: str, saves_first: bool) -> tuple[float, bool]:
    """Error of a run whose parameters were sharded after its optimizer was built, as ``accelerate`` does under FSDP2,
    and whether nothing is kept of what they were.
    """
    whole, spread = model(False), model(True)
    o = optimizer(whole, name)
    new = dict(zip(map(id, whole.parameters()), spread.parameters(), strict=True))
    for group in o.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]
    if saves_first:
        o.load_state_dict(o.state_dict())
    run(spread, o, True, 0, STEPS)
    alone_model, alone = unbroken(name)
    worst = max(
        max(distance(p, q.detach()), state_errors([o.state[p]], [alone.state[q]]))
        for p, q in zip(spread.parameters(), alone_model.parameters(), strict=True)
    )
    return worst, o.state.keys() == set(spread.parameters())
