"""Cases with something missing or broken on one rank."""

from __future__ import annotations

import math
from typing import Any

import cases
import torch
import torch.distributed as dist
from cases import Shard, copies_agree, full, gradient, mesh, randn, replaced, same_on_all, sharded
from torch import Tensor

import orthdion
from orthdion.core import runtime

SHAPES = [(12, 8), (8, 12), (6, 6, 4), (9,), (40, 4)]
GROUPS = [{"algorithm": "matrix"}, {}, {"algorithm": "matrix"}, {"algorithm": "adamw"}, {}]


def parameters(replicated: bool, requires=SHAPES) -> list[torch.nn.Parameter]:
    values = [randn(*s, seed=5 + i, dtype=torch.float64) for i, s in enumerate(requires)]
    if not replicated:
        values = [sharded(v, mesh((-1,)), (Shard(0),)) for v in values]
    return [torch.nn.Parameter(v) for v in values]


def optimizer(params: list[torch.nn.Parameter], replicated: bool, **options) -> orthdion.OrthDion:
    groups = [{"params": [p], **g} for p, g in zip(params, GROUPS, strict=False)]
    where = {"replicate_mesh": dist.group.WORLD} if replicated else {}
    return orthdion.OrthDion(groups, lr=0.05, weight_decay=0.1, rank_fraction=0.3, **where, **options)


def part(g: Tensor, replicated: bool) -> Tensor:
    return g.clone() if replicated else sharded(g, mesh((-1,)), (Shard(0),))


def give(params: list[Tensor], k: int, replicated: bool) -> None:
    replica = dist.get_rank() if replicated else 0
    for i, p in enumerate(params):
        p.grad = part(gradient(tuple(p.shape), k, i, replica, torch.float64), replicated)


def copies_are_equal(params: list[Tensor], o: Any, replicated: bool) -> bool:
    """Whether ranks that hold the same part of a weight or of Q have the same bits."""
    return copies_agree(
        [*params, *(s["Q"] for s in o.state.values() if "Q" in s)], dist.group.WORLD if replicated else None
    )


def missing_gradient(replicated: bool) -> None:
    """None on one rank counts as zero; None everywhere leaves the parameter alone."""
    for lost in range(len(SHAPES)):
        params = parameters(replicated)
        o = optimizer(params, replicated)
        give(params, 0, replicated)
        o.step()
        before = [full(p).clone() for p in params]
        give(params, 1, replicated)
        if dist.get_rank() == 1:
            params[lost].grad = None
        o.step()
        assert copies_are_equal(params, o, replicated)
        assert all(not torch.equal(full(p), b) for p, b in zip(params, before, strict=True))
        before = [full(p).clone() for p in params]
        give(params, 2, replicated)
        params[lost].grad = None
        o.step()
        moved = [not torch.equal(full(p), b) for p, b in zip(params, before, strict=True)]
        assert moved == [i != lost for i in range(len(SHAPES))]


def missing_at_the_first_step() -> None:
    """Also when nothing is known yet, and when it is the only parameter: the very step of a zero in its place."""
    for shapes in ([(20, 16)], [(20, 16), (16, 20)]):
        results = []
        for absent in (True, False):
            params = parameters(True, shapes)
            o = orthdion.OrthDion(params, replicate_mesh=dist.group.WORLD, rank_fraction=0.2)
            give(params, 0, True)
            if dist.get_rank() == 1:
                params[0].grad = None if absent else torch.zeros_like(params[0])
            o.step()
            assert same_on_all(params)
            results.append([p.detach().clone() for p in params])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def small_buckets() -> Any:
    """Few matrices travel together, while it lasts."""
    return replaced(runtime, "BUCKET_BYTES", 20_000)


