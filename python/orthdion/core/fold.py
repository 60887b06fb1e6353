"""How a parameter is seen as matrices: stacks, convolutions, fused blocks, heads (docs/algorithms.md, section 5).

A parameter is a stack of E weights, or one. A weight is upright, (out, in): one that is kept as (in, out) is seen
transposed, and a convolution's axes behind the first are one. Its rows are divided into parts, each of which is a
matrix of its own; a part may come in pieces that alternate with the pieces of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHAPE_KEYS", "Copies", "Fold", "check_shape_keys"]

#: Group keys that say how a parameter is matrices, and their defaults.
SHAPE_KEYS: dict[str, Any] = {
    "flatten": None,
    "transposed": False,
    "split_sizes": None,
    "interleaved": 1,
    "num_heads": None,
}

Span = tuple[int, int]


@dataclass
class Copies:
    """What strides allowed no view of: copies, and how they are written back after the step."""

    made: list[Callable[[], object]] = field(default_factory=list)

    def write_back(self) -> None:
        """Copies them into the tensors that they were made from; a copy of a copy first."""
        for write in reversed(self.made):
            write()


@dataclass(frozen=True)
class Fold:
    """How a parameter of this shape is matrices.

    Attributes:
        shape: the parameter's, over all ranks.
        stacked: the first axis counts weights.
        transposed: weights are kept as (in, out).
        pieces: rows of a piece of each part.
        repeats: how many pieces a part has; those of all parts alternate.
    """

    shape: tuple[int, ...]
    stacked: bool
    transposed: bool
    pieces: tuple[int, ...]
    repeats: int

    @staticmethod
    def of(shape: torch.Size, group: Mapping[str, Any]) -> Fold:
        """By a group's keys, :data:`SHAPE_KEYS`.

        Raises:
            ValueError: for fewer than two dimensions, or parts that are not all of the rows.
        """
        return _fold(tuple(shape), *(group[key] for key in SHAPE_KEYS))

    # ------------------------------------------------------------------ sizes

    @cached_property
    def rows(self) -> int:
        """Rows of a weight: its output features."""
        return self.shape[self.row_axis]

    @cached_property
    def cols(self) -> int:
        """Columns of a weight."""
        return math.prod(self.shape[a] for a in self.col_axes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each part."""
        return tuple(piece * self.repeats for piece in self.pieces)

    @property
    def stack(self) -> int:
        """How many weights there are."""
        return self.shape[0] if self.stacked else 1

    @property
    def parts(self) -> int:
        """How many matrices a weight is."""
        return len(self.pieces)

    @property
    def count(self) -> int:
        """How many matrices there are in all."""
        return self.stack * self.parts

    # ------------------------------------------------------------------ axes

    @property
    def row_axis(self) -> int:
        """The parameter's axis that the rows lie along."""
        return (1 if self.stacked else 0) + (1 if self.transposed else 0)

    @property
    def col_axes(self) -> tuple[int, ...]:
        """Those that the columns lie along."""
        first = 1 if self.stacked else 0
        return tuple(a for a in range(first, len(self.shape)) if a != self.row_axis)

    @property
    def roles(self) -> list[str]:
        """What each axis is: "batch", "rows" or "cols"."""
        batch = ["batch"] if self.stacked else []
        return batch + ["rows" if a == self.row_axis else "cols" for a in range(len(batch), len(self.shape))]

    # ------------------------------------------------------------------ views

    def weights(self, t: Tensor, like: Tensor, copies: Copies | None) -> list[Tensor]:
        """The upright weights of a tensor with the parameter's axes (a local part); ``copies`` None: to be read only.

        Columns of a convolution come in the order of ``like``'s memory: a view wherever strides allow one.
        """
        if self.stacked:
            return list((t.mT if self.transposed else t).unbind(0))
        if t.ndim == 2:
            return [t.T if self.transposed else t]
        matrix = as_matrix(t, like)
        if copies is not None and not is_view(matrix, t):
            copies.made.append(lambda: write_back(t, matrix, like))
        return [matrix]

    def part(self, t: Tensor, k: int, span: Span, copies: Copies | None, axis: int = 0) -> Tensor:
        """The rows of part ``k``, where ``axis`` of ``t`` has the weight's rows ``span``."""
        if self.parts == 1:
            return t
        low, high = self.before(k, span[0]), self.before(k, span[1])
        first = self._row(k, low) - span[0] if low < high else 0
        if low == high or self._row(k, high - 1) - span[0] - first == high - 1 - low:
            return t.narrow(axis, first, high - low)
        index = _rows_of(self, k, span, t.device)
        taken = t.index_select(axis, index)
        if copies is not None:
            copies.made.append(lambda: t.index_copy_(axis, index, taken))
        return taken

    def before(self, k: int, row: int) -> int:
        """How many rows of part ``k`` come before a row of the weight."""
        start = sum(self.pieces[:k])
        whole, rest = divmod(row, sum(self.pieces)) if row else (0, 0)
        return whole * self.pieces[k] + min(max(rest - start, 0), self.pieces[k])

    def _row(self, k: int, i: Any) -> Any:
        """Where row ``i`` of part ``k`` lies in the weight; ``i`` may be a tensor."""
        return i // self.pieces[k] * sum(self.pieces) + sum(self.pieces[:k]) + i % self.pieces[k]


