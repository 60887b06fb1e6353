"""The completed step: Orth-Dion's head, and the residual that rank r misses in the same step (algorithms.md, 3b)."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.adjust import adjusted
from ..core.low_rank import (
    Left,
    RightFactor,
    blend,
    check_feedback,
    feedback_numbers,
    figures,
    left_factor,
    next_q,
    right_factor,
    right_of,
)
from ..core.optimizer import MatrixOptimizer
from ..core.options import choice, flag, number, option
from ..core.registry import register
from ..requests import (
    Body,
    Energies,
    Layout,
    LowRank,
    LowRankUpdate,
    Map,
    Matrix,
    Outcome,
    Reduce,
    Report,
    Residual,
    ResidualSums,
)
from .dion import DionRule

__all__ = ["CompletedDion", "CompletedDionRule"]


@register
@dataclass(frozen=True)
class CompletedDionRule(DionRule):
    """The low-rank head and a residual of root mean square c, in one step."""

    name: ClassVar[str] = "completed-dion"
    summary: ClassVar[str] = (
        "X −= η·sqrt(m/n)·(P Vᵀ + c·sqrt(d−r)·N(T)/‖N(T)‖), T = B − P Rᵀ with normalised rows, columns"
    )
    use: ClassVar[str] = "full-rank steps at low-rank cost, where gradients are synchronised: the one to start with"
    paper: ClassVar[str] = "this library, docs/algorithms.md section 3b"
    flops: ClassVar[str] = "12mnr (linear: 6mnr)"
    sent: ClassVar[str] = "(m+n)·r + m + n"

    rank_fraction: float = number(0.25, 0.0, 1.0, open_low=True, structural=True, doc="r over min(m, n), in (0, 1].")
    right_factor: RightFactor = choice(
        "polar", "qr", "column", "polar", doc='V from R: "polar" (exact), "qr", "column".'
    )
    feedback: Any = option(
        None,
        check_feedback,
        'What M keeps of the residual and of what was captured, as in OrthDion. None: (μ, 0.7), and "momentum" with '
        "a linear residual.",
    )
    residual: Literal["normalized", "linear"] = choice(
        "normalized",
        "normalized",
        "linear",
        doc='N(T): "normalized" (columns, then rows, to one norm) or "linear" (T itself; 6mnr flops in all).',
    )
    residual_scale: float = number(2.0, 0.0, doc="c, the root mean square of the residual's singular values.")
    nesterov: bool = flag(True, doc="Look ahead: B = μM⁺ + G.")

    @classmethod
    def resolve(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The feedback that was measured best with the residual."""
        if options["feedback"] is None:
            mu = float(options["mu"])
            options["feedback"] = "momentum" if options["residual"] == "linear" else (mu, min(0.7, mu))
        return options

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``; r singular values of the direction are 1, the others have a root mean square of c."""
        spare = min(fan_out, fan_in) - rank
        return adjusted(self.adjust_lr, fan_out, fan_in, rank + self.residual_scale**2 * spare)

    def unsupported(self, at: Layout) -> str | None:
        """Where only factors are averaged, nobody has the averaged residual."""
        if not at.compressed:
            return None
        return (
            "the completed step applies what rank r misses of the averaged gradient, but of this matrix only rank-r "
            "factors would be averaged; use orthdion.OrthDion, or let DDP average gradients and leave out "
            "replicate_mesh"
        )

    @property
    def _kappa(self) -> float | None:
        return self.mu if self.nesterov else None

    def fused(self, *, diagnostics: bool = False, bfloat16: bool = False) -> LowRank:
        """What the core is told."""
        residual = {"residual": self.residual, "residual_scale": self.residual_scale, "kappa": self._kappa}
        return self._form(self._feedback, diagnostics=diagnostics, bfloat16=bfloat16, **residual)

    @property
    def _feedback(self) -> Any:
        return self.resolve({"feedback": self.feedback, "mu": self.mu, "residual": self.residual})["feedback"]

    def step(self, w: Matrix) -> Body[Outcome]:
        """``B = κM⁺ + G``, P, R and V from it, X by head and residual, ``M ← a·M⁺ − (a − b)·P (M⁺ᵀP)ᵀ``."""
        left = yield from left_factor(w, blend(w, self.sign, self._kappa))
        if isinstance(left, Report):
            return left
        v, null, r = yield from right_factor(w, left, self.right_factor, self.epsilon)
        a, b = feedback_numbers(self._feedback, self.mu)
        fed = r
        if self.nesterov and a != b:
            fed = yield from right_of(w, blend(w, self.sign, size=left.b.size), left.p)
        found = yield from figures(w, left.b, r, v, null)
        residual = yield from self._residual(w, left, r)
        q = yield from next_q(w, left, self.right_factor, v, null)
        done: Outcome = yield LowRankUpdate(
            left.b,
            left.p,
            r,
            v,
            fed=fed,
            q=q,
            lr=self.lr,
            weight_decay=self.weight_decay,
            scale=w.scale,
            feedback=(a, b),
            residual=residual,
            null=null,
            figures=found,
        )
        return done

    def _residual(self, w: Matrix, left: Left, r: Tensor) -> Generator[Any, Any, Residual | None]:
        """Its numbers, from ‖T‖² = ‖B‖² − ‖R‖² of the whole and of each column: P is orthonormal."""
        at, spare, noise = w.layout, min(w.shape) - r.shape[1], w.precision.noise
        if spare == 0:
            return None
        rows, columns = yield Energies(left.b)
        of_columns = yield Map(_row_squares, (r,))
        goal = self.residual_scale * math.sqrt(spare)
        if self.residual == "linear":
            total, captured = yield (
                Reduce(rows.sum(), at.shards, "residual"),
                Reduce(of_columns.sum(), at.cols, "residual"),
            )
            return Residual(alpha=(yield Map(_alpha, (total, captured), (noise.residual, goal))))
        columns, rows = yield Reduce(columns, at.rows, "residual"), Reduce(rows, at.cols, "residual")
        total, captured, count = yield (
            Reduce(columns.sum(), at.cols, "residual"),
            Reduce(of_columns.sum(), at.cols, "residual"),
            Reduce((rows > 0).sum().double(), at.rows, "residual"),
        )
        inverse = yield Map(_column_scales, (columns, of_columns), (noise.fade,))
        raw, scaled = yield ResidualSums(left.b, left.p, r, inverse)
        raw, scaled = yield Reduce(raw, at.cols, "residual"), Reduce(scaled, at.cols, "residual")
        numbers = (noise.residual, noise.fade, goal)
        lengths = yield Map(_row_scales, (raw, scaled, rows, total, captured, count), numbers)
        return Residual(columns=inverse, rows=lengths)


def _row_squares(r: Tensor) -> Tensor:
    """What P captures of each column's energy."""
    return r.double().square().sum(-1)


