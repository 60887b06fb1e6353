"""The whole step of a bucket on the device, launch by launch; nothing is read on the host (algorithms.md, 1 to 3b).

::

    panels of B that stay in the cache:  P̂ = B Q,  R̂ += Bᵀ P̂           reads M and G
    P = P̂ T⁻¹ by Cholesky QR,  R = R̂ T⁻¹ = Bᵀ P                         factors only
    V, the next Q, the tail's numbers                                    factors only
    panels again:  X ← (1 − ηλ)X − η·scale·D,  M ← a·M⁺ − (a − b)·P Wᵀ   reads M, G and X, writes X and M

Seven passes over the matrix for every form, and nothing of its size is allocated. R comes from the same panels as P̂,
because Bᵀ P = (Bᵀ P̂) T⁻¹; where the inverse would amplify rounding it is computed from P after all, by a slower kernel
that forms B as it goes (flag DIRECT), and so are both products where B must be scaled to be squared (RESCALE). A matrix
with NaN or infinity goes through everything and is not written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...optim.step import Matrix, Options
from ..reference import Reference
from .arguments import TYPES, addresses, pack
from .bucket import Bucket, Slab, buckets
from .device import Device, device_for
from .orthonormal import Factor, complete, orthonormalize, polar
from .pending import Pending, Verdicts, diagnose, note
from .products import DIRECT, LEFT_AGAIN, RESCALE, RIGHT_AGAIN, SKIP, SOME_NULL, UPPER_B, Formed, When, multiply

__all__ = ["lowrank_step"]

#: How much the inverse triangle may amplify the rounding of Bᵀ P̂ (a bound, several times what it does).
_AMPLIFY = 32.0
_NUMBERS = 8


def lowrank_step(matrices: Sequence[tuple[Matrix, Options]], slots: Sequence[Tensor]) -> list[Pending]:
    """Steps every matrix in place; see :func:`orthdion.optim.step.step`. What happened is known when the device is
    done: then a matrix that was skipped has also set its slot, an int32 on the device, to 1.
    """
    reports: list[Pending] = [Pending()] * len(matrices)
    if not matrices:
        return reports
    device = device_for(matrices[0][0].x.device)
    written: list[Tensor] = []
    with device.active():
        for b in buckets(matrices):
            step = _Step(device, b)
            verdicts = step.run()
            note(device, step.flags, SKIP, [slots[i] for i in b.index])
            for k, i in enumerate(b.index):
                reports[i] = Pending(verdicts, k)
            b.write_back()
    for m, _ in matrices:
        written.extend((m.x, m.m, m.q))
    torch.autograd.graph.increment_version(written)
    return reports


@dataclass
class _Energies:
    """Sums of B's squares along rows (m) and down columns (n)."""

    rows: Tensor
    columns: Tensor


