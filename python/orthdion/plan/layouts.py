"""Meshes of any size without processes, and how a model's weights lie on them under the layouts that people use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..distributed import Groups
from ..requests import ALONE, Group
from .models import Weight

__all__ = ["LAYOUTS", "Grid", "GridGroups", "Layout", "Spread", "spread"]

LAYOUTS = ("ddp", "fsdp", "hsdp", "tp", "fsdp+tp", "hsdp+tp")


@dataclass(frozen=True)
class Grid:
    """A mesh of ranks ``first``, ``first`` + 1, … as one of them, ``rank``, sees it."""

    sizes: tuple[int, ...]
    rank: int = 0
    first: int = 0

    @cached_property
    def mesh(self) -> Tensor:
        """The ranks."""
        count = math.prod(self.sizes)
        return torch.arange(self.first, self.first + count, device="cpu").view(self.sizes)

    @property
    def ndim(self) -> int:
        """How many dimensions."""
        return len(self.sizes)

    def size(self, d: int) -> int:
        """Of a dimension."""
        return self.sizes[d]

    def get_coordinate(self) -> list[int]:
        """Where this rank is."""
        found: list[int] = (self.mesh == self.rank).nonzero()[0].tolist()
        return found


class GridGroups(Groups):
    """Groups of a grid, by their ranks alone."""

    def __init__(self) -> None:
        self._known: dict[tuple[Grid, tuple[int, ...]], Group] = {}

    def of(self, mesh: Grid, dims: list[int]) -> Group:
        """The ranks that differ from the grid's own only along ``dims``."""
        key = (mesh, tuple(dims))
        if key not in self._known:
            here = mesh.get_coordinate()
            index = tuple(slice(None) if d in dims else here[d] for d in range(mesh.ndim))
            ranks = tuple(mesh.mesh[index].flatten().tolist())
            self._known[key] = Group(ranks, ranks.index(mesh.rank)) if len(ranks) > 1 else ALONE
        return self._known[key]

    def product(self, a: Group, b: Group) -> Group:
        """The grid that two groups span: every rank of ``a`` has a group ``b`` as far from its own as it is itself."""
        if a.size == 1 or b.size == 1:
            return a if b.size == 1 else b
        own = a.ranks[a.index]
        ranks = tuple(sorted(r + s - own for r in a.ranks for s in b.ranks))
        return Group(ranks, ranks.index(own))


@dataclass(frozen=True)
class Spread:
    """Where one weight lies: placements on a grid (None: whole on every rank), and copies with gradients of their
    own.
    """

    grid: Grid | None
    placements: tuple[Any, ...]
    replicas: Group = ALONE


@dataclass(frozen=True)
class Layout:
    """A layout by its name and the sizes of its mesh.

    Attributes:
        name: one of :data:`LAYOUTS`; "ddp" are replicas with gradients of their own, as `orthdion.decouple` leaves
            them.
        ranks: how many processes.
        shard: ranks that shard a weight between them, under "hsdp" and "hsdp+tp".
        tensor: ranks of a tensor-parallel group.
    """

    name: str = "fsdp"
    ranks: int = 1
    shard: int = 8
    tensor: int = 8

    def check(self) -> Layout:
        """Itself.

        Raises:
            ValueError: for an unknown name, or sizes that do not divide the ranks.
        """
        if self.name not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {self.name!r}")
        for key in ("ranks", "shard", "tensor"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} must be a whole number of at least 1, not {value!r}")
        step = 1
        for key, named in (("tensor", "tp"), ("shard", "hsdp")):
            if named in self.name.split("+") and self.ranks > 1 and self.name != "tp":
                step *= getattr(self, key)
                if self.ranks % step:
                    raise ValueError(f"ranks={self.ranks} is no multiple of {step}: give {key}= another size")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the mesh: copies, shards, tensor-parallel ranks, as many of these as the name has."""
        if self.name in ("ddp", "fsdp", "tp") or self.ranks == 1:
            return (self.ranks,)
        tensor = self.tensor if self.name.endswith("+tp") else 1
        shard = self.shard if self.name.startswith("hsdp") else self.ranks // tensor
        sizes = (self.ranks // tensor // shard, shard, tensor)
        return sizes[0 if self.name.startswith("hsdp") else 1 : 3 if self.name.endswith("+tp") else 2]


def spread(layout: Layout, weight: Weight, rank: int, groups: GridGroups) -> Spread:
    """Where a weight lies.

    FSDP shards the first axis, as FSDP2 does. Tensor parallel divides a matrix along the axis that ``weight.tensor``
    says, and leaves whole what has none; where that is the first, FSDP divides what it has left.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if layout.ranks == 1:
        return Spread(None, ())
    grid = Grid(layout.sizes, rank)
    if layout.name == "ddp":
        return Spread(None, (), groups.of(grid, [0]))
    parts = layout.name.split("+")
    tensor = layout.sizes[-1] if "tp" in parts else 1
    axis = weight.tensor if "tp" in parts else None
    placements: list[Any] = [Replicate()] if parts[0] == "hsdp" else []
    if parts[0] != "tp":
        placements.append(_StridedShard(0, split_factor=tensor) if axis == 0 else Shard(0))
    if "tp" in parts:
        placements.append(Replicate() if axis is None else Shard(axis))
    return Spread(grid, tuple(placements))
