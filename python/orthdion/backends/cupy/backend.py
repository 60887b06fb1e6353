"""CUDA tensors: what like matrices ask for together is answered by launches that they share.

Nothing is decided on the host: a matrix with NaN on any rank goes through the whole body and is not written, by a flag
on the device. Matrices over ranks take the same answers. What the host still reads over ranks, the bodies read: null
columns of a right factor whose rows lie on several ranks, and diagnostics.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ...numerics import orthonormal as plain
from ...numerics.newton_schulz import newton_schulz
from ...requests import (
    Blend,
    Columns,
    Deferred,
    Direction,
    Elementwise,
    Factor,
    Form,
    Gram,
    LowRankUpdate,
    Map,
    MatMul,
    NewtonSchulz,
    Outcome,
    Precision,
    Product,
    Report,
    Request,
    ResidualSums,
    Rounding,
    Settle,
    Sketch,
    Triangle,
    WarmStart,
)
from ...requests import Energies as EnergiesOf
from ..base import Fused
from ..torch import TorchBackend
from .arguments import MATRICES, operand
from .bucket import Room, batch, lying
from .device import Device, device_for
from .elementwise import elementwise
from .orthonormal import complete, orthonormalize, polar, triangles
from .passes import Energies, Passes, Write
from .products import SYMMETRIC, multiply

__all__ = ["CupyBackend"]

#: What is asked of a blend, and reads or writes matrices.
_OF_BLENDS = (EnergiesOf, LowRankUpdate, Product, ResidualSums, Settle, Sketch)
#: Bytes of scratch for an element of what a request brings: copies in double, and results. Factors are copied in single
#: precision at most.
_SCRATCH, _OF_FACTORS = 32, 12
_ON_FACTORS = (Factor, LowRankUpdate, Product, Settle, Sketch, WarmStart)


class CupyBackend(TorchBackend):
    """Up to 64 matrices a launch; B is formed in panels that stay in the cache, and never stored."""

    name = "cupy"
    deferred = True
    #: Four layers of an 8-billion-parameter model in 16 bits: launches are few, and their factors a few GiB at r = d/8.
    together = 2 << 30
    #: What float32 units take is eight times what the tensor cores do; sixteen bits have fewer digits than TF32 anyway.
    unasked: Mapping[torch.dtype, Rounding] = {torch.bfloat16: "tf32", torch.float16: "tf32"}
    fused: Mapping[type[Form], Fused] = {Elementwise: cast(Any, elementwise)}

    def key(self, request: Request) -> Hashable:
        """All that a launch has in common."""
        if isinstance(request, Factor):  # of one r, whatever n: they share the chain that is as long as r says
            a = request.tensor
            return Factor, a.shape[1], a.dtype, a.device, request.kind, request.tol, a.numel() > 0
        whole = request.b.w.shape if isinstance(request, Settle) else None
        if not isinstance(request, _OF_BLENDS) or not request.b.w.x.numel():
            return request.key(), whole
        b = request.b
        key = (type(request), lying(b).key, b.size if isinstance(b.size, float) else None)
        if isinstance(request, LowRankUpdate):
            return *key, *_written(request)
        if isinstance(request, (Sketch, Settle)):
            return *key, request.q.shape, request.q.dtype, whole
        return *key, None if isinstance(request, EnergiesOf) else request.p.shape

    def answer(self, requests: list[Any]) -> list[Any]:
        """The answers, of as many at a time as a launch takes and scratch may hold."""
        first, found = requests[0], list[Any]()
        if isinstance(first, _OF_BLENDS) and not isinstance(first, Settle) and not first.b.w.x.numel():
            one = getattr(self, self._METHODS[type(first)])  # this rank has no part of it
            return [one(q) for q in requests]
        device = device_for(_tensors(first)[0].device)
        with device.active():
            for part in _parts(requests, device):
                found.extend(super().answer(part))
        return found

    # ------------------------------------------------------------ plain tensors

    def map_of_many(self, qs: list[Map]) -> list[Any]:
        """Stacked, on any device."""
        stacked = [batch(column) for column in zip(*(q.tensors for q in qs), strict=True)]
        result = qs[0].function(*stacked, *qs[0].numbers)
        if isinstance(result, tuple):
            return list(zip(*(t.unbind(0) for t in result), strict=True))
        return list(result.unbind(0))

    def matmul_of_many(self, qs: list[MatMul]) -> list[Tensor]:
        """``A B``, as one batched product."""
        return list(self._matmul(batch([q.a for q in qs]), batch([q.b for q in qs]), qs[0].precision).unbind(0))

    def newton_schulz_of_many(self, qs: list[NewtonSchulz]) -> list[Tensor]:
        """One batched iteration."""
        q, product = qs[0], partial(self._matmul, precision=qs[0].precision)
        return list(newton_schulz(batch([p.tensor for p in qs]), q.coefficients, q.divisor, q.epsilon, product))

    def _matmul(self, a: Tensor, b: Tensor, precision: Precision) -> Tensor:
        """Single precision by cuBLAS, on the tensor cores where operands may be rounded."""
        if a.dtype != torch.float32 or 0 in (*a.shape, *b.shape):
            return super()._matmul(a, b, precision)
        if a.ndim == 2:
            return self._matmul(a[None], b[None], precision)[0]
        kind = torch.bfloat16 if precision.rounding == "bfloat16" else torch.float32
        left, right = (_one_side_dense(t.to(kind)) for t in (a, b))
        out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.float32, device=a.device)
        device_for(a.device).multiply(out, left, right, tf32=precision.rounding == "tf32")
        return out

    def gram_of_many(self, qs: list[Gram]) -> list[Tensor]:
        """``AᵀA``"""
        a = batch([q.a for q in qs])
        count, n, r = a.shape
        out = torch.zeros(count, r, r, dtype=torch.float64, device=a.device)
        if a.numel():
            multiply(device_for(a.device), out, operand(a).T, operand(a), shape=SYMMETRIC, sizes=(r, r, n))
        return list(out.unbind(0))

    def triangle_of_many(self, qs: list[Triangle]) -> list[tuple[Tensor, Tensor, None]]:
        """Null directions left out, whatever the condition, which nobody waits for."""
        gram = batch([q.gram for q in qs]).clone()
        t, inverse, _, _ = triangles(device_for(gram.device), gram, qs[0].tol)
        return [(*both, None) for both in zip(t.triu().unbind(0), inverse.triu().unbind(0), strict=True)]

    def factor_of_many(self, qs: list[Factor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """QR by Cholesky, the polar factor by products."""
        if not qs[0].tensor.numel():
            return [self.factor(q) for q in qs]
        heights: dict[int, list[int]] = {}
        for i, q in enumerate(qs):
            heights.setdefault(q.tensor.shape[0], []).append(i)
        device = device_for(qs[0].tensor.device)
        f = orthonormalize(device, [batch([qs[i].tensor for i in of]) for of in heights.values()], qs[0].tol)
        v = polar(device, f) if qs[0].kind == "polar" else f.v
        found: list[Any] = [None] * len(qs)
        for of, own, gone in zip(heights.values(), v, f.of_each(f.null != 0), strict=True):
            for i, *answer in zip(of, own.unbind(0), gone.unbind(0), strict=True):
                found[i] = (*answer, qs[i].tensor)
        return found

    def columns_of_many(self, qs: list[Columns]) -> list[tuple[Tensor, Tensor]]:
        """Unit columns."""
        r, energies = batch([q.r for q in qs]), batch([q.energies for q in qs])
        v, null = plain.columns(r, energies, qs[0].tol, qs[0].epsilon)
        return list(zip(v.unbind(0), null.unbind(0), strict=True))

    def warm_start_of_many(self, qs: list[WarmStart]) -> list[Tensor]:
        """The next Q, its null directions filled where a flag says that there are some, and not all."""
        v, null, old = batch([q.v for q in qs]), batch([q.null for q in qs]), batch([q.old for q in qs])
        old = old.to(v.dtype)
        if qs[0].kind == "column" or not v.numel():
            return list(torch.where(null[:, None, :], old, v).unbind(0))
        device, every = device_for(v.device), null.all(1)
        some = null.any(1) & ~every
        due, gone, basis = some.int(), null.int(), v
        if qs[0].kind == "polar":  # with null directions its columns are not orthonormal: a basis of them is
            f = orthonormalize(device, [v], 1e-3, due)
            (basis,), gone = f.v, f.null
        filled = complete(device, basis, gone, old, due)
        chosen = torch.where(every[:, None, None], old, torch.where(some[:, None, None], filled, v))
        return list(chosen.unbind(0))

    # ------------------------------------------------------------ blends

    def sketch_of_many(self, qs: list[Sketch]) -> list[tuple[Tensor, Tensor]]:
        """``B Q`` and max |B|; rules that look ahead complete the step and will ask for B's energies, so they are taken
        on the way.
        """
        passes, old, first = _passes(qs), batch([q.q for q in qs]), qs[0].b
        energies = passes.room() if abs(first.cg) != first.cm or first.w.diagnose else None
        p, bits, formed = passes.sketch(old, energies)
        largest = bits.view(torch.float32).double() * passes.sizes
        largest = torch.where(largest.isfinite(), largest, torch.inf)
        room = None if formed is None else Room.of(passes.device, formed)
        for k, q in enumerate(qs):
            at = lying(q.b)
            at.q, at.kept = old[k], None if formed is None or room is None else (formed[k], room)
            at.energies = None if energies is None else (energies.rows[k], energies.columns[k])
        return list(zip(p.unbind(0), largest.unbind(0), strict=True))

    def settle_of_many(self, qs: list[Settle]) -> list[tuple[Blend, Tensor, Report | None]]:
        """Flags and sizes from what all ranks know; products of matrices that must be scaled are formed anew."""
        largest, first = batch([q.largest for q in qs]), qs[0].b.w
        sizes, count = torch.empty_like(largest), len(qs)
        skip, lost = (torch.empty(count, dtype=torch.int32, device=largest.device) for _ in range(2))
        grid, spread = (-(-count // 64),), math.sqrt(math.prod(first.shape))
        decided = (largest, sizes, skip, lost, first.precision.safe, spread, count)
        device_for(largest.device).launch("decide", grid, 64, *decided)
        flags = zip(sizes.unbind(0), skip.bool().unbind(0), lost.unbind(0), strict=True)
        blends = []
        for q, (size, skipped, gone) in zip(qs, flags, strict=True):
            q.b.w.skip, q.b.w.lost = skipped, gone
            b = q.b.scaled(size)
            b.formed = q.b.formed
            blends.append(b)
        sketch = batch([q.sketch for q in qs])
        if first.x.numel():
            old = batch([q.q if lying(q.b).q is None else lying(q.b).q for q in qs])  # type: ignore[misc]
            Passes(device_for(largest.device), blends).rescaled(sketch, old)
        return [(b, p, None) for b, p in zip(blends, sketch.unbind(0), strict=True)]

    def product_of_many(self, qs: list[Product]) -> list[Tensor]:
        """``Bᵀ P``"""
        known = [at.kept for q in qs if (at := lying(q.b)).kept is not None]
        formed = batch([block for block, _ in known]) if len(known) == len(qs) else None
        for q in qs:
            lying(q.b).kept = None
        return list(_passes(qs).product(batch([q.p for q in qs]), formed).unbind(0))

    def energies_of_many(self, qs: list[EnergiesOf]) -> list[tuple[Tensor, Tensor]]:
        """Along rows and down columns."""
        passes, known = _passes(qs), [e for q in qs if (e := lying(q.b).energies) is not None]
        if len(known) == len(qs):
            found = Energies(batch([rows for rows, _ in known]), batch([columns for _, columns in known]))
        else:
            found = passes.energies()
        squared = passes.sizes.square()[:, None]
        rows, columns = found.rows * squared, found.columns * squared
        return list(zip(rows.unbind(0), columns.unbind(0), strict=True))

    def residual_sums_of_many(self, qs: list[ResidualSums]) -> list[tuple[Tensor, Tensor]]:
        """Of T, and of T with scaled columns."""
        p, r, columns = (batch([getattr(q, name) for q in qs]) for name in ("p", "r", "columns"))
        raw, scaled = _passes(qs).residual_sums(p, r, columns.double())
        return list(zip(raw.unbind(0), scaled.unbind(0), strict=True))

    # ------------------------------------------------------------ writes

    def low_rank_update_of_many(self, qs: list[LowRankUpdate]) -> list[Outcome]:
        """X, M and Q in place, but of matrices whose flag says not to."""
        first, w = qs[0], qs[0].b.w
        given = first.direction is not None or (first.residual is not None and first.residual.given is not None)
        if given:
            return [self.low_rank_update(q) for q in qs]
        p, v, r = (batch([getattr(q, name) for q in qs]) for name in ("p", "v", "r"))
        fed = r if first.fed is first.r else batch([q.fed for q in qs])
        rates = w.rates
        if rates is None:  # one step of one matrix, outside of optimizers
            numbers = [float(first.lr), float(first.weight_decay)]
            rates = torch.tensor(numbers, dtype=torch.float64).to(w.x.device)
        skip = _flags([q.b.w.skip for q in qs], w.x.device)
        alphas, columns, rows = (_residual(qs, name) for name in ("alpha", "columns", "rows"))
        passes = Passes(device_for(w.x.device), [q.b for q in qs], written=True)
        draws = [q.b.w.draws for q in qs]
        residual = (alphas, columns, rows, draws)
        passes.update(Write(p, v, r, fed, rates, first.scale, first.feedback, w.cautious, skip, *residual))
        passes.keep(batch([q.q for q in qs]).float(), [q.b.w.state["Q"] for q in qs], skip)
        for q in qs:
            self._keep(q.b.w, q.states)
        written = [t for q in qs for t in (q.b.w.x, q.b.m, q.b.w.state["Q"])]
        torch.autograd.graph.increment_version(written)
        nulls = batch([q.null for q in qs]).sum(1).unbind(0)
        return [_outcome(q, null) for q, null in zip(qs, nulls, strict=True)]


def _outcome(q: LowRankUpdate, nulls: Tensor) -> Outcome:
    lost = q.b.w.lost
    return q.b.w.outcome(q.null, q.figures) if lost is None else Deferred(lost, nulls, q.figures)


def _passes(qs: list[Any]) -> Passes:
    return Passes(device_for(qs[0].b.w.x.device), [q.b for q in qs])


def _one_side_dense(t: Tensor) -> Tensor:
    """A batch as cuBLAS takes it."""
    dense = any(t.stride(axis) == 1 or t.shape[axis] == 1 for axis in (1, 2))
    return t if dense and t.stride(0) > 0 else t.contiguous()


def _flags(flags: list[Tensor | None], where: torch.device) -> Tensor:
    """Flags as kernels read them; none is none raised."""
    known = [f for f in flags if f is not None]
    return batch(known).int() if known else torch.zeros(len(flags), dtype=torch.int32, device=where)


def _residual(qs: list[LowRankUpdate], name: str) -> Tensor | None:
    """One of the residual's numbers, of every matrix."""
    found = [getattr(q.residual, name) for q in qs if q.residual is not None]
    return None if not found or found[0] is None else batch(found).double()


