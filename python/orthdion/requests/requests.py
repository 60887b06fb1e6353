"""The requests themselves: values that a rule's generator yields (docs/architecture.md).

Requests with equal keys are answered together. Every answer is described where its request is. Large operands stay
lazy: a :class:`Blend` is formed where a backend reads it. Everything before an update only reads, so a gradient with
NaN or infinity, on any rank, changes nothing on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from .groups import Group
from .matrix import Blend, Matrix, Precision, Report

__all__ = [
    "Average",
    "AverageChanges",
    "Body",
    "Columns",
    "CompressedMean",
    "Direction",
    "Energies",
    "Factor",
    "Gather",
    "Gram",
    "LowRankUpdate",
    "Map",
    "MatMul",
    "NewtonSchulz",
    "Norms",
    "Pack",
    "PackChange",
    "Polar",
    "Product",
    "Reduce",
    "Request",
    "Residual",
    "ResidualMatrix",
    "ResidualSums",
    "Settle",
    "Sketch",
    "Squares",
    "Triangle",
    "Unpack",
    "Update",
    "WarmStart",
    "Whole",
]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Request:
    """What can be asked. ``over`` names the field with the group that must answer, if there is one."""

    over: ClassVar[str | None] = None

    def key(self) -> Hashable:
        """Requests with equal keys may be answered by one call: kind, shapes, formats and options agree."""
        return (type(self), *(_key(getattr(self, f.name)) for f in fields(self)))

    @property
    def away(self) -> bool:
        """Whether other ranks must be asked."""
        return self.over is not None and getattr(self, self.over).size > 1


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, Blend):
        w = value.w
        stored = (w.x.dtype, value.m.dtype, w.g.dtype)
        how = (w.precision, w.cautious, w.rates is None)
        return (value.shape, stored, w.x.device, value.cm, value.cg, *how)
    if isinstance(value, Matrix):
        return (value.shape, value.x.dtype, value.x.device, value.precision)
    if isinstance(value, Group):
        return value.ranks
    if isinstance(value, (tuple, list)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in value.items())
    if isinstance(value, Request):
        return value.key()
    return value  # type: ignore[no-any-return]


#: A computation that stops where it needs an answer: yields requests (one, or a tuple), is sent the answers.
Body = Generator[Request | tuple[Request, ...], Any, T]

# ---------------------------------------------------------------- over process groups


@dataclass(frozen=True, eq=False)
class Reduce(Request):
    """The sum (or maximum) of ``tensor`` over ``group``, divided by ``divisor``: the same bits on every rank.

    ``what`` is for the count of bytes; ``rounded`` says that ``reduce_dtype`` may round it on the wire.
    """

    over: ClassVar[str | None] = "group"
    tensor: Tensor
    group: Group
    what: str
    divisor: int = 1
    op: Literal["sum", "max"] = "sum"
    rounded: bool = False


@dataclass(frozen=True, eq=False)
class Gather(Request):
    """Every rank's ``tensor``, of one shape, stacked in the order of ranks: (group.size, …)."""

    over: ClassVar[str | None] = "group"
    tensor: Tensor
    group: Group
    what: str


@dataclass(frozen=True, eq=False)
class Factor(Request):
    """``(V, null, A)`` of the mean or sum A of ``tensor`` (n, r) over ``group``: its orthonormal or polar factor, and
    flags of the directions that are null, relative to the largest, by ``tol`` (section 4).

    Where many matrices wait together each rank factors some of them, and r² numbers stand for A on the other ranks:
    ``A = V (VᵀA)``, which leaves out its null directions.
    """

    over: ClassVar[str | None] = "group"
    tensor: Tensor
    kind: Literal["qr", "polar"]
    tol: float
    group: Group
    what: str
    divisor: int = 1


@dataclass(frozen=True, eq=False)
class Whole(Request):
    """What ``work`` answers of the whole matrix whose part here is ``tensor``; of that, this rank's part again.

    ``work`` makes a request of the whole tensor, whose answer has its shape: ``partial(NewtonSchulz, …)``. A sharded
    matrix goes to one owner and back; owners are balanced by the work that n·m·min(n, m) stands for.
    """

    tensor: Tensor
    w: Matrix
    work: Callable[[Tensor], Request]
    what: str = "whole"

    @property
    def group(self) -> Group:
        """The ranks that hold the parts."""
        return self.w.layout.shards

    @property
    def away(self) -> bool:
        """Whether there are other parts."""
        return self.group.size > 1


