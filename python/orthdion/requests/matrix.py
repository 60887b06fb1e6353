"""One matrix as a rule sees it, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .groups import Layout

__all__ = ["Blend", "Deferred", "Draws", "Extent", "Matrix", "Noise", "Outcome", "Precision", "Report", "Rounding"]

#: What operands of float32 products may be asked to be rounded to; "float32": nothing.
Rounding = Literal["bfloat16", "tf32", "float32"]
#: Rows ``first`` to ``last`` and columns ``first`` to ``last`` of a whole matrix: what one rank has of it.
Extent = tuple[int, int, int, int]


class Draws(NamedTuple):
    """How the entries of a weight are rounded by draws (:mod:`orthdion.numerics.rounding`): the step's key, and the
    number that entry (i, j) has in the whole weight, ``first + i·row + j·col``.
    """

    key: int
    first: int
    row: int
    col: int


class Noise(NamedTuple):
    """What is rounding noise: a direction of B·Q (``left``) and of R (``right``), relative to the largest; and the
    residual's share of B's energy, in all (``residual``) and in a row or column, where it fades out (``fade``).
    """

    left: float
    right: float
    residual: float
    fade: float


@dataclass(frozen=True)
class Precision:
    """What a matrix is computed in: ``dtype`` (float32, or float64 for float64 weights), ``rounding`` of the operands
    of float32 products, and ``unit``, the roundoff that thresholds are multiples of.
    """

    dtype: torch.dtype = torch.float32
    rounding: Literal["bfloat16", "tf32"] | None = None
    unit: float = 2.0**-24

    @staticmethod
    def of(stored: torch.dtype, rounding: Rounding | None = None) -> Precision:
        """Of weights that are stored so; "float32" rounds no operands."""
        if stored == torch.float64:
            return Precision(torch.float64, None, 2.0**-53)
        return Precision(torch.float32, None if rounding == "float32" else rounding)

    @cached_property
    def noise(self) -> Noise:
        """The thresholds (docs/algorithms.md, section 4)."""
        if self.rounding == "bfloat16":
            return Noise(2.0**-6, 2.0**-8, 2.0**-12, 2.0**-8)
        if self.rounding == "tf32":  # three bits more than bfloat16
            return Noise(2.0**-9, 2.0**-11, 2.0**-16, 2.0**-11)
        return Noise(64.0 * self.unit, 64.0 * self.unit, 16.0 * self.unit, self.unit**0.5 / 16.0)

    @cached_property
    def gate(self) -> tuple[float, float]:
        """Condition numbers up to which one Cholesky QR, and two, are as good as a Householder QR (section 4)."""
        return (self.unit / 2.0**-53) ** 0.5 / 8.0, 1e6

    @cached_property
    def safe(self) -> float:
        """B's largest entry, and its inverse, may have this size before squares lose digits."""
        return 1e100 if self.dtype == torch.float64 else 1e12


@dataclass(slots=True, eq=False)
class Matrix:
    """One matrix on this rank.

    Attributes:
        x, g: the weight and its gradient, local views (m, n); what a rule writes it writes through an update request.
        state: the rule's states by name, local views.
        shape: (m, n) of the whole matrix. With a rule that is ``tall``, a wide matrix is seen transposed.
        fan: (fan_out, fan_in) of the weight, whichever way it is seen.
        scale: what the rule multiplies η by for a weight of this fan.
        layout: the groups that its parts lie on.
        precision: what to compute in.
        diagnose: whether figures are asked for.
        arrived: False where this rank has no gradient, so that ``g`` is zero here.
        offset: bytes of other parameters before this one's, counted alike on every rank.
        skip, lost: flags on the device, where the host does not wait to know: not to write; because something was not
            finite.
        cautious: whether only entries decay that the step does not push away from zero.
        rates: ``[lr, weight_decay]`` in double on the device, where steps read them there.
        words: what the Rust core is told of X and the states, where somebody has it already.
        extents: what each rank of ``layout.shards`` has of the whole matrix, when asked.
        place: first, row and col of :class:`Draws`.
        draws: how X is rounded, if not to nearest.
        spectrum: what a step leaves of its columns for the host, where the rank follows it.
    """

    x: Tensor
    g: Tensor
    state: dict[str, Tensor]
    shape: tuple[int, int]
    fan: tuple[int, int]
    scale: float = 1.0
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    diagnose: bool = False
    arrived: bool = True
    offset: int = 0
    skip: Tensor | None = None
    lost: Tensor | None = None
    cautious: bool = False
    rates: Tensor | None = None
    words: Any = None
    extents: Callable[[], list[Extent]] | None = None
    place: tuple[int, int, int] = (0, 0, 1)
    draws: Draws | None = None
    spectrum: Tensor | None = None

    def outcome(self, null: Tensor | None = None, figures: Report | None = None) -> Outcome:
        """What a write did to it, given R's null directions, and diagnostics if they were asked for."""
        if self.lost is not None:
            return Deferred(self.lost, torch.zeros(()) if null is None else null.sum(), figures)
        return figures or Report(False, 0 if null is None else int(null.sum()))

    def read(self, name: str) -> Tensor:
        """A state in working precision; not to be written to."""
        return self.state[name].to(self.precision.dtype)

    @property
    def gradient(self) -> Tensor:
        """The gradient in working precision; not to be written to."""
        return self.g.to(self.precision.dtype)


@dataclass(slots=True, eq=False)
class Blend:
    """``B = cm·M + cg·G``, which a backend forms where it reads it; ``size`` is the power of two in both coefficients.

    ``formed`` is room for a backend that keeps B after all.
    """

    w: Matrix
    momentum: str
    cm: float
    cg: float
    size: float | Tensor = 1.0
    formed: Any = None

    @property
    def m(self) -> Tensor:
        """M as it is stored."""
        return self.w.state[self.momentum]

    @property
    def shape(self) -> tuple[int, int]:
        """Of this rank's part."""
        rows, cols = self.w.x.shape
        return rows, cols

    def scaled(self, size: float | Tensor) -> Blend:
        """B times a power of two."""
        return replace(self, size=size, formed=None)


class Report(NamedTuple):
    """What happened to a matrix; the figures after ``null`` only if diagnostics are on.

    ``b_energy`` and ``r_energy`` are ‖B‖² (its mean over replicas) and ‖R‖², ``nu`` is ‖V‖₂, ``descent`` ⟨B, P Vᵀ⟩,
    ``nuclear`` ‖R‖_*.
    """

    skipped: bool = False
    null: int = 0
    b_energy: float = 0.0
    r_energy: float = 0.0
    nu: float = 0.0
    descent: float = 0.0
    nuclear: float = 0.0
    effective_rank: float = 0.0
    #: No rank had a gradient.
    idle: bool = False

    def report(self) -> Report:
        """Itself: a backend that does not wait for its device returns something that must be asked."""
        return self


class Outcome(Protocol):
    """What a step did to a matrix, perhaps not known yet."""

    def report(self) -> Report:
        """What it did; waits until that is known."""
        ...


@dataclass(frozen=True)
class Deferred:
    """The report of a step whose flags are still on the device."""

    skipped: Tensor
    nulls: Tensor
    #: Diagnostics, if they were asked for; those have waited already.
    figures: Report | None = None

    def report(self) -> Report:
        """Waits for the device."""
        if bool(self.skipped):
            return Report(True)
        return self.figures or Report(False, int(self.nulls))
