"""Buckets: blends of one shape, format and layout, for common launches; and how they are cut to fit the room there is.

A matrix is seen as it lies in memory, row-major with some pitch, and whether that is B or Bᵀ (``turned``: wide weights
are processed transposed). Views that lie in no such way are copied, and copied back.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...requests import Blend
from .arguments import MATRICES, TYPES, addresses, pack
from .device import Device

__all__ = ["Bucket", "Lying", "Room", "Slab", "batch", "lying"]

#: Entries of one matrix that a thread block handles; panels are whole multiples of its sides.
_TILE_ROWS, _TILE_COLS = 32, 128


def batch(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one contiguous [matrix, …]: a view where they lie side by side already, as the parts of
    an earlier batch or of a collective's buffer do, else a copy.
    """
    first = tensors[0]
    size, start = first.numel(), first.data_ptr()
    step, storage = size * first.element_size(), first.untyped_storage().data_ptr()
    for k, t in enumerate(tensors):
        if t.data_ptr() != start + k * step or not t.is_contiguous() or t.untyped_storage().data_ptr() != storage:
            return torch.stack(list(tensors))
    strides = [math.prod(first.shape[i + 1 :]) for i in range(first.ndim)]
    return first.as_strided((len(tensors), *first.shape), (size, *strides), first.storage_offset())


class Room:
    """Room on a device for what is kept from one request to the next; given back with the last reference to it."""

    def __init__(self, device: Device, size: int) -> None:
        device.kept_bytes += size
        weakref.finalize(self, _give_back, device, size)

    @staticmethod
    def of(device: Device, t: Tensor) -> Room | None:
        """For a tensor that is there already, if that much may be kept."""
        size = t.numel() * t.element_size()
        return Room(device, size) if device.kept_bytes + size <= device.panel_bytes else None


def _give_back(device: Device, size: int) -> None:
    device.kept_bytes -= size


@dataclass(slots=True, eq=False)
class Lying:
    """A blend as it lies in memory; kept on it (``Blend.formed``) as long as its step lasts.

    Attributes:
        turned: memory holds the transposed matrices.
        x: X as it lies; None if it must be copied.
        m, g: M and G as they lie, or copies.
        key: what blends in one launch have in common.
        q: the Q that it was sketched with, in a batch.
        energies: sums of B's squares along rows and down columns, where a pass has taken them on its way.
        kept: B as products read it and as it lies, where there was room for it, until R has been formed; and what holds
            that room.
    """

    turned: bool
    x: Tensor | None
    m: Tensor
    g: Tensor
    key: Hashable
    q: Tensor | None = None
    energies: tuple[Tensor, Tensor] | None = None
    kept: tuple[Tensor, Room] | None = None


def lying(b: Blend) -> Lying:
    """How a blend lies."""
    if isinstance(b.formed, Lying):
        return b.formed
    w = b.w
    x = _lies(w.x, False)
    turned = x is None and _lies(w.x, True) is not None
    x = _lies(w.x, True) if turned else x
    m, g = (_lies(t, turned) for t in (b.m, w.g))
    m, g = ((t.T if turned else t).contiguous() if at is None else at for t, at in ((b.m, m), (w.g, g)))
    formats = (w.x.dtype, 0 if x is None else _pitch(x), m.dtype, _pitch(m), g.dtype, _pitch(g))
    key = (w.x.device, b.shape, turned, formats, w.precision, b.cm, b.cg)
    b.formed = found = Lying(turned, x, m, g, key)
    return found


@dataclass(frozen=True)
class Slab:
    """Part of a bucket whose B there is room for: rows ``first`` to ``last`` of matrices ``start`` to ``stop``."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def matrices(self) -> slice:
        """Which of the bucket's."""
        return slice(self.start, self.stop)

    @property
    def rows(self) -> slice:
        """Which of B's."""
        return slice(self.first, self.last)

    @property
    def count(self) -> int:
        """How many matrices."""
        return self.stop - self.start


