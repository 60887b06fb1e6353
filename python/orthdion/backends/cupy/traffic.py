"""What launches move: the bytes that a kernel's loads and stores add up to, from its grid and arguments.

The tests hold these against what the kernels' own loads and stores count; ``docs/gpu.md`` and ``make gpu-check`` sum
them up to the passes over memory that a step takes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Traffic", "declared"]

_SIZES = (4, 8, 2, 2)  # of the number formats, as the kernels number them
_TILE = 64


@dataclass(frozen=True)
class Traffic:
    """Bytes loaded and stored: of X, M and G, which lie in memory; of all else."""

    matrix_loads: int = 0
    matrix_stores: int = 0
    loads: int = 0
    stores: int = 0
    #: Whether every matrix takes part; otherwise this is what the launch moves at most.
    exact: bool = True

    @property
    def loaded(self) -> int:
        """All loads."""
        return self.matrix_loads + self.loads

    @property
    def stored(self) -> int:
        """All stores."""
        return self.matrix_stores + self.stores


def declared(kernel: str, grid: Sequence[int], arguments: Sequence[Any]) -> Traffic | None:
    """Of a launch; None for kernels that work on r×r numbers in one block a matrix."""
    known = _KERNELS.get(kernel)
    return known(tuple(grid), arguments) if known else None


def _place(packed: bytes) -> tuple[int, int, bool, int, int, int]:
    """``(rows, cols, turned, bytes of an entry of X, M, G)`` of a ``Place``."""
    words = struct.unpack("=11q3d", packed)
    return words[2], words[3], bool(words[4]), _SIZES[words[5]], _SIZES[words[6]], _SIZES[words[7]]


def _form(grid: tuple[int, ...], a: Sequence[Any]) -> Traffic:
    rows, cols, _, _, m, g = _place(a[2])
    entries = grid[2] * rows * cols
    stores = 0 if a[3] is None else entries * _SIZES[a[4]]
    if a[6] is not None:
        stores += 8 * grid[2] * (rows * grid[1] + cols * grid[0])
    return Traffic(matrix_loads=entries * (m + g), stores=stores)


def _residual_rows(grid: tuple[int, ...], a: Sequence[Any]) -> Traffic:
    rows, cols, turned, _, m, g = _place(a[2])
    entries, threads = grid[2] * rows * cols, 256 * grid[0] * grid[1] * grid[2]
    sums = grid[2] * (cols * grid[0] if turned else rows * grid[1])
    return Traffic(matrix_loads=entries * (m + g), loads=entries * (4 + 8) + 8 * threads, stores=2 * 8 * sums)


def _apply(grid: tuple[int, ...], a: Sequence[Any]) -> Traffic:
    rows, cols, _, x, m, g = _place(a[3])
    _, _, alphas, fed, _, captured, columns = struct.unpack("=10q3dq", a[4])[:7]
    entries, threads = grid[2] * rows * cols, 256 * grid[0] * grid[1] * grid[2]
    of_entry = 4 + (4 if fed else 0)
    if columns:
        of_entry += 16 + (0 if captured == fed else 4)
    # Of every thread: the flag, size, α, η and λ.
    return Traffic(
        matrix_loads=entries * (x + m + g),
        matrix_stores=entries * (x + m),
        loads=entries * of_entry + threads * (4 + 8 * (4 if alphas else 3)),
        exact=False,
    )


def _multiply(grid: tuple[int, ...], a: Sequence[Any]) -> Traffic:
    words = struct.unpack("=24q3d10q", a[0])
    sizes = [_SIZES[words[6 * i + 5]] for i in range(4)]
    beta = words[25]
    m, n, k, _, splits, shape, flags = words[27:34]
    if len(a) > 1:
        formed = struct.unpack("=6q3dq", a[1])
        sizes[0] = _SIZES[formed[0]] + _SIZES[formed[1]]
    tiles_i, tiles_j, each = -(-m // _TILE), grid[0], grid[2] // splits
    loads = stores = 0
    for i in range(tiles_i):
        for j in range(tiles_j):
            if shape & (1 | 8) and i > j:
                continue
            rows, cols = min(_TILE, m - i * _TILE), min(_TILE, n - j * _TILE)
            low, high = (i * _TILE if shape & 2 else 0), (min(k, (j + 1) * _TILE) if shape & 4 else k)
            loads += max(high - low, 0) * (rows * sizes[0] + cols * sizes[1])
            loads += rows * cols * sizes[3] if beta else 0
            stores += rows * cols * sizes[2] * (1 if not shape & 1 or i == j else 2) * splits
    loads, stores = loads * each, stores * each
    loads += 4 * 256 * grid[0] * grid[1] * grid[2] if flags else 0
    if len(a) > 1:
        loads += 8 * 256 * grid[0] * grid[1] * grid[2]
    return Traffic(loads=loads, stores=stores, exact=not flags)


def _collect(grid: tuple[int, ...], a: Sequence[Any]) -> Traffic:
    terms, size, count, add, flags = int(a[4]), _SIZES[a[7]], int(a[8]), bool(a[9]), a[10] is not None
    entries = count * grid[1]
    return Traffic(
        loads=entries * (8 * terms + (size if add else 0) + (4 if flags else 0)), stores=entries * size, exact=not flags
    )


def _keep(grid: tuple[int, ...], a: Sequence[Any]) -> Traffic:
    entries = grid[1] * int(a[5]) * int(a[6])
    return Traffic(loads=8 * entries, stores=entries * _SIZES[a[2]], exact=False)


def _operand(grid: tuple[int, ...], a: Sequence[Any]) -> Traffic:
    entries = grid[1] * int(a[5])
    return Traffic(loads=entries * (4 if a[1] is None else 16), stores=entries * _SIZES[a[4]])


def _tensors(packed: bytes) -> tuple[int, int]:
    """How many entries and tensors a ``Tensors`` has."""
    words = struct.unpack("=384q66i", packed)
    return sum(words[320:384]), words[-1]


def _elementwise(grid: tuple[int, ...], a: Sequence[Any]) -> Traffic:
    entries, _ = _tensors(a[0])
    lion, _, x, g, m = struct.unpack("=q4d5q", a[1])[5:]
    states = _SIZES[m] * (1 if lion else 2)
    own = 256 * grid[0] * (4 + 16 + (0 if lion else 16))
    loads, stores = entries * (_SIZES[x] + _SIZES[g] + states), entries * (_SIZES[x] + states)
    return Traffic(matrix_loads=loads, matrix_stores=stores, loads=own, exact=False)


def _find_bad(grid: tuple[int, ...], a: Sequence[Any]) -> Traffic:
    return Traffic(matrix_loads=_tensors(a[0])[0] * _SIZES[struct.unpack("=q4d5q", a[1])[8]])


_KERNELS = {
    "form": _form,
    "residual_rows": _residual_rows,
    "apply": _apply,
    "multiply": _multiply,
    "multiply_formed": _multiply,
    "collect": _collect,
    "keep": _keep,
    "operand": _operand,
    "elementwise": _elementwise,
    "find_bad": _find_bad,
}