@dataclass(frozen=True, eq=False)
class CompressedMean(Request):
    """``C(mean of C(T))`` over ``group`` of each rank's ``tensor`` T, (m, n) and finite: the same bits on every rank.

    C leaves one bit or four of an entry (:mod:`orthdion.numerics.bits`). What is sent is packed: parts go to their
    owners, whose means come back.

    With a ``memory`` H (m, n) ranks send C(T − H), by what T differs from what they are known to have, and the answer
    is ``(mean, H')``. H is a rank's own where others own the rows, and the mean of all others' in the rows that it
    owns, where it has its own T: so the mean over ranks of the H is that of what all of them remember. From one step to
    the next it fades by ``fade``.
    """

    over: ClassVar[str | None] = "group"
    tensor: Tensor
    group: Group
    bits: Literal[1, 4]
    what: str
    memory: Tensor | None = None
    fade: float = 1.0


# ---------------------------------------------------------------- of plain tensors


@dataclass(frozen=True, eq=False)
class Pack(Request):
    """``tensor`` (m, n) in so many bits an entry: bytes (m, k), a string a row."""

    tensor: Tensor
    bits: Literal[1, 4]


@dataclass(frozen=True, eq=False)
class Unpack(Request):
    """The matrix (m, columns) that packed rows stand for."""

    packed: Tensor
    columns: int
    bits: Literal[1, 4]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Average(Request):
    """The mean of w ranks' packed rows (w, m, k), summed in the order of ranks, packed again: (m, k)."""

    packed: Tensor
    columns: int
    bits: Literal[1, 4]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class PackChange(Request):
    """``(C(T − H) packed, fade·(H + C(T − H)))`` for T (``tensor``) and H (``memory``), (m, n)."""

    tensor: Tensor
    memory: Tensor
    bits: Literal[1, 4]
    fade: float


@dataclass(frozen=True, eq=False)
class AverageChanges(Request):
    """``(C(mean) packed, fade·H')`` of w ranks' rows: this one's T (``tensor``, (m, n)), and all others', of which H
    (``memory``) is the mean that was known before, and H' = H + the mean of their changes, ``packed`` (w, m, k).
    ``own`` is this rank's number, whose change is not read.
    """

    packed: Tensor
    tensor: Tensor
    memory: Tensor
    own: int
    bits: Literal[1, 4]
    fade: float


@dataclass(frozen=True, eq=False)
class Map(Request):
    """``function(*tensors, *numbers)``, which must be written for any leading axes: many matrices' small tensors are
    stacked where that saves launches.
    """

    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    numbers: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class MatMul(Request):
    """``A B``"""

    a: Tensor
    b: Tensor
    precision: Precision


@dataclass(frozen=True, eq=False)
class Gram(Request):
    """``AᵀA`` in double."""

    a: Tensor


@dataclass(frozen=True, eq=False)
class Triangle(Request):
    """``(T, T⁻¹, condition)`` of a Gram matrix TᵀT in double. The condition, at most r times too large, is infinite if
    the matrix is not positive definite, and None on a device that the host does not wait for. There directions of less
    than ``tol`` of the largest are left out.
    """

    gram: Tensor
    tol: float


@dataclass(frozen=True, eq=False)
class NewtonSchulz(Request):
    """``X ← aX + (bA + cA²)X`` with ``A = XXᵀ``, once for each (a, b, c), from ``U / max(divisor·‖U‖, epsilon)``."""

    tensor: Tensor
    coefficients: tuple[tuple[float, float, float], ...]
    precision: Precision
    divisor: float = 1.0
    epsilon: float = 1e-7


@dataclass(frozen=True, eq=False)
class Polar(Request):
    """The polar factor U Wᵀ of ``tensor`` = U Σ Wᵀ, of any shape; singular values ≤ tol·max are left out."""

    tensor: Tensor
    tol: float


@dataclass(frozen=True, eq=False)
class WarmStart(Request):
    """The next Q: V, its null directions filled from the old Q; the old one where nothing was learnt (section 2)."""

    kind: Literal["qr", "column", "polar"]
    v: Tensor
    null: Tensor
    old: Tensor


