"""Process groups as sets of ranks, and their products."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..requests import ALONE, Group

__all__ = ["everyone", "from_handle", "meet", "product", "union"]


#: Groups by their ranks, and the world that they belong to: a new init_process_group starts afresh.
_known: dict[tuple[int, ...], Group] = {}
_world: list[Any] = [None]


def _cache() -> dict[tuple[int, ...], Group]:
    world = dist.group.WORLD
    if _world[0] is not world:
        _world[0] = world
        _known.clear()
        remember(world)
    return _known


def remember(handle: Any) -> Group:
    """The group of an existing process group that this rank is in."""
    ranks = tuple(sorted(dist.get_process_group_ranks(handle)))
    group = Group(ranks, ranks.index(dist.get_rank()), handle)
    return _known.setdefault(ranks, group)


def from_handle(handle: Any) -> Group:
    """The group of torch's process group; :data:`ALONE` for one rank."""
    _cache()
    group = remember(handle)
    return group if group.size > 1 else ALONE


def union(ranks: set[int]) -> Group:
    """The group of some ranks, made if nobody has it yet. Every one of them must ask for it in the same order."""
    if len(ranks) <= 1:
        return ALONE
    key = tuple(sorted(ranks))
    cache = _cache()
    if key not in cache:
        remember(dist.new_group(list(key), use_local_synchronization=True))
    return cache[key]


def everyone() -> Group:
    """All ranks; :data:`ALONE` where nobody has started any."""
    return from_handle(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else ALONE


def product(a: Group, b: Group) -> Group:
    """The ranks of ``a`` together with those of each one's ``b``: the grid that the two span.

    Raises:
        ValueError: if the ranks of ``a`` have groups ``b`` that overlap.
    """
    if a.size == 1 or b.size == 1:
        return a if b.size == 1 else b
    others: list[Any] = [None] * a.size
    dist.all_gather_object(others, b.ranks, group=a.handle)
    ranks = [r for other in others for r in other]
    if len(set(ranks)) < len(ranks):
        raise ValueError(
            f"the groups of ranks {a.ranks} and {b.ranks} overlap; give replicate_mesh the mesh dimension whose ranks "
            "hold copies, and shard over another one"
        )
    return union(set(ranks))


def meet(group: Group, why: str, seconds: float = 60.0) -> None:
    """Waits for every rank of a group on gloo; NCCL has a time-out of its own for the collective that follows.

    Raises:
        RuntimeError: with ``why`` and the missing ranks, if some rank does not come.
    """
    if dist.get_backend(group.handle) != "gloo":
        return
    try:
        dist.monitored_barrier(group.handle, timeout=timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as e:
        raise RuntimeError(f"{why}; within {seconds:g} s some rank did not ({e})") from e
