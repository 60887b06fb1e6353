"""Passes over the matrices of a bucket, in panels of B that stay in the cache; and what reads or writes factors on the
way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import Reference
from .arguments import TYPES, addresses, pack
from .bucket import Bucket, Slab
from .device import Device
from .products import NUMBERS, Formed, When, multiply

__all__ = ["Energies", "Passes"]

#: B's largest entry, and its inverse, may have this size before squares leave single precision.
SAFE = 1e12


@dataclass
class Energies:
    """Sums of B's squares along rows (m) and down columns (n)."""

    rows: Tensor
    columns: Tensor


@dataclass
class Projection:
    """``P̂ = B Q``, and from the same panels ``R̂ = Bᵀ P̂``, ``Ŵ = M⁺ᵀ P̂`` and B's energies where they were asked
    for.
    """

    p: Tensor
    r: Tensor | None
    w: Tensor | None
    energies: Energies | None
    largest: Tensor


class Passes:
    """Of one bucket: its flags and numbers on the device, and the passes over its matrices."""

    def __init__(self, device: Device, b: Bucket) -> None:
        self.device, self.b, self.o = device, b, b.options
        self.where = b.x[0].device
        self.m, self.n, self.r = b.shape
        half = self.o.half
        self.product = torch.bfloat16 if half else torch.float32
        like = torch.empty(0, device=self.where)
        self.left, self.right, self.least, self.fade = Reference(half=half, tf32=self.o.tf32).noise(like)
        # A panel takes a third of the cache: M and G stream past it.
        self.entries = max(device.l2_bytes // 3 // (2 if half else 4), 1)
        self.flags = self.new(dtype=torch.int32)
        self.numbers = self.new(NUMBERS, dtype=torch.float64)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for something of every matrix."""
        return torch.empty(self.b.count, *shape, dtype=dtype, device=self.where)

    def each(self, kernel: str, entries: int, *arguments: object) -> None:
        """Launches a kernel of one thread an entry of each matrix."""
        self.device.launch(kernel, (-(-entries // 256), self.b.count), 256, *arguments)

    def gather(self) -> Tensor:
        """The bucket's Q, side by side."""
        q = self.new(self.n, self.r)
        first = self.b.q[0]
        self.each(
            "gather",
            self.n * self.r,
            addresses(self.b.q),
            TYPES[first.dtype],
            *first.stride(),
            q,
            TYPES[q.dtype],
            self.n,
            self.r,
        )
        return q

    def operand(self, t: Tensor, minus: Tensor | None = None) -> Tensor:
        """A factor (less α·``minus``) as products read it."""
        if minus is None and t.dtype == self.product:
            return t
        out = torch.empty_like(t, dtype=self.product)
        entries = t.shape[1] * t.shape[2]
        self.device.launch(
            "operand", (-(-entries // 256), t.shape[0]), 256, t, minus, self.numbers, out, TYPES[self.product], entries
        )
        return out

    def project(self, q: Tensor, *, back: bool, separate: bool, energies: bool) -> Projection:
        """The first pass: reads M and G. ``back``: R̂ too; ``separate``: and Ŵ."""
        b, o, device = self.b, self.o, self.device
        p, r = self.new(self.m, self.r), self.new(self.n, self.r) if back else None
        w = self.new(self.n, self.r) if separate else None
        sums = None
        if energies:
            sums = Energies(self.new(self.m, dtype=torch.float64), self.new(self.n, dtype=torch.float64))
        largest = torch.zeros(b.count, dtype=torch.int32, device=self.where)
        right = self.operand(q)
        for s in b.slabs(self.entries):
            plus = b.block(s, torch.float32) if w is not None else None
            block = self.form(s, plus, largest, sums)
            upright, part, late = b.upright(block), p[s.matrices, s.rows], s.first > 0
            device.multiply(part, upright, right[s.matrices], tf32=o.tf32)
            left = self.operand(part.contiguous()) if o.half else part
            if r is not None:
                device.multiply(r[s.matrices], upright.transpose(1, 2), left, add=late, tf32=o.tf32)
            if plus is not None and w is not None:
                device.multiply(w[s.matrices], b.upright(plus).transpose(1, 2), part, add=late, tf32=o.tf32)
        return Projection(p, r, w, sums, largest)

    def form(
        self,
        s: Slab,
        plus: Tensor | None = None,
        largest: Tensor | None = None,
        energies: Energies | None = None,
        ahead: bool = True,
    ) -> Tensor:
        """A slab's B as products read it, or (``ahead`` False) M⁺; M⁺ in single precision, the largest entries and
        energies where there is room for them.
        """
        b = self.b
        block, grid = b.block(s, self.product), b.grid(s)
        rows, columns = (None, None) if energies is None else self._partial(block, grid)
        if largest is None:
            largest = torch.empty(b.count, dtype=torch.int32, device=self.where)
        operands = (*b.lists(s, "m", "g"), b.place(s, ahead), block, TYPES[block.dtype], plus, largest[s.matrices])
        self.device.launch("form", grid, 256, *operands, rows, columns)
        if energies is not None and rows is not None and columns is not None:
            self._collect(s, rows, columns, energies)
        return block

    def _partial(self, block: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        count, rows, cols = block.shape
        new = block.new_empty
        return new(count, rows, grid[0], dtype=torch.float64), new(count, grid[1], cols, dtype=torch.float64)

    def _sum(self, parts: Tensor, along: int, out: Tensor, add: bool) -> None:
        """Adds up partial sums [matrix, entry, part] (``along`` 2) or [matrix, part, entry] (1)."""
        count, terms, entries = parts.shape[0], parts.shape[along], parts.shape[3 - along]
        step, by = (1, terms) if along == 2 else (entries, 1)
        self.device.launch(
            "collect",
            (-(-entries // 256), count),
            256,
            parts,
            terms * entries,
            step,
            by,
            terms,
            out,
            out.stride(0),
            1,
            entries,
            add,
            None,
            0,
            0,
        )

    def _collect(self, s: Slab, row_sums: Tensor, column_sums: Tensor, energies: Energies) -> None:
        """Partial sums as they lie → energies of B's rows and columns."""
        (rows, rows_along), (columns, columns_along) = (row_sums, 2), (column_sums, 1)
        if self.b.turned:
            (rows, rows_along), (columns, columns_along) = (columns, columns_along), (rows, rows_along)
        self._sum(rows, rows_along, energies.rows[s.matrices, s.rows], False)
        self._sum(columns, columns_along, energies.columns[s.matrices], s.first > 0)

    def formed_operand(self, kappa: float | None) -> Formed:
        """size·B, or (``kappa`` None) size·M⁺, as the slower products form it."""
        b = self.b
        return Formed(b.upright_views("m"), b.upright_views("g"), kappa, self.o.maximize, self.numbers)

    def formed(self, out: Tensor, left: Formed, right: Tensor, flag: int) -> None:
        """``out = left·right`` of the matrices with a flag."""
        multiply(self.device, out, left, right, when=When.has(self.flags, flag))

    def squares(self, r: Tensor) -> Tensor:
        """Sums of squares down the columns of a right factor."""
        squares = self.new(self.r, dtype=torch.float64)
        self.device.launch("column_squares", (-(-self.r // 32), self.b.count), 256, r, squares, self.n, self.r)
        return squares

    def apply(
        self,
        p: Tensor,
        r: Tensor,
        w: Tensor,
        head: Tensor,
        columns: Tensor | None = None,
        lengths: Callable[[Slab, Tensor], Tensor] | None = None,
    ) -> None:
        """The second pass: reads M, G and X, writes X and M. Of a normalized tail, ``columns`` are the scales of its
        columns, and ``lengths`` gives those of a slab's rows, given its P Rᵀ.
        """
        b, o, device = self.b, self.o, self.device
        left, hyper = self.operand(p), o.hyper
        tail_right = self.operand(r) if columns is not None else None
        fed_right = None
        if o.a != o.b:
            fed_right = tail_right if w is r and tail_right is not None else self.operand(w)
        # Products, and the operands that stream past them, fill the cache: smaller panels would be all launches.
        blocks = 1 + (fed_right is not None) + (tail_right is not None and fed_right is not tail_right)
        of_entry = 4 * blocks + sum(t.element_size() for t in (b.x[0], b.m[0], b.g[0]))
        for s in b.slabs(max(self.device.l2_bytes // of_entry, 1)):
            product = self.products(s, left)
            ahead = product(head)
            captured = product(tail_right)
            fed = captured if fed_right is tail_right else product(fed_right)
            of_rows = None
            if captured is not None and lengths is not None:
                of_rows = lengths(s, captured)
            own = None if columns is None else columns[s.matrices]
            write = pack(
                hyper,
                fed,
                ahead,
                captured,
                own,
                of_rows,
                self.n,
                s.last - s.first,
                float(o.a),
                float(o.b),
                float(b.scale),
            )
            device.launch(
                "apply",
                b.grid(s),
                256,
                *b.lists(s, "x", "m", "g"),
                b.place(s),
                write,
                self.flags[s.matrices],
                self.numbers[s.matrices],
            )

    def products(self, s: Slab, p: Tensor) -> Callable[[Tensor | None], Tensor | None]:
        """P Fᵀ of a slab for factors F, as the slab lies."""

        def product(right: Tensor | None) -> Tensor | None:
            if right is None:
                return None
            out = self.b.block(s, torch.float32)
            a, b = p[s.matrices, s.rows], right[s.matrices].transpose(1, 2)
            if self.b.turned:
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            self.device.multiply(out, a, b, tf32=self.o.tf32)
            return out

        return product

    def tail_sums(self, s: Slab, captured: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares along a slab's rows of T, and of T with scaled columns, given its P Rᵀ."""
        b, grid, rows = self.b, self.b.grid(s), s.last - s.first
        shape = (s.count, grid[1], rows) if b.turned else (s.count, rows, grid[0])
        parts = [captured.new_empty(shape, dtype=torch.float64) for _ in range(2)]
        own = (captured, self.numbers[s.matrices], columns[s.matrices], self.n)
        self.device.launch("tail_rows", grid, 256, *b.lists(s, "m", "g"), b.place(s), *own, *parts)
        raw, scaled = (torch.empty(s.count, rows, dtype=torch.float64, device=self.where) for _ in range(2))
        self._sum(parts[0], 1 if b.turned else 2, raw, False)
        self._sum(parts[1], 1 if b.turned else 2, scaled, False)
        return raw, scaled
