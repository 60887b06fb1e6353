"""How fast a machine does each kind of work: measured on this one, or the peaks of a data sheet.

Work takes the longer of its flops at the rate of its kind and its bytes at the memory's bandwidth. A collective over w
ranks takes 2(w − 1)/w of its bytes, counted in units of an all-reduce, at the bandwidth of the link: that of a ring.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from ..backends import choose, get
from ..requests import (
    ALONE,
    Blend,
    Elementwise,
    Factor,
    LowRankUpdate,
    Matrix,
    NewtonSchulz,
    Precision,
    Product,
    Request,
    Sketch,
    Update,
)
from .costs import Cost, Kind, cost_of, size_of
from .counting import Counted, Sent

__all__ = ["HARDWARE", "Hardware", "hardware_of", "measured", "timed"]


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        name: what it is called.
        rates: flops a second, by kind of work and format, "product float32" for one; a kind that has none goes at the
            rate of products, factorisations at that of products in double.
        bandwidths: bytes a second of the memory, "passes float64" for one; "" is every other kind's.
        node: ranks that talk at ``inside``; larger groups, and those that do not lie within one node, at ``across``.
        inside, across: bytes a second that each rank sends; 0 is not known.
        latency: seconds of a collective's every doubling of ranks.
        source: where the figures are from.
    """

    name: str
    rates: Mapping[str, float]
    bandwidths: Mapping[str, float]
    source: str
    node: int = 1
    inside: float = 0.0
    across: float = 0.0
    latency: float = 0.0

    def rate(self, cost: Cost) -> float:
        """Flops a second."""
        if (own := self.rates.get(f"{cost.kind} {cost.format}")) is not None:
            return own
        if cost.kind in ("passes", "one pass"):
            return math.inf
        factors = cost.kind.split()[0] in ("qr", "polar")
        return self.rates["product float64" if factors else f"product {cost.format}"]

    def seconds(self, work: Mapping[Cost, int]) -> float:
        """Of computation, one thing after the other."""
        total = 0.0
        for cost, n in work.items():
            kind = f"{cost.kind} {cost.format}"
            bandwidth = self.bandwidths.get(kind, self.bandwidths[""])
            total += n * max(cost.flops / self.rate(cost), cost.bytes / bandwidth)
        return total

    def on_the_wire(self, sent: Mapping[Sent, int]) -> float:
        """Seconds of collectives, one after the other.

        Raises:
            ValueError: where there are some and no link is known.
        """
        total = 0.0
        for one, n in sent.items():
            ranks = one.group.ranks
            near = ranks[0] // self.node == ranks[-1] // self.node
            bandwidth = self.inside if near and self.inside else self.across
            if not bandwidth:
                raise ValueError(f"no link of {self.name} is known: give link= in Gbit/s")
            w = len(ranks)
            total += n * (2 * (w - 1) / w * one.bytes / bandwidth + self.latency * math.ceil(math.log2(w)))
        return total


_GBIT = 1e9 / 8

#: Peaks of data sheets, not derated.
HARDWARE: dict[str, Hardware] = {
    "h100": Hardware(
        "h100",
        {
            "product float32": 67e12,
            "product tf32": 494.7e12,
            "product bfloat16": 989.4e12,
            "product float64": 67e12,
        },
        {"": 3.35e12},
        "NVIDIA H100 data sheet, SXM: dense peaks (its TF32 and BF16 are with sparsity, twice these), FP64 of tensor "
        "cores, HBM3; NVLink 900 GB/s in both directions together; 400 Gbit/s a GPU as in DGX H100",
        node=8,
        inside=450e9,
        across=400 * _GBIT,
    ),
    "b200": Hardware(
        "b200",
        {
            "product float32": 80e12,
            "product tf32": 1100e12,
            "product bfloat16": 2250e12,
            "product float64": 40e12,
        },
        {"": 8e12},
        "NVIDIA Blackwell architecture brief, B200 in HGX: dense peaks, HBM3e; NVLink 1.8 TB/s in both directions "
        "together; 400 Gbit/s a GPU as in DGX B200",
        node=8,
        inside=900e9,
        across=400 * _GBIT,
    ),
}


def hardware_of(hardware: str | Hardware, link: float | None = None) -> Hardware:
    """A preset's name, "here" for this machine as it is measured now, or a :class:`Hardware`; with a link in Gbit/s.

    Raises:
        ValueError: for another name, or a link that is no positive number.
    """
    if isinstance(hardware, str):
        if hardware != "here" and hardware not in HARDWARE:
            raise ValueError(f"hardware must be 'here' or one of {', '.join(HARDWARE)}, not {hardware!r}")
        found = measured() if hardware == "here" else HARDWARE[hardware]
    else:
        found = hardware
    if link is None:
        return found
    if not (isinstance(link, (int, float)) and not isinstance(link, bool) and 0 < link < math.inf):
        raise ValueError(f"link must be a positive number of Gbit/s, not {link!r}")
    return replace(found, across=link * _GBIT)


# ---------------------------------------------------------------- measured

#: What rates are measured on: rank, and the two lengths of factors; the sides of what is iterated; of a matrix.
_RANK, _FACTORS, _SIDE, _LONG, _MATRIX = 128, (512, 4096), 512, 2048, (2048, 1024)