@lru_cache(maxsize=4096)
def _fold(
    shape: tuple[int, ...],
    flatten: bool | None,
    transposed: bool,
    split_sizes: tuple[int, ...] | None,
    interleaved: int,
    num_heads: int | None,
) -> Fold:
    if len(shape) < 2:
        raise ValueError(
            f"a parameter of shape {shape} is no matrix; give its group algorithm='adamw' or 'lion', or let "
            "orthdion.create(name, model) or orthdion.param_groups(model) divide the model; a trainer that builds the "
            "groups itself takes orthdion.integrations.Factory in place of the class"
        )
    stacked = len(shape) == 3 and not flatten
    if transposed and len(shape) > 2 and not stacked:
        raise ValueError(f"transposed is for (in, out) weights and stacks of them, not for one of shape {shape}")
    rows = shape[(1 if stacked else 0) + (1 if transposed else 0)]
    pieces = split_sizes if split_sizes is not None else (rows,)
    if split_sizes is None and interleaved != 1:
        raise ValueError(f"interleaved={interleaved} repeats split_sizes, which the group does not give")
    if sum(pieces) * interleaved != rows:
        times = f" {interleaved} times" if interleaved > 1 else ""
        raise ValueError(
            f"split_sizes={split_sizes}{times} make {sum(pieces) * interleaved} rows, but a weight of shape {shape} "
            f"has {rows}"
        )
    if num_heads is not None:
        head, rest = divmod(rows, num_heads)
        if rest or (head and any(piece % head for piece in pieces)):
            raise ValueError(
                f"num_heads={num_heads} does not divide the {rows} rows of a weight of shape {shape}"
                + (f" into heads that divide split_sizes={split_sizes}" if split_sizes else "")
            )
        pieces, interleaved = (head,) * num_heads, 1
    return Fold(shape, stacked, transposed, pieces, interleaved)


@lru_cache(maxsize=128)  # each keeps its index on the device
def _rows_of(fold: Fold, k: int, span: Span, device: torch.device) -> Tensor:
    """Where the rows of part ``k`` lie among those of ``span``, counted from its start."""
    rows = torch.arange(fold.before(k, span[0]), fold.before(k, span[1]), device=device)
    found: Tensor = fold._row(k, rows) - span[0]
    return found


def check_shape_keys(group: dict[str, Any]) -> None:
    """Brings a group's :data:`SHAPE_KEYS` to their kinds, in place.

    Raises:
        TypeError, ValueError: for what they may not be.
    """
    for key in ("flatten", "transposed"):
        if not isinstance(group[key], bool) and (key == "transposed" or group[key] is not None):
            allowed = "True, False or None" if key == "flatten" else "True or False"
            raise TypeError(f"{key} must be {allowed}, not {group[key]!r}")
    for key in ("interleaved", "num_heads"):
        if group[key] is not None or key == "interleaved":
            group[key] = _whole(key, group[key])
    if group["split_sizes"] is not None:
        sizes = group["split_sizes"]
        if isinstance(sizes, (str, bytes)) or not (isinstance(sizes, Sequence) or hasattr(sizes, "__array__")):
            raise TypeError(f"split_sizes must be the rows of each part, such as (64, 16, 16), not {sizes!r}")
        group["split_sizes"] = tuple(_whole("split_sizes", size) for size in sizes)
        if not group["split_sizes"]:
            raise ValueError("split_sizes is empty; give the rows of each part, or None for one matrix")


def _whole(key: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if isinstance(value, (bool, float, str)) or number != value:
        raise TypeError(f"{key} must be made of whole numbers, not {value!r}")
    if number < 1:
        raise ValueError(f"{key} must be at least 1, but it is {number}")
    return number


def _column_order(t: Tensor) -> list[int]:
    """Axes behind the first, widest stride first: in that order they flatten without a copy (channels-last too)."""
    strides = t.stride()
    return sorted(range(1, t.ndim), key=lambda d: (-strides[d], d))


def as_matrix(t: Tensor, like: Tensor) -> Tensor:
    """``t`` as (out, rest) with columns in the order of ``like``'s memory; a view wherever strides allow one."""
    if t.ndim == 2:
        return t
    return t.permute(0, *_column_order(like)).flatten(1)


def is_view(matrix: Tensor, of: Tensor) -> bool:
    """Whether writing to ``matrix`` writes to the tensor that it was made from."""
    return matrix.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def write_back(t: Tensor, matrix: Tensor, like: Tensor) -> None:
    """Copies :func:`as_matrix`'s result, where that had to be a copy, into the tensor that it was made from."""
    target = t.permute(0, *_column_order(like))
    target.copy_(matrix.view(target.shape))
