"""Parameters, gradients and states as the matrices and rows that backends see: this rank's part of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..sharding import Layout, Placed, local
from . import blocks
from .states import orientation, single
from .step import Matrix

__all__ = ["Copies", "matrices", "rows"]


@dataclass
class Copies:
    """What strides allowed no view of: copies to be written back after the step."""

    made: list[tuple[Tensor, Tensor, Tensor]]

    def write_back(self) -> None:
        """Copies them into the tensors that they were made from."""
        for t, matrix, like in self.made:
            blocks.write_back(t, matrix, like)


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
) -> list[Matrix]:
    """The low-rank matrices of a parameter, from its local gradient ``g``."""
    x, m, q = local(p.detach()), local(state["momentum"]), local(state["Q"])
    flip = orientation(p, group, state["Q"])
    _, rows, cols = blocks.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
    cut = [(k * rows - placed.ranges[0][0], (k + 1) * rows - placed.ranges[0][0]) for k in range(group["row_blocks"])]
    xs, gs, ms = (_cut(t, x, group["flatten"], cut, copies, k == 1) for k, t in enumerate((x, g.resolve_neg(), m)))
    qs = [q] if single(p, group) else list(q.unbind(0))
    scale = (rows / max(cols, 1)) ** 0.5
    if not flip:
        triples = zip(xs, gs, ms, qs, strict=True)
        return [Matrix(*views, scale, (rows, cols), layout, arrived, offset) for views in triples]
    turned = layout.transposed()
    return [
        Matrix(xi.T, gi.T, mi.T, qi, scale, (cols, rows), turned, arrived, offset)
        for xi, gi, mi, qi in zip(xs, gs, ms, qs, strict=True)
    ]


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
