"""CPU tensors through the Rust core, without copies: one call for all requests of a kind, and whole steps in one
call.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthdion import _core

from ..numerics.bits import row_bytes
from ..requests import (
    Average,
    AverageChanges,
    Blend,
    Draws,
    Elementwise,
    Energies,
    Factor,
    Form,
    LowRank,
    LowRankUpdate,
    NewtonSchulz,
    Pack,
    PackChange,
    Precision,
    Product,
    Request,
    ResidualMatrix,
    ResidualSums,
    Sketch,
    Squares,
    Unpack,
)
from .base import Fused
from .fused import elementwise, low_rank, written
from .table import drawn, table
from .torch import TorchBackend

__all__ = ["RustBackend"]


class RustBackend(TorchBackend):
    """B is formed while the core packs it, and never stored."""

    name = "rust"
    fused: Mapping[type[Form], Fused] = {LowRank: low_rank, Elementwise: elementwise}

    def key(self, request: Request) -> Hashable:
        """The core takes matrices of all shapes in one call."""
        if isinstance(request, (Sketch, Product)):
            return type(request), request.b.w.precision
        if isinstance(request, Factor):
            return Factor, request.kind, request.tol, request.tensor.dtype
        if isinstance(request, NewtonSchulz):
            return NewtonSchulz, request.coefficients, request.divisor, request.epsilon, request.precision
        if isinstance(request, (ResidualMatrix, ResidualSums)):
            return type(request), request.b.w.precision
        if isinstance(request, LowRankUpdate):
            w = request.b.w
            return LowRankUpdate, w.precision, _kind(request), w.draws is None
        return request.key()

    # ------------------------------------------------------------ factorizations and iterations

    def factor_of_many(self, qs: list[Factor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """QR by Cholesky or Householder, polar factors by QDWH."""
        out = [torch.empty_like(q.tensor, memory_format=torch.contiguous_format) for q in qs]
        rows = [((*q.tensor.shape, 0, 0), (q.tensor, v)) for q, v in zip(qs, out, strict=True)]
        # A polar factor is R's, whose columns are nearly orthogonal; QR is that of B·Q too, whose columns are not.
        polar, double = qs[0].kind == "polar", qs[0].tensor.dtype == torch.float64
        null = _core.factors(table(rows), np.empty(0), polar, polar, qs[0].tol, double, _threads())
        return [(v, torch.tensor(n), q.tensor) for q, v, n in zip(qs, out, null, strict=True)]

    def newton_schulz_of_many(self, qs: list[NewtonSchulz]) -> list[Tensor]:
        """Symmetric products once, on the Gram matrix where that is smaller."""
        first = qs[0]
        out = [torch.empty(q.tensor.shape, dtype=q.precision.dtype) for q in qs]
        rows = [((*q.tensor.shape, 0, 0), (q.tensor, x)) for q, x in zip(qs, out, strict=True)]
        coefficients = np.array(first.coefficients, dtype=np.float64).reshape(-1, 3)
        double, half = _double_and_half(first.precision)
        finite = _core.newton_schulz(table(rows), coefficients, first.divisor, first.epsilon, half, double, _threads())
        for x, good in zip(out, finite, strict=True):
            if not good:
                x.fill_(math.nan)
        return out

    # ------------------------------------------------------------ blends

    def _products(
        self, jobs: list[tuple[Blend, Tensor]], transposed: bool, sums: NDArray[np.float64] | None = None
    ) -> list[tuple[Tensor, float]]:
        """``B A``, or ``Bᵀ A``, each with its largest entry; and the sums of B's squares along the result's rows."""
        precision, rows, out = jobs[0][0].w.precision, [], []
        for b, a in jobs:
            m, n = b.shape
            product = torch.empty(n if transposed else m, a.shape[1], dtype=precision.dtype)
            rows.append(((m, n, a.shape[1], 0), (b.m, b.w.g, a, product)))
            out.append(product)
        coefficients = _coefficients([b for b, _ in jobs])
        double, half = _double_and_half(precision)
        kept = np.empty(0) if sums is None else sums
        largest = _core.products(table(rows), coefficients, transposed, kept, double, half, _threads())
        return list(zip(out, largest, strict=True))

    def sketch_of_many(self, qs: list[Sketch]) -> list[tuple[Tensor, Tensor]]:
        """``B Q``; max |B| itself is only looked for where the product's leaves open whether squares are safe."""
        results = []
        for q, (product, top) in zip(qs, self._products([(q.b, q.q) for q in qs], False), strict=True):
            safe = q.b.w.precision.safe
            if not 1.0 / safe < top < safe:
                row = ((*q.b.shape, 0, 0), (q.b.m, q.b.w.g))
                (top,) = _core.largest(table([row]), _coefficients([q.b]), _threads())
            results.append((product, torch.tensor(top if math.isfinite(top) else math.inf, dtype=torch.float64)))
        return results

    def product_of_many(self, qs: list[Product]) -> list[Tensor]:
        """``Bᵀ P``"""
        return [out for out, _ in self._products([(q.b, q.p) for q in qs], True)]

    def energies(self, q: Energies) -> tuple[Tensor, Tensor]:
        """Sums that are taken while B is packed."""
        m, n = q.b.shape
        rows, columns, dtype = np.zeros(m), np.zeros(n), q.b.w.precision.dtype
        for sums, transposed, inner in ((rows, False, n), (columns, True, m)):
            if sums.size:
                self._products([(q.b, torch.zeros(inner, 0, dtype=dtype))], transposed, sums)
        return torch.from_numpy(rows), torch.from_numpy(columns)

    # ------------------------------------------------------------ residuals

    def residual_matrix_of_many(self, qs: list[ResidualMatrix]) -> list[Tensor]:
        """``B − P Rᵀ``, in one pass over M and G."""
        precision = qs[0].b.w.precision
        out = [torch.empty(q.b.shape, dtype=precision.dtype) for q in qs]
        rows = [((*q.b.shape, q.p.shape[1], 0), (q.b.m, q.b.w.g, q.p, q.r, t)) for q, t in zip(qs, out, strict=True)]
        _core.residuals(table(rows), _coefficients([q.b for q in qs]), *_double_and_half(precision), _threads())
        return out

    def residual_sums_of_many(self, qs: list[ResidualSums]) -> list[tuple[Tensor, Tensor]]:
        """A panel of T at a time."""
        precision = qs[0].b.w.precision
        rows = [((*q.b.shape, q.p.shape[1], 0), (q.b.m, q.b.w.g, q.p, q.r)) for q in qs]
        columns = torch.cat([q.columns for q in qs]).numpy()
        sums = torch.empty(sum(2 * q.b.shape[0] for q in qs), dtype=torch.float64)
        coefficients, how = _coefficients([q.b for q in qs]), _double_and_half(precision)
        _core.residual_sums(table(rows), coefficients, columns, sums.numpy(), *how, _threads())
        parts = iter(sums.split([q.b.shape[0] for q in qs for _ in range(2)]))
        return [(next(parts), next(parts)) for _ in qs]

    def squares(self, q: Squares) -> tuple[Tensor, Tensor | None]:
        """One pass."""
        m, n = q.tensor.shape
        rows = torch.zeros(m, dtype=torch.float64)
        columns = torch.zeros(n if q.columns is None else 0, dtype=torch.float64)
        if m and n:
            scales = np.empty(0) if q.columns is None else _flat(q.columns)
            _core.squares(_flat(q.tensor), scales, rows.numpy(), columns.numpy(), _threads())
        return rows, columns if q.columns is None else None

    def pack(self, q: Pack) -> Tensor:
        """The reference's bytes: at one bit but for the rounding of a scale."""
        m, n = q.tensor.shape
        out = torch.empty(m, row_bytes(n, q.bits, q.tensor.dtype), dtype=torch.uint8)
        _core.pack(_flat(q.tensor), (m, n), q.bits, _flat(out), _threads())
        return out

    def unpack(self, q: Unpack) -> Tensor:
        """A row at a time."""
        out = torch.empty(len(q.packed), q.columns, dtype=q.dtype)
        _core.unpack(_flat(q.packed), (len(q.packed), q.columns), q.bits, _flat(out), _threads())
        return out

    def average(self, q: Average) -> Tensor:
        """A row at a time."""
        ranks, m, k = q.packed.shape
        out, double = torch.empty(m, k, dtype=torch.uint8), q.dtype == torch.float64
        _core.average(_flat(q.packed), ranks, (m, q.columns), q.bits, _flat(out), double, _threads())
        return out

    def pack_change(self, q: PackChange) -> tuple[Tensor, Tensor]:
        """A row at a time."""
        m, n = q.tensor.shape
        out = torch.empty(m, row_bytes(n, q.bits, q.tensor.dtype), dtype=torch.uint8)
        memory = torch.empty(m, n, dtype=q.tensor.dtype)
        old, new = (_flat(q.tensor), _flat(q.memory)), (_flat(out), _flat(memory))
        _core.pack_change(*old, (m, n), q.bits, q.fade, *new, _threads())
        return out, memory

    def average_changes(self, q: AverageChanges) -> tuple[Tensor, Tensor]:
        """A row at a time."""
        (ranks, m, k), n = q.packed.shape, q.tensor.shape[1]
        out, memory = torch.empty(m, k, dtype=torch.uint8), torch.empty(m, n, dtype=q.tensor.dtype)
        old, new = (_flat(q.tensor), _flat(q.memory)), (_flat(out), _flat(memory))
        _core.average_changes(_flat(q.packed), ranks, q.own, *old, (m, n), q.bits, q.fade, *new, _threads())
        return out, memory

    # ------------------------------------------------------------ writes

    def low_rank_update_of_many(self, qs: list[LowRankUpdate]) -> list[Any]:
        """X and M in one pass over each."""
        kind = _kind(qs[0])
        forms: dict[LowRank, int] = {}
        rows, numbers, scales = [], [], []
        for q in qs:
            w, u, alpha, extra = q.b.w, q.v, 0.0, q.r
            if q.direction is not None:
                u, alpha, extra = torch.zeros_like(q.v), 1.0, q.direction
            elif q.residual is not None:
                if q.residual.alpha is not None:
                    alpha = float(q.residual.alpha)
                if kind == "share":
                    u = q.v - alpha * q.r
                elif q.residual.given is not None:
                    extra = q.residual.given
                if q.residual.columns is not None and q.residual.rows is not None:
                    scales += [q.residual.columns, q.residual.rows]
            k = forms.setdefault(_form(q), len(forms))
            rows.append(((*w.x.shape, q.p.shape[1], k), (w.x, w.g, q.b.m, q.p, u, q.fed, extra)))
            numbers.append((q.scale, alpha, float(q.b.size)))
        flat = torch.cat(scales).double().numpy() if scales else np.empty(0)
        double = qs[0].b.w.precision.dtype == torch.float64
        rounding = drawn([q.b.w.draws for q in qs])
        _core.writes(table(rows), list(forms), np.array(numbers), kind, flat, rounding, double, _threads())
        written([t for q in qs for t in (q.b.w.x, q.b.m)])
        for q in qs:
            self.keep(q)
        return [q.b.w.outcome(q.null, q.figures) for q in qs]

    def draw(self, target: Tensor, value: Tensor, draws: Draws) -> None:
        """One pass."""
        row = ((*target.shape, 0, 0), (target, value))
        _core.rounded(table([row]), drawn([draws]), _threads())


