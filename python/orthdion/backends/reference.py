"""The primitives in plain torch, as the paper writes them. The oracle of every test; serves any device.

Factorisations run in double precision (single where a device has no double), whatever tensors are stored in. Sections
are those of the documentation's algorithms.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Reference", "complete", "orthonormalize", "polar", "unit_roundoff"]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of the working precision: 2⁻⁵³ for float64, else 2⁻²⁴."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def _double(a: Tensor) -> Tensor:
    return a.float() if a.device.type == "mps" else a.double()


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
    """V with its null columns filled from ``old``'s, orthonormal to the rest; unit vectors where those fail."""
    v = _double(v).clone()
    index = null.nonzero().flatten()
    w = _double(old)[:, index]
    for _ in range(2):
        w = w - v @ (v.T @ w)
    w, missing = _gram_schmidt(w, torch.tensor(1e-3))
    v[:, index] = w
    for j in index[missing].tolist():
        e = torch.zeros(v.shape[0], dtype=v.dtype, device=v.device)
        e[(v * v).sum(dim=1).argmin()] = 1.0
        for _ in range(2):
            e = e - v @ (v.T @ e)
        v[:, j] = e / e.norm()
    return v


class Reference:
    """Primitives over single matrices: B, X, M are (m, n), P (m, r), Q, R, V (n, r).

    ``dtype`` is the working precision: float64 for float64 weights, else float32, unless a test asks for more.
    """

    name = "reference"

    def __init__(self, dtype: torch.dtype | None = None, unit: float | None = None, half: bool = False) -> None:
        self._dtype, self._unit, self._half = dtype, unit, half

    def rounding(self, half: bool) -> Reference:
        """The same, with operands of single-precision products rounded to bfloat16 if ``half``."""
        return Reference(self._dtype, self._unit, half)

    def _operand(self, t: Tensor) -> Tensor:
        return t.bfloat16().to(t.dtype) if self._half and t.dtype == torch.float32 else t

    def working(self, t: Tensor) -> Tensor:
        """A copy in working precision."""
        dtype = self._dtype or (torch.float64 if t.dtype == torch.float64 else torch.float32)
        return t.to(dtype, copy=True)

    def unit(self, t: Tensor) -> float:
        """The roundoff that thresholds are multiples of."""
        return self._unit if self._unit is not None else unit_roundoff(t.dtype)

    def noise(self, t: Tensor) -> tuple[float, float, float, float]:
        """What is rounding noise: a direction of B·Q, and of R, relative to the largest; and the tail's share of B's
        energy, in all and in a row or column, where it fades out.
        """
        if self._half and t.dtype == torch.float32:
            return 2.0**-6, 2.0**-8, 2.0**-12, 2.0**-8
        unit = self.unit(t)
        return 64.0 * unit, 64.0 * unit, 16.0 * unit, math.sqrt(unit) / 16.0

    def scale(self, b: Tensor) -> float:
        """A power of two that brings B's largest entry near 1; 1 where squares are safe anyway. NaN if B is not
        finite.
        """
        largest = float(b.abs().amax()) if b.numel() else 0.0
        if not math.isfinite(largest):
            return math.nan
        safe = 1e12 if b.dtype == torch.float32 else 1e100
        if largest == 0.0 or 1.0 / safe < largest < safe:
            return 1.0
        return math.ldexp(1.0, -math.floor(math.log2(largest)))

    def project(self, b: Tensor, q: Tensor) -> Tensor:
        """``B Q``"""
        return self._operand(b) @ self._operand(q.to(b.dtype))

    def project_back(self, b: Tensor, p: Tensor) -> Tensor:
        """``Bᵀ P``"""
        return self._operand(b).T @ self._operand(p)

    def outer(self, p: Tensor, v: Tensor) -> Tensor:
        """``P Vᵀ``"""
        return self._operand(p) @ self._operand(v).T

    def orthonormalize(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """``orth(P)`` and its null directions."""
        return orthonormalize(p, self.noise(p)[0])

    def right_factor(self, kind: str, r: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """V and the null directions of R (section 2)."""
        tol = self.noise(r)[1]
        if kind == "qr":
            return orthonormalize(r, tol)
        if kind == "polar":
            return polar(r, tol)
        norms = _double(r).norm(dim=0)
        largest = norms.amax() if norms.numel() else norms.new_zeros(())
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

    def direction(self, kind: str, b: Tensor, p: Tensor, r: Tensor, v: Tensor, tail_scale: float) -> Tensor:
        """``D = P Vᵀ + tail`` (section 3b)."""
        m, n = b.shape
        spare = min(m, n) - r.shape[1]
        _, _, least, fade = self.noise(b)
        energy, captured = (_double(x).square().sum() for x in (b, r))
        if kind == "feedback" or spare == 0 or energy - captured <= least * energy:
            return self.outer(p, v)
        weight = tail_scale * math.sqrt(spare)
        if kind == "linear":
            alpha = weight / float((energy - captured).sqrt())
            return self.outer(p, v - alpha * r) + alpha * b
        return self.outer(p, v) + weight * self._normalized(b, b - self.outer(p, r), r, fade)

    @staticmethod
    def _normalized(b: Tensor, t: Tensor, r: Tensor, fade: float) -> Tensor:
        """``N(T)/‖N(T)‖``: columns, whose norms P's orthonormality gives, then rows."""
        columns, rows = _double(b).square().sum(0), _double(b).square().sum(1)
        norms = torch.maximum(columns - _double(r).square().sum(1), fade * columns).sqrt()
        scaled = _double(t) * torch.where(norms > 0, 1.0 / norms.clamp_min(1e-300), 0.0)
        weights = (_double(t).square().sum(1) / (fade * rows).clamp_min(1e-300)).clamp_max(1.0).sqrt()
        norms = scaled.norm(dim=1)
        weights = torch.where(norms > 0, weights / norms.clamp_min(1e-300), 0.0)
        return (scaled * weights[:, None]).to(b.dtype) / math.sqrt(int((rows > 0).sum()))