class Bucket:
    """Same matrices, at most 64: M, G and (to be written) X as they lie, (n, m) where ``turned`` and (m, n) otherwise.

    Attributes:
        blend: ``(c, e, sign)`` of B = c·M⁺ + e·sign·G with M⁺ = M + sign·G.
    """

    def __init__(self, blends: Sequence[Blend], written: bool = False) -> None:
        seen, first = [lying(b) for b in blends], blends[0]
        self.turned, self.shape, self.where = seen[0].turned, first.shape, first.w.x.device
        self.blend = (first.cm, abs(first.cg) - first.cm, math.copysign(1.0, first.cg))
        self.m, self.g = [at.m for at in seen], [at.g for at in seen]
        self.x: list[Tensor] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        if written:
            for b, at in zip(blends, seen, strict=True):
                self.x.append(self._written(b.w.x, at.x))
                self._written(b.m, at.m)

    def _written(self, t: Tensor, at: Tensor | None) -> Tensor:
        """What to write to in place of a tensor, if that lies in no way to be written to."""
        view = t.T if self.turned else t
        if at is None:
            at = view.contiguous()
        if at.data_ptr() != view.data_ptr():
            self._copied.append((view, at))
        return at

    @property
    def count(self) -> int:
        """How many matrices."""
        return len(self.m)

    def slabs(self, entries: int) -> Iterator[Slab]:
        """Cuts the bucket into parts of at most about so many entries: whole matrices, or rows of one."""
        m, n = self.shape
        if m * n <= entries:
            together = min(entries // (m * n), MATRICES)
            for start in range(0, self.count, together):
                yield Slab(start, min(start + together, self.count), 0, m)
            return
        step = max(entries // n // _TILE_COLS, 1) * _TILE_COLS
        for k in range(self.count):
            for first in range(0, m, step):
                yield Slab(k, k + 1, first, min(first + step, m))

    def place(self, s: Slab) -> bytes:
        """The struct ``Place`` of a slab."""
        n, rows = self.shape[1], s.last - s.first
        corner = (0, s.first, n, rows) if self.turned else (s.first, 0, rows, n)
        lists = (self.x or self.m, self.m, self.g)
        formats = [TYPES[ts[0].dtype] for ts in lists]
        return pack(*corner, self.turned, *formats, *(_pitch(ts[0]) for ts in lists), *self.blend)

    def grid(self, s: Slab) -> tuple[int, int, int]:
        """Of the kernels that pass over a slab: tiles of rows as they lie, of columns, and matrices."""
        n, m = self.shape[1], s.last - s.first
        rows, cols = (n, m) if self.turned else (m, n)
        return -(-rows // _TILE_ROWS), -(-cols // _TILE_COLS), s.count

    def block(self, s: Slab, dtype: torch.dtype) -> Tensor:
        """Room for a slab's entries, as they lie."""
        n, rows = self.shape[1], s.last - s.first
        return torch.empty(s.count, *((n, rows) if self.turned else (rows, n)), dtype=dtype, device=self.where)

    def upright(self, block: Tensor) -> Tensor:
        """A block as rows of B."""
        return block.transpose(1, 2) if self.turned else block

    def lists(self, s: Slab, *names: str) -> tuple[bytes, ...]:
        """Addresses of a slab's operands."""
        return tuple(addresses(getattr(self, name)[s.matrices]) for name in names)

    def upright_views(self, name: str) -> list[Tensor]:
        """Operands in B's orientation."""
        return [t.T if self.turned else t for t in getattr(self, name)]

    def write_back(self) -> None:
        """Copies what had to be copied into the tensors that it was made from."""
        for view, copy in self._copied:
            view.copy_(copy)


def _pitch(t: Tensor) -> int:
    return max(t.stride(0), t.shape[1])


def _lies(t: Tensor, turned: bool) -> Tensor | None:
    """The matrix as it lies in memory, if it is row-major (transposed: if ``turned``)."""
    t = t.T if turned else t
    row, col = t.stride()
    if (col == 1 or t.shape[1] == 1) and (row >= t.shape[1] or t.shape[0] == 1):
        return t
    return None
