"""Ranks that reduce together, and the groups that a matrix lies on (docs/algorithms.md, section 7)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

__all__ = ["ALONE", "Group", "Layout"]


@dataclass(frozen=True)
class Group:
    """Ranks that reduce together, ascending; ``handle`` is torch's process group, None for a single rank."""

    ranks: tuple[int, ...] = (0,)
    index: int = 0
    handle: Any = None

    @cached_property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)


#: A rank with nobody to talk to.
ALONE = Group()


@dataclass(frozen=True)
class Layout:
    """The groups that a matrix is laid out on.

    ``rows`` and ``cols`` hold the other parts of its rows and columns, ``replicas`` copies with gradients of their own.
    ``left`` is where P is summed (cols × replicas), ``right`` where R is (rows × replicas), ``shards`` rows × cols,
    ``domain`` all three, ``whole`` these and the ranks with other matrices of a stack. ``compressed``: replicas average
    P and R, not G.
    """

    rows: Group = ALONE
    cols: Group = ALONE
    replicas: Group = ALONE
    left: Group = ALONE
    right: Group = ALONE
    shards: Group = ALONE
    domain: Group = ALONE
    whole: Group = ALONE
    compressed: bool = False

    @cached_property
    def trivial(self) -> bool:
        """Whether a rank can step alone, once gradients are averaged."""
        return self.shards.size == 1 and not self.compressed

    def synchronised(self) -> Layout:
        """The layout once gradients have been averaged: nothing is left to tell the replicas."""
        return replace(self, replicas=ALONE, left=self.cols, right=self.rows, domain=self.shards, compressed=False)

    @cached_property
    def transposed(self) -> Layout:
        """The layout of the transposed matrix."""
        return replace(self, rows=self.cols, cols=self.rows, left=self.right, right=self.left)
