"""What is decided about a parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Verdict", "hint", "matrix"]


@dataclass(frozen=True)
class Verdict:
    """What a parameter is, the shape keys of its group, and the reason in words.

    "matrix" is stepped by the optimizer's own rule. The rest is for AdamW or Lion: a "head" and other
    "decayed" ones, and "plain" ones without decay. "frozen" ones are in no group.
    """

    kind: Literal["matrix", "head", "decayed", "plain", "frozen"]
    reason: str
    keys: dict[str, Any] = field(default_factory=dict)


def matrix(reason: str, **keys: Any) -> Verdict:
    """A hidden matrix, or several."""
    return Verdict("matrix", reason, keys)


def hint(name: str, exact: bool = False, **keys: Any) -> str:
    """How to say otherwise, for all parameters that are called so in any layer, or for this one."""
    pattern = name if exact else re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)
    wish = {"algorithm": "matrix", **keys}
    return f"overrides={{{pattern!r}: {wish if keys else 'matrix'!r}}} steps it as one"
