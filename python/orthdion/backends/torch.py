"""Every request in plain torch, as the papers write it. The oracle of every test; serves any device.

B is formed once and kept as long as its step lasts. Factorisations run in double precision (single where a device has
no double).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..numerics import bits, orthonormal
from ..numerics import newton_schulz as ns
from ..numerics.orthonormal import double
from ..numerics.rounding import drawn, rounded, words
from ..requests import (
    ALONE,
    Average,
    AverageChanges,
    Blend,
    Columns,
    CompressedMean,
    Direction,
    Draws,
    Energies,
    Factor,
    Form,
    Gram,
    LowRankUpdate,
    Map,
    MatMul,
    Matrix,
    NewtonSchulz,
    Norms,
    Pack,
    PackChange,
    Polar,
    Precision,
    Product,
    Report,
    Request,
    ResidualMatrix,
    ResidualSums,
    Rounding,
    Settle,
    Sketch,
    Squares,
    Triangle,
    Unpack,
    Update,
    WarmStart,
)
from .base import Fused

__all__ = ["TorchBackend"]


class TorchBackend:
    """One method a request; ``many`` answers a list where launches are saved by it."""

    name = "torch"
    deferred = False
    together = 0
    unasked: Mapping[torch.dtype, Rounding] = {}
    fused: Mapping[type[Form], Fused] = {}
    _METHODS: ClassVar[dict[type[Request], str]] = {
        Average: "average",
        AverageChanges: "average_changes",
        Columns: "columns",
        CompressedMean: "compressed_mean",
        Direction: "direction",
        Energies: "energies",
        Factor: "factor",
        Gram: "gram",
        LowRankUpdate: "low_rank_update",
        Map: "map",
        MatMul: "matmul",
        NewtonSchulz: "newton_schulz",
        Norms: "norms",
        Pack: "pack",
        PackChange: "pack_change",
        Polar: "polar",
        Product: "product",
        ResidualMatrix: "residual_matrix",
        ResidualSums: "residual_sums",
        Settle: "settle",
        Sketch: "sketch",
        Squares: "squares",
        Triangle: "triangle",
        Unpack: "unpack",
        Update: "update",
        WarmStart: "warm_start",
    }

    def key(self, request: Request) -> Hashable:
        """Shapes, formats and options agree."""
        return request.key()

    def answer(self, requests: list[Any]) -> list[Any]:
        """The answers, from the method ``<request>s`` of a list if there is one, else one by one."""
        name = self._METHODS[type(requests[0])]
        many = getattr(self, f"{name}_of_many", None)
        if many is not None:
            return list(many(requests))
        one: Callable[[Any], Any] = getattr(self, name)
        return [one(q) for q in requests]

    # ------------------------------------------------------------ plain tensors

    def map_of_many(self, qs: list[Map]) -> list[Any]:
        """Small tensors of many matrices are stacked where a launch costs more than a copy."""
        first = qs[0]
        if len(qs) == 1 or first.tensors[0].device.type == "cpu":
            return [q.function(*q.tensors, *q.numbers) for q in qs]
        stacked = [torch.stack(column) for column in zip(*(q.tensors for q in qs), strict=True)]
        result = first.function(*stacked, *first.numbers)
        if isinstance(result, tuple):
            return list(zip(*(t.unbind(0) for t in result), strict=True))
        return list(result.unbind(0))

    def matmul(self, q: MatMul) -> Tensor:
        """``A B``"""
        return self._matmul(q.a, q.b, q.precision)

    def _matmul(self, a: Tensor, b: Tensor, precision: Precision) -> Tensor:
        return rounded(a, precision.rounding) @ rounded(b, precision.rounding)

    def gram(self, q: Gram) -> Tensor:
        """``AᵀA``"""
        wide = double(q.a)
        return wide.T @ wide

    def triangle(self, q: Triangle) -> tuple[Tensor, Tensor, float]:
        """Cholesky's triangle, its inverse and condition."""
        t, failed = torch.linalg.cholesky_ex(q.gram, upper=True)
        inverse = torch.linalg.solve_triangular(t, torch.eye(len(t), dtype=t.dtype, device=t.device), upper=True)
        condition = float(t.norm() * inverse.norm())
        return t, inverse, math.inf if bool(failed) or not math.isfinite(condition) else condition

    def newton_schulz_of_many(self, qs: list[NewtonSchulz]) -> list[Tensor]:
        """One batched iteration; on a CPU one by one, so that the bits do not depend on the batch."""
        q = qs[0]
        options = (q.coefficients, q.divisor, q.epsilon, partial(self._matmul, precision=q.precision))
        if q.tensor.device.type == "cpu":
            return [ns.newton_schulz(p.tensor, *options) for p in qs]
        return list(ns.newton_schulz(torch.stack([p.tensor for p in qs]), *options).unbind(0))

    def polar(self, q: Polar) -> Tensor:
        """By way of the smaller side's factor."""
        u = q.tensor.T if q.tensor.shape[0] < q.tensor.shape[1] else q.tensor
        v: Tensor = self.answer([Factor(u, "polar", q.tol, ALONE, "polar")])[0][0]
        return v.T if u is not q.tensor else v

    def factor(self, q: Factor) -> tuple[Tensor, Tensor, Tensor]:
        """By Householder QR, or SVD."""
        work = orthonormal.orthonormalize if q.kind == "qr" else orthonormal.polar
        return (*work(q.tensor, q.tol), q.tensor)

    def columns(self, q: Columns) -> tuple[Tensor, Tensor]:
        """Unit columns."""
        return orthonormal.columns(q.r, q.energies, q.tol, q.epsilon)

    def warm_start(self, q: WarmStart) -> Tensor:
        """The next Q."""
        return orthonormal.warm_start(q.kind, q.v, q.null, q.old)

    def pack(self, q: Pack) -> Tensor:
        """In bits."""
        return bits.pack(q.tensor, q.bits)

    def unpack(self, q: Unpack) -> Tensor:
        """From bits."""
        return bits.unpack(q.packed, q.columns, q.bits, q.dtype)

    def average(self, q: Average) -> Tensor:
        """From bits to bits."""
        return bits.average(q.packed, q.columns, q.bits, q.dtype)

    def pack_change(self, q: PackChange) -> tuple[Tensor, Tensor]:
        """In bits."""
        return bits.pack_change(q.tensor, q.memory, q.bits, q.fade)

    def average_changes(self, q: AverageChanges) -> tuple[Tensor, Tensor]:
        """From bits to bits."""
        return bits.average_changes(q.packed, q.tensor, q.memory, q.own, q.bits, q.fade)

    def compressed_mean(self, q: CompressedMean) -> Any:
        """Of a rank that is alone, as its own owner: packed twice, or with a memory once."""
        n, dtype = q.tensor.shape[1], q.tensor.dtype
        if q.memory is not None:
            packed = self.pack(Pack(q.tensor, q.bits))
            return self.unpack(Unpack(packed, n, q.bits, dtype)), q.memory * q.fade
        mean = self.average(Average(self.pack(Pack(q.tensor, q.bits))[None], n, q.bits, dtype))
        return self.unpack(Unpack(mean, n, q.bits, dtype))

    def squares(self, q: Squares) -> tuple[Tensor, Tensor | None]:
        """Along rows and down columns."""
        t = double(q.tensor)
        if q.columns is not None:
            return (t * q.columns).square().sum(1), None
        squares = t.square()
        return squares.sum(1), squares.sum(0)

    def norms(self, q: Norms) -> Tensor:
        """Some rows at a time, as copies in double are large."""
        rows = max((1 << 18) // max(q.x.shape[1], 1), 1) if q.x.device.type == "cpu" else max(len(q.x), 1)
        total = double(q.x.new_zeros(3))
        for x, d in zip(q.x.split(rows), q.d.split(rows), strict=True):
            x, d = double(x), double(d)
            total += torch.stack([x.square().sum(), (x * d).sum(), d.square().sum()])
        return total

    # ------------------------------------------------------------ blends

    def _formed(self, b: Blend) -> Tensor:
        if isinstance(b.formed, Tensor):
            return b.formed
        dtype = b.w.precision.dtype
        found = (b.cm * b.m.to(dtype) + b.cg * b.w.g.to(dtype)) * b.size
        if b.formed is None:  # another backend's room stays its own
            b.formed = found
        return found

    def sketch(self, q: Sketch) -> tuple[Tensor, Tensor]:
        """``B Q`` and max |B|"""
        b = self._formed(q.b)
        largest = double(b.abs().amax()) if b.numel() else double(b.new_zeros(()))
        return self._matmul(b, q.q, q.b.w.precision), torch.where(largest.isfinite(), largest, math.inf)

    def settle(self, q: Settle) -> tuple[Blend, Tensor, Report | None]:
        """Decided on the host."""
        top, safe = float(q.largest), q.b.w.precision.safe
        if top < 0.0:
            return q.b, q.sketch, Report(idle=True)
        if not math.isfinite(top):
            return q.b, q.sketch, Report(skipped=True)
        if top == 0.0 or 1.0 / safe < top < safe:
            return q.b, q.sketch, None
        # No entry of P Rᵀ is more than ‖B‖: what could be written as infinity is not.
        if top * math.sqrt(math.prod(q.b.w.shape)) > torch.finfo(q.b.w.precision.dtype).max:
            return q.b, q.sketch, Report(skipped=True)
        b = q.b.scaled(math.ldexp(1.0, -math.floor(math.log2(top))))
        return b, self.answer([Sketch(b, q.q)])[0][0], None

    def product(self, q: Product) -> Tensor:
        """``Bᵀ P``"""
        return self._matmul(self._formed(q.b).T, q.p, q.b.w.precision)

    def energies(self, q: Energies) -> tuple[Tensor, Tensor]:
        """Along rows and down columns."""
        squares = double(self._formed(q.b)).square()
        return squares.sum(1), squares.sum(0)

    def residual_matrix(self, q: ResidualMatrix) -> Tensor:
        """``B − P Rᵀ``"""
        return self._formed(q.b) - self._matmul(q.p, q.r.T, q.b.w.precision)

    def residual_sums(self, q: ResidualSums) -> tuple[Tensor, Tensor]:
        """Of T, and of T with scaled columns."""
        t = double(self.residual_matrix(ResidualMatrix(q.b, q.p, q.r)))
        return t.square().sum(1), (t * q.columns).square().sum(1)

    # ------------------------------------------------------------ writes

    def low_rank_update(self, q: LowRankUpdate) -> Any:
        """X, M and Q."""
        w, (a, b) = q.b.w, q.feedback
        dtype, precision = w.precision.dtype, w.precision
        d = self.direction(Direction(q)) if q.direction is None else q.direction
        plus = a * (q.b.m.to(dtype) + math.copysign(1.0, q.b.cg) * w.g.to(dtype))
        if a != b:
            plus = plus - (a - b) / q.b.size * self._matmul(q.p, q.fed.T, precision)
        self._descend(w, d, q.lr, q.weight_decay, q.scale)
        self._store(w, q.b.m, plus)
        self.keep(q)
        return w.outcome(q.null, q.figures)

    def direction(self, q: Direction) -> Tensor:
        """``P Vᵀ`` and what is added to it."""
        of, residual = q.of, q.of.residual
        d = self._matmul(of.p, of.v.T, of.b.w.precision)
        if residual is not None:
            t = residual.given
            if t is None:
                t = self.residual_matrix(ResidualMatrix(of.b, of.p, of.r))
            if residual.alpha is not None:
                d = d + (double(t) * residual.alpha).to(d.dtype)
            elif residual.columns is not None and residual.rows is not None:
                d = d + (double(t) * residual.columns * residual.rows[:, None]).to(d.dtype)
        return d

    def keep(self, q: LowRankUpdate) -> None:
        """Stores the next step's Q, and the states that the request brings."""
        self._store(q.b.w, q.b.w.state["Q"], q.q)
        self._keep(q.b.w, q.states)

    def _keep(self, w: Matrix, states: dict[str, Tensor]) -> None:
        for name, value in states.items():
            self._store(w, w.state[name], value)

    def update(self, q: Update) -> Any:
        """X and states."""
        exact, states = self._descend(q.w, q.direction, q.lr, q.weight_decay, q.scale), q.states
        if exact is not None and q.error is not None:
            lost = exact - q.w.x.to(exact.dtype)
            states = {**states, "momentum": states["momentum"] + q.error * lost}
        self._keep(q.w, states)
        return q.w.outcome()

    def _descend(self, w: Matrix, d: Tensor, lr: Any, weight_decay: Any, scale: float) -> Tensor | None:
        """``X ← (1 − ηλ)X − η·scale·D``; with care, λ is 0 where D's sign is not X's. Of what is rounded by draws, what
        it was before.
        """
        x, dtype = w.x, w.precision.dtype
        if w.rates is not None:
            lr, weight_decay = w.rates.to(dtype).unbind(0)
        elif w.skip is None and x.dtype == dtype == d.dtype and not w.cautious:
            x.mul_(1.0 - lr * weight_decay).add_(d, alpha=-lr * scale)
            return None
        wide, d = x.to(dtype), d.to(dtype)
        decayed = (1.0 - lr * weight_decay) * wide
        if w.cautious:
            decayed = torch.where(wide.sign() * d.sign() < 0, wide, decayed)
        found: Tensor = decayed - lr * scale * d
        if w.draws is None:
            self._store(w, x, found)
            return None
        if w.skip is None:
            self.draw(x, found, w.draws)
        else:
            there = x.clone()
            self.draw(there, found, w.draws)
            x.copy_(torch.where(w.skip, x, there))
        return found

    def draw(self, target: Tensor, value: Tensor, draws: Draws) -> None:
        """Writes ``value``, float32, each entry as one of its neighbours in the target's format."""
        target.copy_(drawn(value, words(*draws, target.shape, target.device), target.dtype))

    def _store(self, w: Matrix, target: Tensor, value: Tensor) -> None:
        """Writes ``value``, unless the matrix's flag says not to. What is beyond the format's range becomes its largest
        number: an infinite state would stop its matrix for ever.
        """
        most = min(torch.finfo(target.dtype).max, torch.finfo(value.dtype).max)
        if w.skip is not None:
            value = torch.where(w.skip, target.to(value.dtype), value)
        if value.dtype == target.dtype:
            torch.clamp(value, -most, most, out=target)
        else:
            target.copy_(value.clamp(-most, most))
