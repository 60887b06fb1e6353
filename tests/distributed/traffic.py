"""Cases about bytes."""

from __future__ import annotations

import planned
import torch
import torch.distributed as dist
from cases import LAYOUTS, gradient, mesh, randn, same_on_all, sharded, spread

import orthdion


def sent(layout: str | None, shapes, options, shared: bool = False) -> tuple[int, dict[str, int], bool]:
    """Bytes of one step after two, and by content; and whether factorizations were shared out.

    Layout None: replicas with gradients of their own.
    """
    dtype = torch.float32
    if layout is None:
        params = [torch.nn.Parameter(randn(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]
        options = {**options, "replicate_mesh": dist.group.WORLD}
    else:
        shape, placements = LAYOUTS[layout]
        params = [
            torch.nn.Parameter(sharded(randn(*s, seed=i, dtype=dtype), mesh(shape), placements))
            for i, s in enumerate(shapes)
        ]
    o = orthdion.OrthDion(params, lr=0.01, **options)
    with spread(shared):
        for k in range(3):
            for i, p in enumerate(params):
                g = gradient(shapes[i], k, i, dist.get_rank() if layout is None else 0, dtype).clone()
                p.grad = g if layout is None else sharded(g, mesh(shape), placements)
            o.step()
        planned.check(o, shapes, options, lambda i, rank: lies(layout, rank), dtype)
    count = o.communication()
    assert count.steps == 3 and count.total.bytes >= count.last_step.bytes
    assert sum(count.last_step.by_content.values()) == sum(count.last_step.by_collective.values())
    assert "bytes" in str(count)
    # With eight matrices at hand factors are shared out where they are summed over ranks and whole on one of them.
    split = {"reduce_scatter"} <= count.last_step.by_collective.keys()
    return count.last_step.bytes, dict(count.last_step.by_content), split


def lies(layout: str | None, rank: int) -> planned.Spread:
    """Where a planned weight lies."""
    if layout is None:
        return planned.on_replicas(False, rank)
    shape, placements = LAYOUTS[layout]
    return planned.over(mesh(shape).mesh.shape, placements, rank)


def content_of(layout: str, shape: tuple[int, int], name: str, options) -> dict[str, int]:
    """What the second step of a rule sends of one matrix, by content."""
    at, placements = LAYOUTS[layout]
    p = torch.nn.Parameter(sharded(randn(*shape, seed=1, dtype=torch.float32), mesh(at), placements))
    o = orthdion.create(name, [p], **options)
    for k in range(2):
        p.grad = sharded(gradient(shape, k, 0, 0, torch.float32), mesh(at), placements)
        o.step()
    return dict(o.communication().last_step.by_content)


def rounded_on_the_wire() -> tuple[int, int, float]:
    """Bytes of factors in bfloat16 and in float32, and how far the weights are apart after a few steps."""
    results, sizes = [], []
    for reduce_dtype in (torch.bfloat16, None):
        p = torch.nn.Parameter(randn(96, 64, seed=1, dtype=torch.float32))
        o = orthdion.OrthDion([p], replicate_mesh=dist.group.WORLD, rank_fraction=0.1, reduce_dtype=reduce_dtype)
        for k in range(5):
            p.grad = gradient((96, 64), k, 0, dist.get_rank(), torch.float32).clone()
            o.step()
        options = {"rank_fraction": 0.1, "reduce_dtype": reduce_dtype}
        planned.check(o, [(96, 64)], options, lambda i, rank: lies(None, rank), torch.float32)
        assert same_on_all([p])
        results.append(p.detach())
        content = o.communication().last_step.by_content
        sizes.append(content["P"] + content["R"])
    return sizes[0], sizes[1], float((results[0] - results[1]).norm() / results[1].norm())
