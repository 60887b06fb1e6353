"""How a parameter is seen as matrices: stacks, flattened convolutions, fused blocks (docs/algorithms.md, section 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..linalg import qr

__all__ = ["as_matrix", "bounds", "flat", "is_view", "matrix_shape", "start", "write_back"]


def matrix_shape(shape: torch.Size, flatten: bool | None, row_blocks: int) -> tuple[int, int, int]:
    """``(count, m, n)``: a parameter of this shape is ``count`` matrices of m by n.

    2-D: one, or ``row_blocks`` blocks of rows (a fused QKV weight is three). 3-D: a stack along the first axis
    (experts), or with ``flatten=True`` one matrix (out, rest), as are 4-D and 5-D convolution weights.

    Raises:
        ValueError: for fewer than two dimensions, or blocks that do not divide the rows.
    """
    if len(shape) < 2:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} is no matrix; give its group algorithm='adamw' or 'lion', "
            "or build the groups with orthdion.param_groups(model)"
        )
    stacked = len(shape) == 3 and not flatten
    if stacked and row_blocks > 1:
        raise ValueError("row_blocks is for 2-D weights; a 3-D stack is one matrix per entry of its first axis already")
    if stacked:
        return shape[0], shape[1], shape[2]
    if shape[0] % row_blocks:
        raise ValueError(f"row_blocks={row_blocks} does not divide the {shape[0]} rows of a {tuple(shape)} weight")
    return row_blocks, shape[0] // row_blocks, math.prod(shape[1:])


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


def bounds(blocks: int, rows: int, first: int, here: int) -> list[tuple[int, int]]:
    """Which of the ``here`` rows that begin at row ``first`` belong to each block of ``rows``."""
    cut = [(k * rows - first, (k + 1) * rows - first) for k in range(blocks)]
    return [(min(max(a, 0), here), min(max(b, 0), here)) for a, b in cut]


def flat(tensors: list[Tensor]) -> list[Tensor] | None:
    """The tensors as single rows, all in one order of memory; None unless they are dense and lie alike."""
    first = tensors[0]
    strides = first.stride()
    order = sorted(range(first.ndim), key=lambda d: (-strides[d], d))
    rows = [t.permute(order) for t in tensors]
    return [t.view(1, -1) for t in rows] if all(t.is_contiguous() for t in rows) else None


def start(shape: tuple[int, int, int], seed: int, index: int) -> Tensor:
    """The first Q of parameter ``index``: (count, n, r) orthonormal float64 on the CPU.

    Drawn from a generator of its own, so that every rank of a group draws the same and the user's random stream is
    untouched.
    """
    generator = torch.Generator(device="cpu").manual_seed((seed * 1_000_003 + index) % 2**63)
    count, n, r = shape
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.float64, device="cpu")
    # Our own QR, because its bits do not depend on the number of threads.
    return qr(torch.randn(count, n, r, generator=generator, dtype=torch.float32, device="cpu"))[0].double()
