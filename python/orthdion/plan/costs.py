"""What every request costs, and the shape of its answer: one row of a table for each class of requests.

Flops are those of the definition, as the field counts them: a product of m×k and k×n is 2mkn, whatever symmetry a
backend makes use of; how fast a backend is by that count is for the hardware to say (:mod:`.hardware`). Bytes are what
must be read and written once: operands in the formats that they are stored in, answers in working precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..numerics import bits
from ..requests import (
    ALONE,
    Average,
    AverageChanges,
    Blend,
    Columns,
    CompressedMean,
    Direction,
    Energies,
    Factor,
    Gram,
    LowRankUpdate,
    Map,
    MatMul,
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
    Settle,
    Sketch,
    Squares,
    Triangle,
    Unpack,
    Update,
    WarmStart,
)

__all__ = ["COSTS", "KINDS", "Answered", "Cost", "Kind", "cost_of", "size_of"]

#: What a backend may do at rates of its own. A "square" is what a factorisation or an iteration does on the r×r (or
#: s×s) matrix alone; "passes" read and write memory and compute little; "one pass" is a fused step's.
Kind = Literal[
    "product",
    "newton-schulz",
    "newton-schulz square",
    "qr",
    "qr square",
    "polar",
    "polar square",
    "passes",
    "one pass",
]
KINDS: tuple[Kind, ...] = (
    *("product", "newton-schulz", "newton-schulz square", "qr", "qr square"),
    *("polar", "polar square", "passes", "one pass"),
)


@dataclass(frozen=True)
class Cost:
    """Flops and bytes of one kind of work, in the format of its operands."""

    kind: Kind
    format: str
    flops: int
    bytes: int = 0


@dataclass(frozen=True)
class Answered:
    """A request's costs and its answer, which holds no numbers; None where plain torch must be asked (Map)."""

    costs: tuple[Cost, ...]
    answer: Any


#: Rounds of the polar factor's iteration on r×r matrices, an inverse and a product each (section 4): **chosen**, as
#: their number depends on the condition.
_POLAR_ROUNDS = 5


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _format(p: Precision) -> str:
    return p.rounding or ("float64" if p.dtype == torch.float64 else "float32")


def _name(dtype: torch.dtype) -> str:
    return "float64" if dtype == torch.float64 else "float32"


def _like(t: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or t.dtype, device=t.device)


def _of(b: Blend) -> int:
    """Bytes of a blend, which is formed where it is read."""
    return size_of(b.m, b.w.g)


def _product(q: Any, a: Tensor, precision: Precision, *shape: int) -> Answered:
    """B times a thin matrix."""
    m, n = q.b.shape
    out = _like(a, *shape, dtype=precision.dtype)
    return Answered((Cost("product", _format(precision), 2 * m * n * a.shape[1], _of(q.b) + size_of(a, out)),), out)


def _sketch(q: Sketch, fused: bool) -> Answered:
    found = _product(q, q.q, q.b.w.precision, q.b.shape[0], q.q.shape[1])
    return Answered(found.costs, (found.answer, _like(q.q, dtype=torch.float64)))


def _back(q: Product, fused: bool) -> Answered:
    return _product(q, q.p, q.b.w.precision, q.b.shape[1], q.p.shape[1])


def _settle(q: Settle, fused: bool) -> Answered:
    return Answered((), (q.b, q.sketch, None))


def _matmul(q: MatMul, fused: bool) -> Answered:
    (m, k), n = q.a.shape, q.b.shape[1]
    out = _like(q.a, m, n)
    return Answered((Cost("product", _format(q.precision), 2 * m * k * n, size_of(q.a, q.b, out)),), out)


def _gram(q: Gram, fused: bool) -> Answered:
    k, r = q.a.shape
    out = _like(q.a, r, r, dtype=torch.float64)
    return Answered((Cost("product", "float64", 2 * k * r * r, size_of(q.a, out)),), out)


