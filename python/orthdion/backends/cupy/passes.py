"""Passes over the matrices of a bucket: as a whole where there is room for their B, which then is formed once, and in
panels where there is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...requests import Blend, Draws
from .arguments import TYPES, addresses, counters, pack
from .bucket import Bucket, Slab, batch
from .device import Device
from .products import Formed, When, multiply

__all__ = ["Energies", "Passes", "Write"]


@dataclass(frozen=True)
class Energies:
    """Sums of B's squares along rows [matrix, m] and down columns [matrix, n], of B before it is scaled."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Write:
    """What the last pass writes, its tensors of every matrix of the bucket.

    Attributes:
        p, v, r, fed: P (m, r) and the right factors (n, r) of the head, of what is captured, and of the feedback.
        rates: [η, λ] in double.
        scale: what η is multiplied by.
        feedback: (a, b) of ``a·M⁺ − (a − b)·P Wᵀ``.
        cautious: whether entries that the step pushes away from zero do not decay.
        skip: flags; a matrix with 1 is not written.
        alphas: of a linear residual; or None.
        columns, rows: what scales T's columns (n) and rows (m); or None.
        draws: how each X is rounded, all by draws or none.
    """

    p: Tensor
    v: Tensor
    r: Tensor
    fed: Tensor
    rates: Tensor
    scale: float
    feedback: tuple[float, float]
    cautious: bool
    skip: Tensor
    alphas: Tensor | None
    columns: Tensor | None
    rows: Tensor | None
    draws: Sequence[Draws | None]