@dataclass
class _Bench:
    """Requests of the backend that serves this machine's processors, timed."""

    seconds: float
    clock: Callable[[], float]
    rates: dict[str, float] = field(default_factory=dict)
    bandwidths: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backend = get(choose("auto", torch.device("cpu"), torch.float32)[0])
        self.draws = torch.Generator().manual_seed(0)

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.draws)

    def time(self, f: Callable[[], object]) -> float:
        """The lower quartile of calls, after a first one, for about ``seconds``: a busy neighbour only adds."""
        return quantiles(timed(f, self.seconds, self.clock), n=4)[0]

    def answered(self, q: Request) -> float:
        """Seconds of one request."""
        return self.time(lambda: self.backend.answer([q]))

    def two(self, small: Request, large: Request) -> None:
        """The rates of a kind and of its square, from two requests whose squares are equal: t = flops/rate each."""
        short, long = cost_of(small).costs, cost_of(large).costs
        t, u = self.answered(small), self.answered(large)
        rate = (long[0].flops - short[0].flops) / max(u - t, 1e-9)
        self.rates[f"{short[0].kind} float32"] = rate
        if (rest := t - short[0].flops / rate) > 0.0:
            self.rates[f"{short[1].kind} float32"] = short[1].flops / rest

    def rate(self, kind: Kind, *requests: Request) -> None:
        """Of one kind, over requests that do nothing else."""
        flops = Counter[str]()
        for q in requests:
            for cost in cost_of(q).costs:
                flops[cost.kind] += cost.flops
        self.rates[f"{kind} float32"] = flops[kind] / sum(self.answered(q) for q in requests)


def _matrix(bench: _Bench) -> Matrix:
    x, g, m = (bench.randn(*_MATRIX) for _ in range(3))
    q, _ = torch.linalg.qr(bench.randn(_MATRIX[1], _RANK))
    return Matrix(x, g, {"momentum": m, "Q": q}, _MATRIX, _MATRIX)


def timed(f: Callable[[], object], seconds: float, clock: Callable[[], float]) -> list[float]:
    """The times of calls by a clock, after a first call, for about ``seconds`` of it; five at least."""
    f()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = clock()
        f()
        times.append(clock() - start)
    return times


def measured(seconds: float = 0.3, clock: Callable[[], float] = time.perf_counter) -> Hardware:
    """Processors of this machine: what the backend that serves them makes of each kind of work, with torch's number of
    threads; each of some ten measurements takes ``seconds`` or more by the ``clock``. The link is not measured.
    """
    bench = _Bench(seconds, clock)
    w = _matrix(bench)
    b, q = Blend(w, "momentum", 1.0, 1.0), w.state["Q"]
    p, r = torch.linalg.qr(bench.randn(_MATRIX[0], _RANK))[0], bench.randn(_MATRIX[1], _RANK)
    null = torch.zeros(_RANK, dtype=torch.bool)
    write = LowRankUpdate(b, p, r, q, r, q, 0.0, 0.0, 1.0, (1.0, 0.9), None, null)
    bench.rate("product", Sketch(b, q), Product(b, p), write)
    for kind in ("qr", "polar"):
        # R's columns are nearly orthogonal in a step, and so are these.
        small, large = (Factor(bench.randn(n, _RANK), kind, 64 * 2.0**-24, ALONE, kind) for n in _FACTORS)
        bench.two(small, large)
    coefficients = ((3.4445, -4.7750, 2.0315),) * 5
    square, long = (NewtonSchulz(bench.randn(_SIDE, n), coefficients, Precision()) for n in (_SIDE, _LONG))
    bench.two(square, long)
    d = bench.randn(_SIDE, _SIDE).double()
    bench.rates["product float64"] = 2 * _SIDE**3 / bench.time(lambda: d @ d)
    _passes(bench)
    _one_pass(bench)
    threads = torch.get_num_threads()
    source = f"measured here, {bench.backend.name} backend, {threads} thread{'s' if threads > 1 else ''}"
    return Hardware("here", bench.rates, bench.bandwidths, source)


def _passes(bench: _Bench) -> None:
    """Bandwidths: of a copy, and of torch's operations as bodies have them, whose results take new memory."""
    x, y, rows = bench.randn(*_MATRIX), bench.randn(*_MATRIX), bench.randn(_MATRIX[0], 1)

    def single(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """A mean, a quotient by rows, a check."""
        return (x.lerp(y, 0.1) / rows).isfinite().all()

    def double(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """A conversion, squares, their sums."""
        return x.double().square().sum(1)

    bench.bandwidths[""] = 2 * size_of(x) / bench.time(lambda: x.copy_(y))
    for format, passes in (("float32", single), ("float64", double)):
        work: Counter[Cost] = Counter()
        with Counted(work, False):
            passes(*(t.to("meta") for t in (x, y, rows)))
        moved = sum(n * c.bytes for c, n in work.items())
        bench.bandwidths[f"passes {format}"] = moved / bench.time(partial(passes, x, y, rows))


def _one_pass(bench: _Bench) -> None:
    """Flops a second of a whole elementwise step, if there is one."""
    x, g, m = (bench.randn(1, _MATRIX[0] * _MATRIX[1]) for _ in range(3))
    step: Any = bench.backend.fused.get(Elementwise)
    if step is None:
        return
    w = Matrix(x, g, {"momentum": m}, (1, x.numel()), (1, x.numel()))
    form, kept = Elementwise(0.0, 0.0, False, False, "lion", 0.9, 0.99, 0.0), dict[Any, Any]()
    flops = sum(c.flops for c in cost_of(Update(w, g, 0.0, 0.0, {"momentum": m}), True).costs)
    bench.rates["one pass float32"] = flops / bench.time(lambda: step([w], [form], kept))