def _triangle(q: Triangle, fused: bool) -> Answered:
    """Cholesky's triangle and its inverse; the condition is that of a well-conditioned matrix."""
    t = _like(q.gram, *q.gram.shape)
    cost = Cost("qr square", "float64", 2 * q.gram.shape[0] ** 3 // 3, size_of(q.gram, t, t))
    return Answered((cost,), (t, _like(q.gram, *q.gram.shape), 1.0))


def _factor(q: Factor, fused: bool) -> Answered:
    """Of (n, r): QR with V formed, 4nr² flops, or the polar factor, the same with its iteration on r×r."""
    n, r = q.tensor.shape
    kind: Kind = "qr" if q.kind == "qr" else "polar"
    square = 2 * r**3 // 3 if q.kind == "qr" else 4 * _POLAR_ROUNDS * r**3
    own = _name(q.tensor.dtype)
    costs = (
        Cost(kind, own, 4 * n * r * r, 2 * size_of(q.tensor)),
        Cost("qr square" if q.kind == "qr" else "polar square", own, square),
    )
    return Answered(costs, (_like(q.tensor, n, r), _like(q.tensor, r, dtype=torch.bool), q.tensor))


def _polar(q: Polar, fused: bool) -> Answered:
    u = q.tensor.T if q.tensor.shape[0] < q.tensor.shape[1] else q.tensor
    return Answered(_factor(Factor(u, "polar", q.tol, ALONE, "polar"), fused).costs, _like(q.tensor, *q.tensor.shape))


def _newton_schulz(q: NewtonSchulz, fused: bool) -> Answered:
    """Of s×l, s ≤ l, a step is X Xᵀ and its product with X, 4s²l flops, and the square of X Xᵀ, 2s³."""
    s, l = sorted(q.tensor.shape)
    steps, own = len(q.coefficients), _format(q.precision)
    out = _like(q.tensor, *q.tensor.shape, dtype=q.precision.dtype)
    costs = (
        Cost("newton-schulz", own, steps * 4 * s * s * l, steps * 2 * size_of(out)),
        Cost("newton-schulz square", own, steps * 2 * s**3),
    )
    return Answered(costs, out)


def _pass(flops: int, *tensors: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Cost, ...]:
    return (Cost("passes", _name(dtype), flops, size_of(*tensors)),)


def _columns(q: Columns, fused: bool) -> Answered:
    v = _like(q.r, *q.r.shape)
    return Answered(_pass(2 * v.numel(), q.r, v), (v, _like(q.r, q.r.shape[1], dtype=torch.bool)))


def _warm_start(q: WarmStart, fused: bool) -> Answered:
    """Where no direction is null, V itself."""
    return Answered((), q.v)


def _energies(q: Energies, fused: bool) -> Answered:
    """A fused step has the sums from its packing of B."""
    m, n = q.b.shape
    cost = Cost("passes", "float64", 4 * m * n, 0 if fused else _of(q.b))
    x = q.b.w.x
    return Answered((cost,), (_like(x, m, dtype=torch.float64), _like(x, n, dtype=torch.float64)))


def _residual_product(q: ResidualMatrix | ResidualSums) -> Cost:
    m, n = q.b.shape
    precision = q.b.w.precision
    return Cost("product", _format(precision), 2 * m * n * q.p.shape[1], _of(q.b) + size_of(q.p, q.r))


def _residual_matrix(q: ResidualMatrix, fused: bool) -> Answered:
    return Answered((_residual_product(q),), _like(q.p, *q.b.shape, dtype=q.b.w.precision.dtype))


def _residual_sums(q: ResidualSums, fused: bool) -> Answered:
    m, n = q.b.shape
    sums = Cost("passes", "float64", 5 * m * n)
    rows = (_like(q.p, m, dtype=torch.float64), _like(q.p, m, dtype=torch.float64))
    return Answered((_residual_product(q), sums), rows)


def _squares(q: Squares, fused: bool) -> Answered:
    m, n = q.tensor.shape
    cost = Cost("passes", "float64", (4 if q.columns is None else 3) * m * n, size_of(q.tensor))
    down = _like(q.tensor, n, dtype=torch.float64) if q.columns is None else None
    return Answered((cost,), (_like(q.tensor, m, dtype=torch.float64), down))


def _low_rank_update(q: LowRankUpdate, fused: bool) -> Answered:
    """P Vᵀ; P Rᵀ of a residual that is not at hand, unless it is linear, P (V − αR)ᵀ; P Wᵀ of the feedback.

    W is R where there is no look-ahead, but P Rᵀ and P Vᵀ are two products all the same. A fused step still has the
    residual whose sums it took.
    """
    (m, n), w, residual = q.b.shape, q.b.w, q.residual
    again = residual is not None and residual.columns is not None and residual.given is None and not fused
    products = int(q.direction is None) + int(again) + int(q.feedback[0] != q.feedback[1])
    moved = 2 * size_of(w.x, q.b.m) + size_of(w.g, q.p, q.v, q.q, q.q, q.direction)
    given = None if residual is None else residual.given
    costs = (
        Cost("product", _format(w.precision), products * 2 * m * n * q.p.shape[1], moved + size_of(given)),
        Cost("passes", "float32", 8 * m * n),
    )
    return Answered(costs, Report())


def _direction(q: Direction, fused: bool) -> Answered:
    """P Vᵀ, and P Rᵀ of a residual that is not at hand; a linear one reads B."""
    of, (m, n), residual = q.of, q.of.b.shape, q.of.residual
    formed = residual is not None and residual.given is None
    out = _like(of.p, m, n)
    moved = size_of(of.p, of.v, out) + (_of(of.b) if formed else size_of(residual.given if residual else None))
    flops = (1 + int(formed)) * 2 * m * n * of.p.shape[1]
    return Answered((Cost("product", _format(of.b.w.precision), flops, moved),), out)


def _norms(q: Norms, fused: bool) -> Answered:
    """One pass over X and D."""
    return Answered(_pass(6 * q.x.numel(), q.x, q.d), _like(q.x, 3, dtype=torch.float64))


def _update(q: Update, fused: bool) -> Answered:
    """One pass over X, D and the states; a fused step's only pass reads G and the states too."""
    kept = [q.w.state[name] for name in q.states]
    if fused:
        cost = Cost(
            "one pass", _name(q.w.precision.dtype), 4 * q.w.x.numel(), 2 * size_of(q.w.x, *kept) + size_of(q.w.g)
        )
        return Answered((cost,), Report())
    moved = 2 * size_of(q.w.x) + size_of(q.direction, *q.states.values(), *kept)
    return Answered((Cost("passes", _name(q.w.precision.dtype), 4 * q.w.x.numel(), moved),), Report())


def _packed(t: Tensor, m: int, columns: int, how: int, dtype: torch.dtype) -> Tensor:
    return _like(t, m, bits.row_bytes(columns, how, dtype), dtype=torch.uint8)


def _pack(q: Pack, fused: bool) -> Answered:
    out = _packed(q.tensor, q.tensor.shape[0], q.tensor.shape[1], q.bits, q.tensor.dtype)
    return Answered(_pass(2 * q.tensor.numel(), q.tensor, out), out)


def _unpack(q: Unpack, fused: bool) -> Answered:
    out = _like(q.packed, q.packed.shape[0], q.columns, dtype=q.dtype)
    return Answered(_pass(out.numel(), q.packed, out), out)


def _average(q: Average, fused: bool) -> Answered:
    w, m, _ = q.packed.shape
    out = _packed(q.packed, m, q.columns, q.bits, q.dtype)
    return Answered(_pass((2 * w + 2) * m * q.columns, q.packed, out), out)


def _pack_change(q: PackChange, fused: bool) -> Answered:
    out = _packed(q.tensor, q.tensor.shape[0], q.tensor.shape[1], q.bits, q.tensor.dtype)
    memory = torch.empty_like(q.tensor)
    return Answered(_pass(5 * q.tensor.numel(), q.tensor, q.memory, out, memory), (out, memory))


def _average_changes(q: AverageChanges, fused: bool) -> Answered:
    w, (m, n) = q.packed.shape[0], q.tensor.shape
    out, memory = _packed(q.packed, m, n, q.bits, q.tensor.dtype), torch.empty_like(q.tensor)
    return Answered(_pass((2 * w + 5) * m * n, q.packed, q.tensor, q.memory, out, memory), (out, memory))


def _compressed_mean(q: CompressedMean, fused: bool) -> Answered:
    """Of a rank that is alone: packed, averaged with itself or with a memory not, unpacked."""
    if q.memory is not None:
        alone = _pack(Pack(q.tensor, q.bits), fused)
        back = _unpack(Unpack(alone.answer, q.tensor.shape[1], q.bits, q.tensor.dtype), fused)
        return Answered(alone.costs + back.costs, (back.answer, torch.empty_like(q.memory)))
    sent = _pack(Pack(q.tensor, q.bits), fused)
    mean = _average(Average(sent.answer[None], q.tensor.shape[1], q.bits, q.tensor.dtype), fused)
    back = _unpack(Unpack(mean.answer, q.tensor.shape[1], q.bits, q.tensor.dtype), fused)
    return Answered(sent.costs + mean.costs + back.costs, back.answer)


def _map(q: Map, fused: bool) -> Answered:
    """Plain torch, whose operations are counted one by one as it runs (:mod:`.counting`)."""
    return Answered((), q.function(*q.tensors, *q.numbers))


#: The table. ``fused``: the request is a part of a step that the backend has in one piece.
COSTS: dict[type[Request], Callable[[Any, bool], Answered]] = {
    Average: _average,
    AverageChanges: _average_changes,
    Columns: _columns,
    CompressedMean: _compressed_mean,
    Direction: _direction,
    Energies: _energies,
    Factor: _factor,
    Gram: _gram,
    LowRankUpdate: _low_rank_update,
    Map: _map,
    MatMul: _matmul,
    NewtonSchulz: _newton_schulz,
    Norms: _norms,
    Pack: _pack,
    PackChange: _pack_change,
    Polar: _polar,
    Product: _back,
    ResidualMatrix: _residual_matrix,
    ResidualSums: _residual_sums,
    Settle: _settle,
    Sketch: _sketch,
    Squares: _squares,
    Triangle: _triangle,
    Unpack: _unpack,
    Update: _update,
    WarmStart: _warm_start,
}


def cost_of(request: Request, fused: bool = False) -> Answered:
    """The row of a request.

    Raises:
        NotImplementedError: for a class of requests that the table does not have.
    """
    row = COSTS.get(type(request))
    if row is None:
        raise NotImplementedError(
            f"nobody has said what the request {type(request).__name__} costs, so no rule that makes it can be "
            "planned; give it a row in orthdion/plan/costs.py"
        )
    return row(request, fused)
