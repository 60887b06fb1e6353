"""Whole steps of the Rust core: all matrices of a form in one call.

What the core is told of a matrix is kept from one step to the next (a table a list of matrices); only where the
gradients lie is told anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthdion import _core

from ..requests import Form, Matrix, Report
from .table import VIEW, Table, describe, drawn

__all__ = ["elementwise", "low_rank", "written"]

_HEAD = 4
_G = slice(_HEAD + VIEW, _HEAD + 2 * VIEW)
_STEPPED, _SKIPPED = Report(), Report(skipped=True)


@dataclass
class _Kept:
    """The table of a list of matrices, and what the core writes to."""

    matrices: list[Matrix]
    index: NDArray[np.int64]
    table: Table
    targets: list[Tensor]
    counters: list[Tensor] = field(default_factory=list)


def written(tensors: list[Tensor]) -> None:
    """Tells autograd that these were written: a graph that still needs their old values must notice."""
    torch.autograd.graph.increment_version(tensors)


def _words(w: Matrix, states: tuple[str, ...]) -> tuple[int, ...]:
    """What stays of a matrix's row: shapes, X, room for G, and the states."""
    rank = w.state["Q"].shape[1] if "Q" in states else 0
    there = [describe(w.state[name]) if name in w.state else (0,) * VIEW for name in states]
    return (*w.x.shape, rank, 0, *describe(w.x), *(0,) * VIEW, *(n for view in there for n in view))


def _tables(matrices: Sequence[Matrix], states: tuple[str, ...], kept: dict[Any, Any]) -> list[_Kept]:
    """One table for matrices in double and one for the others, kept for as long as the matrices are the same."""
    known: list[_Kept] | None = kept.get(states)
    if known is not None and kept[states, "all"] == matrices:
        return known
    known = []
    for double in (True, False):
        index = [i for i, w in enumerate(matrices) if (w.x.dtype == torch.float64) == double]
        if index:
            chosen = [matrices[i] for i in index]
            rows = np.array([_words(w, states) for w in chosen], dtype=np.int64)
            targets = [t for w in chosen for t in (w.x, *(w.state[s] for s in states if s in w.state))]
            counters = [w.state["step"] for w in chosen if "step" in w.state]
            known.append(_Kept(chosen, np.array(index), rows, targets, counters))
    kept[states], kept[states, "all"] = known, list(matrices)
    return known


def _fill(part: _Kept, forms: Sequence[Form]) -> list[Any]:
    """Writes each matrix's gradient and the number of its form into the table; the distinct forms."""
    part.table[:, _G] = np.array([describe(w.g) for w in part.matrices], dtype=np.int64)
    distinct: dict[int, tuple[int, Form]] = {}
    numbers = [distinct.setdefault(id(f), (len(distinct), f))[0] for f in forms]
    part.table[:, _HEAD - 1] = numbers
    return [f for _, f in distinct.values()]


def low_rank(matrices: Sequence[Matrix], forms: Sequence[Form], kept: dict[Any, Any]) -> list[Report]:
    """The step of Dion's family (docs/algorithms.md, 1 to 3b)."""
    result = [_STEPPED] * len(matrices)
    for part in _tables(matrices, ("momentum", "Q"), kept):
        options = _fill(part, [forms[i] for i in part.index] if len(part.index) < len(forms) else forms)
        scales = np.array([w.scale for w in part.matrices])
        reports = np.zeros((len(part.matrices), 8))
        double = part.matrices[0].x.dtype == torch.float64
        rounding = drawn([w.draws for w in part.matrices])
        _core.lowrank_step(part.table, options, scales, rounding, reports, double, torch.get_num_threads())
        written(part.targets)
        for i in np.flatnonzero(reports.any(axis=1)).tolist():
            skipped, null, *figures = reports[i].tolist()
            result[part.index[i]] = Report(bool(skipped), int(null), *figures)
    return result


def elementwise(matrices: Sequence[Matrix], forms: Sequence[Form], kept: dict[Any, Any]) -> list[Report]:
    """AdamW and Lion (section 6); the counters of those that were stepped go on by one."""
    result = [_STEPPED] * len(matrices)
    for part in _tables(matrices, ("momentum", "variance"), kept):
        options = _fill(part, [forms[i] for i in part.index] if len(part.index) < len(forms) else forms)
        double = part.matrices[0].x.dtype == torch.float64
        counted = [i for i, w in enumerate(part.matrices) if "step" in w.state]
        steps = np.ones(len(part.matrices))
        if counted:
            steps[counted] += torch.stack(part.counters).double().numpy()
        skipped = np.zeros(len(part.matrices), dtype=bool)
        rounding = drawn([w.draws for w in part.matrices])
        _core.elementwise_step(part.table, options, steps, rounding, skipped, double, torch.get_num_threads())
        written(part.targets)
        if advanced := [c for c, i in zip(part.counters, counted, strict=True) if not skipped[i]]:
            torch._foreach_add_(advanced, 1.0)
        for i in np.flatnonzero(skipped).tolist():
            result[part.index[i]] = _SKIPPED
    return result
