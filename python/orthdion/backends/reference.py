"""The primitives in plain torch, as the paper writes them. The oracle of every test; serves any device.

Factorisations run in double precision (single where a device has no double), whatever tensors are stored in. Sections
are those of the documentation's algorithms.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..optim.step import Options, Outcome, Report, Tail
    from ..optim.tall import Tall
    from ..sharding import Body, Group

__all__ = ["Job", "Reference", "complete", "orthonormalize", "polar", "unit_roundoff"]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of the working precision: 2⁻⁵³ for float64, else 2⁻²⁴."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def _double(a: Tensor) -> Tensor:
    return a.float() if a.device.type == "mps" else a.double()


def _to_tf32(t: Tensor) -> Tensor:
    """Single precision with 10 bits behind the point, as tensor cores read it; to nearest, ties to even."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def orthonormalize(a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """``V, null`` of ``A = V T`` with diag(T) ≥ 0; columns of V whose ``T_jj ≤ tol·max‖a_i‖`` are zero.

    A is (n, r) with n ≥ r; V has its dtype, ``null`` is bool (r,). Source: section 2, the sign and null-space rules.
    """
    if a.numel() == 0:
        return torch.zeros_like(a), torch.ones(a.shape[1], dtype=torch.bool, device=a.device)
    wide = _double(a)
    largest = wide.abs().amax()
    wide = wide / largest.clamp_min(torch.finfo(wide.dtype).tiny)  # squares must not vanish
    threshold = tol * wide.norm(dim=0).amax()
    v, t = torch.linalg.qr(wide)
    diagonal = t.diagonal()
    null = diagonal.abs() <= threshold
    if null.any():
        v, null = _gram_schmidt(wide, threshold)
    else:
        v = v * torch.where(diagonal < 0, -1.0, 1.0)
    return v.to(a.dtype), null


def _gram_schmidt(a: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Column by column, twice, leaving out null ones: a QR would invent directions and lose those after them."""
    v, null = torch.zeros_like(a), torch.zeros(a.shape[1], dtype=torch.bool, device=a.device)
    for j in range(a.shape[1]):
        c = a[:, j]
        for _ in range(2):
            c = c - v @ (v.T @ c)
        norm = c.norm()
        null[j] = norm <= threshold
        if not null[j]:
            v[:, j] = c / norm
    return v, null


