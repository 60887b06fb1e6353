"""Orthonormal factors, null directions and completions in plain torch: the oracle of every test, on any device.

Factorisations run in double precision (single where a device has no double), whatever tensors are stored in. Sections
are those of the documentation's algorithms.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["columns", "complete", "double", "gram_schmidt", "orthonormalize", "polar", "unit_roundoff", "warm_start"]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of the working precision: 2⁻⁵³ for float64, else 2⁻²⁴."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def double(a: Tensor) -> Tensor:
    """In double precision, or in single where the device has no double."""
    return a.float() if a.device.type == "mps" else a.double()


def orthonormalize(a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """``V, null`` of ``A = V T`` with diag(T) ≥ 0; columns of V whose ``T_jj ≤ tol·max‖a_i‖`` are zero.

    A is (n, r) with n ≥ r; V has its dtype, ``null`` is bool (r,). Source: section 2, the sign and null-space rules.
    """
    if a.numel() == 0:
        return torch.zeros_like(a), torch.ones(a.shape[1], dtype=torch.bool, device=a.device)
    wide = double(a)
    largest = wide.abs().amax()
    wide = wide / largest.clamp_min(torch.finfo(wide.dtype).tiny)  # squares must not vanish
    threshold = tol * wide.norm(dim=0).amax()
    v, t = torch.linalg.qr(wide)
    diagonal = t.diagonal()
    null = diagonal.abs() <= threshold
    if null.any():
        v, null = gram_schmidt(wide, threshold)
    else:
        v = v * torch.where(diagonal < 0, -1.0, 1.0)
    return v.to(a.dtype), null


def gram_schmidt(a: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
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
    u, s, wt = torch.linalg.svd(double(r), full_matrices=False)
    keep = (s > tol * s.amax()).to(u.dtype)
    return ((u * keep) @ wt).to(r.dtype), orthonormalize(r, tol)[1]


def complete(v: Tensor, null: Tensor, old: Tensor) -> Tensor:
    """V with its null columns filled from ``old``'s, orthonormal to the rest.

    Where such a column lies in V's span, the column of ``old`` with the largest remainder serves: ``old`` has r
    independent ones and V fewer. So the result is the same in every orthonormal basis that both are written in.
    """
    v, old = double(v).clone(), double(old)
    index = null.nonzero().flatten()
    w = old[:, index]
    for _ in range(2):
        w = w - v @ (v.T @ w)
    w, missing = gram_schmidt(w, torch.tensor(1e-3))
    v[:, index] = w
    for j in index[missing].tolist():
        rest = old - v @ (v.T @ old)
        e = rest[:, rest.square().sum(0).argmax()]
        for _ in range(2):
            e = e / e.norm().clamp_min(1e-300)
            e = e - v @ (v.T @ e)
        v[:, j] = e / e.norm().clamp_min(1e-300)
    return v


def columns(r: Tensor, energies: Tensor, tol: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """R (…, n, r) with unit columns, from the sums of their squares (…, r), and which are null (section 2)."""
    norms = energies.sqrt()
    largest = norms.amax(-1, keepdim=True)
    null = norms <= tol * largest
    scale = torch.where(null, 0.0, 1.0 / (norms + epsilon * largest).clamp_min(1e-300))
    return (double(r) * scale[..., None, :]).to(r.dtype), null


def warm_start(kind: str, v: Tensor, null: Tensor, old: Tensor) -> Tensor:
    """The next Q: V, its null directions kept from the old Q; the old one where nothing was learnt."""
    if bool(null.all()):
        return old
    if not bool(null.any()):
        return v
    if kind == "column":
        return torch.where(null, old.to(v.dtype), v)
    if kind == "polar":
        v, null = gram_schmidt(double(v), torch.tensor(1e-3) * double(v).norm(dim=0).amax())
    return complete(v, null, old)
