"""Orth-Dion (arXiv 2605.16341)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.low_rank import RightFactor, check_feedback
from ..core.optimizer import MatrixOptimizer
from ..core.options import choice, number, option
from ..core.registry import register
from .dion import DionRule

__all__ = ["OrthDion", "OrthDionRule"]


@register
@dataclass(frozen=True)
class OrthDionRule(DionRule):
    """Dion's step (:class:`.dion.DionRule`) with an orthonormal right factor and a feedback of (μ, 0)."""

    name: ClassVar[str] = "orth-dion"
    summary: ClassVar[str] = "X −= η·sqrt(m/n)·P Vᵀ, P = orth((M+G) Q), V = orth((M+G)ᵀP); M = μ·(residual)"
    use: ClassVar[str] = "factors in place of gradients on the wire, with singular values of exactly 1"
    paper: ClassVar[str] = "arXiv 2605.16341"
    advised: ClassVar[Any] = "low rank"

    rank_fraction: float = number(0.25, 0.0, 1.0, open_low=True, structural=True, doc="r over min(m, n), in (0, 1].")
    right_factor: RightFactor = choice(
        "qr", "qr", "column", "polar", doc='V from R: "qr" (this paper\'s), "column" (Dion\'s), "polar" (exact).'
    )
    feedback: Any = option(
        "orth-dion",
        check_feedback,
        'What M keeps of the residual and of what was captured: "orth-dion" (μ, 0), "dion" (1, μ), "pure" (1, 0), '
        '"momentum" (μ, μ), or two numbers (a, b) in [0, 1]; (1, 0.7) was best where it was tuned.',
    )


class OrthDion(MatrixOptimizer, rule=OrthDionRule):
    r"""Low-rank spectral descent with an orthonormal right factor.

    For each weight X of shape (m, n), with gradient G, buffer M and warm start Q (n, r), one step is

    .. math::
        B &= M + G, \quad P = \mathrm{orth}(BQ), \quad R = B^\top P, \quad V = \mathrm{orth}(R) \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; P V^\top \\
        M &\leftarrow a (B - P R^\top) + b P R^\top, \qquad Q \leftarrow V

    so the step has exactly r singular values of 1 (Dion, which only normalises R's columns, has ones between 0 and
    :math:`\sqrt r`). The published form keeps a = μ of the residual and b = 0 of what was captured.

    DTensor parameters (FSDP2, tensor parallel, both, HSDP) need no arguments: rows and columns are read off their
    placements, and the step is the one that a single process would take, to rounding.

    Example:
        >>> optimizer = orthdion.OrthDion(orthdion.param_groups(model), lr=0.01)
        >>> loss.backward()
        >>> optimizer.step()
    """
