"""A parameter's layout, read off its DTensor placements (docs/algorithms.md, section 7).

Each axis of a parameter plays a role in its matrices: *rows*, *columns*, or *batch* (the stacked axis of experts).
Ranks that hold other parts of the rows are the group ``rows``, those with other columns ``cols``; ranks along the batch
axis have nothing to tell each other. Ranks with copies and gradients of their own are ``replicas``; where copies come
with equal gradients (plain DDP, HSDP, tensor-parallel norms) there is nothing to reduce and so no group.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..requests import ALONE, Group, Layout
from .groups import from_handle, product, union

__all__ = ["Groups", "Placed", "is_dtensor", "lay", "local", "place", "unsharded"]

Role = str


@dataclass(frozen=True)
class Placed:
    """How a parameter lies: its mesh and placements (None for a plain tensor), the local range on each axis, layout."""

    mesh: Any
    placements: tuple[Any, ...]
    ranges: tuple[tuple[int, int], ...]
    layout: Layout
    shape: tuple[int, ...] = ()

    def stack_is_shared(self, stacked: bool) -> bool:
        """Whether ranks hold different matrices of a stack."""
        return stacked and any(s.is_shard(0) for s in self.placements)

    def ranges_over_shards(self) -> list[tuple[tuple[int, int], ...]]:
        """What each rank of ``layout.shards`` has of every axis, in the order of the group."""
        if self.mesh is None or self.layout.shards.size == 1:
            return [self.ranges]
        found = []
        for rank in self.layout.shards.ranks:
            coordinate = (self.mesh.mesh == rank).nonzero()[0].tolist()
            found.append(_ranges(self.shape, self.mesh, self.placements, coordinate))
        return found

    def cut(self, whole: Tensor) -> Tensor:
        """The rank's part of a tensor that lies as the parameter does."""
        for axis, (first, last) in enumerate(self.ranges):
            whole = whole.narrow(axis, first, last - first)
        return whole

    def wrap(self, t: Tensor, shape: torch.Size, axes: dict[int, int]) -> Tensor:
        """A local state as the DTensor it is a part of; ``axes`` maps the parameter's axes to the state's."""
        if self.mesh is None:
            return t
        from torch.distributed.tensor import DTensor, Replicate

        places = [_moved(p, axes) if hasattr(p, "dim") else p for p in self.placements]
        places = [Replicate() if p is None else p for p in places]
        stride = _contiguous(shape) if tuple(t.shape) != tuple(shape) else t.stride()
        return DTensor.from_local(t, self.mesh, places, run_check=False, shape=shape, stride=stride)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _moved(placement: Any, axes: dict[int, int]) -> Any:
    """A shard of the parameter's axis as the shard of the state's axis that goes with it."""
    if placement.dim not in axes:
        return None
    if type(placement).__name__ == "_StridedShard":
        return type(placement)(axes[placement.dim], split_factor=placement.split_factor)
    return type(placement)(axes[placement.dim])


def is_dtensor(t: Any) -> bool:
    """Whether this is a DTensor, without importing them where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The local part of a DTensor, waited for; a plain tensor as it is. Writing to it writes to the DTensor."""
    if not is_dtensor(t):
        return t
    part: Tensor = t._local_tensor  # type: ignore[attr-defined]  # to_local() makes autograd a part of this
    return part.wait() if hasattr(part, "wait") else part


def _chunk(span: tuple[int, int], parts: int, index: int) -> tuple[int, int]:
    """torch.chunk's ``index``-th part: all parts but the last are of one size, the last ones may be empty."""
    start, stop = span
    size = -(-(stop - start) // parts)
    return min(stop, start + index * size), min(stop, start + (index + 1) * size)


def _order(placements: tuple[Any, ...]) -> tuple[list[int], list[int]]:
    """Mesh dimensions that shard, and those of them whose shard is strided (FSDP over tensor parallel on one axis):
    those divide what the plain ones have left.
    """
    order = [d for d, s in enumerate(placements) if not s.is_replicate()]
    return order, [d for d in order if type(placements[d]).__name__ == "_StridedShard"]


def _ranges(
    shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], coordinate: list[int]
) -> tuple[tuple[int, int], ...]:
    """What the rank at a coordinate of the mesh has of every axis."""
    ranges = [(0, s) for s in shape]
    order, strided = _order(placements)
    for d in [d for d in order if d not in strided] + strided:
        axis = placements[d].dim
        ranges[axis] = _chunk(ranges[axis], mesh.size(d), coordinate[d])
    return tuple(ranges)