def unlike_numbers_of_experts(count: int) -> float:
    """Ranks with unlike numbers of a stack's matrices, and dense ones that they share, over several buckets."""
    shapes = [(count, 40, 30), *[(40, 30)] * 6]
    where, placement = mesh((-1,)), (Shard(0),)
    worst = 0.0
    for backend in ("rust", "torch"):
        whole = [torch.nn.Parameter(randn(*s, seed=i, dtype=torch.float64)) for i, s in enumerate(shapes)]
        parts = [torch.nn.Parameter(sharded(p.detach(), where, placement)) for p in whole]
        both = [orthdion.OrthDion(x, rank_fraction=0.2, backend=backend) for x in (whole, parts)]
        for k in range(2):
            for i, s in enumerate(shapes):
                whole[i].grad = gradient(s, k, i, 0, torch.float64).clone()
                parts[i].grad = sharded(whole[i].grad, where, placement)
            norms = [float(o.clip_grad_norm_(1.0)) for o in both]
            assert abs(norms[0] - norms[1]) < 1e-12 * norms[0]
            with small_buckets():
                for o in both:
                    o.step()
        worst = max(worst, cases.errors(parts, whole))
    return worst


def experts_without_a_gradient(name: str, poisoned: bool) -> None:
    """One rank's experts saw nothing, or a NaN: they stay, the others' move, and later buckets are cut alike.

    With a missing gradient every rank also clips by one norm.
    """
    shapes = [(4, 40, 30), *[(40, 30)] * 6]
    params = parameters(False, shapes)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params[1:]]
    both = [orthdion.create(name, x, lr=0.05) for x in (params, twins)]
    for p, twin in zip(params[1:], twins, strict=True):  # a start depends on the parameter's place
        both[1].state[twin] = {key: t.detach().clone() for key, t in both[0].state[p].items()}
    for k in range(2):
        give(params, k, False)
        if dist.get_rank() == 1:
            params[0].grad = None
        if poisoned:
            g = cases.local(gradient(shapes[0], k, 0, 0, torch.float64)).clone()
            params[0].grad = part(g.fill_(math.nan) if dist.get_rank() == 1 else g, False)
        else:
            norms: list[float] = [0.0] * dist.get_world_size()
            dist.all_gather_object(norms, float(both[0].clip_grad_norm_(1.0)))
            assert len(set(norms)) == 1
        for p, twin in zip(params[1:], twins, strict=True):
            twin.grad = p.grad.detach().clone()
        before = [cases.local(p.detach()).clone() for p in params]
        with small_buckets():
            for o in both:
                o.step()
        moved = [not torch.equal(cases.local(p), b) for p, b in zip(params, before, strict=True)]
        assert moved == [dist.get_rank() != 1, *[True] * 6]
    assert bool(both[0].skipped_steps) == (poisoned and dist.get_rank() == 1)
    for p, twin in zip(params[1:], twins, strict=True):
        assert cases.distance(p, full(twin)) < 1e-10


def nan_on_one_rank(replicated: bool) -> None:
    """That parameter is left alone on every rank, counted on every rank, and moves again afterwards."""
    for bad in range(len(SHAPES)):
        for poison in (math.nan, math.inf):
            params = parameters(replicated)
            o = optimizer(params, replicated)
            give(params, 0, replicated)
            o.step()
            before = [full(p).clone() for p in params]
            give(params, 1, replicated)
            if dist.get_rank() == 1:
                g = cases.local(params[bad].grad)
                g.view(-1)[-1] = poison
            o.step()
            moved = [not torch.equal(full(p), b) for p, b in zip(params, before, strict=True)]
            stack = bad == 2  # one matrix of the stack is skipped, the others are not
            assert [m for i, m in enumerate(moved) if i != bad] == [True] * (len(SHAPES) - 1)
            assert moved[bad] == stack
            counts = [0] * dist.get_world_size()
            dist.all_gather_object(counts, sum(o.skipped_steps.values()))
            assert counts[1] == 1 and (stack or set(counts) == {1}), counts
            give(params, 2, replicated)
            o.step()
            assert all(bool(full(p).isfinite().all()) for p in params)
            assert copies_are_equal(params, o, replicated)


def zero_gradient(replicated: bool) -> None:
    """Nothing but the weight decay, and as before after it."""
    params = parameters(replicated)
    o = optimizer(params, replicated)
    for p in params:
        p.grad = torch.zeros_like(p)
    before = [full(p).clone() for p in params]
    q = [full(s["Q"]).clone() for s in o.state.values() if "Q" in s]
    o.step()
    for p, b in zip(params, before, strict=True):
        assert torch.allclose(full(p), b * (1 - 0.05 * 0.1), rtol=1e-14, atol=0)
    assert all(torch.equal(a, full(s["Q"])) for a, s in zip(q, [s for s in o.state.values() if "Q" in s], strict=True))


