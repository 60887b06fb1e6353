"""Factors whose rows lie on several ranks (docs/algorithms.md, sections 4 and 7).

``A = E·S`` with orthonormal columns of E, which stay where A's rows are, and a small S that every rank has. QR, the
polar factor, null directions and completions do not depend on the orthonormal basis that a matrix is written in, so
``f(A) = E·f(S)``: what serves whole matrices serves S as it would have served A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..requests import ALONE, Body, Factor, Gather, Gram, Group, MatMul, Precision, Reduce, Triangle, WarmStart

__all__ = ["Tall", "compress", "factor", "warm_start"]

_DOUBLE = Precision(torch.float64, None, 2.0**-53)


@dataclass(frozen=True)
class Tall:
    """``A = E·S``: ``basis`` is this rank's part of E, acting on rows ``first`` and following of S (``small``)."""

    basis: Tensor
    small: Tensor
    first: int = 0

    def expand(self, f: Tensor) -> Tensor:
        """The rank's rows of ``E·f``."""
        return self.basis @ f[self.first : self.first + self.basis.shape[1]].to(self.basis.dtype)


def compress(a: Tensor, along: Group, gate: tuple[float, float]) -> Body[Tall]:
    """Compresses A (k local rows, r columns), whose rows lie ``along`` a group; works in double.

    Cholesky QR with an all-reduced Gram matrix (r² numbers a pass): one pass up to the condition ``gate[0]``, two up to
    ``gate[1]``. Beyond, and for rank-deficient A, Householder QR of each part and an all-gather of the triangles (r²
    numbers from each rank), which holds for any condition. A device that the host does not wait for takes two passes;
    directions below the noise of single precision, which would be null anyway, are left out there.
    """
    once, twice = gate
    basis, small = a, None
    for attempt, tol in enumerate((2.0**-22, 0.0)):
        gram = yield Reduce((yield Gram(basis)), along, "gram")
        t, inverse, condition = yield Triangle(gram, tol)
        if condition is not None and not condition <= twice:
            break
        basis = yield MatMul(basis.to(inverse.dtype), inverse, _DOUBLE)
        small = t if small is None else t @ small
        if attempt == 1 or (condition is not None and condition <= once):
            return Tall(basis, small)
    wide, r = a.double(), a.shape[1]
    q, t = torch.linalg.qr(wide)
    block = torch.zeros(r, r, dtype=t.dtype, device=t.device)
    block[: t.shape[0]] = t
    blocks = yield Gather(block, along, "triangles")
    return Tall(q, blocks.reshape(-1, r), along.index * r)


def factor(
    a: Tensor,
    kind: Literal["qr", "polar"],
    tol: float,
    *,
    over: Group,
    along: Group,
    what: str,
    copies: int,
    gate: tuple[float, float],
) -> Body[tuple[Tensor, Tensor, Tensor]]:
    """``(V, null, A)`` of A, which is summed ``over`` ranks and whose rows lie ``along`` others."""
    if along.size == 1:
        factored: tuple[Tensor, Tensor, Tensor] = yield Factor(a, kind, tol, over, what, copies)
        return factored
    a = yield Reduce(a, over, what, copies, rounded=True)
    tall = yield from compress(a, along, gate)
    v, null, _ = yield Factor(tall.small, kind, tol, ALONE, what)
    return tall.expand(v).to(a.dtype), null, a


def warm_start(
    kind: Literal["qr", "column", "polar"],
    v: Tensor,
    null: Tensor,
    old: Tensor,
    along: Group,
    gate: tuple[float, float],
) -> Body[Tensor]:
    """The next Q. To fill null columns over ranks, V and the old Q are written in an orthonormal basis of both."""
    old = old.to(v.dtype)
    if along.size == 1 or kind == "column" or not bool(null.any()) or bool(null.all()):
        kept: Tensor = yield WarmStart(kind, v, null, old)
        return kept
    tall = yield from compress(torch.cat([v, old], 1), along, gate)
    small, r = tall.small, v.shape[1]
    found: Tensor = yield WarmStart(kind, small[:, :r], null, small[:, r:])
    return tall.expand(found)
