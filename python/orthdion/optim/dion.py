"""Dion (arXiv 2504.05295)."""

from __future__ import annotations

from .lowrank import LowRankOptimizer

__all__ = ["Dion"]


class Dion(LowRankOptimizer):
    r"""Dion: low-rank spectral descent with a column-normalised right factor, as microsoft/dion computes it.

    .. math::
        B &= M + G, \quad P = \mathrm{orth}(BQ), \quad R = B^\top P, \quad V_j = R_j / (\|R_j\| + \epsilon) \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; P V^\top \\
        M &\leftarrow B - (1 - \mu) P R^\top, \qquad Q \leftarrow V

    Constructor keywords up to ``epsilon``, group keys and state keys are those of ``dion.Dion``, whose checkpoints
    load. Its settings of its own QR have no counterpart here, its mixed precision is ``momentum_dtype`` and
    ``q_dtype``. ε is relative to the largest column, so that the step does not depend on the gradient's scale. The
    keyword-only arguments are those of :class:`orthdion.OrthDion`; here ``right_factor`` defaults to "column",
    ``feedback`` to "dion" and ``rank_fraction`` to 1, as there. Errors as there.
    """

    _published = ("column", "dion")
