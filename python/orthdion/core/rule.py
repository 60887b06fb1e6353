"""What an optimizer of the family is: a frozen dataclass of options, its states, and a step that asks for what it
needs.

A rule is written for one matrix. Its fields are the group keys, made by the functions of :mod:`.options`; ``states``
says what it keeps; ``step`` is a generator that yields :mod:`orthdion.requests` and ends with an update. It then runs
on every
backend, sharded in every layout, in checkpoints and on the command line::

    @dataclass(frozen=True)
    class SignedMomentum(Rule):
        name: ClassVar[str] = "signed-momentum"
        states: ClassVar[States] = {"momentum": StateSpec()}
        lr: float = number(0.01, 0.0, doc="η, the learning rate.")
        mu: float = number(0.9, 0.0, 1.0, doc="μ, the momentum.")

        def step(self, w: Matrix) -> Body[Outcome]:
            m = self.mu * w.read("momentum") + w.gradient
            return (yield Update(w, m.sign(), self.lr, self.weight_decay, {"momentum": m}))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..requests import Body, Form, Layout, Matrix, Outcome
from .options import check_number, choice, flag, number, option, whole

__all__ = ["LATE", "OF_MATRICES", "ON_DEMAND", "Axis", "Rule", "StateSpec", "States", "row_variance"]

Axis = Literal["rows", "cols", "rank", "out"]

#: Options of every rule that are of matrices: a group of an elementwise rule does not take them from its optimizer.
OF_MATRICES = ("hyperball", "row_variance")


@dataclass(frozen=True)
class StateSpec:
    """A state by its axes, from which shape, sharding, saving and re-laying follow.

    ``("rows", "cols")`` lies as the weight does; ``("cols", "rank")``, ``("rows",)`` and the like are of each matrix,
    ``("out",)`` of its output features, which of a matrix that is seen transposed are the columns; ``()`` is one number
    a parameter. ``dtype`` None: ``q_dtype`` for what has a rank, ``momentum_dtype`` for the rest.
    ``apart``: replicas that average factors have one each; a checkpoint has the mean, with which all of them go on.
    ``host``: no step reads it, so it stays with the host.
    """

    axes: tuple[Axis, ...] = ("rows", "cols")
    start: Literal["zeros", "orthonormal"] = "zeros"
    dtype: torch.dtype | None = None
    apart: bool = False
    host: bool = False


States = dict[str, StateSpec]

#: States that options or layouts ask for. Where they do not, a checkpoint's are not taken along.
ON_DEMAND = frozenset({"effective_rank", "memory", "variance"})
#: Those that start afresh where a checkpoint has none.
LATE = ON_DEMAND - {"variance"}


def _check_share(name: str, value: Any) -> Any:
    return None if value is None else check_number(name, value, 0.0, 1.0, open_high=True)


def row_variance(default: float | None) -> Any:
    """The option of that name."""
    return option(
        default,
        _check_share,
        "β₂ of NorMuon's even rows (arXiv 2510.05491): each output's step is divided by its running root mean square, "
        "at the step's norm. None: not.",
        structural=True,
    )


@dataclass(frozen=True)
class Rule:
    """The base of every optimizer rule.

    Class attributes:
        name: what the registry, groups and checkpoints call it.
        summary, use, paper: a line each: the equation, what it is for, where it is from.
        flops, sent: of a step of an m×n matrix (rank r), and the elements that it sends where it is sharded over rows;
            "" where that is not known.
        states: what it keeps of each matrix.
        tall: wide matrices are seen transposed, so that m ≥ n.
        elementwise: it has no matrices: tensors of any shape are seen as rows.
        checks_gradient: its step finds out by itself whether the gradient has arrived and is finite, on all ranks.
        compensates: its step is proportional to its momentum, so that errors can be paid back through it ("eco").
        advised: what `orthdion.plan` may choose it as, for the losses that were measured; not inherited.
        averages_factors: where replicas have gradients of their own, it averages factors in place of the gradient.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    use: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    flops: ClassVar[str] = ""
    sent: ClassVar[str] = ""
    states: ClassVar[States] = {}
    tall: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    checks_gradient: ClassVar[bool] = False
    averages_factors: ClassVar[bool] = False
    compensates: ClassVar[bool] = False
    advised: ClassVar[Literal["full rank", "low rank", ""]] = ""

    lr: float = number(0.01, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    weight_decay: float = number(0.01, 0.0, doc="λ, decoupled; multiplied by η, not by the scale.")
    maximize: bool = flag(False, doc="Ascend.")
    cautious_weight_decay: bool = flag(
        False, doc="Decay only entries that the step does not push away from zero (arXiv 2510.12402)."
    )
    hyperball: bool = flag(
        False,
        doc="Keep each matrix's Frobenius norm, with steps of η times that norm (arXiv 2606.16899): adjust_lr then "
        "makes no difference.",
    )
    row_variance: float | None = row_variance(None)
    weight_rounding: Literal["nearest", "stochastic", "eco"] = choice(
        "nearest",
        "nearest",
        "stochastic",
        "eco",
        doc='How weights of bfloat16 and float16 are rounded: "nearest"; "stochastic", up or down as is right on '
        'average, so that small steps are not lost; "eco", so too, and what is lost goes into AdamW\'s momentum (arXiv '
        "2601.22101).",
    )
    rounding_seed: int = whole(0, 0, doc="Of stochastic rounding; saved, unlike ``seed``.")

    def step(self, w: Matrix) -> Body[Outcome]:
        """The step of one matrix: reads, asks, and ends with an update. The gradient is finite, and averaged."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def fused(self, *, diagnostics: bool = False, bfloat16: bool = False) -> Form | None:
        """What a backend that has this step in one piece is told; None: there is no such piece."""
        return None

    def in_one_piece(self, *, diagnostics: bool = False, bfloat16: bool = False) -> Form | None:
        """:meth:`fused`, unless the direction must be known as a whole before it is written."""
        return None if self.controlled else self.fused(diagnostics=diagnostics, bfloat16=bfloat16)

    @property
    def controlled(self) -> bool:
        """Whether something is done to its directions before they are written (:mod:`.control`)."""
        return self.hyperball or self.row_variance is not None

    @property
    def kept(self) -> States:
        """Its states, those of options among them."""
        return self.states if self.row_variance is None else {**self.states, "variance": StateSpec(("out",))}

    def scale(self, fan_out: int, fan_in: int, rank: int) -> float:
        """What η is multiplied by for a weight (fan_out, fan_in) whose states have this rank."""
        return 1.0

    def rank(self, m: int, n: int) -> int:
        """The length of the axis "rank" for an m×n matrix.

        ``r = ceil(rank_fraction·min(m, n) / rank_multiple_of)·rank_multiple_of``, at most min(m, n).
        """
        fraction, multiple = getattr(self, "rank_fraction", 1.0), getattr(self, "rank_multiple_of", 1)
        # A fraction such as 0.1 of 30 must give 3, not the 4 that its rounding error would make of it.
        return min(math.ceil(round(fraction * min(m, n) / multiple, 9)) * multiple, min(m, n))

    def kept_in(self, at: Layout) -> States:
        """What it keeps of matrices that lie so: its states, and what only some layouts need, which starts afresh where
        a checkpoint has none of it.
        """
        return self.kept

    def unsupported(self, at: Layout) -> str | None:
        """Why matrices that lie so cannot be stepped, and the remedy; None if they can."""
        return None

    @classmethod
    def resolve(cls, options: dict[str, object]) -> dict[str, object]:
        """Options with None replaced by what it stands for, so that a checkpoint says what was meant."""
        return options

    @property
    def adapts(self) -> bool:
        """Whether its steps leave what the next rank is made of (:mod:`.ranks`)."""
        return False

    def check(self) -> None:
        """Refuses options that do not go together (:class:`ValueError`); one that overrides it calls this one too."""
        if self.elementwise and self.controlled:
            name = "hyperball" if self.hyperball else "row_variance"
            raise ValueError(
                f"{name} is for matrices, and {self.name} sees none; leave it out of groups of {self.name}"
            )
        if self.hyperball and self.cautious_weight_decay:
            raise ValueError(
                "hyperball keeps the norm of weights, so there is no decay to be careful with; leave out "
                "cautious_weight_decay, or hyperball"
            )
        if self.weight_rounding == "eco" and not self.compensates:
            raise ValueError(
                "weight_rounding='eco' pays errors back through a momentum that steps are proportional to, and those "
                f"of {self.name} are of one size whatever the momentum's; use 'stochastic', and 'eco' in groups of "
                "adamw"
            )
        if self.row_variance is not None and "variance" in self.states:
            raise ValueError(f"{self.name} has a variance of its own, beta2 is its β₂; leave out row_variance")

    @property
    def keeps_factors(self) -> bool:
        """Whether a state of it has a rank."""
        return any("rank" in state.axes for state in self.kept.values())

    @property
    def shared(self) -> tuple[float, float, bool, bool]:
        """What every fused form begins with."""
        return self.lr, self.weight_decay, self.maximize, self.cautious_weight_decay

    @property
    def sign(self) -> float:
        """−1 to ascend."""
        return -1.0 if self.maximize else 1.0
