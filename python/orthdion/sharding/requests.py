"""What a step asks of the other ranks, as values that its body yields (docs/algorithms.md, section 7)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .groups import Group

__all__ = ["Body", "Factorize", "Gather", "Reduce", "Request", "Work", "mean_over"]

#: ``(V, null)`` of a tall matrix: a partial isometry of its shape, and flags of the null directions.
Work = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Reduce:
    """The sum (or maximum) of ``tensor`` over ``group``, divided by ``divisor``; ``what`` is for the count of bytes.

    The answer is the reduced tensor, the same bits on every rank.
    """

    tensor: Tensor
    group: Group
    what: str
    divisor: int = 1
    op: Literal["sum", "max"] = "sum"
    #: Whether ``reduce_dtype`` may round it on the wire.
    rounded: bool = False


@dataclass(frozen=True)
class Gather:
    """Every rank's ``tensor``, of one shape, stacked in the order of ranks: (group.size, …)."""

    tensor: Tensor
    group: Group
    what: str


@dataclass(frozen=True)
class Factorize:
    """``work`` of the mean or sum of ``tensor`` (k, r), which is whole on every rank of ``group``.

    The answer is ``(V, null, A)`` with the reduced tensor A. Where many matrices wait together each rank factorizes
    some of them, and r² numbers stand for A on the other ranks: ``A = V (VᵀA)``, which leaves out its null directions.
    """

    tensor: Tensor
    group: Group
    what: str
    work: Work
    divisor: int = 1


Request = Reduce | Gather | Factorize

T = TypeVar("T")
#: A computation that stops where it needs other ranks: yields requests (one, or a tuple), is sent the answers.
Body = Generator[Request | tuple[Request, ...], Any, T]


def mean_over(group: Group, t: Tensor, what: str) -> Body[Tensor]:
    """The mean of ``t`` over a group, taken in single precision at least."""
    wide = t if t.dtype == torch.float64 else t.float()
    mean: Tensor = yield Reduce(wide, group, what, group.size)
    return mean
