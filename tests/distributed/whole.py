"""Cases of requests for whole matrices, whose parts travel to an owner and back."""

from __future__ import annotations

from typing import Any

import own_rules  # noqa: F401  # registers them
import torch
from cases import LAYOUTS, Replicate, Shard, build, distance, gradient, local, mesh, randn, sharded
from torch import Tensor

#: shape, group keys, mesh, placements
HARD: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, ...], tuple[Any, ...]]] = [
    *[(s, {}, *at) for at in LAYOUTS.values() for s in ((13, 7), (7, 13), (2, 5), (5, 1))],
    ((30, 7), {"split_sizes": (10,) * 3}, (-1,), (Shard(0),)),  # parts are cut inside a shard
    ((6, 7), {"split_sizes": (2,) * 3}, (-1,), (Shard(0),)),  # wide parts, some of a single row
    ((12, 10), {"num_heads": 3}, (-1,), (Shard(1),)),
    ((15, 5), {"split_sizes": (5,) * 3}, (2, -1), (Shard(0), Shard(1))),
    ((21, 5), {"split_sizes": (7,) * 3}, (2, -1), (Shard(1), Shard(0))),
    ((16, 5), {"split_sizes": (10, 4, 2)}, (-1,), (Shard(0),)),  # one tall, two wide
    ((24, 5), {"split_sizes": (4, 1, 1), "interleaved": 4}, (2, -1), (Shard(0), Shard(1))),
    ((5, 16), {"transposed": True, "split_sizes": (10, 4, 2)}, (2, -1), (Shard(0), Shard(1))),
    ((3, 4, 12), {"transposed": True, "split_sizes": (1, 1), "interleaved": 6}, (-1,), (Shard(2),)),
    ((9, 6), {"transposed": True}, (-1,), (Shard(0),)),
    ((6, 9, 5), {}, (-1,), (Shard(1),)),
    ((3, 5, 9), {}, (-1,), (Shard(1),)),  # a rank without rows
    ((3, 5, 9), {}, (-1,), (Shard(2),)),
    ((5, 9, 5), {}, (2, -1), (Shard(0), Shard(1))),  # matrices of their own, and rows of them
    ((5, 7, 5), {}, (2, -1), (Shard(2), Shard(1))),
    ((4, 7, 5), {}, (2, -1), (Replicate(), Shard(1))),
    ((10, 3, 2, 2), {}, (-1,), (Shard(0),)),
    ((8, 5, 3, 3), {}, (-1,), (Shard(1),)),
    ((6, 5, 2, 2), {}, (2, -1), (Shard(0), Shard(1))),
    ((30, 2, 3), {"flatten": True}, (-1,), (Shard(0),)),
    ((0, 5), {}, (-1,), (Shard(0),)),
    ((5, 0), {}, (-1,), (Shard(0),)),
    ((1, 1), {}, (2, -1), (Shard(0), Shard(1))),
]


def where_everything_lies(name: str) -> list[Any]:
    """Which of the hard ones differ by a single bit from one process's, in weight or momentum, after two steps."""
    dtype = torch.float64
    whole = [torch.nn.Parameter(randn(*s, seed=5 + i, dtype=dtype)) for i, (s, *_) in enumerate(HARD)]
    parts = [
        torch.nn.Parameter(sharded(p.detach(), mesh(at), placements))
        for p, (_, _, at, placements) in zip(whole, HARD, strict=True)
    ]
    both = []
    for params in (whole, parts):
        groups = [{"params": [p], **keys} for p, (_, keys, _, _) in zip(params, HARD, strict=True)]
        both.append(build(groups, {"optimizer": name}))
    for k in range(2):
        for i, (shape, _, at, placements) in enumerate(HARD):
            whole[i].grad = randn(*shape, seed=1000 * k + i, dtype=dtype)
            parts[i].grad = sharded(whole[i].grad, mesh(at), placements)
        for o in both:
            o.step()
    wrong = []
    for p, q, case in zip(parts, whole, HARD, strict=True):
        for t, expected in ((p, q), (both[1].state[p]["momentum"], both[0].state[q]["momentum"])):
            part = local(sharded(expected.detach(), t.device_mesh, t.placements))
            if not torch.equal(local(t.detach()), part):
                wrong.append(case)
    return wrong


def bytes_of(layout: str, shapes: list[tuple[int, ...]], options: dict[str, Any]) -> dict[str, Any]:
    """What this rank's last step sent for whole matrices, and how many elements it has parts of."""
    at, placements = LAYOUTS[layout]
    dtype = torch.float32
    params = [
        torch.nn.Parameter(sharded(randn(*s, seed=i, dtype=dtype), mesh(at), placements)) for i, s in enumerate(shapes)
    ]
    o = build(params, options)
    for k in range(2):
        for i, p in enumerate(params):
            p.grad = sharded(gradient(shapes[i], k, i, 0, dtype), mesh(at), placements)
        o.step()
    last = o.communication().last_step
    shards = [d for d, s in enumerate(placements) if not s.is_replicate()]
    coordinate = [mesh(at).get_coordinate()[d] for d in shards]
    index = 0
    for d, c in zip(shards, coordinate, strict=True):
        index = index * mesh(at).size(d) + c
    return {
        "content": dict(last.by_content),
        "collectives": dict(last.by_collective),
        "count": last.collectives,
        "parts": sum(local(p).numel() for p in params),
        "index": index,
    }


def a_whole_that_is_not_finite() -> tuple[bool, int]:
    """A NaN in one rank's part: whether that matrix stayed here and another one moved; and what was counted."""
    params = [
        torch.nn.Parameter(sharded(randn(13, 7, seed=i, dtype=torch.float64), mesh((-1,)), (Shard(0),)))
        for i in range(2)
    ]
    o = build(params, {"optimizer": "muon"})
    before: list[Tensor] = []
    for k in range(2):
        before = [local(p.detach()).clone() for p in params]
        for i, p in enumerate(params):
            g = randn(13, 7, seed=10 * k + i, dtype=torch.float64)
            if (k, i) == (1, 0):
                g[12, 3] = float("nan")  # of the last rank that has a row
            p.grad = sharded(g, mesh((-1,)), (Shard(0),))
        o.step()
    same = [torch.equal(local(p.detach()), b) for p, b in zip(params, before, strict=True)]
    return same[0] and (not same[1] or not before[1].numel()), sum(o.skipped_steps.values())


def convolutions_of_any_cut() -> float:
    """Muon's distance from one process, of convolutions cut inside their kernel, or in channels-last memory."""
    worst, shape = 0.0, (6, 5, 3, 3)
    line, grid = mesh((-1,)), mesh((2, -1))
    cuts = [(line, (Shard(d),)) for d in range(4)] + [(grid, (Shard(2), Shard(1))), (grid, (Shard(0), Shard(3)))]
    for where, placements in cuts:
        for memory in (torch.contiguous_format, torch.channels_last):

            def part(t: Tensor, at: Any = (where, placements), memory: Any = memory) -> Tensor:
                return sharded(t, *at).to(memory_format=memory)

            whole = torch.nn.Parameter(randn(*shape, seed=1, dtype=torch.float64))
            spread = torch.nn.Parameter(part(whole.detach()))
            both = [build([p], {"optimizer": "muon"}) for p in (whole, spread)]
            for k in range(2):
                whole.grad = randn(*shape, seed=2 + k, dtype=torch.float64)
                spread.grad = part(whole.grad)
                for o in both:
                    o.step()
            worst = max(worst, distance(spread, whole.detach()))
    return worst