def place(p: Tensor, name: str, roles_of: list[Role] | None, replicas: Group) -> Placed:
    """Reads a parameter's placements. ``roles_of`` None: the elements go each their own way (AdamW).

    Raises:
        NotImplementedError: a placement that cannot be handled, with the way around it.
    """
    if not is_dtensor(p):
        whole = tuple((0, s) for s in p.shape)
        return Placed(None, (), whole, unsharded(replicas), tuple(p.shape))
    mesh, placements = p.device_mesh, tuple(p.placements)  # type: ignore[attr-defined]
    if mesh.get_coordinate() is None:
        raise NotImplementedError(
            f"{name} lies on a mesh that this rank is not in; give this rank's optimizer only its own parameters"
        )
    for placement in placements:
        if placement.is_partial():
            raise NotImplementedError(
                f"{name} is placed {placement}: an unfinished sum; call .redistribute() on it before it becomes a "
                "parameter"
            )
    strided = _order(placements)[1]
    if len({placements[d].dim for d in strided}) < len(strided):
        raise NotImplementedError(
            f"{name} has two strided shards of one axis: {placements}; shard it over one mesh less"
        )
    ranges = _ranges(tuple(p.shape), mesh, placements, list(mesh.get_coordinate()))
    if tuple(b - a for a, b in ranges) != tuple(local(p).shape):
        raise NotImplementedError(
            f"{name}: rank {dist.get_rank()} holds {tuple(local(p).shape)} where {placements} give "
            f"{tuple(b - a for a, b in ranges)}; shard it with torch's own Shard placements"
        )
    return lay(mesh, placements, tuple(p.shape), name, roles_of, replicas)


class Groups:
    """How the groups of a mesh are had; a planner has some of its own."""

    def of(self, mesh: Any, dims: list[int]) -> Group:
        """The ranks that differ from this one only along ``dims``."""
        if len(dims) == 1:
            return from_handle(mesh.get_group(dims[0]))
        return union(set(_span(mesh, dims))) if dims else ALONE

    def product(self, a: Group, b: Group) -> Group:
        """The grid that two groups span."""
        return product(a, b)


def lay(
    mesh: Any,
    placements: tuple[Any, ...],
    shape: tuple[int, ...],
    name: str,
    roles_of: list[Role] | None,
    replicas: Group,
    made: Groups | None = None,
) -> Placed:
    """How a parameter of this shape lies on a mesh, by its placements.

    Raises:
        ValueError: where ``replicas`` are ranks that it is sharded over.
    """
    made = made or Groups()
    order, strided = _order(placements)
    groups: dict[Role, list[int]] = {}
    for d in [d for d in order if d not in strided] + strided:
        groups.setdefault(roles_of[placements[d].dim] if roles_of else "shards", []).append(d)
    own = int(mesh.mesh[tuple(mesh.get_coordinate())])
    copies = _span(mesh, [d for d in range(mesh.ndim) if d not in order])
    if replicas.size > 1 and set(replicas.ranks) <= set(copies):
        replicas = ALONE  # a dimension of the weight's own mesh, over which FSDP2 has averaged the gradients
    elif set(replicas.ranks) & set(_span(mesh, list(range(mesh.ndim)))) > {own}:
        raise ValueError(
            f"{name} is sharded over ranks that replicate_mesh {replicas.ranks} holds to have copies of it; give "
            "replicate_mesh the mesh dimension whose ranks have copies"
        )
    rows, cols = (made.of(mesh, groups.get(k, [])) for k in ("rows", "cols"))
    everything = [d for k, ds in groups.items() if k != "batch" for d in ds]
    layout = _layout(rows, cols, made.of(mesh, everything), replicas, made)
    if groups.get("batch"):
        layout = replace(layout, whole=made.product(replicas, made.of(mesh, order)))
    ranges = _ranges(shape, mesh, placements, list(mesh.get_coordinate()))
    return Placed(mesh, placements, ranges, layout, shape)


def unsharded(replicas: Group) -> Layout:
    """The layout of a matrix that is whole on its rank, with copies elsewhere."""
    return _layout(ALONE, ALONE, ALONE, replicas, Groups())


def _layout(rows: Group, cols: Group, shards: Group, replicas: Group, made: Groups) -> Layout:
    return Layout(
        rows=rows,
        cols=cols,
        replicas=replicas,
        left=made.product(replicas, cols),
        right=made.product(replicas, rows),
        shards=shards,
        domain=(domain := made.product(replicas, shards)),
        whole=domain,
    )


def _span(mesh: Any, dims: list[int]) -> list[int]:
    """The ranks that differ from this one only along ``dims``."""
    here = mesh.get_coordinate()
    index = tuple(slice(None) if d in dims else here[d] for d in range(mesh.ndim))
    ranks: list[int] = mesh.mesh[index].flatten().tolist()
    return ranks
