"""The whole step of a bucket on the device, launch by launch; nothing is read on the host (algorithms.md, 1 to 3b).

::

    panels of B that stay in the cache:  P̂ = B Q,  R̂ += Bᵀ P̂           reads M and G
    P = P̂ T⁻¹ by Cholesky QR,  R = R̂ T⁻¹ = Bᵀ P                         factors only
    V, the next Q, the tail's numbers                                    factors only
    panels again:  X ← (1 − ηλ)X − η·scale·D,  M ← a·M⁺ − (a − b)·P Wᵀ   reads M, G and X, writes X and M

Seven passes over the matrix for every form, and no room but for panels and factors. R comes from the same panels as P̂,
because Bᵀ P = (Bᵀ P̂) T⁻¹; where the inverse would amplify rounding it is computed from P after all, by a slower kernel
that forms B as it goes (flag DIRECT), and so are both products where B must be scaled to be squared (RESCALE). A matrix
with NaN or infinity goes through everything and is not written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...optim.step import Matrix, Options
from .arguments import TYPES, addresses
from .bucket import Slab, buckets
from .device import device_for
from .orthonormal import Factor, complete, orthonormalize, polar
from .passes import SAFE, Energies, Passes
from .pending import Pending, Verdicts, diagnose, note
from .products import DIRECT, LEFT_AGAIN, RESCALE, RIGHT_AGAIN, SKIP, SOME_NULL, UPPER_B, When, multiply

__all__ = ["lowrank_step"]

#: How much the inverse triangle may amplify the rounding of Bᵀ P̂ (a bound, several times what it does).
_AMPLIFY = 32.0


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
        for b in buckets(matrices, device.factor_bytes):
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


class _Step(Passes):
    """One bucket's step."""

    def run(self) -> Verdicts:
        """All of it."""
        o = self.o
        separate = o.kappa is not None and o.a != o.b
        q = self.gather()
        first = self.project(q, back=True, separate=separate, energies=o.tail != "feedback" or o.diagnostics)
        self.device.launch(
            "decide", (-(-self.b.count // 64),), 64, first.largest, self.flags, self.numbers, SAFE, self.b.count
        )
        self.formed(first.p, self.formed_operand(o.kappa), q, RESCALE)
        energies, p = first.energies, self._left(first.p)
        assert first.r is not None
        r = self._back(p, first.r, o.kappa)
        w = self._back(p, first.w, None) if first.w is not None else r
        v, completed, kept = self._right_factor(r, q)
        figures = None
        if o.diagnostics and energies is not None:
            figures = diagnose(self.numbers, r, v, energies.rows)
        head, columns = self._tail(r, v, energies)
        self.apply(p.v, r, w, head, columns, None if energies is None else self._lengths(energies, columns))
        to = self.b.q[0]
        self.each(
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

    def _left(self, p: Tensor) -> Factor:
        limit = (_AMPLIFY, DIRECT)
        return orthonormalize(
            self.device, p, self.left, self.flags, self.numbers, LEFT_AGAIN, also=DIRECT, direct=limit
        )

    def _back(self, p: Factor, raw: Tensor, kappa: float | None) -> Tensor:
        """R = R̂ T⁻¹, or where that would be inaccurate from P itself; (``kappa`` None) of M⁺."""
        out = torch.empty_like(raw)
        multiply(self.device, out, raw, p.s, shape=UPPER_B, when=When(self.flags, DIRECT, 0))
        self.formed(out, self.formed_operand(kappa).T, p.v, DIRECT)
        return out

    def _right_factor(self, r: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """V; what the next Q is instead of it where some directions are null; columns that Q keeps."""
        kind, device = self.o.right_factor, self.device
        if kind == "column":
            squares, scales = self.squares(r), self.new(self.r, dtype=torch.float64)
            null = self.new(self.r, dtype=torch.int32)
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
            self.each("scale_columns", self.n * self.r, r, scales, v, self.n, self.r)
            return v, None, null
        f = orthonormalize(device, r, self.right, self.flags, self.numbers, RIGHT_AGAIN, null_flags=True)
        if kind == "qr":
            return f.v, complete(device, f.v, f.null, q, self.flags), None
        v = polar(device, f)
        # With null directions polar's columns are not orthonormal: a basis of them is.
        basis = orthonormalize(device, v, 1e-3, self.flags, self.numbers, 0, mask=SOME_NULL)
        return v, complete(device, basis.v, basis.null, q, self.flags), None

    def _tail(self, r: Tensor, v: Tensor, energies: Energies | None) -> tuple[Tensor, Tensor | None]:
        """The head that goes into the product, V or V − αR, and the scales of the tail's columns."""
        o, device = self.o, self.device
        if o.tail == "feedback" or energies is None:
            return self.operand(v), None
        weight = o.tail_scale * math.sqrt(self.b.spare)
        device.launch(
            "tail_numbers",
            (self.b.count,),
            256,
            energies.rows,
            self.m,
            self.squares(r),
            self.r,
            self.numbers,
            weight,
            self.least,
            o.tail == "linear",
        )
        if o.tail == "linear":
            return self.operand(v, r), None
        columns = self.new(self.n, dtype=torch.float64)
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
        return self.operand(v), columns

    def _lengths(self, energies: Energies, columns: Tensor | None) -> Callable[[Slab, Tensor], Tensor] | None:
        """What the rows of a normalized tail are multiplied by, slab by slab."""
        if columns is None:
            return None
        of_columns = columns

        def lengths(s: Slab, captured: Tensor) -> Tensor:
            raw, scaled = self.tail_sums(s, captured, of_columns)
            count, rows = raw.shape
            out = torch.empty_like(raw)
            known = (energies.rows[s.matrices], s.first, self.m, rows, self.numbers[s.matrices])
            self.device.launch("tail_lengths", (-(-rows // 256), count), 256, raw, scaled, *known, out, self.fade)
            return out

        return lengths