class _Step:
    """One bucket's step and what it needs on the way."""

    def __init__(self, device: Device, b: Bucket) -> None:
        self.device, self.b, self.o = device, b, b.options
        self.where = b.x[0].device
        self.m, self.n, self.r = b.shape
        half = self.o.half
        self.product = torch.bfloat16 if half else torch.float32
        self.left, self.right, self.least, self.fade = Reference(half=half, tf32=self.o.tf32).noise(self._like())
        # Half a panel of B stays cached beside what streams past it.
        self.entries = max(device.l2_bytes // 3 // (2 if half else 4), 1)
        self.flags = self._new(dtype=torch.int32)
        self.numbers = self._new(_NUMBERS, dtype=torch.float64)

    def _like(self) -> Tensor:
        return torch.empty(0, device=self.where)

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.b.count, *shape, dtype=dtype, device=self.where)

    def _each(self, kernel: str, entries: int, *arguments: object) -> None:
        """Launches a kernel of one thread an entry of each matrix."""
        self.device.launch(kernel, (-(-entries // 256), self.b.count), 256, *arguments)

    def run(self) -> Verdicts:
        """All of it."""
        o = self.o
        separate = o.kappa is not None and o.a != o.b
        q = self._gather(torch.float32)
        p_raw, r_raw, w_raw, energies = self._project(q, separate)
        p = self._left(p_raw)
        r = self._back(p, r_raw, o.kappa)
        w = self._back(p, w_raw, None) if w_raw is not None else r
        v, completed, kept = self._right_factor(r, q)
        figures = None
        if o.diagnostics and energies is not None:
            figures = diagnose(self.b, self.numbers, r, v, energies.rows)
        head, columns = self._tail(r, v, energies)
        self._apply(p.v, r, w, head, columns, energies)
        to = self.b.q[0]
        self._each(
            "keep",
            self.n * self.r,
            v,
            completed,
            kept,
            addresses(self.b.q),
            TYPES[to.dtype],
            *to.stride(),
            self.n,
            self.r,
            self.flags,
        )
        return Verdicts(self.flags, self.numbers, figures)

    def _gather(self, dtype: torch.dtype) -> Tensor:
        """The bucket's Q, side by side."""
        q = self._new(self.n, self.r, dtype=dtype)
        first = self.b.q[0]
        self._each(
            "gather",
            self.n * self.r,
            addresses(self.b.q),
            TYPES[first.dtype],
            *first.stride(),
            q,
            TYPES[dtype],
            self.n,
            self.r,
        )
        return q

    def _operand(self, t: Tensor, minus: Tensor | None = None) -> Tensor:
        """A factor (less α·``minus``) as products read it."""
        if minus is None and t.dtype == self.product:
            return t
        out = torch.empty_like(t, dtype=self.product)
        entries = t.shape[1] * t.shape[2]
        self.device.launch(
            "operand", (-(-entries // 256), t.shape[0]), 256, t, minus, self.numbers, out, TYPES[self.product], entries
        )
        return out

    # ------------------------------------------------------------------ the first pass

    def _project(self, q: Tensor, separate: bool) -> tuple[Tensor, Tensor, Tensor | None, _Energies | None]:
        """P̂ = B Q, R̂ = Bᵀ P̂, Ŵ = M⁺ᵀ P̂ where that differs, and B's energies where they are asked for."""
        b, o, device = self.b, self.o, self.device
        p, r = self._new(self.m, self.r), self._new(self.n, self.r)
        w = torch.empty_like(r) if separate else None
        energies = None
        if o.tail != "feedback" or o.diagnostics:
            energies = _Energies(self._new(self.m, dtype=torch.float64), self._new(self.n, dtype=torch.float64))
        largest = torch.zeros(b.count, dtype=torch.int32, device=self.where)
        right = self._operand(q)
        for s in b.slabs(self.entries):
            block = b.block(s, self.product)
            plus = b.block(s, torch.float32) if separate else None
            grid = b.grid(s)
            row_sums, column_sums = (None, None) if energies is None else self._partial(block, grid)
            device.launch(
                "form",
                grid,
                256,
                *b.lists(s, "m", "g"),
                b.place(s),
                block,
                TYPES[self.product],
                plus,
                largest[s.matrices],
                row_sums,
                column_sums,
            )
            if energies is not None and row_sums is not None and column_sums is not None:
                self._collect(s, row_sums, column_sums, energies)
            upright, part = b.upright(block), p[s.matrices, s.rows]
            device.multiply(part, upright, right[s.matrices], tf32=o.tf32)
            left = self._operand(part.contiguous()) if o.half else part
            late = s.first > 0
            device.multiply(r[s.matrices], upright.transpose(1, 2), left, add=late, tf32=o.tf32)
            if plus is not None and w is not None:
                device.multiply(w[s.matrices], b.upright(plus).transpose(1, 2), part, add=late, tf32=o.tf32)
        device.launch("decide", (-(-b.count // 64),), 64, largest, self.flags, self.numbers, 1e12, b.count)
        self._formed(p, self._formed_operand(o.kappa), q, RESCALE)
        return p, r, w, energies

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

    def _collect(self, s: Slab, row_sums: Tensor, column_sums: Tensor, energies: _Energies) -> None:
        """Partial sums as they lie → energies of B's rows and columns."""
        (rows, rows_along), (columns, columns_along) = (row_sums, 2), (column_sums, 1)
        if self.b.turned:
            (rows, rows_along), (columns, columns_along) = (columns, columns_along), (rows, rows_along)
        self._sum(rows, rows_along, energies.rows[s.matrices, s.rows], False)
        self._sum(columns, columns_along, energies.columns[s.matrices], s.first > 0)

    def _formed_operand(self, kappa: float | None) -> Formed:
        b = self.b
        return Formed(b.upright_views("m"), b.upright_views("g"), kappa, self.o.maximize, self.numbers)

    def _formed(self, out: Tensor, left: Formed, right: Tensor, flag: int) -> None:
        multiply(self.device, out, left, right, when=When.has(self.flags, flag))

    # ------------------------------------------------------------------ factors

    def _left(self, p: Tensor) -> Factor:
        limit = (_AMPLIFY, DIRECT)
        return orthonormalize(
            self.device, p, self.left, self.flags, self.numbers, LEFT_AGAIN, also=DIRECT, direct=limit
        )

    def _back(self, p: Factor, raw: Tensor, kappa: float | None) -> Tensor:
        """R = R̂ T⁻¹, or where that would be inaccurate from P itself; (``kappa`` None) of M⁺."""
        out = torch.empty_like(raw)
        multiply(self.device, out, raw, p.s, shape=UPPER_B, when=When(self.flags, DIRECT, 0))
        self._formed(out, self._formed_operand(kappa).T, p.v, DIRECT)
        return out

    def _right_factor(self, r: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """V; what the next Q is instead of it where some directions are null; columns that Q keeps."""
        kind, device = self.o.right_factor, self.device
        if kind == "column":
            squares, scales = self._squares(r), self._new(self.r, dtype=torch.float64)
            null = self._new(self.r, dtype=torch.int32)
            device.launch(
                "column_scales",
                (self.b.count,),
                256,
                squares,
                scales,
                null,
                self.numbers,
                self.flags,
                self.r,
                self.right,
                self.o.epsilon,
            )
            v = torch.empty_like(r)
            self._each("scale_columns", self.n * self.r, r, scales, v, self.n, self.r)
            return v, None, null
        f = orthonormalize(device, r, self.right, self.flags, self.numbers, RIGHT_AGAIN, null_flags=True)
        if kind == "qr":
            return f.v, complete(device, f.v, f.null, q, self.flags), None
        v = polar(device, f)
        # With null directions polar's columns are not orthonormal: a basis of them is.
        basis = orthonormalize(device, v, 1e-3, self.flags, self.numbers, 0, mask=SOME_NULL)
        return v, complete(device, basis.v, basis.null, q, self.flags), None

    def _squares(self, r: Tensor) -> Tensor:
        squares = self._new(self.r, dtype=torch.float64)
        self.device.launch("column_squares", (-(-self.r // 32), self.b.count), 256, r, squares, self.n, self.r)
        return squares

    def _tail(self, r: Tensor, v: Tensor, energies: _Energies | None) -> tuple[Tensor, Tensor | None]:
        """The head that goes into the product, V or V − αR, and the scales of the tail's columns."""
        o, device = self.o, self.device
        if o.tail == "feedback" or energies is None:
            return self._operand(v), None
        weight = o.tail_scale * math.sqrt(self.b.spare)
        device.launch(
            "tail_numbers",
            (self.b.count,),
            256,
            energies.rows,
            self.m,
            self._squares(r),
            self.r,
            self.numbers,
            weight,
            self.least,
            o.tail == "linear",
        )
        if o.tail == "linear":
            return self._operand(v, r), None
        columns = self._new(self.n, dtype=torch.float64)
        device.launch(
            "tail_columns",
            (-(-self.n // 8), self.b.count),
            256,
            energies.columns,
            r,
            self.n,
            self.r,
            self.numbers,
            columns,
            self.fade,
        )
        return self._operand(v), columns

    # ------------------------------------------------------------------ the second pass

    def _apply(
        self, p: Tensor, r: Tensor, w: Tensor, head: Tensor, columns: Tensor | None, energies: _Energies | None
    ) -> None:
        """Writes X and M."""
        b, o, device = self.b, self.o, self.device
        left, hyper = self._operand(p), o.hyper
        tail_right = self._operand(r) if columns is not None else None
        fed_right = None
        if o.a != o.b:
            fed_right = tail_right if w is r and tail_right is not None else self._operand(w)
        for s in b.slabs(self.entries):
            product = self._products(s, left)
            ahead = product(head)
            captured = product(tail_right)
            fed = captured if fed_right is tail_right else product(fed_right)
            lengths = None
            if columns is not None and captured is not None and energies is not None:
                lengths = self._lengths(s, captured, columns, energies)
            own = None if columns is None else columns[s.matrices]
            write = pack(
                hyper,
                fed,
                ahead,
                captured,
                own,
                lengths,
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

    def _products(self, s: Slab, p: Tensor) -> Callable[[Tensor | None], Tensor | None]:
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

    def _lengths(self, s: Slab, captured: Tensor, columns: Tensor, energies: _Energies) -> Tensor:
        """What the rows of a normalized tail are multiplied by."""
        b, device, grid, rows = self.b, self.device, self.b.grid(s), s.last - s.first
        along = 1 if b.turned else 2
        shape = (s.count, grid[1], rows) if b.turned else (s.count, rows, grid[0])
        raw, scaled = (captured.new_empty(shape, dtype=torch.float64) for _ in range(2))
        device.launch(
            "tail_rows",
            grid,
            256,
            *b.lists(s, "m", "g"),
            b.place(s),
            captured,
            self.numbers[s.matrices],
            columns[s.matrices],
            self.n,
            raw,
            scaled,
        )
        sums = [torch.empty(s.count, rows, dtype=torch.float64, device=self.where) for _ in range(3)]
        self._sum(raw, along, sums[0], False)
        self._sum(scaled, along, sums[1], False)
        device.launch(
            "tail_lengths",
            (-(-rows // 256), s.count),
            256,
            sums[0],
            sums[1],
            energies.rows[s.matrices],
            s.first,
            self.m,
            rows,
            self.numbers[s.matrices],
            sums[2],
            self.fade,
        )
        return sums[2]
