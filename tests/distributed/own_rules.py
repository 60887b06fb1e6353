"""Rules that ask for what ours do not: whole matrices whose entries tell where they lie, states along one axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import orthdion
from orthdion.core.options import number
from orthdion.core.rule import States
from orthdion.requests import Body, Map, Matrix, Outcome, Reduce, Request, Update, Whole

__all__ = ["Positions", "RowVariance", "TallPositions", "TallRowVariance"]


def _weighted(whole: Tensor) -> Tensor:
    """Every entry times its number in the whole matrix, minus its row's first: whoever mixes up parts is found out."""
    m, n = whole.shape
    return whole * torch.arange(m * n, dtype=whole.dtype, device=whole.device).view(m, n) - whole[:, :1]


def _work(whole: Tensor) -> Request:
    return Map(_weighted, (whole,))


@orthdion.register
@dataclass(frozen=True)
class Positions(orthdion.Rule):
    """``D_ij = (in + j)·M_ij − M_i0`` of the whole matrix, with a momentum."""

    name: ClassVar[str] = "positions"
    states: ClassVar[States] = {"momentum": orthdion.StateSpec()}

    def step(self, w: Matrix) -> Body[Outcome]:
        assert not self.tall or w.shape[0] >= w.shape[1]
        m = w.read("momentum") + w.gradient
        d = yield Whole(m, w, _work)
        return (yield Update(w, d, self.lr, self.weight_decay, {"momentum": m}))


@orthdion.register
@dataclass(frozen=True)
class TallPositions(Positions):
    """The same of the matrix, transposed if it is wide."""

    name: ClassVar[str] = "tall-positions"
    tall: ClassVar[bool] = True


@orthdion.register
@dataclass(frozen=True)
class RowVariance(orthdion.Rule):
    """``v ← βv + (1−β)·(mean of G² along each row)``, ``D = M / √v``, as NorMuon scales rows."""

    name: ClassVar[str] = "row-variance"
    states: ClassVar[States] = {"momentum": orthdion.StateSpec(), "variance": orthdion.StateSpec(("rows",))}

    beta: float = number(0.9, 0.0, 1.0, doc="β.")

    def step(self, w: Matrix) -> Body[Outcome]:
        g, at = w.gradient, w.layout
        m = 0.9 * w.read("momentum") + g
        squares = yield Reduce(g.square().sum(1), at.cols, "norms")
        v = self.beta * w.read("variance") + (1.0 - self.beta) * squares / w.shape[1]
        d = m / v.sqrt()[:, None]
        return (yield Update(w, d, self.lr, self.weight_decay, {"momentum": m, "variance": v}))


@orthdion.register
@dataclass(frozen=True)
class TallRowVariance(RowVariance):
    """The same along the longer side."""

    name: ClassVar[str] = "tall-row-variance"
    tall: ClassVar[bool] = True