class Passes:
    """Over the matrices of like blends."""

    def __init__(self, device: Device, blends: Sequence[Blend], written: bool = False) -> None:
        self.device, self.b = device, Bucket(blends, written)
        self.where, precision, sizes = self.b.where, blends[0].w.precision, [b.size for b in blends]
        self._tf32 = precision.rounding == "tf32"
        self._format = torch.bfloat16 if precision.rounding == "bfloat16" else torch.float32
        self._entries = max(device.panel_bytes // self._format.itemsize, 1)
        # Where nothing has been settled yet, no B has to be scaled.
        self._settled = isinstance(sizes[0], Tensor) or sizes[0] != 1.0
        self.sizes = batch([self._size(s) for s in sizes])

    def _size(self, size: float | Tensor) -> Tensor:
        if isinstance(size, Tensor):
            return size
        return torch.full((), size, dtype=torch.float64, device=self.where)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for something of every matrix."""
        return torch.empty(self.b.count, *shape, dtype=dtype, device=self.where)

    # ------------------------------------------------------------ that only read

    def sketch(self, q: Tensor, energies: Energies | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """``B Q`` [matrix, m, r], the largest entries of B [matrix] as the bits of single-precision numbers, and B as
        it lies [matrix, …], if it was formed in one piece; on the way the energies, where there is room for them.
        """
        p, right = self.new(self.b.shape[0], q.shape[2]), self._operand(q)
        largest = torch.zeros(self.b.count, dtype=torch.int32, device=self.where)
        slabs, block = list(self.b.slabs(self._entries)), None
        for s in slabs:
            block = self._panel(s, largest, energies)
            self.device.multiply(p[s.matrices, s.rows], self.b.upright(block), right[s.matrices], tf32=self._tf32)
        self.rescaled(p, q)
        return p, largest, block if len(slabs) == 1 else None

    def rescaled(self, p: Tensor, q: Tensor) -> None:
        """``size·B Q`` into p of the matrices whose size is not 1, by a slower kernel that sums in double."""
        self._formed(p, q, False)

    def product(self, p: Tensor, kept: Tensor | None = None) -> Tensor:
        """``size·Bᵀ P`` [matrix, n, r], with B as :meth:`sketch` formed it, if it is still there."""
        out, left = self.new(self.b.shape[1], p.shape[2]), self._operand(p)
        for s in self.b.slabs(self._entries) if kept is None else (Slab(0, self.b.count, 0, self.b.shape[0]),):
            down = self.b.upright(self._panel(s) if kept is None else kept).transpose(1, 2)
            self.device.multiply(out[s.matrices], down, left[s.matrices, s.rows], add=s.first > 0, tf32=self._tf32)
        self._formed(out, p, True)
        return out

    def energies(self) -> Energies:
        """The energies alone; B is not stored."""
        found = self.room()
        for s in self.b.slabs(self._entries):
            self._form(s, None, None, found)
        return found

    def room(self) -> Energies:
        """Room for energies."""
        m, n = self.b.shape
        return Energies(self.new(m, dtype=torch.float64), self.new(n, dtype=torch.float64))

    def residual_sums(self, p: Tensor, r: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares along rows of T = size·B − P Rᵀ, and of T with its columns scaled: each [matrix, m]."""
        b, (m, n) = self.b, self.b.shape
        left, right = self._operand(p), self._operand(r)
        raw, scaled = self.new(m, dtype=torch.float64), self.new(m, dtype=torch.float64)
        for s in b.slabs(self._entries):
            captured, grid, rows = self._captured(s, left, right), b.grid(s), s.last - s.first
            shape = (s.count, grid[0], rows) if b.turned else (s.count, rows, grid[1])
            parts = [captured.new_empty(shape, dtype=torch.float64) for _ in range(2)]
            own = (captured, self.sizes[s.matrices], columns[s.matrices], n)
            self.device.launch("residual_rows", grid, 256, *b.lists(s, "m", "g"), b.place(s), *own, *parts)
            for part, out in zip(parts, (raw, scaled), strict=True):
                self._sum(part, 1 if b.turned else 2, out[s.matrices, s.rows], False)
        return raw, scaled

    # ------------------------------------------------------------ that write

    def update(self, w: Write) -> None:
        """Reads M, G and X, writes X and M: ``X ← (1 − ηλ)X − η·scale·D`` and ``M ← a·M⁺ − (a − b)/size·P Wᵀ``."""
        b, device, (a, kept) = self.b, self.device, w.feedback
        left = self._operand(w.p)
        head = self._operand(w.v, None if w.alphas is None else (w.r, w.alphas))
        captured = None if w.columns is None else self._operand(w.r)
        fed = None if a == kept else captured if w.fed is w.r and captured is not None else self._operand(w.fed)
        products = 1 + (fed is not None) + (captured is not None and fed is not captured)
        for s in b.slabs(max(device.panel_bytes // (4 * products), 1)):
            ahead = self._captured(s, left, head)
            of_r = None if captured is None else self._captured(s, left, captured)
            of_fed = of_r if fed is captured else None if fed is None else self._captured(s, left, fed)
            write = pack(
                w.rates,
                self.sizes[s.matrices],
                None if w.alphas is None else w.alphas[s.matrices],
                of_fed,
                ahead,
                of_r,
                None if w.columns is None else w.columns[s.matrices],
                None if w.rows is None else w.rows[s.matrices, s.first :],
                *reversed(b.shape),
                float(a),
                float(kept),
                float(w.scale),
                w.cautious,
            )
            _, drawn = counters(w.draws[s.matrices], b.turned)
            to = (*b.lists(s, "x", "m", "g"), b.place(s))
            device.launch("apply", b.grid(s), 256, *to, write, w.skip[s.matrices], drawn)
        b.write_back()

    def keep(self, q: Tensor, targets: list[Tensor], skip: Tensor) -> None:
        """The next Q [matrix, n, r] into a list of tensors that lie alike."""
        rows, cols = q.shape[1:]
        to = (addresses(targets), TYPES[targets[0].dtype], *targets[0].stride())
        self.device.launch("keep", (-(-rows * cols // 256), len(targets)), 256, q, *to, rows, cols, skip)

    # ------------------------------------------------------------ parts of them

    def _operand(self, t: Tensor, less: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """A factor as products read it; ``less``: R and α of V − αR."""
        if less is None and t.dtype == self._format:
            return t
        out, entries = torch.empty_like(t, dtype=self._format), t.shape[1] * t.shape[2]
        r, alphas = less or (None, None)
        grid = (-(-entries // 256), t.shape[0])
        self.device.launch("operand", grid, 256, t, r, alphas, out, TYPES[self._format], entries)
        return out

    def _panel(self, s: Slab, largest: Tensor | None = None, energies: Energies | None = None) -> Tensor:
        """A slab's B as products read it, as it lies."""
        block = self.b.block(s, self._format)
        self._form(s, block, largest, energies)
        return block

    def _form(self, s: Slab, block: Tensor | None, largest: Tensor | None, energies: Energies | None) -> None:
        """A slab's B, its largest entries and its energies, where there is room for them."""
        b, grid = self.b, self.b.grid(s)
        rows = columns = None
        if energies is not None:
            cut = s.last - s.first
            height, width = (b.shape[1], cut) if b.turned else (cut, b.shape[1])
            rows = torch.empty(s.count, height, grid[1], dtype=torch.float64, device=self.where)
            columns = torch.empty(s.count, grid[0], width, dtype=torch.float64, device=self.where)
        top = None if largest is None else largest[s.matrices]
        operands = (*b.lists(s, "m", "g"), b.place(s), block, TYPES[self._format], top)
        self.device.launch("form", grid, 256, *operands, rows, columns)
        if energies is not None and rows is not None and columns is not None:
            # Partial sums as they lie → sums along B's rows and down its columns.
            along, down = ((columns, 1), (rows, 2)) if b.turned else ((rows, 2), (columns, 1))
            self._sum(*along, energies.rows[s.matrices, s.rows], False)
            self._sum(*down, energies.columns[s.matrices], s.first > 0)

    def _sum(self, parts: Tensor, along: int, out: Tensor, add: bool) -> None:
        """Adds up partial sums [matrix, entry, part] (``along`` 2) or [matrix, part, entry] (1)."""
        count, terms, entries = parts.shape[0], parts.shape[along], parts.shape[3 - along]
        step, by = (1, terms) if along == 2 else (entries, 1)
        target = (out, out.stride(0), TYPES[out.dtype], entries, add)
        grid = (-(-entries // 256), count)
        self.device.launch("collect", grid, 256, parts, terms * entries, step, by, terms, *target, None, 0)

    def _formed(self, out: Tensor, right: Tensor, transposed: bool) -> None:
        if self._settled:
            left = Formed(self.b.upright_views("m"), self.b.upright_views("g"), self.b.blend, self.sizes)
            due = When((self.sizes != 1.0).int(), 1)
            multiply(self.device, out, left.T if transposed else left, right, when=due)

    def _captured(self, s: Slab, p: Tensor, right: Tensor) -> Tensor:
        """P Fᵀ of a slab for a factor F, as the slab lies."""
        out = self.b.block(s, torch.float32)
        a, b = p[s.matrices, s.rows], right[s.matrices].transpose(1, 2)
        if self.b.turned:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        self.device.multiply(out, a, b, tf32=self._tf32)
        return out