def polar(r: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """``R (RᵀR)^(−1/2)`` by SVD, singular values ≤ tol·max left out; and the null flags of R's QR. Shapes as above."""
    if r.numel() == 0:
        return torch.zeros_like(r), torch.ones(r.shape[1], dtype=torch.bool, device=r.device)
    u, s, wt = torch.linalg.svd(_double(r), full_matrices=False)
    keep = (s > tol * s.amax()).to(u.dtype)
    return ((u * keep) @ wt).to(r.dtype), orthonormalize(r, tol)[1]


def complete(v: Tensor, null: Tensor, old: Tensor) -> Tensor:
    """V with its null columns filled from ``old``'s, orthonormal to the rest.

    Where such a column lies in V's span, the column of ``old`` with the largest remainder serves: ``old`` has r
    independent ones and V fewer. So the result is the same in every orthonormal basis that both are written in.
    """
    v, old = _double(v).clone(), _double(old)
    index = null.nonzero().flatten()
    w = old[:, index]
    for _ in range(2):
        w = w - v @ (v.T @ w)
    w, missing = _gram_schmidt(w, torch.tensor(1e-3))
    v[:, index] = w
    for j in index[missing].tolist():
        rest = old - v @ (v.T @ old)
        e = rest[:, rest.square().sum(0).argmax()]
        for _ in range(2):
            e = e / e.norm().clamp_min(1e-300)
            e = e - v @ (v.T @ e)
        v[:, j] = e / e.norm().clamp_min(1e-300)
    return v


class Reference:
    """Primitives over single matrices: B, X, M are (m, n), P (m, r), Q, R, V (n, r).

    ``dtype`` is the working precision: float64 for float64 weights, else float32, unless a test asks for more.
    """

    name = "reference"

    def __init__(
        self, dtype: torch.dtype | None = None, unit: float | None = None, half: bool = False, tf32: bool = False
    ) -> None:
        self._dtype, self._unit, self._half, self._tf32 = dtype, unit, half, tf32

    def rounding(self, half: bool, tf32: bool = False) -> Reference:
        """The same, with operands of single-precision products rounded to bfloat16 if ``half``, to TF32 if ``tf32``."""
        return type(self)(self._dtype, self._unit, half, tf32)

    def _operand(self, t: Tensor) -> Tensor:
        if t.dtype != torch.float32 or not (self._half or self._tf32):
            return t
        return t.bfloat16().to(t.dtype) if self._half else _to_tf32(t)

    def working(self, t: Tensor) -> Tensor:
        """A copy in working precision."""
        dtype = self._dtype or (torch.float64 if t.dtype == torch.float64 else torch.float32)
        return t.to(dtype, copy=True)

    def unit(self, t: Tensor) -> float:
        """The roundoff that thresholds are multiples of."""
        return self._unit if self._unit is not None else unit_roundoff(t.dtype)

    def compress(self, a: Tensor, along: Group, unit: Tensor) -> Body[Tall]:
        """A tall matrix over ranks as E·S; ``unit`` tells the working precision."""
        from ..optim.tall import compress

        return compress(a, along, self.gate(unit))

    def gate(self, t: Tensor) -> tuple[float, float]:
        """Condition numbers up to which one Cholesky QR, and two, are as good as a Householder QR (section 4)."""
        return math.sqrt(self.unit(t) / 2.0**-53) / 8.0, 1e6

    def noise(self, t: Tensor) -> tuple[float, float, float, float]:
        """What is rounding noise: a direction of B·Q, and of R, relative to the largest; and the tail's share of B's
        energy, in all and in a row or column, where it fades out.
        """
        if self._half and t.dtype == torch.float32:
            return 2.0**-6, 2.0**-8, 2.0**-12, 2.0**-8
        if self._tf32 and t.dtype == torch.float32:  # three bits more than bfloat16
            return 2.0**-9, 2.0**-11, 2.0**-16, 2.0**-11
        unit = self.unit(t)
        return 64.0 * unit, 64.0 * unit, 16.0 * unit, math.sqrt(unit) / 16.0

    def safe(self, t: Tensor) -> float:
        """B's largest entry, and its inverse, may have this size before squares lose digits."""
        return 1e12 if t.dtype == torch.float32 else 1e100

    def open(self, x: Tensor, g: Tensor, m: Tensor, q: Tensor, o: Options) -> Job:
        """A step's large operands: reads of B, and the write at the end."""
        return Job(self, x, g, m, q, o)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``A B``"""
        return self._operand(a) @ self._operand(b)

    def orthonormalize(self, a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """``orth(A)`` and its null directions (section 4)."""
        return orthonormalize(a, tol)

    def polar(self, a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """``A (AᵀA)^(−1/2)`` and the null directions."""
        return polar(a, tol)

    def columns(self, r: Tensor, energies: Tensor, tol: float, epsilon: float) -> tuple[Tensor, Tensor]:
        """R with unit columns, from the sums of their squares, and which are null (section 2)."""
        norms = energies.sqrt()
        largest = norms.amax()
        null = norms <= tol * largest
        scale = torch.where(null, 0.0, 1.0 / (norms + epsilon * largest).clamp_min(1e-300))
        return (_double(r) * scale).to(r.dtype), null

    def warm_start(self, kind: str, v: Tensor, null: Tensor, old: Tensor) -> Tensor:
        """The next Q: V, its null directions kept from the old Q; the old one where nothing was learnt."""
        if bool(null.all()):
            return old
        if not bool(null.any()):
            return v
        if kind == "column":
            return torch.where(null, old.to(v.dtype), v)
        if kind == "polar":
            v, null = _gram_schmidt(_double(v), torch.tensor(1e-3) * _double(v).norm(dim=0).amax())
        return complete(v, null, old)


class Job:
    """The large operands of one step: B = M⁺ or κM⁺ + G, scaled by a power of two ``size``, and the weights."""

    def __init__(self, be: Reference, x: Tensor, g: Tensor, m: Tensor, q: Tensor, o: Options) -> None:
        self._be, self._o, self._targets = be, o, (x, m, q)
        dtype = be.working(x).dtype
        self.old, g, m = (be.working(t).to(dtype) for t in (q, g, m))
        if o.maximize:
            g = -g
        self._plus = m + g
        self._b = self._plus if o.kappa is None else o.kappa * self._plus + g
        self.size: float | Tensor = 1.0

    def sketch(self) -> Tensor:
        """``B Q`` (m, r)"""
        return self._be.product(self._b, self.old)

    def entry(self) -> Tensor:
        """Max |B|, infinite if B is not finite; a double."""
        largest = _double(self._b.abs().amax()) if self._b.numel() else self._b.new_zeros((), dtype=torch.float64)
        return torch.where(largest.isfinite(), largest, math.inf)

    def settle(self, largest: Tensor) -> Report | None:
        """Takes what :meth:`entry` is over all ranks (−1: nobody has a gradient) and scales B if it must be; a report
        if the step ends here.
        """
        from ..optim.step import Report

        top, safe = float(largest), self._be.safe(self.old)
        if top < 0.0:
            return Report(skipped=False, idle=True)
        if not math.isfinite(top):
            return Report(skipped=True)
        if top != 0.0 and not 1.0 / safe < top < safe:
            self.rescale(math.ldexp(1.0, -math.floor(math.log2(top))))
        return None

    def report(self, null: Tensor, figures: Report | None) -> Outcome:
        """What will have happened, given R's null directions, and diagnostics if they were asked for."""
        from ..optim.step import Report

        return figures or Report(False, int(null.sum()))

    def rescale(self, size: float) -> None:
        """Multiplies B by a power of two."""
        self._b, self.size = self._b * size, size

    def back(self, p: Tensor) -> Tensor:
        """``Bᵀ P`` (n, r)"""
        return self._be.product(self._b.T, p)

    def captured(self, p: Tensor) -> Tensor:
        """``size·M⁺ᵀ P`` (n, r)"""
        return self._be.product(self._plus.T, p) * self.size

    def energies(self) -> tuple[Tensor, Tensor]:
        """Sums of B's squares along each row (m,) and down each column (n,)."""
        squares = _double(self._b).square()
        return squares.sum(1), squares.sum(0)

    def tail_rows(self, p: Tensor, r: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares along each row of T = B − P Rᵀ, and of T with its columns scaled."""
        t = _double(self._b - self._be.product(p, r.T))
        return t.square().sum(1), (t * columns).square().sum(1)

    def write(self, p: Tensor, r: Tensor, v: Tensor, w: Tensor, scale: float, tail: Tail) -> None:
        """``X ← (1 − ηλ)X − η·scale·D`` and ``M ← a·M⁺ − (a − b)·P Wᵀ/size``, in place."""
        x, m, _ = self._targets
        o, be = self._o, self._be
        if tail.alpha is not None:
            d = be.product(p, (v - tail.alpha * r).T) + tail.alpha * self._b
        else:
            d = be.product(p, v.T)
            if tail.columns is not None and tail.rows is not None:
                t = _double(self._b - be.product(p, r.T)) * tail.columns
                d = d + (t * tail.rows[:, None]).to(d.dtype)
        plus = o.a * self._plus
        if o.a != o.b:
            plus = plus - (o.a - o.b) / self.size * be.product(p, w.T)
        x.copy_((1.0 - o.lr * o.weight_decay) * be.working(x) - o.lr * scale * d)
        m.copy_(plus)

    def keep(self, q: Tensor) -> None:
        """Stores the next step's Q."""
        self._targets[2].copy_(q)
