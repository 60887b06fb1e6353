"""A rule's own body, run on tensors that hold no numbers, by the runtime that steps real ones: requests are answered
with shapes, collectives are counted and not posted.

A body is run once for each kind of matrix: what it asks for is kept, and matrices of the same shape, layout and options
ask for it again without running it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..distributed import Communicator
from ..requests import Body, CompressedMean, Factor, Form, Gather, Group, Reduce, Request, Whole
from .costs import Cost, cost_of

__all__ = ["Counted", "CountingBackend", "CountingCommunicator", "Sent", "Tally", "Trace", "traced"]

Tally = Counter[Cost]
_aten = torch.ops.aten


class Counted(TorchDispatchMode):
    """Counts what bodies compute in plain torch, operation by operation, and answers the host's questions.

    Products and factorisations cost their flops; everything else is a pass over what it reads and writes. Numbers that
    a body asks of a tensor without any are those of an ordinary step: no flag is up, and a number is 1.
    """

    def __init__(self, work: Tally, fused: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._work, self._fused = work, fused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return {torch.bool: False}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        out = func(*args, **kwargs)
        inputs = [t for t in _tensors((args, kwargs)) if t.is_meta]
        outputs = [t for t in _tensors(out) if t.is_meta]
        if not outputs or _is_view(func, inputs, outputs):
            return out
        self._work[self._cost(func, inputs, outputs)] += 1
        return out

    def _cost(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Cost:
        own = "float64" if outputs[0].dtype == torch.float64 else "float32"
        # A fused step keeps in registers and caches what a body writes to memory.
        moved = 0 if self._fused else sum(_touched(t) for t in (*inputs, *outputs))
        flops = _PRODUCTS.get(func.overloadpacket)
        if flops is not None:
            return Cost("product", own, flops(inputs, outputs), moved)
        return Cost("passes", own, max(t.numel() for t in (*inputs, *outputs)), moved)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for one in found.values():
            yield from _tensors(one)
    elif isinstance(found, (tuple, list)):
        for one in found:
            yield from _tensors(one)


def _touched(t: Tensor) -> int:
    """Bytes of what a tensor's strides reach: of an expanded one, once."""
    numbers = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return numbers * t.element_size() if t.numel() else 0


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether nothing is read or written: a view, or memory that is only taken."""
    if func.overloadpacket in (_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided):
        return True
    if func._schema.is_mutable:
        return False
    there = {t.untyped_storage()._cdata for t in inputs}
    return all(t.untyped_storage()._cdata in there for t in outputs)


def _mm(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Of (…, m, k) and (…, k, n), which come last."""
    return 2 * outputs[0].numel() * inputs[-2].shape[-1]


