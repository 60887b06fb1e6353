"""The step of Dion's family, written once, over primitives and a communicator (docs/algorithms.md, 1 to 3b and 7).

::

    M⁺ = M + G
    B  = M⁺, or κM⁺ + G                     Nesterov's look-ahead
    P  = orth(Σ_cols B Q),  R = Σ_rows Bᵀ P   one power iteration
    V  = right_factor(R)
    D  = P Vᵀ + tail(B − P Rᵀ)
    X  = (1 − ηλ)·X − η·scale·D
    M  = a·M⁺ − (a − b)·P (M⁺ᵀ P)ᵀ
    Q  = V, null directions kept

Σ_rows and Σ_cols are over the ranks that hold the other rows and columns, and a mean over replicas whose gradients
differ. Each ``yield`` asks for one of those; on one rank it is answered at once. Everything up to V only reads, so a
gradient with NaN or infinity, on any rank, changes nothing on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends.reference import Job, Reference
from ..backends.table import Words
from ..sharding import Body, Communicator, Factorize, Group, Layout, Reduce
from .tall import Tall

__all__ = ["Matrix", "Options", "Outcome", "Report", "RightFactor", "Tail", "figures", "step"]

RightFactor = Literal["qr", "column", "polar"]


@dataclass(frozen=True)
class Options:
    """Hyperparameters of a step, shared by the matrices of a group; ``half`` rounds products' operands to bfloat16,
    ``tf32`` to TF32 where the device multiplies that.
    """

    lr: float
    weight_decay: float
    a: float
    b: float
    right_factor: RightFactor
    tail: Literal["feedback", "linear", "normalized"]
    tail_scale: float
    kappa: float | None
    maximize: bool
    epsilon: float
    diagnostics: bool
    half: bool = False
    tf32: bool = False
    #: ``[lr, weight_decay]`` in double where the step reads them on the device; those above are not read then.
    hyper: Tensor | None = None


class Matrix(NamedTuple):
    """One matrix and its state: local views X, G, M (m, n) and Q (n, r); ``scale`` multiplies η.

    ``shape`` is the whole matrix's, ``layout`` the groups its parts lie on. ``arrived`` is False if this rank has no
    gradient, so that G is zero here; where no rank has one the matrix is left alone. ``offset``: how many bytes of
    other parameters come before this one's, counted alike on every rank. ``words``: what the Rust core is told of X, M
    and Q (:func:`orthdion.backends.table.fixed_words`), where somebody has it already.
    """

    x: Tensor
    g: Tensor
    m: Tensor
    q: Tensor
    scale: float
    shape: tuple[int, int]
    layout: Layout = Layout()
    arrived: bool = True
    offset: int = 0
    words: Words | None = None


class Report(NamedTuple):
    """What happened to a matrix; the figures after ``null`` only if diagnostics are on.

    ``b_energy`` and ``r_energy`` are ‖B‖² (its mean over replicas) and ‖R‖², ``nu`` is ‖V‖₂, ``descent`` ⟨B, P Vᵀ⟩,
    ``nuclear`` ‖R‖_*.
    """

    skipped: bool
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
class Tail:
    """What is added to P Vᵀ: α·T, or T with scaled columns and rows, or nothing."""

    alpha: Tensor | None = None
    columns: Tensor | None = None
    rows: Tensor | None = None


def step(matrices: Sequence[tuple[Matrix, Options]], be: Reference, comm: Communicator) -> list[Outcome]:
    """Steps every matrix in place."""
    bodies = [_one(matrix, o, be.rounding(o.half, o.tf32)) for matrix, o in matrices]
    return comm.run(bodies, [matrix.offset for matrix, _ in matrices])


def _one(matrix: Matrix, o: Options, be: Reference) -> Body[Outcome]:
    at, kind = matrix.layout, o.right_factor
    if 0 in (*matrix.shape, matrix.q.shape[1]):
        return Report(skipped=False)
    job = be.open(matrix.x, matrix.g, matrix.m, matrix.q, o)
    left, right, least, fade = be.noise(job.old)

    largest = yield Reduce(_arrival(matrix, job), at.domain, "flags", op="max")
    if (early := job.settle(largest)) is not None:
        return early

    sketch = partial(_factor, be=be, unit=job.old, copies=at.replicas.size)
    p, _, _ = yield from sketch(job.sketch(), at.left, at.rows, "P", partial(be.orthonormalize, tol=left))
    if kind == "column":
        r = yield Reduce(job.back(p), at.right, "R", at.replicas.size, rounded=True)
        energies = yield Reduce(r.double().square().sum(0), at.cols, "norms")
        v, null = be.columns(r, energies, right, o.epsilon)
    else:
        work = partial(be.orthonormalize if kind == "qr" else be.polar, tol=right)
        v, null, r = yield from sketch(job.back(p), at.right, at.cols, "R", work)
    w = r
    if o.kappa is not None and o.a != o.b:
        w = yield Reduce(job.captured(p), at.right, "R", at.replicas.size, rounded=True)

    figures = None
    if o.diagnostics:
        figures = yield from _diagnose(job, r, v, null, at)
    report = job.report(null, figures)
    tail = Tail()
    if o.tail != "feedback":
        tail = yield from _tail(job, p, r, matrix, o, least, fade)
    q = yield from _warm_start(kind, v, null, job.old, be, at)

    job.write(p, r, v, w, matrix.scale, tail)
    job.keep(q)
    return report


def _arrival(matrix: Matrix, job: Job) -> Tensor:
    """Of which the maximum over ranks tells what has arrived: −1 nothing, infinity something that is not finite."""
    entry = job.entry()
    return entry if matrix.arrived else torch.where(entry.isfinite(), -torch.ones_like(entry), entry)


def _factor(
    a: Tensor,
    over: Group,
    along: Group,
    what: str,
    work: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    be: Reference,
    unit: Tensor,
    copies: int,
) -> Body[tuple[Tensor, Tensor, Tensor]]:
    """``(V, null, A)`` of A, which is summed ``over`` ranks and whose rows lie ``along`` others."""
    if along.size == 1:
        factored: tuple[Tensor, Tensor, Tensor] = yield Factorize(a, over, what, work, copies)
        return factored
    a = yield Reduce(a, over, what, copies, rounded=True)
    tall: Tall = yield from be.compress(a, along, unit)
    v, null = work(tall.small)
    return tall.expand(v).to(a.dtype), null, a


def _warm_start(kind: str, v: Tensor, null: Tensor, old: Tensor, be: Reference, at: Layout) -> Body[Tensor]:
    """The next Q. To fill null columns, V and the old Q are written in an orthonormal basis of both."""
    if at.cols.size == 1 or kind == "column" or not bool(null.any()) or bool(null.all()):
        return be.warm_start(kind, v, null, old)
    tall: Tall = yield from be.compress(torch.cat([v, old], 1), at.cols, old)
    small = tall.small
    return tall.expand(be.warm_start(kind, small[:, : v.shape[1]], null, small[:, v.shape[1] :]))


def _tail(job: Job, p: Tensor, r: Tensor, matrix: Matrix, o: Options, least: float, fade: float) -> Body[Tail]:
    """The tail's numbers (section 3b), from ‖T‖² = ‖B‖² − ‖R‖² of the whole and of each column: P is orthonormal."""
    at, spare = matrix.layout, min(matrix.shape) - r.shape[1]
    if spare == 0:
        return Tail()
    rows, columns = job.energies()
    squares = r.double().square()
    if o.tail == "linear":
        total, captured = yield (Reduce(rows.sum(), at.shards, "tail"), Reduce(squares.sum(), at.cols, "tail"))
    else:
        columns, rows = yield (Reduce(columns, at.rows, "tail"), Reduce(rows, at.cols, "tail"))
        total, captured, count = yield (
            Reduce(columns.sum(), at.cols, "tail"),
            Reduce(squares.sum(), at.cols, "tail"),
            Reduce((rows > 0).sum().double(), at.rows, "tail"),
        )
    # Where the tail is rounding noise there is none: a weight of 0, as nothing here is read on the host.
    energy = total - captured
    weight = (energy > least * total).to(energy.dtype) * (o.tail_scale * math.sqrt(spare))
    if o.tail == "linear":
        return Tail(alpha=weight / energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt())
    norms = torch.maximum(columns - squares.sum(1), fade * columns).sqrt()
    inverse = torch.where(norms > 0, 1.0 / norms.clamp_min(1e-300), 0.0)
    raw, scaled = job.tail_rows(p, r, inverse)
    raw, scaled = yield (Reduce(raw, at.cols, "tail"), Reduce(scaled, at.cols, "tail"))
    # Rows in which the tail is noise fade out; every other row of N has norm 1.
    share = (raw / (fade * rows).clamp_min(1e-300)).clamp_max(1.0).sqrt()
    lengths = torch.where(scaled > 0, share / scaled.sqrt().clamp_min(1e-300), 0.0)
    return Tail(columns=inverse, rows=lengths * (weight / count.clamp_min(1.0).sqrt()))