def _weight(total: Tensor, captured: Tensor, least: float, goal: float) -> tuple[Tensor, Tensor]:
    """The residual's energy, and the norm that it is to get: 0 where it is rounding noise."""
    energy = total - captured
    return energy, (energy > least * total).to(energy.dtype) * goal


def _alpha(total: Tensor, captured: Tensor, least: float, goal: float) -> Tensor:
    """α that gives T the norm ``goal``."""
    energy, weight = _weight(total, captured, least, goal)
    return weight / energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt()


def _column_scales(columns: Tensor, captured: Tensor, fade: float) -> Tensor:
    """The inverse norm of each of T's columns; one that is noise fades out."""
    norms = torch.maximum(columns - captured, fade * columns).sqrt()
    return torch.where(norms > 0, 1.0 / norms.clamp_min(1e-300), 0.0)


def _row_scales(
    raw: Tensor,
    scaled: Tensor,
    rows: Tensor,
    total: Tensor,
    captured: Tensor,
    count: Tensor,
    least: float,
    fade: float,
    goal: float,
) -> Tensor:
    """What each row of T with scaled columns is multiplied by: rows in which T is noise fade out; every other row gets
    one norm, and all together ``goal``.
    """
    _, weight = _weight(total, captured, least, goal)
    share = (raw / (fade * rows).clamp_min(1e-300)).clamp_max(1.0).sqrt()
    lengths = torch.where(scaled > 0, share / scaled.sqrt().clamp_min(1e-300), 0.0)
    return lengths * (weight / count.clamp_min(1.0).sqrt())[..., None]


class CompletedDion(MatrixOptimizer, rule=CompletedDionRule):
    r"""Full-rank spectral descent at low-rank cost: a low-rank orthonormal head and a cheap normalised residual.

    .. math::
        M &\leftarrow M + G, \quad B = \mu M + G, \quad P = \mathrm{orth}(BQ), \quad R = B^\top P \\
        D &= P\,V(R)^\top + c \sqrt{d - r}\; N(T)/\|N(T)\|, \qquad T = B - P R^\top \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; D \\
        M &\leftarrow a M - (a - b) P (M^\top P)^\top, \qquad Q \leftarrow \mathrm{orth}(R), \qquad d = \min(m, n)

    The first r singular values of the step are 1, the others have a root mean square of c. It saves computation, not
    communication: it needs gradients that are already synchronised, as one process, FSDP, tensor parallel and plain DDP
    have them.

    Example:
        >>> optimizer = orthdion.CompletedDion(orthdion.param_groups(model), lr=0.02)
        >>> loss.backward()
        >>> optimizer.step()
    """
