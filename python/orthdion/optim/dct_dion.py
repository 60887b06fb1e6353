"""DCT-Dion (Trion, arXiv 2505.17967): Dion in columns of a cosine transform, which are chosen and not tracked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..core.adjust import AdjustLr, adjust_lr, adjusted
from ..core.optimizer import MatrixOptimizer
from ..core.options import number, whole
from ..core.registry import register
from ..core.rule import Rule, States, StateSpec
from ..numerics.cosines import basis, transform
from ..numerics.newton_schulz import JORDAN
from ..requests import Body, MatMul, Matrix, NewtonSchulz, Outcome, Reduce, Report, Update, Whole
from .dion2 import largest

__all__ = ["DCTDion", "DCTDionRule"]


@register
@dataclass(frozen=True)
class DCTDionRule(Rule):
    """The polar factor of the momentum's largest columns under a cosine transform along its shorter side."""

    name: ClassVar[str] = "dct-dion"
    summary: ClassVar[str] = "X −= η·sqrt(m/n)·NS(S_r) C_rᵀ, S = (M+G) C, C a cosine transform; M = B − (1−μ)·S_r C_rᵀ"
    use: ClassVar[str] = "Dion without a Q to store or to factorise"
    paper: ClassVar[str] = "arXiv 2505.17967"
    flops: ClassVar[str] = "4mnr + 20mr²"
    sent: ClassVar[str] = "2mr + n"
    states: ClassVar[States] = {"momentum": StateSpec()}
    tall: ClassVar[bool] = True

    lr: float = number(0.02, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    mu: float = number(0.95, 0.0, 1.0, doc="μ, what M keeps of the columns that were stepped: the error feedback.")
    rank_fraction: float = number(0.25, 0.0, 1.0, open_low=True, doc="r over min(m, n), in (0, 1].")
    rank_multiple_of: int = whole(1, 1, doc="r is rounded up to a multiple of this.")
    epsilon: float = number(1e-7, 0.0, doc="The smallest norm that the chosen columns are divided by.")

    adjust_lr: AdjustLr | None = adjust_lr()

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``; r singular values of the direction are near 1."""
        return adjusted(self.adjust_lr, fan_out, fan_in, rank)

    def step(self, w: Matrix) -> Body[Outcome]:
        """``B = M + G``, ``S = B C``, ``D = NS(S_r) C_rᵀ``, ``M ← B − (1 − μ) S_r C_rᵀ``. With sharded columns each
        rank transforms its own, as if the others were zero, and the transforms are summed.
        """
        at, n, r = w.layout, w.shape[1], self.rank(*w.shape)
        if 0 in w.shape:
            return Report()
        b = w.read("momentum") + self.sign * w.gradient
        limit = torch.finfo(b.dtype)
        b.clamp_(limit.min, limit.max)  # a sum, which may leave the range
        top = yield Reduce(b.abs().amax() if b.numel() else b.new_zeros(()), at.shards, "norms", op="max")
        size = torch.where(top > 0.0, top, 1.0)  # sums of what is divided by it are safe
        first, spread = 0, b / size
        if at.cols.size > 1:
            assert w.extents is not None, "a sharded matrix knows where its parts lie"
            first = w.extents()[at.shards.index][2]
            spread = b.new_zeros(b.shape[0], n)
            spread[:, first : first + b.shape[1]] = b / size
        s = yield Reduce(transform(spread), at.cols, "transform")
        norms = yield Reduce(s.abs().sum(0, dtype=torch.float64), at.rows, "norms")
        chosen = largest(norms, r)
        s = s.index_select(1, chosen)
        o = yield Whole(s, self._rows(w, r), partial(self._polar, w))
        c = basis(n, torch.arange(first, first + b.shape[1], device=b.device), chosen).to(b.dtype)
        d, captured = yield MatMul(o, c.T, w.precision), MatMul(s, c.T, w.precision)
        m = b - (1.0 - self.mu) * captured * size
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, {"momentum": m}, w.scale)
        return done

    def _rows(self, w: Matrix, r: int) -> Matrix:
        """The matrix of the chosen columns, which lies over the ranks of the rows, and is whole along its columns."""
        at, every = w.layout, w.extents() if w.extents is not None else []

        def extents() -> list[tuple[int, int, int, int]]:
            return [(*every[at.shards.ranks.index(k)][:2], 0, r) for k in at.rows.ranks]

        return replace(w, shape=(w.shape[0], r), layout=replace(at, shards=at.rows), extents=extents)

    def _polar(self, w: Matrix, s: Tensor) -> NewtonSchulz:
        return NewtonSchulz(s, JORDAN, w.precision, epsilon=self.epsilon)


class DCTDion(MatrixOptimizer, rule=DCTDionRule):
    r"""DCT-Dion (Trion): low-rank spectral descent in columns of a fixed transform.

    .. math::
        B &= M + G, \quad S = B C, \quad C_{jk} = \sqrt{2/n} \cos(\pi (2j + 1) k / 2n) \\
        r &: \text{the columns of } S \text{ with the largest } \ell_1 \text{ norms}, \quad
        M \leftarrow B - (1 - \mu)\, S_r C_r^\top \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; \mathrm{NS}(S_r)\, C_r^\top

    n is the shorter side: a wide matrix is seen transposed. The transform is a fast one for any n. The polar factor is
    approximated by five of Jordan's Newton–Schulz iterations. Options may be edited at any time, the rank too.
    **chosen**: of equal norms the first columns; r = d/4, as for :class:`orthdion.OrthDion`.

    A convolution that is sharded within its kernel has its columns in the order of the parts, and so another basis than
    on one process; sharded along its channels it has not.
    """
