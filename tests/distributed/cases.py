"""What the workers run. Every case compares with the same optimizer in one process on the averaged gradient."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import orthdion
from orthdion.sharding import local

__all__ = [
    "LAYOUTS",
    "Replicate",
    "Shard",
    "errors",
    "full",
    "gradient",
    "local",
    "mesh",
    "randn",
    "same_on_all",
    "sharded",
]

#: name → (mesh shape, placements, which mesh dimension has gradients of its own)
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "fsdp": ((-1,), (Shard(0),)),
    "columns": ((-1,), (Shard(1),)),
    "replicated": ((-1,), (Replicate(),)),
    "fsdp+tp": ((2, -1), (Shard(0), Shard(1))),
    "tp+fsdp": ((2, -1), (Shard(1), Shard(0))),
    "both on rows": ((2, -1), (Shard(0), Shard(0))),
    "hsdp": ((2, -1), (Replicate(), Shard(0))),
}
_meshes: dict[tuple[int, ...], Any] = {}


def mesh(shape: tuple[int, ...]) -> Any:
    """A mesh over all ranks; -1 takes what is left."""
    world = dist.get_world_size()
    known = 1
    for s in shape:
        known *= max(s, 1) if s > 0 else 1
    shape = tuple(world // known if s < 0 else s for s in shape)
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"axis{i}" for i in range(len(shape))))
    return _meshes[shape]


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@cache
def signal(shape: tuple[int, ...], i: int) -> Tensor:
    """(…, m, n) of a third of full rank; vectors are random."""
    if len(shape) < 2:
        return randn(*shape, seed=i, dtype=torch.float64)
    m, n = shape[-2], shape[-1]
    r = max(1, min(m, n) // 3)
    u, v = (torch.linalg.qr(randn(*shape[:-2], s, r, seed=31 * i + s, dtype=torch.float64))[0] for s in (m, n))
    return (u * torch.linspace(3, 1, r, dtype=torch.float64)) @ v.mT


@cache
def gradient(shape: tuple[int, ...], k: int, i: int, replica: int, dtype: torch.dtype) -> Tensor:
    """A signal that all share, with noise of its own for each step and replica."""
    noise = randn(*shape, seed=7919 * k + 101 * replica + 13 * i, dtype=torch.float64)
    return (signal(shape, i) + 0.05 * noise).to(dtype)


def sharded(t: Tensor, where: Any, placements: tuple[Any, ...]) -> Tensor:
    """Every rank has the whole tensor and takes its part: nothing is sent."""
    return distribute_tensor(t, where, placements, src_data_rank=None)


def full(t: Tensor) -> Tensor:
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()


def single(shapes, steps, replicas, dtype, kind="OrthDion", start=0, **options):
    """Weights, momenta and Q of one process with averaged gradients."""
    params = [torch.nn.Parameter(randn(*s, seed=5 + i, dtype=dtype)) for i, s in enumerate(shapes)]
    o = getattr(orthdion, kind)(params, lr=0.05, weight_decay=0.1, **options)
    for k in range(start, steps):
        for i, p in enumerate(params):
            p.grad = sum(gradient(shapes[i], k, i, r, dtype) for r in range(replicas)) / replicas
        o.step()
    return params, o


def errors(params: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((full(p) - full(q)).norm() / full(q).norm().clamp_min(1e-30))
        for p, q in zip(params, expected, strict=True)
    )


def same_on_all(tensors: list[Tensor], group: Any = None) -> bool:
    """Whether all ranks have the same bits."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    return bool((low == high).all())


def layout_equals_one_process(layout: str, shapes, steps, dtype, options) -> tuple[float, bool, Any]:
    """Relative error of the weights, whether whole weights are the same bits on all ranks, and what was sent."""
    shape, placements = LAYOUTS[layout]
    where = mesh(shape)
    params = [
        torch.nn.Parameter(sharded(randn(*s, seed=5 + i, dtype=dtype), where, placements)) for i, s in enumerate(shapes)
    ]
    o = orthdion.OrthDion(params, lr=0.05, weight_decay=0.1, **options)
    for k in range(steps):
        for i, p in enumerate(params):
            p.grad = sharded(gradient(shapes[i], k, i, 0, dtype), where, placements)
        o.step()
    expected, _ = single(shapes, steps, 1, dtype, **options)
    return errors(params, expected), same_on_all([full(p) for p in params]), o.communication()


def replicas_equal_one_process(shapes, steps, dtype, options, hybrid=False) -> tuple[float, bool, Any]:
    """The same for replicas with gradients of their own: plain tensors, or sharded over a second mesh dimension."""
    where = mesh((2, -1))
    replica = where.get_local_rank(0) if hybrid else dist.get_rank()
    count = 2 if hybrid else dist.get_world_size()
    group = where["axis0"] if hybrid else dist.group.WORLD

    def place(t: Tensor) -> Tensor:
        return sharded(t, where["axis1"], (Shard(0),)) if hybrid else t

    params = [torch.nn.Parameter(place(randn(*s, seed=5 + i, dtype=dtype))) for i, s in enumerate(shapes)]
    o = orthdion.OrthDion(params, lr=0.05, weight_decay=0.1, replicate_mesh=group, **options)
    for k in range(steps):
        for i, p in enumerate(params):
            p.grad = place(gradient(shapes[i], k, i, replica, dtype))
        o.step()
    expected, _ = single(shapes, steps, count, dtype, **options)
    return errors(params, expected), same_on_all([full(p) for p in params]), o.communication()
