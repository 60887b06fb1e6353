"""MoFaSGD (arXiv 2507.08091): a momentum that is kept as a singular value decomposition of rank r, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.adjust import AdjustLr, adjust_lr, adjusted
from ..core.factors import compress, warm_start
from ..core.optimizer import MatrixOptimizer
from ..core.options import number, whole
from ..core.registry import register
from ..core.rule import Rule, States, StateSpec
from ..requests import Body, Map, MatMul, Matrix, Outcome, Reduce, Report, Update

__all__ = ["MoFaSGD", "MoFaSGDRule"]


@register
@dataclass(frozen=True)
class MoFaSGDRule(Rule):
    """The singular vectors of a momentum U diag(σ) Vᵀ, to which gradients are added within its tangent space."""

    name: ClassVar[str] = "mofasgd"
    summary: ClassVar[str] = "X −= η·sqrt(m/n)·U Vᵀ, U diag(σ) Vᵀ = SVD_r(μ·U diag(σ) Vᵀ + (1−μ)·tangent part of G)"
    use: ClassVar[str] = "the least memory: states of (m+n)·r and no momentum of the weight's size"
    paper: ClassVar[str] = "arXiv 2507.08091"
    flops: ClassVar[str] = "6mnr + 24(m+n)r²"
    sent: ClassVar[str] = "nr + 5r²"
    states: ClassVar[States] = {
        "U": StateSpec(("rows", "rank")),
        "sigma": StateSpec(("rank",)),
        "V": StateSpec(("cols", "rank"), start="orthonormal"),
    }

    mu: float = number(0.95, 0.0, 1.0, doc="μ, the momentum.")
    rank_fraction: float = number(0.25, 0.0, 1.0, open_low=True, structural=True, doc="r over min(m, n), in (0, 1].")
    rank_multiple_of: int = whole(1, 1, structural=True, doc="r is rounded up to a multiple of this.")

    adjust_lr: AdjustLr | None = adjust_lr()

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``; r singular values of the direction are 1."""
        return adjusted(self.adjust_lr, fan_out, fan_in, rank)

    def step(self, w: Matrix) -> Body[Outcome]:
        """``[U, GV] K [V, GᵀU]ᵀ`` with ``K = [[μΣ − (1−μ)UᵀGV, (1−μ)I], [(1−μ)I, 0]]`` is the new momentum; it is
        decomposed between orthonormal bases of both sides, which are of 2r columns.
        """
        at, gate, (u, sigma, v) = w.layout, w.precision.gate, (w.read(name) for name in self.states)
        r = len(sigma)
        if 0 in (*w.shape, r):
            return Report()
        g = self.sign * w.gradient
        top = torch.cat([g.abs().amax().view(1) if g.numel() else g.new_zeros(1), sigma]).amax()
        top = yield Reduce(top, at.shards, "norms", op="max")
        size = torch.where(top > 0.0, top, 1.0)  # squares must neither vanish nor leave the range
        g = g / size
        right, left = yield MatMul(g, v, w.precision), MatMul(g.T, u, w.precision)
        right, left = yield Reduce(right, at.cols, "GV"), Reduce(left, at.rows, "GU")
        inner = yield Reduce(u.T.double() @ right.double(), at.rows, "gram")
        rows = yield from compress(torch.cat([u, right], 1), at.rows, gate)
        cols = yield from compress(torch.cat([v, left], 1), at.cols, gate)
        numbers = (self.mu, w.precision.noise.right)
        tensors = (rows.small, cols.small, inner, sigma.double() / size)
        p, values, q, null = yield Map(_decomposed, tensors, numbers)
        u, new = rows.expand(p).to(v.dtype), cols.expand(q).to(v.dtype)
        d = yield MatMul(u, new.T, w.precision)
        kept = yield from warm_start("qr", new, null, v, at.cols, gate)
        states = {"U": u, "sigma": (values * size).to(v.dtype), "V": kept}
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, states, w.scale)
        return done


def _decomposed(
    left: Tensor, right: Tensor, inner: Tensor, sigma: Tensor, mu: float, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(P, σ, Q, null)``, the r leading singular pairs of ``left K rightᵀ``; those of noise are zeros.

    Signs are such that a right vector does not point away from the one that it replaces.
    """
    r = sigma.shape[-1]
    eye = torch.eye(r, dtype=inner.dtype, device=inner.device) * (1.0 - mu)
    corner = mu * torch.diag_embed(sigma) - (1.0 - mu) * inner
    eye = eye.expand_as(corner)
    middle = torch.cat([torch.cat([corner, eye], -1), torch.cat([eye, torch.zeros_like(corner)], -1)], -2)
    p, s, qt = torch.linalg.svd(left @ middle @ right.mT, full_matrices=False)
    p, s, q = p[..., :r], s[..., :r], qt.mT[..., :r]
    null = s <= tol * s[..., :1]
    away = (q * right[..., :r]).sum(-2) < 0.0
    q = q * torch.where(null, 0.0, torch.where(away, -1.0, 1.0))[..., None, :]
    p = p * torch.where(null, 0.0, torch.where(away, -1.0, 1.0))[..., None, :]
    return p, torch.where(null, 0.0, s), q, null


class MoFaSGD(MatrixOptimizer, rule=MoFaSGDRule):
    r"""MoFaSGD: spectral steps from a momentum that is kept in factors.

    .. math::
        \hat G &= U U^\top G + G V V^\top - U U^\top G V V^\top, \quad
        U \Sigma V^\top \leftarrow \mathrm{SVD}_r\big(\mu\, U \Sigma V^\top + (1 - \mu) \hat G\big) \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; U V^\top

    The decomposition is that of a matrix of 2r columns and rows between orthonormal bases of [U, GV] and [V, GᵀU]: the
    momentum itself is never formed. **chosen**: it starts with U = 0, σ = 0 and a random orthonormal V, so that the
    first momentum is the gradient's part in that space (the paper decomposes the first gradient, the released code the
    weight); singular values of noise are zero, their vectors leave the step, and V keeps its old directions there, as
    in section 2; no second term of G's complement, which the released code has and the paper's algorithm has not.
    """
