"""The completed step over replicas whose residual travels in few bits: one process by hand, and the real thing."""

from __future__ import annotations

import math
from typing import Any

import planned
import torch
import torch.distributed as dist
from cases import Shard, build, copies_agree, distance, full, gradient, mesh, randn, sharded
from test_bits import plain
from torch import Tensor

A, B, MU, SCALE = 0.95, 0.7, 0.95, 2.0


class ByHand:
    """Section 7b for a matrix (m ≥ n) and all replicas' momenta, in double; ``parts`` are compressed each by itself."""

    def __init__(self, x: Tensor, q: Tensor, replicas: int, bits: int, parts: list[tuple[slice, slice]]) -> None:
        self.x, self.q, self.bits, self.parts = x.clone(), q.clone(), bits, parts
        self.m = [torch.zeros_like(x) for _ in range(replicas)]
        #: What is known of each replica's residual, at one bit.
        self.h = [torch.zeros_like(x) for _ in range(replicas)]

    def compress(self, t: Tensor) -> Tensor:
        out = torch.zeros_like(t)
        for part in self.parts:
            out[part] = plain(t[part], self.bits)
        return out

    def owners(self) -> list[tuple[int, tuple[slice, slice]]]:
        """Each replica's rows of each part."""
        w, found = len(self.m), []
        for part in self.parts:
            span, rows = part[0].indices(len(self.x)), len(self.x[part])
            cuts = [slice(span[0] + rows * k // w, span[0] + rows * (k + 1) // w) for k in range(w)]
            found += [(k, (cut, part[1])) for k, cut in enumerate(cuts)]
        return found

    def known(self) -> Tensor:
        """Of each row, the mean of what its owner knows of the others' residuals."""
        out = torch.zeros_like(self.x)
        for k, rows in self.owners():
            out[rows] = sum(h[rows] for i, h in enumerate(self.h) if i != k) / (len(self.h) - 1)
        return out

    def mean(self, ts: list[Tensor]) -> Tensor:
        """Of the residuals, as all replicas get it."""
        if self.bits == 4:
            return self.compress(sum(self.compress(t) for t in ts) / len(ts))
        self.h = [h + self.compress(t - h) for t, h in zip(ts, self.h, strict=True)]
        known, out = self.known(), torch.zeros_like(self.x)
        for k, rows in self.owners():
            out[rows] = (ts[k][rows] + (len(ts) - 1) * known[rows]) / len(ts)
        self.h = [A * h for h in self.h]
        return self.compress(out)

    def step(self, gs: list[Tensor], lr: float, decay: float, fan: float) -> None:
        plus = [m + g for m, g in zip(self.m, gs, strict=True)]
        bs = [MU * m + g for m, g in zip(plus, gs, strict=True)]
        p, t = torch.linalg.qr(sum(bs) / len(bs) @ self.q)
        p = p * t.diagonal().sign()
        rs = [b.T @ p for b in bs]
        u, _, w = torch.linalg.svd(sum(rs) / len(rs), full_matrices=False)
        c = self.mean([b - p @ r.T for b, r in zip(bs, rs, strict=True)])
        c = c / c.norm(dim=0)
        c = c / c.norm(dim=1, keepdim=True)
        spare = min(self.x.shape) - p.shape[1]
        d = p @ (u @ w).T + SCALE * math.sqrt(spare) * c / c.norm()
        self.m = [A * m - (A - B) * p @ (m.T @ p).T for m in plus]
        self.x = (1 - lr * decay) * self.x - lr * fan * d
        self.q = u @ w


def _parts(shape: tuple[int, ...], shards: int) -> list[tuple[slice, slice]]:
    """What ranks have of the tall matrix, whose weight is cut along its rows."""
    size = -(-shape[0] // shards)
    spans = [slice(k * size, min(shape[0], (k + 1) * size)) for k in range(shards) if k * size < shape[0]]
    every = slice(None)
    return [(s, every) if shape[0] >= shape[1] else (every, s) for s in spans]


def few_bits_equal_the_hand(shapes: Any, steps: int, bits: int, hybrid: bool) -> tuple[float, float, bool, Any]:
    """How far weights, and the mean of momenta, are from one process's by hand; whether copies agree; the traffic."""
    where = mesh((2, -1))
    replica = where.get_local_rank(0) if hybrid else dist.get_rank()
    count = 2 if hybrid else dist.get_world_size()
    shards = dist.get_world_size() // count
    group = where["axis0"] if hybrid else dist.group.WORLD
    handle = where.get_group(0) if hybrid else dist.group.WORLD

    def place(t: Tensor) -> Tensor:
        return sharded(t, where["axis1"], (Shard(0),)) if hybrid else t

    dtype, lr, decay = torch.float64, 0.02, 0.1
    params = [torch.nn.Parameter(place(randn(*s, seed=5 + i, dtype=dtype))) for i, s in enumerate(shapes)]
    options = {"optimizer": "completed-dion", "rank_fraction": 0.3, "residual_bits": bits}
    o = build(params, options, replicate_mesh=group, lr=lr, weight_decay=decay)
    hands = []
    for s, p in zip(shapes, params, strict=True):
        x = full(p)
        hands.append(ByHand(x if s[0] >= s[1] else x.T, full(o.state[p]["Q"]), count, bits, _parts(s, shards)))
    for k in range(steps):
        for i, (s, p, hand) in enumerate(zip(shapes, params, hands, strict=True)):
            gs = [gradient(s, k, i, r, dtype) for r in range(count)]
            p.grad = place(gs[replica])
            hand.step([g if s[0] >= s[1] else g.T for g in gs], lr, decay, math.sqrt(s[0] / s[1]))
        o.step()
    agree = copies_agree([*params, *(s["Q"] for s in o.state.values())], handle)
    sent = o.communication()
    planned.check(o, shapes, options, lambda i, rank: planned.on_replicas(hybrid, rank), dtype)
    o.synchronize_for_checkpoint()
    apart = momenta = 0.0
    for s, p, hand in zip(shapes, params, hands, strict=True):
        mean = sum(hand.m) / count
        apart = max(apart, distance(p, hand.x if s[0] >= s[1] else hand.x.T))
        momenta = max(momenta, distance(o.state[p]["momentum"], mean if s[0] >= s[1] else mean.T, 1.0))
        assert ("memory" in o.state[p]) == (bits == 1)
        if bits == 1:
            known = hand.known()
            momenta = max(momenta, distance(o.state[p]["memory"], known if s[0] >= s[1] else known.T, 1.0))
    return apart, momenta, agree, sent


def a_stack_and_a_convolution(bits: int) -> float:
    """How far their matrices are from the same ones by hand after ten steps, on plain replicas."""
    count, dtype, shapes = dist.get_world_size(), torch.float64, [(3, 24, 16), (36, 5, 2, 2)]
    params = [torch.nn.Parameter(randn(*s, seed=5 + i, dtype=dtype)) for i, s in enumerate(shapes)]
    options = {"optimizer": "completed-dion", "rank_fraction": 0.3, "residual_bits": bits, "weight_decay": 0.1}
    o = build([params[0]], {**options, "lr": 0.02}, replicate_mesh=dist.group.WORLD)
    o.add_param_group({"params": [params[1]], "flatten": True})
    seen = [params[0].detach(), params[1].detach().view(1, 36, 20)]
    hands = []
    for x, p in zip(seen, params, strict=True):
        q = o.state[p]["Q"].reshape(len(x), x.shape[2], -1)
        hands.append([ByHand(x[e], q[e], count, bits, _parts(x.shape[1:], 1)) for e in range(len(x))])
    for k in range(10):
        for i, (p, x, each) in enumerate(zip(params, seen, hands, strict=True)):
            gs = [gradient(tuple(x.shape), k, i, r, dtype) for r in range(count)]
            p.grad = gs[dist.get_rank()].view(p.shape)
            for e, hand in enumerate(each):
                hand.step([g[e] for g in gs], 0.02, 0.1, math.sqrt(x.shape[1] / x.shape[2]))
        o.step()
    return max(distance(x[e], h.x) for x, each in zip(seen, hands, strict=True) for e, h in enumerate(each))


def a_nan_on_one_replica(bits: int) -> tuple[bool, int]:
    """Whether a step with a NaN on the last rank changes nothing anywhere, and what was counted."""
    p = torch.nn.Parameter(randn(24, 16, seed=1, dtype=torch.float32))
    o = build([p], {"optimizer": "completed-dion", "rank_fraction": 0.25, "residual_bits": bits},
              replicate_mesh=dist.group.WORLD)  # fmt: skip
    for k in range(2):
        p.grad = gradient((24, 16), k, 0, dist.get_rank(), torch.float32).clone()
        o.step()
    before = [t.clone() for t in (p.detach(), *o.state[p].values())]
    if dist.get_rank() == dist.get_world_size() - 1:
        p.grad[3, 4] = math.nan
    o.step()
    same = all(torch.equal(a, b) for a, b in zip(before, (p.detach(), *o.state[p].values()), strict=True))
    return same, sum(o.skipped_steps.values())


def dead_columns_and_rows(bits: int) -> tuple[float, float]:
    """How far weights move whose gradient is zero on every replica: a row, and a column."""
    p = torch.nn.Parameter(randn(24, 16, seed=1, dtype=torch.float32))
    x = p.detach().clone()
    o = build([p], {"optimizer": "completed-dion", "rank_fraction": 0.25, "residual_bits": bits},
              replicate_mesh=dist.group.WORLD, weight_decay=0.0)  # fmt: skip
    for k in range(3):
        g = gradient((24, 16), k, 0, dist.get_rank(), torch.float32).clone()
        g[5], g[:, 7] = 0.0, 0.0
        p.grad = g
        o.step()
    moved = (p.detach() - x).abs()
    return float(moved[5].max()), float(moved[:, 7].max())


def resumed(bits: int) -> bool:
    """Whether a run that is saved and loaded goes on to the bits of the one that was saved and went on."""

    def run(o: Any, p: Tensor, steps: range) -> None:
        for k in steps:
            p.grad = gradient((24, 16), k, 0, dist.get_rank(), torch.float32)
            o.step()

    options = {"optimizer": "completed-dion", "rank_fraction": 0.25, "residual_bits": bits}
    p = torch.nn.Parameter(randn(24, 16, seed=1, dtype=torch.float32))
    o = build([p], options, replicate_mesh=dist.group.WORLD)
    run(o, p, range(4))
    kept = o.state_dict()
    other = torch.nn.Parameter(p.detach().clone())
    again = build([other], options, replicate_mesh=dist.group.WORLD)
    again.load_state_dict(kept)
    run(o, p, range(4, 8))
    run(again, other, range(4, 8))
    return bool(torch.equal(p, other))


def memories_of_other_runs() -> tuple[bool, bool, bool, bool]:
    """Whether a load leaves no memory where none was saved (from one process, and from replicas that send four bits),
    the saved one where replicas send one bit, and none where they send four or there is one process.
    """
    rank, make = dist.get_rank(), {"optimizer": "completed-dion", "rank_fraction": 0.25}

    def one(bits: int, mesh: Any) -> tuple[Any, Tensor]:
        p = torch.nn.Parameter(randn(24, 16, seed=1, dtype=torch.float32))
        return build([p], {**make, "residual_bits": bits}, replicate_mesh=mesh), p

    def saved(o: Any, p: Tensor) -> Any:
        p.grad = gradient((24, 16), 0, 0, rank, torch.float32)
        o.step()
        return o.state_dict()

    alone, four, remembers = (one(1, None), one(4, dist.group.WORLD), one(1, dist.group.WORLD))
    states = [saved(*run) for run in (alone, four, remembers)]
    kept = remembers[0].state[remembers[1]]["memory"]
    o, p = one(1, dist.group.WORLD)
    fresh = []
    for state in states[:2]:
        o.load_state_dict(states[2])
        o.load_state_dict(state)
        fresh.append(not o.state[p]["memory"].any() and o.param_groups[0]["residual_bits"] == 1)
    o.load_state_dict(states[2])
    taken = bool(torch.equal(o.state[p]["memory"], kept)) and bool(kept.any())
    left = True
    for other, q in (alone, four):
        other.load_state_dict(states[2])
        left &= "memory" not in other.state[q]
    return (*fresh, taken, left)


def tiny_then_ordinary() -> float:
    """How far the first step after many tiny gradients, in whose steps B was enlarged, is from the same in double."""
    found = []
    for dtype in (torch.float32, torch.float64):
        p = torch.nn.Parameter(torch.zeros(24, 16, dtype=dtype))
        options = {"optimizer": "completed-dion", "rank_fraction": 0.25, "residual_bits": 1}
        o = build([p], options, replicate_mesh=dist.group.WORLD, weight_decay=0.0)
        for k in range(4):
            p.grad = gradient((24, 16), k, 0, dist.get_rank(), dtype) * (1e-16 if k < 3 else 1.0)
            before = p.detach().clone()
            o.step()
        found.append((p.detach() - before).double())
    return float((found[0] - found[1]).norm() / found[1].norm())
