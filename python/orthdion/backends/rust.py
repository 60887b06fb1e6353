"""CPU tensors through the Rust core: the whole step of all matrices in one call, without copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthdion import _core

from ..optim.elementwise import Rule
from ..optim.step import Matrix, Options, Report
from .reference import Reference
from .table import describe, operands

__all__ = ["Rust", "elementwise_step", "lowrank_step"]

_RIGHT = {"qr": 0, "column": 1, "polar": 2}
_TAIL = {"feedback": 0, "linear": 1, "normalized": 2}
_VIEWS = 27


def _by_precision(dtypes: Sequence[torch.dtype]) -> list[tuple[bool, list[int]]]:
    """Indices of the tensors that are computed in double and in single precision."""
    parts = [(True, [i for i, d in enumerate(dtypes) if d == torch.float64])]
    parts.append((False, [i for i, d in enumerate(dtypes) if d != torch.float64]))
    return [part for part in parts if part[1]]


def lowrank_step(matrices: Sequence[tuple[Matrix, Options]]) -> list[Report]:
    """Steps every matrix in place; see :func:`orthdion.optim.step.step`, whose results it has."""
    reports = np.zeros((len(matrices), 8))
    for double, index in _by_precision([m.x.dtype for m, _ in matrices]):
        table = np.empty((len(index), _VIEWS), dtype=np.int64)
        numbers = np.empty((len(index), 13))
        for row, i in enumerate(index):
            m, o = matrices[i]
            table[row] = (*m.x.shape, m.q.shape[1], *describe(m.x), *describe(m.g), *describe(m.m), *describe(m.q))
            numbers[row] = (*_numbers(o), m.scale)
        out = np.zeros((len(index), 8))
        _core.lowrank_step(table, numbers, out, double, torch.get_num_threads())
        reports[index] = out
    _bump([t for m, _ in matrices for t in (m.x, m.m, m.q)])
    return [Report(bool(r[0]), int(r[1]), *r[2:].tolist()) for r in reports]


def _numbers(o: Options) -> tuple[float, ...]:
    kappa = float("nan") if o.kappa is None else o.kappa
    return (
        o.lr,
        o.weight_decay,
        o.a,
        o.b,
        _RIGHT[o.right_factor],
        _TAIL[o.tail],
        o.tail_scale,
        kappa,
        o.maximize,
        o.epsilon,
        o.diagnostics,
        o.half,
    )


def elementwise_step(tensors: Sequence[tuple[tuple[Tensor, ...], Rule]]) -> list[bool]:
    """AdamW (X, G, M, V) or Lion (X, G, M) on 2-D views in place; returns which were skipped for NaN or infinity."""
    skipped = np.zeros(len(tensors), dtype=bool)
    for double, index in _by_precision([t[0].dtype for t, _ in tensors]):
        table = np.zeros((len(index), _VIEWS), dtype=np.int64)
        numbers = np.empty((len(index), 9))
        for row, i in enumerate(index):
            views, rule = tensors[i]
            words: list[Any] = [*views[0].shape, 0]
            for view in views:
                words.extend(describe(view))
            table[row, : len(words)] = words
            numbers[row] = (
                rule.algorithm == "lion",
                rule.lr,
                rule.weight_decay,
                rule.beta1,
                rule.beta2,
                rule.epsilon,
                1.0 - rule.beta1**rule.step,
                1.0 - rule.beta2**rule.step,
                rule.maximize,
            )
        out = np.zeros(len(index), dtype=bool)
        _core.elementwise_step(table, numbers, out, double, torch.get_num_threads())
        skipped[index] = out
    _bump([t for views, _ in tensors for k, t in enumerate(views) if k != 1])
    return [bool(s) for s in skipped]


def _bump(tensors: list[Tensor]) -> None:
    """Tells autograd that these were written: a graph that still needs their old values must notice."""
    torch.autograd.graph.increment_version(tensors)


class Rust(Reference):
    """The primitives for matrices that lie on several ranks: factorisations by the core."""

    name = "rust"

    def orthonormalize(self, a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """``orth(A)`` and its null directions (section 4)."""
        return _factor(a, tol, polar=False)

    def polar(self, a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """``A (AᵀA)^(−1/2)`` and the null directions."""
        return _factor(a, tol, polar=True)


def _factor(a: Tensor, tol: float, polar: bool) -> tuple[Tensor, Tensor]:
    v, double = torch.empty_like(a, memory_format=torch.contiguous_format), a.dtype == torch.float64
    null, _ = _core.factor(operands(a, v), np.zeros((a.shape[1],) * 2), polar, tol, double, torch.get_num_threads())
    return v, torch.tensor(null)
