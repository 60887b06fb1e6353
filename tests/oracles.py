"""Short, slow, double-precision transcriptions, and the problems that tests share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import orthdion


def orth(a: Tensor) -> Tensor:
    """Q of the QR with positive diagonal."""
    q, r = torch.linalg.qr(a)
    return q * torch.sign(r.diagonal())


def dion_step(x: Tensor, g: Tensor, m: Tensor, q: Tensor, lr: float, mu: float, decay: float) -> None:
    """Dion's own five lines (arXiv 2504.05295, algorithm 1), all in place, for X, G, M (m, n) and Q (n, r)."""
    m += g
    p = torch.linalg.qr(m @ q)[0]
    r = m.T @ p
    m -= (1 - mu) * (p @ r.T)
    q.copy_(r / (r.norm(dim=0) + 1e-8))
    x.copy_((1 - lr * decay) * x - lr * (x.shape[0] / x.shape[1]) ** 0.5 * (p @ q.T))


def lion_step(x: Tensor, g: Tensor, m: Tensor, lr: float, betas: tuple[float, float], decay: float) -> None:
    """Lion (arXiv 2302.06675), in place."""
    u = torch.sign(betas[0] * m + (1 - betas[0]) * g)
    x.copy_((1 - lr * decay) * x - lr * u)
    m.copy_(betas[1] * m + (1 - betas[1]) * g)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers from a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """(m, n) float64 with the given singular values and random singular vectors."""
    k = len(sigma)
    u, v = (
        orth(randn(m, k, seed=seed, dtype=torch.float64)),
        orth(randn(n, k, seed=seed + 1, dtype=torch.float64)),
    )
    return (u * sigma) @ v.T


def low_rank(params, residual=None, **options):
    """Orth-Dion, or with a residual the completed step."""
    if residual is None:
        return orthdion.OrthDion(params, **options)
    return orthdion.CompletedDion(params, residual=residual, **options)


def pairwise(**axes):
    """Rows of a table in which every two values of different axes stand together at least once."""
    names, rows = list(axes), []
    wanted = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(axes[a]))
        for y in range(len(axes[b]))
    }
    everything = list(itertools.product(*(range(len(axes[n])) for n in names)))
    while wanted:
        gains = [
            {(a, row[i], b, row[j]) for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)} & wanted
            for row in everything
        ]
        best = max(range(len(everything)), key=lambda k: len(gains[k]))
        wanted -= gains[best]
        rows.append({n: axes[n][k] for n, k in zip(names, everything[best], strict=True)})
    return rows


def parameter(t: Tensor, grad: Tensor | None = None) -> torch.nn.Parameter:
    """A parameter with a gradient."""
    p = torch.nn.Parameter(t.clone(memory_format=torch.preserve_format))
    if grad is not None:
        p.grad = grad
    return p
