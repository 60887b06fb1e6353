"""Newton–Schulz iterations towards the polar factor (docs/algorithms.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["JORDAN", "POLAR_EXPRESS", "Coefficients", "newton_schulz"]

Coefficients = tuple[tuple[float, float, float], ...]

#: Keller Jordan's quintic, five times: singular values end between 0.7 and 1.2 (github.com/KellerJordan/Muon).
JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

#: Polar Express: each step the best for the interval that the one before leaves (arXiv 2505.16932); for input divided
#: by 1.02·‖U‖.
POLAR_EXPRESS: Coefficients = (
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)


def newton_schulz(
    u: Tensor,
    coefficients: Coefficients,
    divisor: float = 1.0,
    epsilon: float = 1e-7,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """``X ← aX + (bA + cA²)X``, A = XXᵀ, for each (a, b, c), from ``U / max(divisor·‖U‖, epsilon)``.

    U is (…, m, n); A is formed on the smaller side. ``product`` multiplies, as exactly as it likes. A zero matrix stays
    zero; entries are scaled first, so that squares neither vanish nor overflow.
    """
    largest = u.abs().amax((-2, -1), keepdim=True) if u.numel() else u.new_ones(())
    size = torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = (u / size).norm(dim=(-2, -1), keepdim=True) * divisor
    x = u / size / torch.maximum(norm, epsilon / size)
    flip = u.shape[-2] > u.shape[-1]
    x = x.mT if flip else x

    for a, b, c in coefficients:
        gram = product(x, x.mT)
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return x.mT if flip else x