def rank_deficient(right_factor: str) -> None:
    """Gradients of rank 1 with r = 4: null directions, whose warm start must agree with one process's."""
    shapes = [(16, 12), (12, 16), (40, 10)]

    def low(shape: tuple[int, int], k: int, i: int) -> Tensor:
        u, v = (randn(s, seed=40 + 3 * i + s, dtype=torch.float64) for s in shape)
        return (1.0 + k) * torch.outer(u, v)

    for placement in (Shard(0), Shard(1)):
        params = [
            torch.nn.Parameter(sharded(randn(*s, seed=5 + i, dtype=torch.float64), mesh((-1,)), (placement,)))
            for i, s in enumerate(shapes)
        ]
        plain = [torch.nn.Parameter(full(p).clone()) for p in params]
        both = [orthdion.OrthDion(x, right_factor=right_factor, rank_fraction=0.4) for x in (params, plain)]
        for k in range(6):
            for i, s in enumerate(shapes):
                plain[i].grad = low(s, k, i)
                params[i].grad = sharded(plain[i].grad, mesh((-1,)), (placement,))
            for o in both:
                o.step()
        for p, x in zip(params, plain, strict=True):
            assert torch.allclose(full(p), x, atol=1e-9)
            q = full(both[0].state[p]["Q"])
            if right_factor != "column":
                assert torch.allclose(q.T @ q, torch.eye(q.shape[1], dtype=q.dtype), atol=1e-9)
            assert torch.allclose(q, both[1].state[x]["Q"], atol=1e-6)


def extreme_scales() -> None:
    """The step does not depend on the gradient's scale, sharded as in one process."""
    results = []
    for scale in (1.0, 1e-30, 1e12):
        p = torch.nn.Parameter(sharded(randn(12, 8, seed=1, dtype=torch.float32), mesh((-1,)), (Shard(0),)))
        o = orthdion.OrthDion([p], weight_decay=0.0)
        g = gradient((12, 8), 0, 0, 0, torch.float64)
        p.grad = sharded((g * scale).float(), mesh((-1,)), (Shard(0),))
        o.step()
        results.append(full(p))
    assert all(torch.allclose(results[0], r, atol=1e-6) for r in results)


def refusals() -> list[str]:
    """What cannot be handled is refused by name, before anything is built."""
    messages = []
    world, w = dist.group.WORLD, mesh((-1,))
    p = torch.nn.Parameter(randn(40, 40, seed=1, dtype=torch.float32))
    shard = torch.nn.Parameter(sharded(p.detach(), w, (Shard(0),)))
    conv = torch.nn.Parameter(sharded(randn(200, 5, 3, 3, seed=1, dtype=torch.float32), w, (Shard(1),)))
    two = mesh((2, -1))
    attempts = [
        lambda: orthdion.CompletedDion([p], replicate_mesh=world),
        lambda: orthdion.OrthDion([p], replicate_mesh=two),
        lambda: orthdion.OrthDion([p], replicate_mesh="dp"),
        lambda: orthdion.OrthDion([p], replicate_mesh=world, outer_shard_mesh=w),
        lambda: orthdion.OrthDion([shard], outer_shard_mesh=two["axis0"]),
        lambda: orthdion.OrthDion([{"params": [conv]}]),
        lambda: orthdion.decouple(torch.nn.Linear(3, 3)),
        lambda: orthdion.OrthDion([p], replicate_mesh=world).__getstate__(),
        lambda: orthdion.OrthDion([p], replicate_mesh_grad_sync=1),
        lambda: orthdion.OrthDion([p], reduce_dtype=torch.float16),
        lambda: orthdion.OrthDion(
            [torch.nn.Parameter(sharded(p.detach(), two["axis1"], (Shard(0),)))], replicate_mesh=world
        ),
        lambda: orthdion.OrthDion([shard], outer_shard_mesh=w),
    ]
    for attempt in attempts:
        try:
            attempt()
            messages.append("accepted")
        except (ValueError, TypeError, NotImplementedError) as e:
            messages.append(f"{type(e).__name__}: {e}")
    return messages
