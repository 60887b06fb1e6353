"""Buckets: matrices of one shape, format and layout, stepped in common launches; and how they are cut to fit the cache.

A matrix is seen as it lies in memory, row-major with some pitch, and whether that is B or Bᵀ (``turned``: wide weights
are processed transposed). Views that lie in no such way are copied, and copied back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...optim.step import Matrix, Options
from .arguments import MATRICES, TYPES, addresses, pack

__all__ = ["Bucket", "Slab", "buckets"]

#: Entries of one matrix that a thread block handles; panels are whole multiples of its sides.
_TILE_ROWS, _TILE_COLS = 32, 128


@dataclass(frozen=True)
class Slab:
    """Part of a bucket whose B fits the cache: rows ``first`` to ``last`` of matrices ``start`` to ``stop``."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def matrices(self) -> slice:
        """Which of the bucket's."""
        return slice(self.start, self.stop)

    @property
    def rows(self) -> slice:
        """Which of B's."""
        return slice(self.first, self.last)

    @property
    def count(self) -> int:
        """How many matrices."""
        return self.stop - self.start


@dataclass
class Bucket:
    """Same matrices: X, M, G as they lie, (n, m) where ``turned`` and (m, n) otherwise; Q (n, r)."""

    index: list[int]
    x: list[Tensor]
    m: list[Tensor]
    g: list[Tensor]
    q: list[Tensor]
    options: Options
    scale: float
    turned: bool
    copied: list[tuple[Tensor, Tensor]]

    @property
    def count(self) -> int:
        """How many matrices."""
        return len(self.x)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(m, n, r)``"""
        rows, cols = self.x[0].shape
        n, r = self.q[0].shape
        return (cols if self.turned else rows), n, r

    @property
    def spare(self) -> int:
        """Directions that rank r leaves to the tail."""
        return min(self.x[0].shape) - self.q[0].shape[1]

    def slabs(self, entries: int) -> Iterator[Slab]:
        """Cuts the bucket into parts of at most about so many entries: whole matrices, or rows of one."""
        m, n, _ = self.shape
        if m * n <= entries:
            together = min(entries // (m * n), MATRICES)
            for start in range(0, self.count, together):
                yield Slab(start, min(start + together, self.count), 0, m)
            return
        step = max(entries // n // _TILE_COLS, 1) * _TILE_COLS
        for k in range(self.count):
            for first in range(0, m, step):
                yield Slab(k, k + 1, first, min(first + step, m))

    def place(self, s: Slab, ahead: bool = True) -> bytes:
        """The struct ``Place`` of a slab; ``ahead``: B looks ahead where the options say so."""
        _, n, _ = self.shape
        rows = s.last - s.first
        corner = (0, s.first, n, rows) if self.turned else (s.first, 0, rows, n)
        x, m, g, o = self.x[0], self.m[0], self.g[0], self.options
        return pack(
            *corner,
            self.turned,
            TYPES[x.dtype],
            TYPES[m.dtype],
            TYPES[g.dtype],
            _pitch(x),
            _pitch(m),
            _pitch(g),
            -1.0 if o.kappa is None or not ahead else o.kappa,
            -1.0 if o.maximize else 1.0,
        )

    def grid(self, s: Slab) -> tuple[int, int, int]:
        """Of the kernels that pass over a slab."""
        _, n, _ = self.shape
        rows, cols = (n, s.last - s.first) if self.turned else (s.last - s.first, n)
        return -(-cols // _TILE_COLS), -(-rows // _TILE_ROWS), s.count

    def block(self, s: Slab, dtype: torch.dtype) -> Tensor:
        """Room for a slab's entries, as they lie."""
        _, n, _ = self.shape
        rows = s.last - s.first
        return torch.empty(s.count, *((n, rows) if self.turned else (rows, n)), dtype=dtype, device=self.x[0].device)

    def upright(self, block: Tensor) -> Tensor:
        """A block as rows of B."""
        return block.transpose(1, 2) if self.turned else block

    def lists(self, s: Slab, *names: str) -> tuple[bytes, ...]:
        """Addresses of a slab's operands."""
        return tuple(addresses(getattr(self, name)[s.matrices]) for name in names)

    def upright_views(self, name: str) -> list[Tensor]:
        """Operands in B's orientation."""
        return [t.T if self.turned else t for t in getattr(self, name)]

    def write_back(self) -> None:
        """Copies what had to be copied into the tensors that it was made from."""
        for view, copy in self.copied:
            view.copy_(copy)


def _pitch(t: Tensor) -> int:
    return max(t.stride(0), t.shape[1])


def _lies(t: Tensor, turned: bool) -> Tensor | None:
    """The matrix as it lies in memory, if it is row-major (transposed: if ``turned``)."""
    t = t.T if turned else t
    row, col = t.stride()
    if (col == 1 or t.shape[1] == 1) and (row >= t.shape[1] or t.shape[0] == 1):
        return t
    return None


def buckets(matrices: Sequence[tuple[Matrix, Options]], factor_bytes: int) -> list[Bucket]:
    """Groups matrices by all that a launch has in common; at most 64 each, P, R, V and their like of a bucket and its
    Gram matrices within ``factor_bytes`` where it has more than one.
    """
    made: dict[tuple[object, ...], list[Bucket]] = {}
    for i, (matrix, o) in enumerate(matrices):
        if 0 in (*matrix.shape, matrix.q.shape[1]):
            continue
        turned = _lies(matrix.x, False) is None and _lies(matrix.x, True) is not None
        copied: list[tuple[Tensor, Tensor]] = []
        lying = []
        for k, view in enumerate((matrix.x, matrix.m, matrix.g)):
            as_is = _lies(view, turned)
            if as_is is None:
                as_is = (view.T if turned else view).contiguous()
                if k < 2:
                    copied.append((view.T if turned else view, as_is))
            lying.append(as_is)
        x, m, g = lying
        key = (
            id(o),
            matrix.scale,
            turned,
            tuple(x.shape),
            matrix.q.shape[1],
            matrix.q.stride(),
            matrix.q.dtype,
            *((t.dtype, _pitch(t)) for t in lying),
        )
        (rows, cols), rank = matrix.x.shape, matrix.q.shape[1]
        most, chain = _most(rows, cols, rank, factor_bytes), made.setdefault(key, [])
        if not chain or chain[-1].count == most:
            chain.append(Bucket([], [], [], [], [], o, matrix.scale, turned, []))
        b = chain[-1]
        b.index.append(i)
        for members, t in ((b.x, x), (b.m, m), (b.g, g), (b.q, matrix.q)):
            members.append(t)
        b.copied.extend(copied)
    return [b for chain in made.values() for b in chain]


def _most(m: int, n: int, r: int, factor_bytes: int) -> int:
    each = 4 * (3 * m + 6 * n) * r + 8 * 8 * r * r
    return max(1, min(MATRICES, factor_bytes // each))
