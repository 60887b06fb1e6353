"""Cases of CurvaDion, and of DDP models whose gradients stay apart."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from cases import gradient, randn, replaced, same_on_all
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import orthdion

SHAPES = [(16, 12), (12, 20), (9,)]


def build(**options: Any) -> tuple[list[nn.Parameter], orthdion.CurvaDion]:
    params = [nn.Parameter(randn(*s, seed=5 + i, dtype=torch.float64)) for i, s in enumerate(SHAPES)]
    groups = [{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}]
    o = orthdion.CurvaDion(groups, dist.group.WORLD, lr=0.01, rank_fraction=0.3, **options)
    return params, o


def give(params: list[nn.Parameter], k: int, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = scale * gradient(tuple(p.shape), k, i, dist.get_rank(), torch.float64)


def replicas_meet(local_step: str) -> tuple[Any, list[bool], list[int]]:
    """Equal to the bit after each synchronisation, and only then; a flag on the wire in between."""
    params, o = build(threshold=1e9, max_interval=4, local_step=local_step)
    equal, sent = [], []
    for k in range(13):
        give(params, k)
        o.step()
        equal.append(same_on_all(params))
        sent.append(o.communication().last_step.bytes)
    q = [s["Q"] for s in o.state.values() if "Q" in s]
    assert same_on_all(q)
    return o.synchronisation(), equal, sent


def gate() -> list[int]:
    """One rank's change is every rank's: at which steps they met."""
    params, o = build(threshold=0.5, max_interval=1000)
    met, before = [], 0
    for k in range(12):
        give(params, 0, 100.0 if k == 7 and dist.get_rank() == 1 else 1e-3 if k else 1.0)
        o.step()
        now = o.synchronisation().synchronised
        if now > before:
            met.append(k)
        before = now
    return met


def always(**options: Any) -> bool:
    """With τ = 0 it is Dion with replicas."""
    params, o = build(threshold=0.0, **options)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    groups = [{"params": others[:2]}, {"params": others[2:], "algorithm": "adamw"}]
    dion = orthdion.Dion(groups, dist.group.WORLD, lr=0.01, rank_fraction=0.3)
    for k in range(6):
        for x, opt in ((params, o), (others, dion)):
            give(x, k)
            opt.step()
    return all(torch.equal(a, b) for a, b in zip(params, others, strict=True)) and o.synchronisation().rate == 1.0


def troubles_between_meetings() -> bool:
    """A NaN, or no gradient, on one rank in a local step: the others go on, and all are equal after the next."""
    params, o = build(threshold=1e9, max_interval=5)
    for k in range(11):
        give(params, k)
        if k in (2, 7) and dist.get_rank() == 1:
            params[0].grad[0, 0] = math.nan
            params[2].grad[0] = math.nan
        if k == 3 and dist.get_rank() == 0:
            params[1].grad = None
        o.step()
    assert dist.get_rank() != 1 or sum(o.skipped_steps.values()) == 4
    give(params, 11)
    o.synchronize_for_checkpoint()
    assert same_on_all([*params, *(t for s in o.state.values() for t in s.values())])
    return all(bool(p.isfinite().all()) for p in params)


def shards_between_meetings() -> bool:
    """A NaN on one shard leaves the whole matrix alone in a local step too."""
    from cases import Shard, full, mesh, sharded

    p = nn.Parameter(sharded(randn(8, 6, seed=1, dtype=torch.float64), mesh((-1,)), (Shard(0),)))
    o = orthdion.CurvaDion([p], threshold=1e9)
    for k in range(2):
        g = randn(8, 6, seed=k, dtype=torch.float64)
        if k:
            g[-1, 0] = math.nan
        before = full(p).clone()
        p.grad = sharded(g, mesh((-1,)), (Shard(0),))
        o.step()
    return torch.equal(before, full(p)) and sum(o.skipped_steps.values()) == 1


def ddp(prepare: bool) -> tuple[bool, list[str], bool]:
    """Whether gradients stay apart through backward, what is warned of, and whether weights are equal after steps."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24)))
    replicas = orthdion.decouple(model) if prepare else dist.group.WORLD
    o = orthdion.OrthDion(orthdion.param_groups(model), replicate_mesh=replicas, rank_fraction=0.25)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(3):
            o.zero_grad()
            for micro in range(2):
                x = randn(8, 24, seed=100 * k + 10 * micro + dist.get_rank(), dtype=torch.float32)
                if micro == 0:
                    with model.no_sync():
                        model(x).square().mean().backward()
                else:
                    model(x).square().mean().backward()
            apart = not same_on_all([p.grad for p in model.parameters()])
            o.step()
    return apart, [str(w.message) for w in caught], same_on_all(list(model.parameters()))


def uncovered() -> str:
    """An optimizer that lacks some of a decoupled model's parameters."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    try:
        orthdion.OrthDion([model.module[0].weight], replicate_mesh=orthdion.decouple(model))
    except ValueError as e:
        return str(e)
    return "accepted"


def clipping() -> tuple[float, float]:
    """Of replicas: the root mean square of their norms, no smaller than the norm of the mean."""
    p = nn.Parameter(randn(40, 30, seed=1, dtype=torch.float64))
    o = orthdion.OrthDion([p], replicate_mesh=dist.group.WORLD, rank_fraction=0.1)
    p.grad = gradient((40, 30), 0, 0, dist.get_rank(), torch.float64).clone()
    mean = p.grad.clone()
    dist.all_reduce(mean)
    square = p.grad.square().sum()
    dist.all_reduce(square)
    expected = float((square / dist.get_world_size()).sqrt())
    found = float(o.clip_grad_norm_(0.5))
    assert abs(found - expected) < 1e-12 * expected
    assert found >= float(mean.norm()) / dist.get_world_size()
    after = p.grad.square().sum()
    dist.all_reduce(after)
    return float((after / dist.get_world_size()).sqrt()), 0.5


def saved_by_one_rank() -> str:
    """state_dict() on one rank only is refused, in time."""
    from orthdion.distributed import meet

    p = nn.Parameter(randn(40, 30, seed=1, dtype=torch.float64))
    o = orthdion.OrthDion([p], replicate_mesh=dist.group.WORLD, rank_fraction=0.1)
    p.grad = gradient((40, 30), 0, 0, dist.get_rank(), torch.float64).clone()
    o.step()
    message = ""
    with replaced(meet, "__defaults__", (1.0,)):
        if dist.get_rank() == 0:
            try:
                o.state_dict()
            except RuntimeError as e:
                message = str(e)
    return message
