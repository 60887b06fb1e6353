"""The mesh arguments of microsoft/dion, accepted and held against what the parameters say themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..requests import ALONE, Group
from .groups import from_handle
from .layout import Placed

__all__ = ["Meshes"]

_FORMS = "a one-dimensional DeviceMesh, a ProcessGroup, or what orthdion.decouple(ddp) returns"


@dataclass(frozen=True)
class Meshes:
    """``replicas`` whose gradients differ, and the groups (None: not told) that parameters may be sharded over."""

    replicas: Group = ALONE
    shards: tuple[Group, ...] | None = None

    @staticmethod
    def of(replicate: Any, outer: Any, inner: Any, grad_sync: Any) -> Meshes:
        """From the constructor's arguments.

        Raises:
            TypeError: an argument of another kind. ValueError: meshes of more than one dimension, or the same twice.
            RuntimeError: where torch has no distributed package.
        """
        if not isinstance(grad_sync, bool):
            raise TypeError(f"replicate_mesh_grad_sync must be True or False, not {grad_sync!r}")
        given = {"replicate_mesh": replicate, "outer_shard_mesh": outer, "inner_shard_mesh": inner}
        if not dist.is_available() and any(mesh is not None for mesh in given.values()):
            raise RuntimeError(f"{', '.join(given)} need a torch with its distributed package; leave them out")
        groups = {name: _group(name, mesh) for name, mesh in given.items() if mesh is not None}
        seen: dict[tuple[int, ...], str] = {}
        for name, group in groups.items():
            if group.size > 1 and (other := seen.setdefault(group.ranks, name)) != name:
                raise ValueError(f"{name} and {other} are the same ranks {group.ranks}; each axis needs its own mesh")
        shards = tuple(g for name, g in groups.items() if name != "replicate_mesh")
        replicas = groups.get("replicate_mesh", ALONE)
        return Meshes(replicas if grad_sync else ALONE, shards or None)

    def check(self, name: str, placed: Placed) -> None:
        """Refuses a parameter that is sharded over ranks which the arguments do not name.

        Raises:
            ValueError: naming the parameter and the mesh dimension.
        """
        if self.shards is None or placed.mesh is None:
            return
        known = {g.ranks for g in self.shards}
        for d, placement in enumerate(placed.placements):
            if placement.is_replicate() or placed.mesh.size(d) == 1:
                continue
            ranks = tuple(sorted(dist.get_process_group_ranks(placed.mesh.get_group(d))))
            if ranks not in known:
                raise ValueError(
                    f"{name} is sharded over ranks {ranks}, which is neither outer_shard_mesh nor inner_shard_mesh; "
                    "pass the mesh that the model was sharded with, or leave both out: they are read off the parameters"
                )


def _group(name: str, mesh: Any) -> Group:
    from torch.distributed.device_mesh import DeviceMesh

    handle = getattr(mesh, "process_group", mesh)
    if not isinstance(handle, (DeviceMesh, dist.ProcessGroup)):
        raise TypeError(f"{name} must be {_FORMS}, not {type(mesh).__name__}")
    if isinstance(handle, DeviceMesh):
        if handle.ndim != 1:
            raise ValueError(f'{name} must have one dimension, not {handle.ndim}; pass one of them: mesh["dp"]')
        if handle.get_coordinate() is None:
            raise ValueError(f"this rank is not in {name}")
        handle = handle.get_group()
    return from_handle(handle)