def _qr(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    m, n = inputs[0].shape[-2:]
    return 4 * max(m, n) * min(m, n) ** 2 * math.prod(inputs[0].shape[:-2])


def _svd(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Golub and Van Loan's count for U, Σ and V of a tall matrix."""
    m, n = sorted(inputs[0].shape[-2:], reverse=True)
    return (14 * m * n * n + 8 * n**3) * math.prod(inputs[0].shape[:-2])


def _fft(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """2.5·N·log₂(n) for N real numbers transformed n at a time; n is the last axis."""
    n = max(inputs[0].shape[-1], 2)
    return int(2.5 * inputs[0].numel() * math.log2(n))


#: Operations that are no passes, by what they are counted as.
_PRODUCTS: dict[Any, Callable[[list[Tensor], list[Tensor]], int]] = {
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm), _mm),
    **dict.fromkeys((_aten.mv, _aten.addmv), lambda i, o: 2 * i[-2].numel()),
    **dict.fromkeys((_aten.linalg_qr, _aten.geqrf), _qr),
    **dict.fromkeys((_aten._linalg_svd, _aten._linalg_eigh), _svd),
    **dict.fromkeys((_aten._fft_r2c, _aten._fft_c2c, _aten._fft_c2r), _fft),
}


# ---------------------------------------------------------------- bodies


class _Answered(Request):
    """Stands where a body has asked its own rank, and has been answered."""

    def key(self) -> Hashable:
        """All of one kind."""
        return _Answered


_DONE = _Answered()


@dataclass
class Trace:
    """What bodies of one kind ask for, round by round, and what they cost on the way."""

    rounds: list[tuple[Request, ...]] = field(default_factory=list)
    work: Tally = field(default_factory=Counter)

    def again(self) -> Body[None]:
        """A body that asks other ranks for the same, in the same rounds."""
        yield from (asked for asked in self.rounds)  # a generator takes the answers that are sent


def traced(body: Body[Any], fused: bool) -> Trace:
    """Runs a body to its end, and keeps what it asks of other ranks; what it asks of its own is counted.

    ``fused``: a backend has this step in one piece.

    Raises:
        ValueError: for a body that cannot run on tensors without numbers, or that makes a request of unknown cost.
    """
    try:
        return _traced(body, fused)
    except (RuntimeError, NotImplementedError) as e:
        raise ValueError(
            f"its step cannot be counted: on tensors of the device 'meta', which hold no numbers, it raises {e} "
            "Tensors that a step makes need the device of the matrix, as in torch.arange(n, device=w.gradient.device)"
        ) from e


def _traced(body: Body[Any], fused: bool) -> Trace:
    trace = Trace()
    counter = Counted(trace.work, fused)
    answers: Any = None
    while True:
        try:
            with counter:
                asked = body.send(answers)
        except StopIteration:
            return trace
        requests = asked if isinstance(asked, tuple) else (asked,)
        found = []
        for q in requests:
            if q.away:
                found.append(_from_others(q))
            elif isinstance(q, (Reduce, Gather)):
                found.append(q.tensor if isinstance(q, Reduce) else q.tensor[None])
            else:
                with counter:
                    answered = cost_of(q.work(q.tensor) if isinstance(q, Whole) else q, fused)
                trace.work.update(answered.costs)
                found.append(answered.answer)
        trace.rounds.append(tuple(q if q.away else _DONE for q in requests))
        answers = tuple(found) if isinstance(asked, tuple) else found[0]


def _from_others(q: Any) -> Any:
    """The shape of what other ranks answer; what that costs is counted where it is asked."""
    if isinstance(q, Gather):
        return q.tensor.new_empty(q.group.size, *q.tensor.shape)
    if isinstance(q, (Factor, CompressedMean)):
        return cost_of(q).answer
    if isinstance(q, (Reduce, Whole)):
        return torch.empty_like(q.tensor)
    raise NotImplementedError(
        f"nobody has said what shape other ranks' answer to {type(q).__name__} has, so no rule that makes it can be "
        "planned; say so in orthdion/plan/counting.py"
    )


class CountingBackend:
    """Answers what owners are asked to compute between two collectives."""

    name = "counting"
    deferred = False
    fused: Mapping[type[Form], Any] = {}
    together = 0
    unasked: Mapping[torch.dtype, Any] = {}

    def __init__(self) -> None:
        self.work: Tally = Counter()

    def key(self, request: Request) -> Hashable:
        """Each class on its own: nothing is saved by more."""
        return type(request).__name__

    def answer(self, requests: list[Any]) -> list[Any]:
        """Shapes."""
        if requests[0] is _DONE:
            return [None] * len(requests)
        found = []
        with Counted(self.work, False):
            for q in requests:
                answered = cost_of(q)
                self.work.update(answered.costs)
                found.append(answered.answer)
        return found


class Sent(NamedTuple):
    """One collective: over which ranks, and its bytes in units of an all-reduce."""

    collective: str
    group: Group
    bytes: int


class _Landed:
    """A collective that nobody waits for."""

    def wait(self) -> None:
        """At once."""


class CountingCommunicator(Communicator):
    """The communicator of real steps, which counts as they do, with nothing posted."""

    def __init__(self, reduce_dtype: torch.dtype | None = None) -> None:
        super().__init__(reduce_dtype)
        self.sent: Counter[Sent] = Counter()

    def _all_reduce(self, flat: Tensor, op: Any, group: Group) -> _Landed:
        return _Landed()

    def _all_gather(self, out: Tensor, flat: Tensor, group: Group) -> _Landed:
        return _Landed()

    def _reduce_scatter(self, out: Tensor, flat: Tensor, group: Group) -> _Landed:
        return _Landed()

    def _all_to_all(self, out: Tensor, sent: Tensor, to_come: list[int], to_go: list[int], group: Group) -> _Landed:
        return _Landed()

    def _count(self, collective: str, group: Group, numbers: dict[str, int], flat: Tensor) -> None:
        before = self.traffic.bytes
        super()._count(collective, group, numbers, flat)
        self.sent[Sent(collective, group, self.traffic.bytes - before)] += 1
