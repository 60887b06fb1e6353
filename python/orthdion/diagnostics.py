"""What the last step did to each matrix. Off unless the optimizer was built with ``diagnostics=True``."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

from torch import Tensor

from ._text import table
from .requests import Report

if TYPE_CHECKING:
    from .core.optimizer import MatrixOptimizer

__all__ = ["MatrixDiagnostics", "last_step", "summary"]


@dataclass(frozen=True)
class MatrixDiagnostics:
    """The last step of one matrix.

    Attributes:
        name: of the parameter; matrices of a stack are numbered.
        nu: ``ν = ‖V‖₂``, Orth-Dion's geometric mismatch: 1 for "qr" and "polar", up to √r for "column".
        alignment: ``⟨B, P Vᵀ⟩ / ‖R‖_*``, how much of the steepest descent within the subspace the step attains: 1 for
        "polar".
        captured: ``‖R‖²/‖B‖²``, the share of B's energy in its rank-r part.
        effective_rank: ``exp(entropy)`` of R's normalised column norms, between 1 and r.
        rank: r.
        null: directions in which B was numerically zero.
        skipped: the gradient held NaN or infinity; nothing was changed.
    """

    name: str
    nu: float
    alignment: float
    captured: float
    effective_rank: float
    rank: int
    null: int
    skipped: bool


def last_step(optimizer: MatrixOptimizer) -> list[MatrixDiagnostics]:
    """One entry a matrix that the last step touched.

    Raises:
        ValueError: if the optimizer was not built with ``diagnostics=True``, or has not stepped yet.
    """
    if not optimizer._diagnose:
        raise ValueError("diagnostics are off; build the optimizer with diagnostics=True")
    if not optimizer._done:
        raise ValueError("the optimizer has not stepped yet")
    reports: dict[Tensor, list[Report]] = {}
    for owners, outcomes in optimizer._done:
        for p, outcome in zip(owners, outcomes, strict=True):
            reports.setdefault(p, []).append(outcome.report())
    result = []
    for p, found in reports.items():
        if "Q" not in optimizer.state[p]:
            continue
        name, rank = optimizer._name(p), optimizer.state[p]["Q"].shape[-1]
        for i, r in enumerate(found):
            result.append(
                MatrixDiagnostics(
                    name if len(found) == 1 else f"{name}[{i}]",
                    r.nu,
                    r.descent / r.nuclear if r.nuclear else 0.0,
                    r.r_energy / r.b_energy if r.b_energy else 0.0,
                    r.effective_rank,
                    rank,
                    r.null,
                    r.skipped,
                )
            )
    return result


def summary(optimizer: MatrixOptimizer) -> str:
    """:func:`last_step` as a table."""
    head = [f.name for f in fields(MatrixDiagnostics)]
    rows = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in astuple(entry)] for entry in last_step(optimizer)]
    return table(head, rows)
