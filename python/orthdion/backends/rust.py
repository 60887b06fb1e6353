"""CPU tensors through the Rust core: the whole step of all matrices in one call, without copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthdion import _core

from ..optim.elementwise import Rule
from ..optim.step import Matrix, Options, Report, Tail
from .reference import Job, Reference
from .table import describe, fixed_words, operands

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
    hyper = {key: numbers_of(o) for key, o in {id(o): o for _, o in matrices}.items()}  # a few for many matrices
    for double, index in _by_precision([m.x.dtype for m, _ in matrices]):
        words: list[int] = []
        numbers: list[float] = []
        for i in index:
            m, o = matrices[i]
            before, behind = m.words or fixed_words(m.x, m.m, m.q)
            words += before
            words += describe(m.g)
            words += behind
            numbers += hyper[id(o)]
            numbers.append(m.scale)
        table = np.array(words, dtype=np.int64).reshape(len(index), _VIEWS)
        out = np.zeros((len(index), 8))
        _core.lowrank_step(table, np.array(numbers).reshape(len(index), 13), out, double, torch.get_num_threads())
        reports[index] = out
    _bump([t for m, _ in matrices for t in (m.x, m.m, m.q)])
    result = [Report(skipped=False)] * len(matrices)
    for i in np.flatnonzero(reports.any(axis=1)).tolist():
        skipped, null, *figures = reports[i].tolist()
        result[i] = Report(bool(skipped), int(null), *figures)
    return result


def numbers_of(o: Options) -> tuple[float, ...]:
    """Hyperparameters as the core takes them; a matrix's scale follows."""
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
    """The primitives for matrices that lie on several ranks."""

    name = "rust"

    def open(self, x: Tensor, g: Tensor, m: Tensor, q: Tensor, o: Options) -> Job:
        """A step's large operands, where they are; a normalized tail, whose sums run over ranks, goes over copies."""
        return Job(self, x, g, m, q, o) if o.tail == "normalized" else RustJob(self, x, g, m, q, o)

    def orthonormalize(self, a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """``orth(A)`` and its null directions (section 4)."""
        return _factor(a, tol, polar=False)

    def polar(self, a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """``A (AᵀA)^(−1/2)`` and the null directions."""
        return _factor(a, tol, polar=True)


class RustJob(Job):
    """B is formed while the core packs it, and never stored."""

    def __init__(self, be: Reference, x: Tensor, g: Tensor, m: Tensor, q: Tensor, o: Options) -> None:
        self._be, self._o, self._targets, self._g = be, o, (x, m, q), g
        self._double = x.dtype == torch.float64
        self.old = q.to(torch.float64 if self._double else torch.float32, copy=True)
        self.size = 1.0
        self._sketch: tuple[float, Tensor, float] | None = None

    def _sum(self, kappa: float | None) -> tuple[float, float]:
        """The coefficients of M and G in B, or (``kappa`` None) in M⁺."""
        size = float(self.size)
        sign = -size if self._o.maximize else size
        return (size, sign) if kappa is None else (kappa * size, (1.0 + kappa) * sign)

    def _product(
        self,
        a: Tensor,
        transposed: bool,
        kappa: float | None,
        sums: NDArray[np.float64] | None = None,
    ) -> tuple[Tensor, float]:
        _, m, _ = self._targets
        out = a.new_empty(m.shape[1] if transposed else m.shape[0], a.shape[1])
        table = operands(m, self._g, a, out)
        sums = np.empty(0) if sums is None else sums
        threads = torch.get_num_threads()
        largest = _core.part_product(table, self._sum(kappa), transposed, sums, self._double, self._o.half, threads)
        return out, largest

    def sketch(self) -> Tensor:
        """``B Q`` (m, r)"""
        if self._sketch is None or self._sketch[0] != self.size:
            self._sketch = (float(self.size), *self._product(self.old, False, self._o.kappa))
        return self._sketch[1]

    def entry(self) -> Tensor:
        """A size that tells whether squares of B are safe: max |B Q|, or max |B| where that leaves it open; infinite if
        B is not finite.
        """
        self.sketch()
        assert self._sketch is not None
        largest, safe = self._sketch[2], self._be.safe(self.old)
        if not 1.0 / safe < largest < safe:
            largest = _core.part_largest(operands(self._targets[1], self._g), self._sum(self._o.kappa), 1)
        return torch.tensor(largest if math.isfinite(largest) else math.inf, dtype=torch.float64)

    def rescale(self, size: float) -> None:
        """Multiplies B by a power of two."""
        self.size = size

    def back(self, p: Tensor) -> Tensor:
        """``Bᵀ P`` (n, r)"""
        return self._product(p, True, self._o.kappa)[0]

    def captured(self, p: Tensor) -> Tensor:
        """``size·M⁺ᵀ P`` (n, r)"""
        return self._product(p, True, None)[0]

    def energies(self) -> tuple[Tensor, Tensor]:
        """Sums of B's squares along each row (m,) and down each column (n,)."""
        _, m, _ = self._targets
        rows, columns = np.zeros(m.shape[0]), np.zeros(m.shape[1])
        for sums, transposed, inner in ((rows, False, m.shape[1]), (columns, True, m.shape[0])):
            self._product(self.old.new_zeros(inner, 1), transposed, self._o.kappa, sums)
        return torch.from_numpy(rows), torch.from_numpy(columns)

    def write(self, p: Tensor, r: Tensor, v: Tensor, w: Tensor, scale: float, tail: Tail) -> None:
        """``X ← (1 − ηλ)X − η·scale·D`` and ``M ← a·M⁺ − (a − b)·P Wᵀ/size``, in place."""
        x, m, _ = self._targets
        alpha = 0.0 if tail.alpha is None else float(tail.alpha)
        u = v - alpha * r if alpha else v
        numbers = np.array([*numbers_of(self._o), scale])
        table = operands(self._g, p, u, w, x, m)
        _core.part_write(table, numbers, alpha, float(self.size), self._double, torch.get_num_threads())
        _bump([x, m])


def _factor(a: Tensor, tol: float, polar: bool) -> tuple[Tensor, Tensor]:
    v, double = torch.empty_like(a, memory_format=torch.contiguous_format), a.dtype == torch.float64
    t, threads = np.zeros((a.shape[1],) * 2), torch.get_num_threads()
    # A polar factor is R's, whose columns are nearly orthogonal; QR is that of B·Q too, whose columns are not.
    null, _ = _core.factor(operands(a, v), t, polar, polar, tol, double, threads)
    return v, torch.tensor(null)
