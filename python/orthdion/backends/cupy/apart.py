"""The primitives for matrices that lie on several ranks, on the device: the step's body decides nothing on the host.

Reductions over NCCL run on its stream and are waited for by torch's, not by the host. What a body on the CPU decides
with an ``if`` is here a flag on the device: a matrix with NaN anywhere goes through the step on every rank and is not
written. One read is left to the low-rank step: whether a right factor whose rows lie on several ranks has null columns
that must be filled. Diagnostics read too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...optim.tall import Tall
from ...sharding import Body, Group, Reduce
from ..deferred import Deferred
from ..reference import Job, Reference
from .bucket import Slab, buckets
from .device import Device, device_for
from .orthonormal import complete, orthonormalize, polar, triangles
from .passes import SAFE, Energies, Passes
from .products import ALL_NULL, ALPHA, NUMBERS, RESCALE, RIGHT_AGAIN, SIZE, SOME_NULL, SYMMETRIC, UPPER_B, multiply

if TYPE_CHECKING:
    from ...optim.step import Options, Report, Tail

__all__ = ["Cupy"]


class Cupy(Reference):
    """Matrices are single: V, R (n, r) float32, or the small float64 ones that stand for tall ones over ranks."""

    name = "cupy"

    def open(self, x: Tensor, g: Tensor, m: Tensor, q: Tensor, o: Options) -> CupyJob:
        """A step's large operands, where they are."""
        return CupyJob(self, x, g, m, q, o)

    def orthonormalize(self, a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """``orth(A)`` and its null directions (section 4)."""
        device, flags, numbers = _fresh(a)
        with device.active():
            f = orthonormalize(device, a.contiguous()[None], tol, flags, numbers, RIGHT_AGAIN)
        return f.v[0], f.null[0] != 0

    def polar(self, a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """``A (AᵀA)^(−1/2)`` and the null directions."""
        device, flags, numbers = _fresh(a)
        with device.active():
            f = orthonormalize(device, a.contiguous()[None], tol, flags, numbers, RIGHT_AGAIN)
            return polar(device, f)[0], f.null[0] != 0

    def warm_start(self, kind: str, v: Tensor, null: Tensor, old: Tensor) -> Tensor:
        """The next Q: V, its null directions filled from the old Q; the old one where nothing was learnt."""
        old = old.to(v.dtype)
        if kind == "column":
            return torch.where(null, old, v)
        device, flags, numbers = _fresh(v)
        some, every = null.any(), null.all()
        flags.copy_((some * SOME_NULL + every * ALL_NULL).int().reshape(1))
        batch, gone = v.contiguous()[None], null.int()[None].contiguous()
        with device.active():
            if kind == "polar":  # with null directions its columns are not orthonormal: a basis of them is
                basis = orthonormalize(device, batch, 1e-3, flags, numbers, 0, mask=SOME_NULL)
                batch, gone = basis.v, basis.null
            filled = complete(device, batch, gone, old.contiguous()[None], flags)[0]
        return torch.where(every, old, torch.where(some, filled, v))

    def compress(self, a: Tensor, along: Group, unit: Tensor) -> Body[Tall]:
        """``A = E·S`` by two Cholesky QR with all-reduced Gram matrices in double: always two, as one pass or two would
        be the host's choice. Directions below the noise of single precision are left out; they would be null anyway.
        """
        device, flags, numbers = _fresh(a)
        r, basis, small = a.shape[1], a.contiguous()[None], None
        for tol in (2.0**-22, 0.0):
            gram = torch.zeros(1, r, r, dtype=torch.float64, device=a.device)
            with device.active():
                if len(a):
                    multiply(device, gram, basis.transpose(1, 2), basis, shape=SYMMETRIC)
            gram[0] = yield Reduce(gram[0], along, "gram")
            with device.active():
                t, s, _, _ = triangles(device, gram, tol, flags, numbers)
                onward = torch.empty(basis.shape, dtype=torch.float64, device=a.device)
                multiply(device, onward, basis, s, shape=UPPER_B)
            t = t[0].triu()
            basis, small = onward, t if small is None else t @ small
        assert small is not None
        return Tall(basis[0], small)


def _fresh(a: Tensor) -> tuple[Device, Tensor, Tensor]:
    """The device, and flags and numbers of one matrix."""
    flags = torch.zeros(1, dtype=torch.int32, device=a.device)
    return device_for(a.device), flags, torch.zeros(1, NUMBERS, dtype=torch.float64, device=a.device)


class CupyJob(Job):
    """A step's large operands on the device; B is formed panel by panel and never stored."""

    def __init__(self, be: Reference, x: Tensor, g: Tensor, m: Tensor, q: Tensor, o: Options) -> None:
        from ...optim.step import Matrix

        self._be, self._o, self._targets = be, o, (x, m, q)
        self.old = q.float()
        whole = (max(x.shape[0], 1), max(x.shape[1], 1))
        self.device = device_for(x.device)
        #: None where this rank has no part of the matrix.
        self._passes: Passes | None = None
        if x.numel() and q.shape[1]:
            (bucket,) = buckets([(Matrix(x, g, m, q, 1.0, whole), o)], self.device.factor_bytes)
            self._passes = Passes(self.device, bucket)
        self._sketch = torch.zeros(x.shape[0], q.shape[1], device=x.device)
        self.skip = torch.zeros((), dtype=torch.bool, device=x.device)
        self._lost = self.skip

    def entry(self) -> Tensor:
        """Max |B|, infinite if B is not finite; a double on the device."""
        if self._passes is None:
            return torch.zeros((), dtype=torch.float64, device=self.old.device)
        with self.device.active():
            first = self._passes.project(self.old[None].contiguous(), back=False, separate=False, energies=False)
        self._sketch = first.p[0]
        top = first.largest.view(torch.float32)[0].double()
        return torch.where(top.isfinite(), top, torch.inf)

    def settle(self, largest: Tensor) -> None:
        """Flags and numbers from what all ranks know, by the kernel that also decides for one rank; nothing is read."""
        self._lost = ~largest.isfinite()
        self.skip = self._lost | (largest < 0.0)
        passes = self._passes
        _, flags, numbers = _fresh(self.old) if passes is None else (None, passes.flags, passes.numbers)
        bits = largest.float().reshape(1).view(torch.int32)  # −1, nobody's gradient, lies above infinity, as NaN does
        with self.device.active():
            self.device.launch("decide", (1,), 64, bits, flags, numbers, SAFE, 1)
            if passes is not None:
                formed = passes.formed_operand(self._o.kappa)
                passes.formed(self._sketch[None], formed, self.old[None].contiguous(), RESCALE)
        self.size = numbers[0, SIZE]

    def report(self, null: Tensor, figures: Report | None) -> Deferred:
        """What will have happened."""
        return Deferred(self._lost, null.sum(), figures)

    def sketch(self) -> Tensor:
        """``B Q`` (m, r)"""
        return self._sketch

    def back(self, p: Tensor) -> Tensor:
        """``Bᵀ P`` (n, r)"""
        return self._back(p, ahead=True)

    def captured(self, p: Tensor) -> Tensor:
        """``size·M⁺ᵀ P`` (n, r)"""
        return self._back(p, ahead=False)

    def _back(self, p: Tensor, ahead: bool) -> Tensor:
        passes, out = self._passes, torch.zeros(self.old.shape[0], p.shape[1], device=p.device)
        if passes is None:
            return out
        b, batch = passes.b, p.contiguous()[None]
        with self.device.active():
            left = passes.operand(batch)
            for s in b.slabs(passes.entries):
                upright = b.upright(passes.form(s, ahead=ahead))
                part, late = left[s.matrices, s.rows], s.first > 0
                self.device.multiply(out[None], upright.transpose(1, 2), part, add=late, tf32=self._o.tf32)
            formed = passes.formed_operand(self._o.kappa if ahead else None)
            passes.formed(out[None], formed.T, batch, RESCALE)
        return out

    def energies(self) -> tuple[Tensor, Tensor]:
        """Sums of B's squares along each row (m,) and down each column (n,)."""
        x, passes = self._targets[0], self._passes
        if passes is None:
            rows, columns = (torch.zeros(k, dtype=torch.float64, device=x.device) for k in x.shape)
            return rows, columns
        sums = Energies(passes.new(passes.m, dtype=torch.float64), passes.new(passes.n, dtype=torch.float64))
        with self.device.active():
            for s in passes.b.slabs(passes.entries):
                passes.form(s, energies=sums)
        return sums.rows[0] * self.size**2, sums.columns[0] * self.size**2

    def tail_rows(self, p: Tensor, r: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares along each row of T = B − P Rᵀ, and of T with its columns scaled."""
        x, passes = self._targets[0], self._passes
        raw, scaled = (torch.zeros(x.shape[0], dtype=torch.float64, device=x.device) for _ in range(2))
        if passes is not None:
            with self.device.active():
                left, right = (passes.operand(t.contiguous()[None]) for t in (p, r))
                scales = columns.contiguous()[None]
                for s in passes.b.slabs(passes.entries):
                    captured = passes.products(s, left)(right)
                    assert captured is not None
                    sums = passes.tail_sums(s, captured, scales)
                    raw[s.rows], scaled[s.rows] = sums[0][0], sums[1][0]
        return raw, scaled

    def write(self, p: Tensor, r: Tensor, v: Tensor, w: Tensor, scale: float, tail: Tail) -> None:
        """``X ← (1 − ηλ)X − η·scale·D`` and ``M ← a·M⁺ − (a − b)·P Wᵀ/size``, in place, unless skipped."""
        passes = self._passes
        if passes is None:
            return
        passes.b.scale = scale
        with self.device.active():
            left, captured, head, fed = (t.contiguous()[None] for t in (p, r, v, w))
            if tail.alpha is not None:
                passes.numbers[0, ALPHA] = tail.alpha
            head = passes.operand(head, captured if tail.alpha is not None else None)
            columns = lengths = None
            if tail.columns is not None and tail.rows is not None:
                columns, of_rows = tail.columns.contiguous()[None], tail.rows

                def lengths(s: Slab, _: Tensor) -> Tensor:
                    return of_rows[s.rows].contiguous()[None]

            passes.apply(left, captured, captured if w is r else fed, head, columns, lengths)
        passes.b.write_back()
        torch.autograd.graph.increment_version(list(self._targets[:2]))

    def keep(self, q: Tensor) -> None:
        """Stores the next step's Q, unless skipped."""
        target = self._targets[2]
        target.copy_(torch.where(self.skip, target, q.to(target.dtype)))
