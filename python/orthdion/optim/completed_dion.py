"""The completed step: Orth-Dion's head, and the residual that rank r misses in the same step (algorithms.md, 3b)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..core.adjust import adjusted
from ..core.low_rank import (
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
from ..core.ranks import observed
from ..core.registry import register
from ..core.residuals import MEMORY, exact_residual, sent_residual
from ..core.rule import States, StateSpec
from ..requests import Body, Layout, LowRank, LowRankUpdate, Matrix, Outcome, Product, Reduce, Report
from .dion import DionRule

__all__ = ["CompletedDion", "CompletedDionRule"]


#: The most that replicas remember from one step to the next of what they have sent: what they and owners add up drifts
#: apart by rounding, for as long as it lasts. M's own share where that is less.
_FADE = 0.99


def _check_bits(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value in (1, 4)):
        return value
    raise ValueError(f"{name} must be 1, 4 or None (the residual does not travel), not {value!r}")


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
    advised: ClassVar[Any] = "full rank"
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
    residual_bits: Any = option(
        None,
        _check_bits,
        "Bits an entry that the residual travels in where only factors are averaged (``replicate_mesh``): 4, or 1 and "
        "a state as large as the momentum. None: not at all, so that there gradients must be.",
        structural=True,
        here=True,
    )

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

    def kept_in(self, at: Layout) -> States:
        """At one bit replicas remember what they have sent of the residual."""
        remembers = at.compressed and self.residual_bits == 1
        return {**self.kept, MEMORY: StateSpec(apart=True)} if remembers else self.kept

    def unsupported(self, at: Layout) -> str | None:
        """Where only factors are averaged, nobody has the averaged residual."""
        if not at.compressed or self.residual_bits is not None:
            return None
        return (
            "the completed step applies what rank r misses of the averaged gradient, but of this matrix only rank-r "
            "factors would be averaged; send it in few bits (residual_bits=4 or 1), or use orthdion.OrthDion, or let "
            "DDP average gradients and leave out replicate_mesh"
        )

    @property
    def _kappa(self) -> float | None:
        return self.mu if self.nesterov else None

    def fused(self, *, diagnostics: bool = False, bfloat16: bool = False) -> LowRank | None:
        """What the core is told; it has no step that looks at R."""
        if self.adaptive_rank:
            return None
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
        own = yield Product(left.b, left.p)
        v, null, r = yield from right_factor(w, left, self.right_factor, self.epsilon, own)
        if self.adaptive_rank:
            yield from observed(w, r)
        # Replicas with gradients of their own keep what they have captured themselves: nothing of M need travel.
        kept = w.layout.compressed
        mine = r if not kept else (yield Reduce(own, w.layout.rows, "R"))
        a, b = feedback_numbers(self._feedback, self.mu)
        fed = mine
        if self.nesterov and a != b:
            ahead = blend(w, self.sign, size=left.b.size)
            if kept:
                fed = yield Reduce((yield Product(ahead, left.p)), w.layout.rows, "R")
            else:
                fed = yield from right_of(w, ahead, left.p)
        found = yield from figures(w, left.b, r, v, null)
        wanted, states = (self.residual, self.residual_scale), dict[str, Tensor]()
        if kept:
            residual, states = yield from sent_residual(w, left, r, mine, *wanted, self.residual_bits, min(a, _FADE))
        else:
            residual = yield from exact_residual(w, left, r, *wanted)
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
            states=states,
        )
        return done


class CompletedDion(MatrixOptimizer, rule=CompletedDionRule):
    r"""Full-rank spectral descent at low-rank cost: a low-rank orthonormal head and a cheap normalised residual.

    .. math::
        M &\leftarrow M + G, \quad B = \mu M + G, \quad P = \mathrm{orth}(BQ), \quad R = B^\top P \\
        D &= P\,V(R)^\top + c \sqrt{d - r}\; N(T)/\|N(T)\|, \qquad T = B - P R^\top \\
        X &\leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\; D \\
        M &\leftarrow a M - (a - b) P (M^\top P)^\top, \qquad Q \leftarrow \mathrm{orth}(R), \qquad d = \min(m, n)

    The first r singular values of the step are 1, the others have a root mean square of c. It saves computation: it
    takes gradients that are already synchronised, as one process, FSDP, tensor parallel and plain DDP have them. With
    ``residual_bits`` it saves communication too.

    Example:
        >>> optimizer = orthdion.CompletedDion(orthdion.param_groups(model), lr=0.02)
        >>> loss.backward()
        >>> optimizer.step()
    """
