"""Bytes on the wire, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Traffic", "elements"]


@dataclass
class Traffic:
    """Bytes on the wire, ``by_collective`` and ``by_content``, and how many collectives there were.

    The unit is the all-reduce: one of b bytes counts b, a reduce-scatter of b half of that, and so does an all-gather
    of b bytes in all, since a ring all-reduce is one of each. In a ring of w ranks each sends 2(w − 1)/w of the count.
    """

    by_collective: Counter[str] = field(default_factory=Counter)
    by_content: Counter[str] = field(default_factory=Counter)
    collectives: int = 0

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(self.by_collective.values())

    def add(self, collective: str, content: dict[str, int]) -> None:
        """Counts one collective."""
        self.by_collective[collective] += sum(content.values())
        self.by_content.update(content)
        self.collectives += 1

    def __iadd__(self, other: Traffic) -> Traffic:
        self.by_collective.update(other.by_collective)
        self.by_content.update(other.by_content)
        self.collectives += other.collectives
        return self


def elements(requests: Sequence[Any]) -> dict[str, int]:
    """How many elements of each content requests send."""
    count = Counter[str]()
    for q in requests:
        count[q.what] += q.tensor.numel()
    return count
