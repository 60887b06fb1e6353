"""What low-rank rules are made of: one power iteration over shards, right factors, the next warm start, figures.

::

    P = orth(Σ_cols B Q),   R = Σ_rows Bᵀ P,   V = right_factor(R)        docs/algorithms.md, sections 1, 2 and 7

Σ_rows and Σ_cols are over the ranks that hold the other rows and columns, and a mean over replicas whose gradients
differ; on one rank they are answered at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..requests import Blend, Body, Columns, Energies, Map, Matrix, Product, Reduce, Report, Settle, Sketch
from .factors import factor, warm_start
from .options import check_number, one_of, pair

__all__ = [
    "FEEDBACK",
    "Left",
    "RightFactor",
    "blend",
    "feedback_numbers",
    "figures",
    "left_factor",
    "next_q",
    "right_factor",
    "right_of",
]

RightFactor = Literal["qr", "column", "polar"]

#: Published forms of the error feedback ``M ← a·(B − P Rᵀ) + b·P Rᵀ`` by μ (docs/algorithms.md, section 3).
FEEDBACK: dict[str, Callable[[float], tuple[float, float]]] = {
    "dion": lambda mu: (1.0, mu),
    "orth-dion": lambda mu: (mu, 0.0),
    "pure": lambda mu: (1.0, 0.0),
    "momentum": lambda mu: (mu, mu),
}


def feedback_numbers(feedback: Any, mu: float) -> tuple[float, float]:
    """``(a, b)`` of a published form's name or of two numbers."""
    if isinstance(feedback, str):
        return FEEDBACK[feedback](mu)
    a, b = feedback
    return float(a), float(b)


def check_feedback(name: str, value: Any) -> Any:
    """The check of the option: a published form's name, or two numbers in [0, 1].

    Raises:
        ValueError: for an unknown name or numbers out of range. TypeError: for anything else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return one_of(name, value, FEEDBACK)
    try:
        a, b = pair(name, value)
    except TypeError:
        known = ", ".join(FEEDBACK)
        raise TypeError(f"{name} must be a name ({known}) or two numbers (a, b), not {value!r}") from None
    return float(check_number(f"{name}'s a", a, 0.0, 1.0)), float(check_number(f"{name}'s b", b, 0.0, 1.0))


def blend(w: Matrix, sign: float, kappa: float | None = None, size: float | Tensor = 1.0) -> Blend:
    """``M⁺ = M ± G``, or with a look-ahead ``κM⁺ ± G``."""
    if kappa is None:
        return Blend(w, "momentum", 1.0, sign, size)
    return Blend(w, "momentum", kappa, (1.0 + kappa) * sign, size)


@dataclass(frozen=True)
class Left:
    """``P`` (m, r), of B at a size whose squares are safe, and the old Q in working precision."""

    b: Blend
    p: Tensor
    old: Tensor


def left_factor(w: Matrix, b: Blend) -> Body[Left | Report]:
    """``P = orth(B Q)``; a report where the step ends here, as nothing has arrived or something is not finite."""
    at, noise = w.layout, w.precision.noise
    old = w.read("Q")
    if 0 in (*w.shape, old.shape[1]):
        return Report()
    sketch, largest = yield Sketch(b, old)
    if not w.arrived:  # the maximum over ranks tells what has arrived: −1 nothing
        largest = torch.where(largest.isfinite(), -torch.ones_like(largest), largest)
    largest = yield Reduce(largest, at.domain, "flags", op="max")
    b, sketch, verdict = yield Settle(b, old, sketch, largest)
    if verdict is not None:
        return verdict  # type: ignore[no-any-return]
    copies, gate = at.replicas.size, w.precision.gate
    p, _, _ = yield from factor(
        sketch, "qr", noise.left, over=at.left, along=at.rows, what="P", copies=copies, gate=gate
    )
    return Left(b, p, old)


def right_of(w: Matrix, b: Blend, p: Tensor) -> Body[Tensor]:
    """``R = Bᵀ P`` (n, r), summed."""
    at = w.layout
    r: Tensor = yield Reduce((yield Product(b, p)), at.right, "R", at.replicas.size, rounded=True)
    return r


def right_factor(
    w: Matrix, left: Left, kind: RightFactor, epsilon: float, own: Tensor | None = None
) -> Body[tuple[Tensor, Tensor, Tensor]]:
    """``(V, null, R)`` of R = Bᵀ P: its QR factor, unit columns, or polar factor. ``own``: this rank's part of R, where
    it is known.
    """
    at, tol = w.layout, w.precision.noise.right
    if own is None:
        own = yield Product(left.b, left.p)
    if kind == "column":
        r = yield Reduce(own, at.right, "R", at.replicas.size, rounded=True)
        energies = yield Reduce((yield Map(_column_squares, (r,))), at.cols, "norms")
        v, null = yield Columns(r, energies, tol, epsilon)
        return v, null, r
    copies, gate = at.replicas.size, w.precision.gate
    return (yield from factor(own, kind, tol, over=at.right, along=at.cols, what="R", copies=copies, gate=gate))


def next_q(w: Matrix, left: Left, kind: RightFactor, v: Tensor, null: Tensor) -> Body[Tensor]:
    """The next Q: V, null directions kept from the old one, so that they can come back."""
    return (yield from warm_start(kind, v, null, left.old, w.layout.cols, w.precision.gate))


def _column_squares(r: Tensor) -> Tensor:
    return r.double().square().sum(-2)


def figures(w: Matrix, b: Blend, r: Tensor, v: Tensor, null: Tensor) -> Body[Report | None]:
    """What :class:`Report` tells, if the matrix is to be diagnosed. Waits for the device."""
    if not w.diagnose:
        return None
    at = w.layout
    # A device that learns of a NaN later than the host goes through here with it.
    r, v = torch.nan_to_num(r.double() / b.size), torch.nan_to_num(v.double())
    energy = (yield Energies(b))[0].sum() / b.size**2
    energy, gram, own, descent = yield (
        Reduce(energy, at.domain, "diagnostics", at.replicas.size),
        Reduce(r.T @ r, at.cols, "diagnostics"),
        Reduce(v.T @ v, at.cols, "diagnostics"),
        Reduce((r * v).sum(), at.cols, "diagnostics"),
    )
    return Report(False, int(null.sum()), *_figures(energy, gram, own, descent))


def _figures(
    energy: Tensor, gram: Tensor, own: Tensor, descent: Tensor
) -> tuple[float, float, float, float, float, float]:
    """From ‖B‖², RᵀR, VᵀV and ⟨R, V⟩."""
    norms = gram.diagonal().sqrt()
    total = float(norms.sum())
    share = norms / max(total, torch.finfo(gram.dtype).tiny)
    entropy = -float((share * share.clamp_min(1e-300).log()).sum())
    nu = float(torch.linalg.eigvalsh(own)[-1].clamp_min(0.0).sqrt())
    nuclear = float(torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().sum())
    rank = math.exp(entropy) if total > 0.0 else 0.0
    return float(energy), float(norms.square().sum()), nu, float(descent), nuclear, rank
