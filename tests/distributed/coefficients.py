"""Cases of replicas that send coefficients of their own momenta, as DeMo does."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from cases import gradient, randn, same_on_all
from torch import Tensor

import orthdion


def _side(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


def _cosines(n: int) -> Tensor:
    c = [[math.cos(math.pi * (2 * j + 1) * k / (2 * n)) for k in range(n)] for j in range(n)]
    return torch.nn.functional.normalize(torch.tensor(c, dtype=torch.float64), dim=0)


def papers_step(x: Tensor, deltas: list[Tensor], gs: list[Tensor], lr: float, decay: float, k: int, most: int) -> None:
    """DeMo (arXiv 2411.19870) on as many replicas as there are momenta, in place."""
    h, w = (_side(n, most) for n in x.shape)
    left, right = _cosines(h), _cosines(w)
    for delta, g in zip(deltas, gs, strict=True):
        delta.mul_(decay).add_(g, alpha=lr)
    step = torch.zeros_like(x)
    for i in range(0, x.shape[0], h):
        for j in range(0, x.shape[1], w):
            at = slice(i, i + h), slice(j, j + w)
            total, senders = torch.zeros(h * w).double(), torch.zeros(h * w).double()
            for delta in deltas:
                q = (left.T @ delta[at] @ right).flatten()
                sent = q.abs().sort(descending=True).indices[:k]
                total[sent] += q[sent]
                senders[sent] += 1
                few = torch.zeros_like(q)
                few[sent] = q[sent]
                delta[at] -= left @ few.view(h, w) @ right.T
            step[at] = left @ (total / senders.clamp_min(1)).view(h, w) @ right.T
    x.sub_(lr * step.sign())


def replicas_take_the_papers_step(shapes: list[tuple[int, int]], steps: int, k: int, most: int) -> dict[str, Any]:
    """How far weights and this replica's momenta are from the paper's, whether all have the same bits of weights, what
    the last step sent, and what momenta are after a checkpoint.
    """
    rank, size, dtype = dist.get_rank(), dist.get_world_size(), torch.float64
    params = [torch.nn.Parameter(randn(*s, seed=5 + i, dtype=dtype)) for i, s in enumerate(shapes)]
    xs = [p.detach().clone() for p in params]
    deltas = [[torch.zeros(s, dtype=dtype) for _ in range(size)] for s in shapes]
    o = orthdion.DeMo(params, lr=0.01, weight_decay=0.0, top_k=k, chunk=most, replicate_mesh=dist.group.WORLD)
    for step in range(steps):
        for i, p in enumerate(params):
            gs = [gradient(shapes[i], step, i, r, dtype) for r in range(size)]
            p.grad = gs[rank].clone()
            papers_step(xs[i], deltas[i], gs, 0.01, 0.999, k, most)
        o.step()
    own = [o.state[p]["momentum"].clone() for p in params]
    same, last = same_on_all(list(params)), o.communication().last_step
    o.state_dict()
    kept = [o.state[p]["momentum"] for p in params]
    return {
        "weights": max(float((p.detach() - x).norm() / x.norm()) for p, x in zip(params, xs, strict=True)),
        "momenta": max(float((m - d[rank]).norm()) for m, d in zip(own, deltas, strict=True)),
        "apart": min(float((d[0] - d[-1]).norm()) for d in deltas),
        "checkpoint": max(float((m - sum(d) / size).norm()) for m, d in zip(kept, deltas, strict=True)),
        "same": same,
        "content": dict(last.by_content),
    }


def nan_on_one_replica() -> tuple[bool, int]:
    """Whether a matrix stays on all replicas where one gradient holds NaN, and another one moves; what was counted."""
    params = [torch.nn.Parameter(randn(12, 8, seed=i, dtype=torch.float32)) for i in range(2)]
    before = [p.detach().clone() for p in params]
    o = orthdion.DeMo(params, replicate_mesh=dist.group.WORLD)
    for i, p in enumerate(params):
        p.grad = randn(12, 8, seed=10 * dist.get_rank() + i, dtype=torch.float32)
    if dist.get_rank() == 1:
        params[0].grad[3, 4] = float("nan")
    o.step()
    stayed, moved = (torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
    return stayed and not moved and not o.state[params[0]]["momentum"].any(), sum(o.skipped_steps.values())


def parts_within_a_replica() -> str:
    """What is said of them."""
    from cases import Shard, mesh, sharded

    grid = mesh((2, -1))
    p = torch.nn.Parameter(sharded(randn(12, 8, seed=1, dtype=torch.float32), grid["axis1"], (Shard(0),)))
    try:
        orthdion.DeMo([p], replicate_mesh=grid["axis0"])
    except ValueError as e:
        return str(e)
    return ""
