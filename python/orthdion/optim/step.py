"""The step of Dion's family, written once, over primitives and a communicator (docs/algorithms.md, sections 1 to 3b).

::

    M⁺ = M + G
    B  = M⁺, or κM⁺ + G                     Nesterov's look-ahead
    P  = orth(Σ_cols B Q),  R = Σ_rows Bᵀ P   one power iteration
    V  = right_factor(R)
    D  = P Vᵀ + tail(B − P Rᵀ)
    X  = (1 − ηλ)·X − η·scale·D
    M  = a·M⁺ − (a − b)·P (M⁺ᵀ P)ᵀ
    Q  = V, null directions kept

Everything up to V only reads, so a gradient with NaN or infinity changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..backends.reference import Reference
from ..sharding import Communicator

__all__ = ["Matrix", "Options", "Report", "RightFactor", "Tail", "step"]

RightFactor = Literal["qr", "column", "polar"]
Tail = Literal["feedback", "linear", "normalized"]


@dataclass(frozen=True)
class Options:
    """Hyperparameters of a step, shared by the matrices of a group; ``half`` rounds products' operands to bfloat16."""

    lr: float
    weight_decay: float
    a: float
    b: float
    right_factor: RightFactor
    tail: Tail
    tail_scale: float
    kappa: float | None
    maximize: bool
    epsilon: float
    diagnostics: bool
    half: bool = False


@dataclass(frozen=True)
class Matrix:
    """One matrix and its state: views X, G, M (m, n) and Q (n, r); ``scale`` multiplies η."""

    x: Tensor
    g: Tensor
    m: Tensor
    q: Tensor
    scale: float


@dataclass(frozen=True)
class Report:
    """What happened to a matrix; the figures after ``null`` only if diagnostics are on.

    ``b_energy`` and ``r_energy`` are ‖B‖² and ‖R‖², ``nu`` is ‖V‖₂, ``descent`` ⟨B, P Vᵀ⟩, ``nuclear`` ‖R‖_*.
    """

    skipped: bool
    null: int = 0
    b_energy: float = 0.0
    r_energy: float = 0.0
    nu: float = 0.0
    descent: float = 0.0
    nuclear: float = 0.0
    effective_rank: float = 0.0


def step(matrices: Sequence[tuple[Matrix, Options]], be: Reference, comm: Communicator) -> list[Report]:
    """Steps every matrix in place."""
    return [_one(matrix, o, be, comm) for matrix, o in matrices]


def _one(matrix: Matrix, o: Options, be: Reference, comm: Communicator) -> Report:
    be = be.rounding(o.half)
    x, old = be.working(matrix.x), be.working(matrix.q)
    if 0 in (*x.shape, old.shape[1]):
        return Report(skipped=False)
    g = be.working(matrix.g)
    if o.maximize:
        g = -g
    plus = be.working(matrix.m) + g
    b = plus if o.kappa is None else o.kappa * plus + g
    size = be.scale(b)
    if math.isnan(size):
        return Report(skipped=True)
    b = b * size

    p = comm.mean_replicas(comm.sum_cols(be.project(b, old)))
    p, _ = be.orthonormalize(p)
    r = comm.mean_replicas(comm.sum_rows(be.project_back(b, p)))
    v, null = be.right_factor(o.right_factor, r, o.epsilon)
    report = _report(b / size, r / size, v, null) if o.diagnostics else Report(False, int(null.sum()))

    d = be.direction(o.tail, b, p, r, v, o.tail_scale)
    if o.a != o.b:
        captured = comm.sum_rows(be.project_back(plus, p))
        plus = o.a * plus - (o.a - o.b) * be.outer(p, captured)
    else:
        plus = o.a * plus
    matrix.x.copy_((1.0 - o.lr * o.weight_decay) * x - o.lr * matrix.scale * d)
    matrix.m.copy_(plus)
    matrix.q.copy_(be.warm_start(o.right_factor, v, null, old))
    return report


def _report(b: Tensor, r: Tensor, v: Tensor, null: Tensor) -> Report:
    b, r, v = b.double(), r.double(), v.double()
    share = r.norm(dim=0)
    share = share[share > 0] / share.sum()
    return Report(
        skipped=False,
        null=int(null.sum()),
        b_energy=float(b.square().sum()),
        r_energy=float(r.square().sum()),
        nu=float(torch.linalg.matrix_norm(v, 2)),
        descent=float((r * v).sum()),
        nuclear=float(torch.linalg.matrix_norm(r, "nuc")),
        effective_rank=float(torch.exp(-(share * share.log()).sum())) if share.numel() else 0.0,
    )
