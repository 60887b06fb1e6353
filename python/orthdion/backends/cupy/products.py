"""Batched products in double precision by the kernel ``multiply``, and what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .arguments import Operand, addresses, operand, pack
from .device import Device

__all__ = ["SYMMETRIC", "UPPER_A", "UPPER_B", "UPPER_C", "Formed", "When", "multiply"]

#: Shapes that make parts of a product superfluous, as ``multiply.cu`` numbers them.
SYMMETRIC, UPPER_A, UPPER_B, UPPER_C = 1, 2, 4, 8
_TILE = 64
#: Blocks of a product, about, that fill a large device.
_BLOCKS = 256
#: Blocks of a launch that flags decide on, about: two for each multiprocessor of a large device. What is rarely due
#: must cost little when it is not.
_GATED = 256
#: Rows of tiles in a grid, at most.
_ROWS = 65535


@dataclass(frozen=True)
class When:
    """Which matrices take part: those whose flag (an int32 each, decided on the device) has all of ``mask``. Those with
    ``flag & elsewhere`` have their result written to ``other``, which has the result's strides.
    """

    flags: Tensor | None = None
    mask: int = 0
    elsewhere: int = 0
    other: Tensor | None = None


@dataclass(frozen=True)
class Formed:
    """The left operand size·B from lists of momenta and gradients, in B's orientation; ``blend`` as
    :attr:`Bucket.blend`.
    """

    m: Sequence[Tensor]
    g: Sequence[Tensor]
    blend: tuple[float, float, float]
    sizes: Tensor

    @property
    def T(self) -> Formed:
        """The transposed matrices."""
        return replace(self, m=[t.T for t in self.m], g=[t.T for t in self.g])


def multiply(
    device: Device,
    out: Tensor | Operand,
    a: Tensor | Operand | Formed,
    b: Tensor | Operand,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    delta: float = 0.0,
    add: Tensor | Operand | None = None,
    shape: int = 0,
    when: When | None = None,
    pairs: int = 1,
    sizes: tuple[int, int, int] | None = None,
) -> None:
    """``out = α·A B + β·add + δ·I`` for batches [matrix, row, column]; sums in double precision.

    ``sizes``: rows of A, columns of B, and what is summed over, where operands are blocks of their tensors.
    ``shape`` says what is triangular or symmetric. Long sums with few results are taken in parts, in a fixed order.
    """
    when, c, right = when or When(), _operand(out), _operand(b)
    if sizes is None:
        assert isinstance(out, Tensor) and isinstance(b, Tensor)
        sizes = (out.shape[1], out.shape[2], b.shape[1])
    m, n, k = sizes
    count = c.tensor.shape[0]
    tiles = -(-m // _TILE) * -(-n // _TILE)
    splits = 1
    plain = not beta and not delta and alpha == 1.0 and not shape & (UPPER_A | UPPER_B) and pairs == 1
    if plain and when.other is None and c.tensor[0].is_contiguous():
        # Enough blocks for a large device; the same on every device and in every batch, as all must sum in one order.
        splits = max(1, min(_BLOCKS // tiles, k // 512, 64))
    target, other = c, when.other
    if splits > 1:
        parts = torch.empty(splits * count, m, n, dtype=torch.float64, device=c.tensor.device)
        target, other = operand(parts), None
    left = a if isinstance(a, Operand) else operand(a) if isinstance(a, Tensor) else right
    product = pack(
        *left.words(),
        *right.words(),
        *target.words(),
        *_operand(out if add is None else add).words(),
        float(alpha),
        float(beta),
        float(delta),
        m,
        n,
        k,
        pairs,
        splits,
        shape,
        when.flags,
        when.mask,
        other,
        when.elsewhere if other is not None else 0,
    )
    across, down, deep = -(-n // _TILE), -(-m // _TILE), count * pairs * splits
    most = _ROWS if not when.mask else max(1, _GATED // (across * deep))
    grid = (across, min(down, most), deep)
    if isinstance(a, Formed):
        row_m, col_m = a.m[0].stride()
        row_g, col_g = a.g[0].stride()
        words = (operand(a.m[0][None]).type, operand(a.g[0][None]).type, row_m, col_m, row_g, col_g)
        formed = pack(*words, *a.blend, a.sizes)
        device.launch("multiply_formed", grid, 256, product, formed, addresses(a.m), addresses(a.g))
    else:
        device.launch("multiply", grid, 256, product)
    if splits > 1:
        entries = m * n
        device.launch(
            "collect",
            (-(-entries // 256), count),
            256,
            target.tensor,
            entries,
            count * entries,
            1,
            splits,
            c.p,
            c.batch,
            c.type,
            entries,
            0,
            when.flags,
            when.mask,
        )


def _operand(t: Tensor | Operand) -> Operand:
    return t if isinstance(t, Operand) else operand(t)
