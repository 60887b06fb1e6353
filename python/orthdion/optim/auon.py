"""AuON (arXiv 2509.24320): a momentum divided by its norm, and by the root mean square of its hyperbolic cosine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.adjust import adjusted
from ..core.optimizer import MatrixOptimizer
from ..core.options import flag, number
from ..core.registry import register
from ..requests import Body, Matrix, Outcome, Reduce, Update
from .muon import MomentumRule

__all__ = ["AuON", "AuONRule"]


@register
@dataclass(frozen=True)
class AuONRule(MomentumRule):
    """A momentum of norm 1, or as it is, over ``sqrt(mean cosh²(γU/‖U‖))``, which is between 1 and cosh γ."""

    name: ClassVar[str] = "auon"
    summary: ClassVar[str] = "X −= η·scale·N/sqrt(mean cosh²(γN)), N = U/‖U‖, U = lerp(G, M, μ), M = lerp(M, G, 1−μ)"
    use: ClassVar[str] = "to compare with: a momentum at unit norm, whose parts nothing brings to one size"
    paper: ClassVar[str] = "arXiv 2509.24320"
    flops: ClassVar[str] = "O(mn)"
    sent: ClassVar[str] = "2"

    lr: float = number(0.025, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    gamma: float = number(1.0, 0.0, 100.0, doc="γ, what the unit momentum is multiplied by within the cosine.")
    normalized: bool = flag(True, doc="Divide U itself by its norm (the paper); its released code does not.")

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """By ``adjust_lr``; the direction has norm 1, but for the cosine's part."""
        return adjusted(self.adjust_lr, fan_out, fan_in, 1.0)

    def step(self, w: Matrix) -> Body[Outcome]:
        """``M ← lerp(M, G, 1 − μ)``, ``D = N / sqrt(mean cosh²(γN))``. Sums run over all shards."""
        u, m = self.lookahead(w)
        wide, shards = u.double(), w.layout.shards
        largest = wide.abs().amax() if u.numel() else wide.sum()
        size = (yield Reduce(largest, shards, "norms", op="max")).clamp_min(1e-300)
        norm = (yield Reduce((wide / size).square().sum(), shards, "norms")).sqrt().clamp_min(1e-300)
        n = wide / size / norm
        total = yield Reduce((self.gamma * n).cosh().square().sum(), shards, "norms")
        d = (n if self.normalized else wide) / (total / max(w.shape[0] * w.shape[1], 1)).sqrt().clamp_min(1.0)
        limit = torch.finfo(u.dtype).max
        d = d.clamp(-limit, limit).to(u.dtype)
        done: Outcome = yield Update(w, d, self.lr, self.weight_decay, {"momentum": m}, w.scale)
        return done


class AuON(MatrixOptimizer, rule=AuONRule):
    r"""AuON: a momentum at unit norm.

    .. math::
        M &\leftarrow \mu M + (1 - \mu) G, \quad U = (1 - \mu) G + \mu M, \quad N = U / \|U\| \\
        X &\leftarrow (1 - \eta\lambda) X - \eta\,\mathrm{scale}\; N / \sqrt{\mathrm{mean} \cosh^2(\gamma N)}

    All that is done to M is to divide it by one number: D has its singular vectors and the ratios of its singular
    values, and norm 1 at most, where a polar factor has sqrt(min(m, n)). So rates are larger than Muon's.

    The sources differ. The paper divides U by its norm, with γ = 1. The released code divides by the norm only within
    the cosine, with γ = 1.5 (η = 0.24): ``normalized=False, gamma=1.5, adjust_lr=None`` is that step, momentum descent
    whose rate is divided by a number between 1 and 2.4. **chosen**: the paper's; no ε, as zeros stay zeros anyhow;
    ``adjust_lr`` is "spectral" as everywhere here, where the paper has sqrt(max(1, m/n)); η is 0.025, the better of two
    rates that were tried, and a tenth of the paper's.
    """
