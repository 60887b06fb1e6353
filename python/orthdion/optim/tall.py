"""Tall matrices whose rows lie on several ranks, reduced to small ones (docs/algorithms.md, sections 4 and 7).

``A = E·S`` with orthonormal columns of E, which stay where A's rows are, and a small S that every rank has. QR, the
polar factor, null directions and completions do not depend on the orthonormal basis that a matrix is written in, so
``f(A) = E·f(S)``: the primitives serve S as they would have served A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sharding import Body, Gather, Group, Reduce

__all__ = ["Tall", "compress"]


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
    numbers from each rank), which holds for any condition.
    """
    wide, r = a.double(), a.shape[1]
    once, twice = gate
    basis, small = wide, None
    for attempt in range(2):
        gram = yield Reduce(basis.T @ basis, along, "gram")
        t, failed = torch.linalg.cholesky_ex(gram, upper=True)
        inverse = torch.linalg.solve_triangular(t, torch.eye(r, dtype=t.dtype, device=t.device), upper=True)
        condition = float(t.norm() * inverse.norm())  # at most r times too large
        if bool(failed) or not condition <= twice:
            break
        basis, small = basis @ inverse, t if small is None else t @ small
        if condition <= once or attempt == 1:
            return Tall(basis, small)
    q, t = torch.linalg.qr(wide)
    block = torch.zeros(r, r, dtype=t.dtype, device=t.device)
    block[: t.shape[0]] = t
    blocks = yield Gather(block, along, "triangles")
    return Tall(q, blocks.reshape(-1, r), along.index * r)
