"""NuMuon (arXiv 2603.03597): the leading singular pairs of a momentum, as many as a schedule says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.low_rank import RightFactor, check_feedback
from ..core.optimizer import MatrixOptimizer
from ..core.options import check_number, choice, number, option
from ..core.registry import register
from ..requests import Body, Gram, LowRank, Map, MatMul, Matrix, Reduce
from .dion import DionRule

__all__ = ["NuMuon", "NuMuonRule"]


def _check_share(name: str, value: Any) -> Any:
    return None if value is None else check_number(name, value, 0.0, 1.0, open_low=True)


@register
@dataclass(frozen=True)
class NuMuonRule(DionRule):
    """Dion's step (:class:`.dion.DionRule`) on a momentum without error feedback; of P Vᵀ the k leading pairs."""

    name: ClassVar[str] = "numuon"
    summary: ClassVar[str] = "X −= η·sqrt(m/n)·U_k V_kᵀ, the k leading singular pairs of M = μM + G by power iteration"
    use: ClassVar[str] = "weights that are to be compressed: steps of low rank, which lets weights become so"
    paper: ClassVar[str] = "arXiv 2603.03597"

    rank_fraction: float = number(0.25, 0.0, 1.0, open_low=True, structural=True, doc="r over min(m, n), in (0, 1].")
    right_factor: RightFactor = choice(
        "polar", "qr", "column", "polar", doc='V from R: "polar" (exact), "qr", "column".'
    )
    feedback: Any = option("momentum", check_feedback, 'As in Dion; "momentum" (μ, μ) is none.')
    step_fraction: Any = option(
        None,
        _check_share,
        "k over min(m, n), at most rank_fraction: the pairs that are stepped. A schedule may edit it between steps. "
        "None: all r.",
    )

    def check(self) -> None:
        """No more pairs than are tracked."""
        super().check()
        if self.step_fraction is None:
            return
        if self.adaptive_rank:
            raise ValueError("adaptive_rank=True and step_fraction each choose the rank: set step_fraction=None")
        if self.step_fraction > self.rank_fraction:
            raise ValueError(
                f"step_fraction must be at most rank_fraction, but it is {self.step_fraction} > {self.rank_fraction}; "
                "set rank_fraction to the largest share of the schedule"
            )
        if self.right_factor != "polar":
            raise ValueError(f"step_fraction needs right_factor='polar', not {self.right_factor!r}; or leave it None")

    def fused(self, *, diagnostics: bool = False, bfloat16: bool = False) -> LowRank | None:
        """What the core is told; it has no step of fewer pairs."""
        return None if self.step_fraction is not None else super().fused(diagnostics=diagnostics, bfloat16=bfloat16)

    def pairs(self, w: Matrix) -> int:
        """K"""
        d = min(w.shape)
        return d if self.step_fraction is None else math.ceil(round(float(self.step_fraction) * d, 9))

    def taken(self, w: Matrix, v: Tensor, r: Tensor) -> Body[Tensor]:
        """``V Π``: Π projects onto the k leading eigenvectors of RᵀR, so P (V Π)ᵀ has P Rᵀ's k leading pairs."""
        k = self.pairs(w)
        if k >= v.shape[1]:
            return v
        gram = yield Reduce((yield Gram(r)), w.layout.cols, "gram")
        projection = yield Map(_leading, (gram,), (k,))
        taken: Tensor = yield MatMul(v, projection.to(v.dtype), w.precision)
        return taken


def _leading(gram: Tensor, k: int) -> Tensor:
    """The projection onto the eigenvectors of the k largest eigenvalues."""
    size = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp_min(1e-300)
    vectors: Tensor = torch.linalg.eigh(gram / size).eigenvectors[..., -k:]
    return vectors @ vectors.mT


class NuMuon(MatrixOptimizer, rule=NuMuonRule):
    r"""NuMuon: spectral steps of rank k.

    .. math::
        M &\leftarrow \mu M + G, \quad P = \mathrm{orth}(MQ), \quad P R^\top = P P^\top M = U S W^\top \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; U_k W_k^\top, \qquad Q \leftarrow R (R^\top R)^{-1/2}

    The paper takes the k leading singular pairs of M, by a block Krylov method; here those of P Rᵀ, M's part in the
    space that one warm-started power iteration a step follows. At r = min(m, n) the two are the same. The paper's M is
    a running mean, (1 − μ) times this one, with the same pairs.

    k follows a schedule in the paper: ``group["step_fraction"]`` is read at each step, and may be edited as a rate is.
    ``rank_fraction`` is what is tracked, so the largest k of the schedule. With ``step_fraction=None`` k = r, and a
    step is in the core what it is for Dion. **chosen**: pairs of noise are left out, as in section 2.
    """