def _written(q: LowRankUpdate) -> tuple[Hashable, ...]:
    """What writes in one launch have in common."""
    w, old, residual = q.b.w, q.b.w.state["Q"], q.residual
    rates = (float(q.lr), float(q.weight_decay)) if w.rates is None else w.rates.data_ptr()
    kind = None if residual is None else (residual.alpha is None, residual.columns is None, residual.given is None)
    formats = (old.dtype, old.shape, old.stride(), q.q.dtype)
    how = (q.scale, q.feedback, kind, q.fed is q.r, q.direction is None)
    return rates, w.cautious, *how, w.skip is None, w.draws is None, formats


def _tensors(q: Any) -> list[Tensor]:
    """What a request brings beside its matrices."""
    found: list[Tensor] = []
    if isinstance(q, Direction):
        return _tensors(q.of)
    for f in fields(q):
        value = getattr(q, f.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            found.extend(t for t in value if isinstance(t, Tensor))
        elif isinstance(value, Blend):
            found.append(value.w.x[:0])
    return found


def _parts(requests: list[Any], device: Device) -> Iterator[list[Any]]:
    """At most 64 at a time, and as many as scratch may hold."""
    part, taken = list[Any](), 0
    for request in requests:
        own = _scratch(request)
        if part and (len(part) == MATRICES or taken + own > device.factor_bytes):
            yield part
            part, taken = [], 0
        part.append(request)
        taken += own
    yield part


def _scratch(request: Any) -> int:
    """Bytes that answering a request takes."""
    entries = sum(t.numel() for t in _tensors(request))
    return (_OF_FACTORS if isinstance(request, _ON_FACTORS) else _SCRATCH) * entries
