"""What the device can do: the floors come from here."""

from __future__ import annotations

from typing import Any

import torch

from orthdion.backends.cupy.device import device_for
from orthdion.backends.cupy.orthonormal import orthonormalize, polar

from ..cases import MODELS
from ..context import Context
from ..launches import of_kernels
from .timing import model_of

__all__ = ["ceilings", "factors", "kernels"]

_FORMATS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def ceilings(context: Context) -> None:
    """Copies, large square products by format, and the products of a step by its shapes, in 10⁹ a second."""
    size, device, clock = (128 if context.dry else 8192), context.device, context.clock
    rates = {"copy": _copy(context, 16 * size * size)}
    for name in _FORMATS:
        rates[name] = _rate(context, name, 1, size, size, size)
    a = torch.randn(size // 2, size // 2, device=device, dtype=torch.float64)
    rates["float64"] = 2 * (size // 2) ** 3 / clock.time(lambda: a @ a, context.seconds).low / 1e6
    context.found("rates", **rates)
    seen = set()
    for m, n in model_of(context, "llama-3-8b").matrices:
        r = min(m, n) // 8 or 1
        for what, sizes in (("B Q", (m, n, r)), ("B' P", (n, m, r)), ("P F'", (m, r, n))):
            if sizes not in seen:
                seen.add(sizes)
                for name in ("bfloat16", "tf32"):
                    rows, inner, cols = sizes
                    rate = _rate(context, name, 4, rows, inner, cols)
                    context.found("product", what=what, shape=[m, n, r], format=name, count=4, rate=rate)


def _copy(context: Context, entries: int) -> float:
    x = torch.empty(entries, device=context.device)
    y = torch.empty_like(x)
    return 2 * 4 * entries / context.clock.time(lambda: y.copy_(x), context.seconds).low / 1e6


def _rate(context: Context, name: str, count: int, m: int, k: int, n: int) -> float:
    there, device = device_for(context.device), context.device
    a, b = (torch.randn(count, *s, device=device).to(_FORMATS[name]) for s in ((m, k), (k, n)))
    out = torch.empty(count, m, n, device=device)

    def product() -> None:
        with there.active():
            there.multiply(out, a, b, tf32=name == "tf32")

    return 2 * count * m * n * k / context.clock.time(product, context.seconds / 2).low / 1e6


def factors(context: Context) -> None:
    """Milliseconds of P = orth(P̂) and of V's polar factor for batches, by r."""
    there = device_for(context.device)
    for r in (8, 70) if context.dry else (128, 256, 512, 1024):
        for count in (1,) if context.dry else (1, 4, 28):
            a = torch.randn(count, 8 * r if not context.dry else 2 * r, r, device=context.device)

            def qr(a: torch.Tensor = a) -> Any:
                with there.active():
                    return orthonormalize(there, [a], 2.0**-18)

            def both(a: torch.Tensor = a) -> Any:
                with there.active():
                    return polar(there, orthonormalize(there, [a], 2.0**-18))

            for name, work in (("qr", qr), ("qr and polar", both)):
                timing = context.clock.time(work, context.seconds / 2, context.least)
                context.found("factor", what=name, r=r, rows=a.shape[1], count=count, ms=timing.median)


def kernels(context: Context) -> None:
    """Each kernel of one layer's step, each launch waited for."""
    model = (MODELS["llama-3-8b"].shrunk() if context.dry else MODELS["llama-3-8b"]).with_layers(1)
    for row in of_kernels(context.clock, model, "bfloat16"):
        context.found("kernel", **row)
