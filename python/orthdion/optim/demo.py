"""DeMo (arXiv 2411.19870): the fast components of every replica's own momentum travel, nothing else does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..core.gradients import arrive
from ..core.optimizer import MatrixOptimizer
from ..core.options import number, whole
from ..core.registry import register
from ..core.rule import Rule, States, StateSpec
from ..numerics.cosines import basis
from ..requests import ALONE, Body, Gather, Layout, Map, Matrix, Outcome, Report, Request, Update, Whole

__all__ = ["DeMo", "DeMoRule"]


@register
@dataclass(frozen=True)
class DeMoRule(Rule):
    """The sign of a mean over replicas of each one's largest coefficients, which leave its momentum."""

    name: ClassVar[str] = "demo"
    summary: ClassVar[str] = "X −= η·sign(mean over replicas of top_k(cosines of Δ's chunks)), Δ = decay·Δ + ηG − sent"
    use: ClassVar[str] = "replicas on a very slow network: some hundredths of the gradient travel"
    paper: ClassVar[str] = "arXiv 2411.19870"
    flops: ClassVar[str] = "4·chunk·mn"
    sent: ClassVar[str] = "mn (replicas: 1.5·k·mn/chunk²)"
    states: ClassVar[States] = {"momentum": StateSpec(apart=True)}
    checks_gradient: ClassVar[bool] = True
    averages_factors: ClassVar[bool] = True

    lr: float = number(0.001, 0.0, doc="η, the learning rate. A tensor is read at each step.")
    decay: float = number(0.999, 0.0, 1.0, open_high=True, doc="What Δ keeps of itself.")
    top_k: int = whole(32, 1, doc="Coefficients of each chunk that are sent.")
    chunk: int = whole(64, 1, doc="The largest side of a chunk; sides are divisors of the matrix's.")

    def rank(self, m: int, n: int) -> int:
        """There are no factors: nothing has this axis."""
        return 0

    def unsupported(self, at: Layout) -> str | None:
        """Where replicas hold parts, nobody has whole chunks to send."""
        if not at.compressed or at.shards.size == 1:
            return None
        sharded = "DeMo sends chunks of whole matrices between replicas, but this one is sharded within its replica"
        return f"{sharded}; use plain DDP with orthdion.decouple, or leave out replicate_mesh"

    def step(self, w: Matrix) -> Body[Outcome]:
        """``Δ ← decay·Δ + ηG``; what is sent of it leaves it; ``D`` is the sign of what all have sent, decoded."""
        if 0 in w.shape:
            return Report()
        at, deferred = w.layout, w.x.device.type == "cuda"
        arrival = yield from arrive(w.g, w.arrived, replace(at, replicas=ALONE), deferred)
        if arrival.g is None:
            return Report(skipped=arrival.skipped, idle=not arrival.skipped)
        w.skip, w.lost = arrival.skip, arrival.lost
        delta = self.decay * w.read("momentum") + self.lr * self.sign * w.gradient
        limit = torch.finfo(delta.dtype)
        delta.clamp_(limit.min, limit.max)  # a sum, which may leave the range
        sides = _divisor(w.shape[0], self.chunk), _divisor(w.shape[1], self.chunk)
        if at.replicas.size == 1:
            sent = together = yield Whole(delta, w, partial(_work, sides, self.top_k))
        else:
            values, index = _largest(_encoded(delta, sides), self.top_k)
            narrow = torch.int16 if math.prod(sides) <= 2**15 else torch.int32
            places = index.to(narrow).view(torch.uint8)
            every, places = yield Gather(values, at.replicas, "values"), Gather(places, at.replicas, "index")
            sent = _decoded(_spread([values], [index], sides), delta.shape, sides)
            spread = _spread(list(every), list(places.view(narrow).long()), sides)
            together = _decoded(spread, delta.shape, sides)
        done: Outcome = yield Update(w, together.sign(), self.lr, self.weight_decay, {"momentum": delta - sent})
        return done


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most ``most``."""
    return next(k for k in range(min(n, most), 0, -1) if n % k == 0)


def _cosines(side: int, like: Tensor) -> Tensor:
    return basis(side, *[torch.arange(side, device=like.device)] * 2).to(like.dtype)


def _encoded(x: Tensor, sides: tuple[int, int]) -> Tensor:
    """Coefficients of X's chunks (…, chunks, area)."""
    h, k = sides
    chunks = x.unflatten(-1, (-1, k)).unflatten(-3, (-1, h)).transpose(-3, -2)
    found: Tensor = _cosines(h, x).T @ chunks @ _cosines(k, x)
    return found.flatten(-2).flatten(-3, -2)


def _decoded(coefficients: Tensor, shape: torch.Size, sides: tuple[int, int]) -> Tensor:
    """What :func:`_encoded` has made of a matrix of this shape."""
    h, k = sides
    chunks = coefficients.unflatten(-1, (h, k)).unflatten(-3, (shape[-2] // h, shape[-1] // k))
    x: Tensor = _cosines(h, coefficients) @ chunks @ _cosines(k, coefficients).T
    return x.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _largest(coefficients: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The coefficients of largest size in each chunk, and where they are."""
    index = coefficients.abs().topk(min(count, coefficients.shape[-1]), -1).indices
    return coefficients.gather(-1, index), index


def _spread(values: list[Tensor], index: list[Tensor], sides: tuple[int, int]) -> Tensor:
    """Of each coefficient the mean over those who sent it. One sender after the other, for the same bits everywhere."""
    total = values[0].new_zeros((*values[0].shape[:-1], math.prod(sides)))
    count = torch.zeros_like(total)
    for v, i in zip(values, index, strict=True):
        total.scatter_add_(-1, i, v)
        count.scatter_add_(-1, i, torch.ones_like(v))
    return total / count.clamp_min(1.0)


def _part(x: Tensor, sides: tuple[int, int], count: int) -> Tensor:
    """X's largest coefficients, decoded."""
    values, index = _largest(_encoded(x, sides), count)
    return _decoded(_spread([values], [index], sides), x.shape, sides)


def _work(sides: tuple[int, int], count: int, x: Tensor) -> Request:
    return Map(_part, (x,), (sides, count))


class DeMo(MatrixOptimizer, rule=DeMoRule):
    r"""DeMo: replicas whose momenta are their own send the coefficients that are large.

    .. math::
        \Delta &\leftarrow \mathrm{decay} \cdot \Delta + \eta G, \quad
        q = \mathrm{top}_k\big(C_h^\top \Delta_\mathrm{chunk} C_w\big) \text{ of each chunk}, \quad
        \Delta \leftarrow \Delta - C_h\, q\, C_w^\top \\
        X &\leftarrow (1 - \eta\lambda) X - \eta\,\mathrm{sign}\big(C_h\, \bar q\, C_w^\top\big), \qquad
        \bar q = \text{of each coefficient the mean over the replicas that sent it}

    Chunks are h×w, the largest divisors of the sides that are at most ``chunk``. With ``replicate_mesh`` (and
    :func:`orthdion.decouple`) each replica sends k values and k places a chunk, in place of h·w. A prime side longer
    than ``chunk`` has chunks of one row or column, of which all coefficients may be sent.

    Δ is this library's state "momentum", so it is saved; the released code forgets it. **chosen**: a checkpoint holds
    the replicas' mean Δ, with which all of them go on; without replicas a sharded matrix is stepped as a whole one;
    matrices only, where the paper steps vectors likewise.
    """
