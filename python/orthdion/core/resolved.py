"""A group's rule, and what it was made from: whether a group has been edited is a comparison with this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .rule import Rule

__all__ = ["Resolved"]


@dataclass(frozen=True)
class Resolved:
    """``rule`` was made from ``values`` of the group's keys ``names``, when it had ``size`` keys. ``live``: a value is
    a tensor, which is read at each step.
    """

    group: dict[str, Any]
    names: tuple[str, ...]
    values: list[Any]
    size: int
    rule: Rule
    live: bool
