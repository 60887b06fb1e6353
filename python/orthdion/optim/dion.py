"""Dion (arXiv 2504.05295)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..core.adjust import AdjustLr, adjust_lr, adjusted
from ..core.low_rank import (
    RightFactor,
    blend,
    check_feedback,
    feedback_numbers,
    figures,
    left_factor,
    next_q,
    right_factor,
)
from ..core.optimizer import MatrixOptimizer
from ..core.options import choice, number, option, whole
from ..core.registry import register
from ..core.rule import Rule, States, StateSpec
from ..requests import Body, LowRank, LowRankUpdate, Matrix, Outcome, Report

__all__ = ["Dion", "DionRule"]


@register
@dataclass(frozen=True)
class DionRule(Rule):
    """The low-rank step with error feedback; published forms differ in ``right_factor`` and ``feedback``."""

    name: ClassVar[str] = "dion"
    summary: ClassVar[str] = "X −= η·sqrt(m/n)·P Vᵀ, P = orth((M+G) Q), V = unit columns of (M+G)ᵀP; feedback into M"
    use: ClassVar[str] = "factors in place of gradients on the wire, as microsoft/dion computes it"
    paper: ClassVar[str] = "arXiv 2504.05295"
    advised: ClassVar[Any] = "low rank"
    flops: ClassVar[str] = "8mnr"
    sent: ClassVar[str] = "(m+n)·r"
    states: ClassVar[States] = {
        "momentum": StateSpec(apart=True),
        "Q": StateSpec(("cols", "rank"), start="orthonormal"),
    }
    tall: ClassVar[bool] = True
    checks_gradient: ClassVar[bool] = True
    averages_factors: ClassVar[bool] = True

    mu: float = number(0.95, 0.0, 1.0, doc="μ, the momentum.")
    rank_fraction: float = number(1.0, 0.0, 1.0, open_low=True, structural=True, doc="r over min(m, n), in (0, 1].")
    rank_multiple_of: int = whole(1, 1, structural=True, doc="r is rounded up to a multiple of this.")
    epsilon: float = number(1e-8, 0.0, doc='The guard of right_factor="column", relative to the largest column.')
    right_factor: RightFactor = choice(
        "column", "qr", "column", "polar", doc='V from R: "column" (Dion), "qr" (Orth-Dion), "polar" (exact).'
    )
    feedback: Any = option(
        "dion",
        check_feedback,
        'What M keeps of the residual and of what was captured: "dion" (1, μ), "orth-dion" (μ, 0), "pure" (1, 0), '
        '"momentum" (μ, μ), or two numbers (a, b) in [0, 1].',
    )

    adjust_lr: AdjustLr | None = adjust_lr()

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``; r singular values of the direction are 1, to V's orthogonality."""
        return adjusted(self.adjust_lr, fan_out, fan_in, rank)

    def fused(self, *, diagnostics: bool = False, bfloat16: bool = False) -> LowRank | None:
        """What the core is told."""
        return self._form(self.feedback, diagnostics=diagnostics, bfloat16=bfloat16)

    def _form(self, feedback: Any, **more: Any) -> LowRank:
        a, b = feedback_numbers(feedback, self.mu)
        alone = {"residual": None, "residual_scale": 0.0, "kappa": None}
        return LowRank(*self.shared, a, b, self.right_factor, epsilon=self.epsilon, **{**alone, **more})

    def step(self, w: Matrix) -> Body[Outcome]:
        """``B = M + G``, P and V from it, ``M ← a·(B − P Rᵀ) + b·P Rᵀ``, ``Q ← V``."""
        left = yield from left_factor(w, blend(w, self.sign))
        if isinstance(left, Report):
            return left
        v, null, r = yield from right_factor(w, left, self.right_factor, self.epsilon)
        found = yield from figures(w, left.b, r, v, null)
        q = yield from next_q(w, left, self.right_factor, v, null)
        taken = yield from self.taken(w, v, r)
        done: Outcome = yield LowRankUpdate(
            left.b,
            left.p,
            r,
            taken,
            fed=r,
            q=q,
            lr=self.lr,
            weight_decay=self.weight_decay,
            scale=w.scale,
            feedback=feedback_numbers(self.feedback, self.mu),
            residual=None,
            null=null,
            figures=found,
        )
        return done

    def taken(self, w: Matrix, v: Tensor, r: Tensor) -> Body[Tensor]:
        """What weights are stepped by in place of V: all of it."""
        yield from ()
        return v


class Dion(MatrixOptimizer, rule=DionRule):
    r"""Dion: low-rank spectral descent with a column-normalised right factor, as microsoft/dion computes it.

    .. math::
        B &= M + G, \quad P = \mathrm{orth}(BQ), \quad R = B^\top P, \quad V_j = R_j / (\|R_j\| + \epsilon) \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; P V^\top \\
        M &\leftarrow B - (1 - \mu) P R^\top, \qquad Q \leftarrow V

    Positional keywords, group keys and state keys are those of ``dion.Dion``, whose checkpoints load. Its mixed
    precision is ``momentum_dtype`` and ``q_dtype``. ε is relative to the largest column, so that the step does not
    depend on the gradient's scale.
    """

    positional = (
        *("replicate_mesh", "outer_shard_mesh", "inner_shard_mesh", "replicate_mesh_grad_sync"),
        *("rank_fraction", "rank_multiple_of", "lr", "mu", "betas", "weight_decay", "epsilon"),
    )
