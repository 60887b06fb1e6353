"""Parameters, gradients and states as the matrices and rows that backends see: this rank's part of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backends.table import Words, fixed_words
from ..sharding import Layout, Placed, local
from . import blocks
from .states import orientation, single
from .step import Matrix

__all__ = ["Copies", "Seen", "matrices", "rows"]


@dataclass
class Copies:
    """What strides allowed no view of: copies to be written back after the step."""

    made: list[tuple[Tensor, Tensor, Tensor]]

    def write_back(self) -> None:
        """Copies them into the tensors that they were made from."""
        for t, matrix, like in self.made:
            blocks.write_back(t, matrix, like)


@dataclass(frozen=True)
class Seen:
    """What of a parameter's matrices stays from one step to the next: ``(X, M, Q)`` of each, what the Rust core is told
    of them, and by what one knows that they still lie there.
    """

    key: tuple[Any, ...]
    states: tuple[Tensor, Tensor]
    parts: list[tuple[Tensor, Tensor, Tensor]]
    words: list[Words | None]
    scale: float
    shape: tuple[int, int]
    layout: Layout
    flip: bool
    cut: list[tuple[int, int]]
    bytes: int


def matrices(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    placed: Placed,
    layout: Layout,
    arrived: bool,
    offset: int,
    copies: Copies,
    seen: dict[Tensor, Seen],
) -> tuple[list[Matrix], int]:
    """The low-rank matrices of a parameter, from its local gradient ``g``, and the bytes that it has on each rank.

    ``seen`` keeps the views of X, M and Q for as long as the tensors are the same and lie where they did: to make and
    describe them takes longer than the step of a small matrix.
    """
    m, q = state["momentum"], state["Q"]
    known: Seen | None = None
    key: tuple[Any, ...] = ()
    if plain := placed.mesh is None:
        known = seen.get(p)
        where = (p.data_ptr(), p.shape, p.stride(), m.data_ptr(), q.data_ptr())
        key = (*where, group["flatten"], group["row_blocks"], layout)
    if known is None or known.states[0] is not m or known.states[1] is not q or known.key != key:
        before = len(copies.made)
        known = _look(p, (m, q), group, placed, layout, copies, key)
        if plain and len(copies.made) == before:
            seen[p] = known
    g = g.resolve_neg() if g.is_neg() else g
    gs = _cut(g, local(p), group["flatten"], known.cut, copies, True)
    if known.flip:
        gs = [gi.T for gi in gs]
    rest = (known.scale, known.shape, known.layout, arrived, offset)
    made = zip(known.parts, gs, known.words, strict=True)
    return [Matrix(x, gi, mi, qi, *rest, words) for (x, mi, qi), gi, words in made], known.bytes


def _look(
    p: Tensor,
    states: tuple[Tensor, Tensor],
    group: dict[str, Any],
    placed: Placed,
    layout: Layout,
    copies: Copies,
    key: tuple[Any, ...],
) -> Seen:
    x, m, q = local(p.detach()), local(states[0]), local(states[1])
    flip = orientation(p, group, states[1])
    _, rows, cols = blocks.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
    cut = [(k * rows - placed.ranges[0][0], (k + 1) * rows - placed.ranges[0][0]) for k in range(group["row_blocks"])]
    xs, ms = (_cut(t, x, group["flatten"], cut, copies, False) for t in (x, m))
    qs = [q] if single(p, group) else list(q.unbind(0))
    scale = (rows / max(cols, 1)) ** 0.5
    size = p.numel() * p.element_size() // layout.shards.size
    shape = (rows, cols)
    if flip:
        xs, ms, shape, layout = [xi.T for xi in xs], [mi.T for mi in ms], (cols, rows), layout.transposed()
    parts = list(zip(xs, ms, qs, strict=True))
    words = [fixed_words(*part) if x.is_cpu else None for part in parts]
    return Seen(key, states, parts, words, scale, shape, layout, flip, cut, size)


def _cut(
    t: Tensor, like: Tensor, flatten: bool | None, cut: list[tuple[int, int]], copies: Copies, read_only: bool
) -> list[Tensor]:
    """The 2-D views of a tensor; ``cut`` are the row ranges of its blocks, of which this rank may hold a part."""
    if t.ndim == 3 and not flatten:
        return list(t.unbind(0))
    if t.ndim == 2 and len(cut) == 1:
        return [t]
    matrix = blocks.as_matrix(t, like)
    if not read_only and not blocks.is_view(matrix, t):
        copies.made.append((t, matrix, like))
    if len(cut) == 1:
        return [matrix]
    bounds = [(min(max(a, 0), len(matrix)), min(max(b, 0), len(matrix))) for a, b in cut]
    return [matrix[a:b] for a, b in bounds]


def rows(p: Tensor, g: Tensor, state: dict[str, Tensor], copies: Copies) -> tuple[Tensor, ...]:
    """(X, G, M[, V]) as 2-D views, for AdamW and Lion."""
    x, m = local(p.detach()), local(state["momentum"])
    tensors = [x, g.resolve_neg(), m, *([local(state["variance"])] if "variance" in state else [])]
    if (flat := blocks.flat(tensors)) is not None:
        return tuple(flat)
    if x.ndim <= 2:
        return tuple(t if t.ndim == 2 else t.reshape(1, -1) if t.ndim == 0 else t[None] for t in tensors)
    views = [blocks.as_matrix(t, x) for t in tensors]
    for k, (t, view) in enumerate(zip(tensors, views, strict=True)):
        if k != 1 and not blocks.is_view(view, t):
            copies.made.append((t, view, x))
    return tuple(views)