@dataclass(frozen=True, eq=False)
class Columns(Request):
    """``(V, null)``: R with unit columns, from the sums of their squares over all its rows, and which are null."""

    r: Tensor
    energies: Tensor
    tol: float
    epsilon: float


# ---------------------------------------------------------------- of a blend B


@dataclass(frozen=True, eq=False)
class Sketch(Request):
    """``(B Q, largest)``. ``largest`` is a double that tells whether squares of B are safe: max |B|, or the product's
    own maximum where that settles it; infinite if B is not finite.
    """

    b: Blend
    q: Tensor


@dataclass(frozen=True, eq=False)
class Settle(Request):
    """``(B, B Q, verdict)`` given the maximum of ``largest`` over all ranks (−1: nobody has a gradient).

    B is brought to a size whose squares are safe. The verdict is a report if the step ends here. A device that is not
    waited for raises the matrix's flag ``skip`` instead.
    """

    b: Blend
    q: Tensor
    sketch: Tensor
    largest: Tensor


@dataclass(frozen=True, eq=False)
class Product(Request):
    """``Bᵀ P`` (n, r)"""

    b: Blend
    p: Tensor


@dataclass(frozen=True, eq=False)
class Energies(Request):
    """Sums of B's squares along each row (m,) and down each column (n,), in double."""

    b: Blend


@dataclass(frozen=True, eq=False)
class ResidualMatrix(Request):
    """``T = B − P Rᵀ`` (m, n) in working precision."""

    b: Blend
    p: Tensor
    r: Tensor


@dataclass(frozen=True, eq=False)
class ResidualSums(Request):
    """Sums of squares along each row of T = B − P Rᵀ, and of T with its ``columns`` scaled, in double."""

    b: Blend
    p: Tensor
    r: Tensor
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Norms(Request):
    """``[‖X‖², ⟨X, D⟩, ‖D‖²]`` of this rank's parts, in double: X as it is stored."""

    x: Tensor
    d: Tensor


@dataclass(frozen=True, eq=False)
class Squares(Request):
    """Sums of squares of ``tensor`` (m, n) along each row and down each column, in double.

    With ``columns`` its columns are multiplied by these first, and the second sums are not asked for: None.
    """

    tensor: Tensor
    columns: Tensor | None = None


# ---------------------------------------------------------------- writes


@dataclass(frozen=True)
class Residual:
    """What is added to P Vᵀ: α·T, or T with scaled columns and rows; T is B − P Rᵀ where it is not ``given`` whole."""

    alpha: Tensor | None = None
    columns: Tensor | None = None
    rows: Tensor | None = None
    given: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LowRankUpdate(Request):
    """``X ← (1 − ηλ)X − η·scale·(P Vᵀ + residual)``, ``M ← a·M⁺ − (a − b)·P Wᵀ/size`` and ``Q ← q``, in place.

    M⁺ = M ± G; ``fed`` is W, R of M⁺. The answer is the outcome: ``null`` counts null directions, ``figures`` are the
    diagnostics if they were asked for. Where ``direction`` is given, it is what is taken for P Vᵀ + residual;
    ``states`` are new values of further states.
    """

    b: Blend
    p: Tensor
    r: Tensor
    v: Tensor
    fed: Tensor
    q: Tensor
    lr: float
    weight_decay: float
    scale: float
    feedback: tuple[float, float]
    residual: Residual | None
    null: Tensor
    figures: Report | None = None
    direction: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Direction(Request):
    """``D = P Vᵀ + residual`` of an update, formed (m, n) in working precision."""

    of: LowRankUpdate


@dataclass(frozen=True, eq=False)
class Update(Request):
    """``X ← (1 − ηλ)X − η·scale·D`` for a whole direction D (or its part here), and new values of states by name.

    A rule that decays by other means passes ``weight_decay=0`` and puts it into D. ``error``: what X's rounding error
    X̃ − X is multiplied by and then added to the state "momentum", where X is rounded by draws. The answer is the
    outcome.
    """

    w: Matrix
    direction: Tensor
    lr: float
    weight_decay: float
    states: dict[str, Tensor]
    scale: float = 1.0
    error: Tensor | None = None
