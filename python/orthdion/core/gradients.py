"""Gradients on their way into a step: checked, awaited, averaged where replicas differ, clipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import local
from ..requests import Body, Group, Layout, Reduce
from .rule import Rule

__all__ = [
    "FLOATS",
    "Arrival",
    "arrive",
    "check",
    "checked_by_the_step",
    "gradient",
    "mean_over",
    "power_sum",
    "same_everywhere",
]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(p: Tensor, g: Tensor, name_of: Callable[[Tensor], str]) -> None:
    """Refuses a gradient that no backend could read; the name is only asked for then.

    Raises:
        TypeError: sparse, complex or integer. ValueError: another shape or device than the parameter's.
    """
    if g.layout == torch.strided and g.dtype in FLOATS and g.shape == p.shape and g.device == p.device:
        return
    name = name_of(p)
    if g.layout != torch.strided:
        raise TypeError(f"the gradient of {name} is sparse; make it dense (embedding: sparse=False)")
    if g.dtype not in FLOATS:
        raise TypeError(f"the gradient of {name} has dtype {g.dtype}; it must be real and floating")
    if g.shape != p.shape:
        raise ValueError(f"the gradient of {name} has shape {tuple(g.shape)}; clear it and run backward again")
    raise ValueError(f"the gradient of {name} is on {g.device}, the parameter on {p.device}; move one")


def gradient(p: Tensor) -> Tensor | None:
    """The rank's part of the gradient, placed as the parameter is."""
    g = p.grad
    if g is None or local(p) is p:
        return g
    if g.placements != p.placements:  # type: ignore[attr-defined]  # a replicated norm's is a sum to be finished
        g = g.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local(g)


def checked_by_the_step(rule: Rule, at: Layout) -> bool:
    """Whether a rule's own body learns what has arrived, and averages what replicas differ in."""
    return rule.checks_gradient and (at.compressed or at.replicas.size == 1)


@dataclass(frozen=True)
class Arrival:
    """A gradient that may be used; None if no rank had one, or (``skipped``) some rank's held NaN or infinity.

    Where the host does not wait to know, ``lost`` and ``skip`` say so on the device.
    """

    g: Tensor | None
    skipped: bool = False
    lost: Tensor | None = None
    skip: Tensor | None = None


def arrive(g: Tensor, here: bool, at: Layout, deferred: bool = False) -> Body[Arrival]:
    """Waits for every rank's word on a gradient, and averages it over the replicas. ``here``: this rank has one."""
    finite = torch.isfinite(g).all()
    word = torch.where(finite, 1.0 if here else -1.0, math.inf).to(torch.float64)
    answer = yield Reduce(word, at.domain, "flags", op="max")
    lost = skip = None
    if deferred:
        lost = answer.isinf()
        skip = lost | (answer < 0.0)
    elif float(answer) < 0.0:
        return Arrival(None)
    elif math.isinf(float(answer)):
        return Arrival(None, skipped=True)
    # The mean of bfloat16 gradients is taken in single precision; `reduce_dtype` may say otherwise.
    wide = g if g.dtype == torch.float64 or at.replicas.size == 1 else g.float()
    mean = yield Reduce(wide, at.replicas, "gradient", at.replicas.size, rounded=True)
    return Arrival(mean, lost=lost, skip=skip)


def mean_over(group: Group, t: Tensor, what: str) -> Body[Tensor]:
    """The mean of ``t`` over a group, taken in single precision at least."""
    wide = t if t.dtype == torch.float64 else t.float()
    mean: Tensor = yield Reduce(wide, group, what, group.size)
    return mean


def same_everywhere(gradients: list[tuple[Tensor | None, Layout]]) -> Body[bool]:
    """Whether gradients that should differ between replicas are equal on all of them, and not zero."""
    if not gradients:
        return False
    device = next((g.device for g, _ in gradients if g is not None), None)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = torch.stack([zero if g is None else g.double().sum() for g, _ in gradients])
    both = yield Reduce(torch.cat([sums, -sums]), gradients[0][1].replicas, "flags", op="max")
    high, low = both.chunk(2)
    return bool((high == -low).all()) and bool(sums.any())


def power_sum(g: Tensor, p: float, at: Layout) -> Body[Tensor]:
    """``Σ|g|ᵖ`` over the shards, the mean of it over replicas; for p = ∞ the largest entry."""
    if math.isinf(p):
        top = g.double().abs().amax() if g.numel() else g.new_zeros((), dtype=torch.float64)
        largest: Tensor = yield Reduce(top, at.whole, "norm", op="max")
        return largest
    total: Tensor = yield Reduce(g.double().abs().pow(p).sum(), at.whole, "norm", at.replicas.size)
    return total