def _diagnose(job: Job, r: Tensor, v: Tensor, null: Tensor, at: Layout) -> Body[Report]:
    # A device that learns of a NaN later than the host goes through here with it.
    r, v = torch.nan_to_num(r.double() / job.size), torch.nan_to_num(v.double())
    energy = job.energies()[0].sum() / job.size**2
    energy, gram, own, descent = yield (
        Reduce(energy, at.domain, "diagnostics", at.replicas.size),
        Reduce(r.T @ r, at.cols, "diagnostics"),
        Reduce(v.T @ v, at.cols, "diagnostics"),
        Reduce((r * v).sum(), at.cols, "diagnostics"),
    )
    return Report(False, int(null.sum()), *figures(energy, gram, own, descent).tolist())


def figures(energy: Tensor, gram: Tensor, own: Tensor, descent: Tensor) -> Tensor:
    """What :class:`Report` has after ``null``, along the last axis, from ‖B‖², RᵀR, VᵀV and ⟨R, V⟩; batches too."""
    tiny = torch.finfo(gram.dtype).tiny
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    share = norms / norms.sum(-1, keepdim=True).clamp_min(tiny)
    rank = (-(share * share.clamp_min(tiny).log()).sum(-1)).exp()
    return torch.stack(
        [
            energy,
            norms.square().sum(-1),
            torch.linalg.eigvalsh(own)[..., -1].clamp_min(0.0).sqrt(),
            descent,
            torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().sum(-1),
            torch.where(norms.sum(-1) > 0, rank, torch.zeros_like(rank)),
        ],
        -1,
    )