def _kind(q: LowRankUpdate) -> Literal["share", "given", "scaled", "missed"]:
    """What is added to P Vᵀ: a share of B, T as it is given, or T with scaled columns and rows, given or not."""
    if q.direction is not None:
        return "given"
    if q.residual is None or (q.residual.columns is None and q.residual.given is None):
        return "share"
    if q.residual.columns is None:
        return "given"
    return "missed" if q.residual.given is None else "scaled"


def _coefficients(bs: list[Blend]) -> NDArray[np.float64]:
    return np.array([(b.cm * float(b.size), b.cg * float(b.size)) for b in bs])


def _flat(t: Tensor) -> NDArray[Any]:
    """Its elements in order, without a copy where they lie so."""
    return t.contiguous().view(-1).numpy()


def _form(q: LowRankUpdate) -> LowRank:
    a, b = q.feedback
    ahead = abs(q.b.cg) != q.b.cm  # B = κM⁺ ± G = κM ± (1 + κ)G
    return LowRank(
        lr=float(q.lr),
        weight_decay=float(q.weight_decay),
        maximize=q.b.cg < 0.0,
        cautious=q.b.w.cautious,
        a=a,
        b=b,
        right_factor="qr",
        residual=None if q.residual is None else "linear",
        residual_scale=0.0,
        kappa=q.b.cm if ahead else None,
        epsilon=0.0,
        bfloat16=q.b.w.precision.rounding == "bfloat16",
    )


def _double_and_half(precision: Precision) -> tuple[bool, bool]:
    return precision.dtype == torch.float64, precision.rounding == "bfloat16"


def _threads() -> int:
    return torch.get_num_threads()
