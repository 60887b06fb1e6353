"""Runs the bodies of many matrices side by side, and their requests in few collectives.

A *bucket* of bodies runs until each waits for other ranks. Their requests are laid into one flat buffer for each group
and kind and sent off; while those travel, the next bucket computes. Every rank has the same matrices in the same order
and takes every decision from reduced numbers, so all post the same collectives in the same order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import Group
from .requests import Body, Factorize, Gather, Reduce, Request, Work

__all__ = ["BUCKET_BYTES", "Communicator", "Traffic", "alone", "one_each"]

#: Matrices up to this many bytes travel together.
BUCKET_BYTES = 16 << 20
#: Factorizations are spread over the ranks if padding their shares to one length costs no more than this factor,
_PADDING = 1.25
#: and if that saves each rank so many flops: some milliseconds of a core, which two more collectives take easily.
_WORTH = 2**28

T = TypeVar("T")
#: What a collective does: yields handles to wait for, returns the answers in the order of its requests.
_Course = Generator[Any, None, list[Any]]


@dataclass
class Traffic:
    """Bytes on the wire, ``by_collective`` and ``by_content``, and how many collectives there were.

    The unit is the all-reduce: one of b bytes counts b, a reduce-scatter of b half of that, and so does an all-gather
    of b bytes in all, since a ring all-reduce is one of each. In a ring of w ranks each sends 2(w − 1)/w of the count.
    """

    by_collective: Counter[str] = field(default_factory=Counter)
    by_content: Counter[str] = field(default_factory=Counter)
    collectives: int = 0

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(self.by_collective.values())

    def add(self, collective: str, content: dict[str, int]) -> None:
        """Counts one collective."""
        self.by_collective[collective] += sum(content.values())
        self.by_content.update(content)
        self.collectives += 1

    def __iadd__(self, other: Traffic) -> Traffic:
        self.by_collective.update(other.by_collective)
        self.by_content.update(other.by_content)
        self.collectives += other.collectives
        return self


def alone(request: Request) -> Any:
    """The answer where the group is one rank."""
    if isinstance(request, Reduce):
        return request.tensor
    if isinstance(request, Gather):
        return request.tensor[None]
    return (*request.work(request.tensor), request.tensor)


def one_each(bodies: Sequence[Body[Any]]) -> list[int]:
    """Offsets that put every body into a bucket of its own."""
    return [i * BUCKET_BYTES for i in range(len(bodies))]


class Communicator:
    """Runs bodies; ``reduce_dtype`` rounds factors and gradients on the wire."""

    def __init__(self, reduce_dtype: torch.dtype | None = None) -> None:
        self._reduce_dtype = reduce_dtype
        #: Whether every rank has every matrix. Where stacks are shared out, ranks take unlike numbers of rounds, and
        #: two buckets at a time would post what they have in common in unlike orders.
        self.uniform = True
        #: Since the last step, in the last one, and in all.
        self.traffic, self.last, self.total = Traffic(), Traffic(), Traffic()
        self.steps = 0

    def close_step(self) -> None:
        """Books the traffic so far on the step that ends here."""
        self.last, self.traffic = self.traffic, Traffic()
        self.total += self.last
        self.steps += 1

    def fresh(self) -> Communicator:
        """One like it that has sent nothing."""
        other = Communicator(self._reduce_dtype)
        other.uniform = self.uniform
        return other

    def run(self, bodies: Sequence[Body[T]], offsets: Iterable[int]) -> list[T]:
        """What the bodies return, in their order. ``offsets``: how many bytes come before each one; ascending, and of
        bodies that talk to each other the same on every rank. Those in the same ``BUCKET_BYTES`` travel together.
        """
        # One bucket computes while the other's collectives travel.
        most = 2 if self.uniform else 1
        results: dict[int, T] = {}
        waiting = deque(_Bucket(self, part, results) for part in _cut(list(enumerate(bodies)), list(offsets)))
        flying: deque[_Bucket] = deque()
        while waiting or flying:
            bucket = waiting.popleft() if waiting and len(flying) < most else flying.popleft()
            if bucket.advance():
                flying.append(bucket)
        return [results[i] for i in range(len(bodies))]

    # Each collective is a generator: it posts, yields the handle, and is resumed when that has been waited for.

    def reduce(self, requests: list[Reduce]) -> _Course:
        """One all-reduce for all of them."""
        first = requests[0]
        flat, dtype = self._flat([q.tensor for q in requests], first.rounded), first.tensor.dtype
        self._count("all_reduce", first.group, _numbers(requests), flat)
        op = dist.ReduceOp.MAX if first.op == "max" else dist.ReduceOp.SUM
        yield dist.all_reduce(flat, op=op, group=first.group.handle, async_op=True)
        parts = _split(flat.to(dtype), [q.tensor.shape for q in requests])
        return [t if q.divisor == 1 else t / q.divisor for t, q in zip(parts, requests, strict=True)]

    def gather(self, requests: list[Gather]) -> _Course:
        """One all-gather for all of them."""
        group = requests[0].group
        flat = self._flat([q.tensor for q in requests], False)
        out = flat.new_empty(group.size * flat.numel())
        self._count("all_gather", group, _numbers(requests), flat)
        yield dist.all_gather_into_tensor(out, flat, group=group.handle, async_op=True)
        ranks = [_split(part, [q.tensor.shape for q in requests]) for part in out.view(group.size, -1)]
        return [torch.stack(parts) for parts in zip(*ranks, strict=True)]

    def factorize(self, requests: list[Factorize]) -> _Course:
        """Reduce-scatter to each matrix's owner, the work there, all-gather; or all-reduce, and the work everywhere."""
        group = requests[0].group
        owners = _owners([q.tensor.numel() for q in requests], group.size)
        shares = [[q for q, o in zip(requests, owners, strict=True) if o == rank] for rank in range(group.size)]
        longest = max(sum(q.tensor.numel() for q in share) for share in shares)
        padded = longest * group.size > _PADDING * sum(q.tensor.numel() for q in requests)
        saved = sum(4 * q.tensor.numel() * q.tensor.shape[1] for q in requests) * (1 - 1 / group.size)
        # A factor that was rounded on its way back would not be orthonormal: then only the sums are.
        if self._reduce_dtype is not None or padded or saved < _WORTH:
            plain = [Reduce(q.tensor, group, q.what, q.divisor, rounded=True) for q in requests]
            reduced = yield from self.reduce(plain)
            return [(*q.work(a), a) for q, a in zip(requests, reduced, strict=True)]

        like = requests[0].tensor
        rows = [torch.cat([like.new_empty(0), *(q.tensor.reshape(-1) for q in share)]) for share in shares]
        flat = torch.stack([_padded(row, longest) for row in rows])
        mine = flat.new_empty(longest)
        self._count("reduce_scatter", group, _numbers(requests), flat)
        yield dist.reduce_scatter_tensor(mine, flat.view(-1), group=group.handle, async_op=True)

        own = shares[group.index]
        parts = _split(mine, [q.tensor.shape for q in own])
        done = [_triple(a if q.divisor == 1 else a / q.divisor, q.work) for q, a in zip(own, parts, strict=True)]
        thick = [[q.tensor.shape for q in share] for share in shares]
        # Null flags and T: r + r² numbers a matrix, in double.
        thin = [[torch.Size((s[1] + s[1] ** 2,)) for s in row] for row in thick]
        tall = yield from self._exchange([v for v, _ in done], thick, owners, group, requests[0].what, flat)
        small = yield from self._exchange([x for _, x in done], thin, owners, group, "triangles", flat.double())
        answers = []
        for v, x in zip(tall, small, strict=True):
            r = v.shape[1]
            answers.append((v, x[:r] != 0, v @ x[r:].view(r, r).to(v.dtype)))
        return answers

    def _exchange(
        self,
        tensors: list[Tensor],
        shapes: list[list[torch.Size]],
        owners: list[int],
        group: Group,
        what: str,
        like: Tensor,
    ) -> _Course:
        """An all-gather of what each rank has of its matrices, in the order of the matrices."""
        width = max(sum(shape.numel() for shape in row) for row in shapes)
        flat = _padded(torch.cat([like.new_empty(0), *(t.reshape(-1) for t in tensors)]), width)
        out = like.new_empty(group.size * width)
        self._count("all_gather", group, {what: 1}, flat)
        yield dist.all_gather_into_tensor(out, flat, group=group.handle, async_op=True)
        split = [_split(part, row) for part, row in zip(out.view(group.size, -1), shapes, strict=True)]
        return _in_order(split, owners)

    def _flat(self, tensors: list[Tensor], rounded: bool) -> Tensor:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        return flat.to(self._reduce_dtype) if rounded and self._reduce_dtype is not None else flat

    def _count(self, collective: str, group: Group, numbers: dict[str, int], flat: Tensor) -> None:
        """Shares a buffer's bytes, padding included, out to what is in it."""
        twice = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": group.size}[collective]
        size, total = twice * flat.numel() * flat.element_size() // 2, max(sum(numbers.values()), 1)
        content = {what: size * n // total for what, n in numbers.items()}
        content[next(iter(content))] += size - sum(content.values())
        self.traffic.add(collective, content)


def _numbers(requests: Sequence[Request]) -> dict[str, int]:
    """How many numbers of each content."""
    count = Counter[str]()
    for q in requests:
        count[q.what] += q.tensor.numel()
    return count


def _triple(a: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """V, and null flags with ``T = VᵀA`` behind them: V is a partial isometry, V Vᵀ projects onto its range."""
    v, null = work(a)
    return v, torch.cat([null.double(), (v.double().T @ a.double()).flatten()])


def _padded(t: Tensor, to: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, to - t.numel()))


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = flat[: sum(s.numel() for s in shapes)].split([s.numel() for s in shapes]) if shapes else ()
    return [t.view(s) for t, s in zip(parts, shapes, strict=True)]


def _in_order(split: list[list[Tensor]], owners: list[int]) -> list[Tensor]:
    queues = [iter(parts) for parts in split]
    return [next(queues[o]) for o in owners]


def _owners(sizes: list[int], ranks: int) -> list[int]:
    """Largest first, each to the rank that has the least so far."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = min(range(ranks), key=loads.__getitem__)
        loads[owners[i]] += sizes[i]
    return owners


def _cut(bodies: list[tuple[int, Body[T]]], offsets: list[int]) -> list[list[tuple[int, Body[T]]]]:
    pairs = zip(offsets, bodies, strict=True)
    return [[body for _, body in part] for _, part in groupby(pairs, key=lambda pair: pair[0] // BUCKET_BYTES)]


class _Flight:
    """A collective under way, and the addresses (body, number of its request) that wait for it."""

    def __init__(self, course: _Course, addresses: list[tuple[int, int]]) -> None:
        self.addresses, self.answers = addresses, list[Any]()
        self._course, self._handle = course, next(course)

    def land(self) -> bool:
        """Waits for the present leg; False if another one follows."""
        self._handle.wait()
        try:
            self._handle = self._course.send(None)
        except StopIteration as stop:
            self.answers = stop.value
            return True
        return False


class _Bucket:
    """Bodies that travel together."""

    def __init__(self, comm: Communicator, bodies: list[tuple[int, Body[Any]]], results: dict[int, Any]) -> None:
        self._comm, self._bodies, self._results = comm, dict(bodies), results
        self._flights: list[_Flight] = []
        self._answers: dict[int, list[Any]] = {i: [None] for i in self._bodies}
        self._single: dict[int, bool] = dict.fromkeys(self._bodies, True)

    def advance(self) -> bool:
        """Waits for what is under way, computes on, posts what is asked; False when every body has returned."""
        under_way = []
        for flight in self._flights:
            if not flight.land():
                under_way.append(flight)
                continue
            for (i, k), answer in zip(flight.addresses, flight.answers, strict=True):
                self._answers[i][k] = answer
        self._flights = under_way
        if under_way:
            return True
        wanted: dict[tuple[Any, ...], list[tuple[tuple[int, int], Request]]] = {}
        for i in list(self._bodies):
            for k, request in self._resume(i):
                wanted.setdefault(_key(request), []).append(((i, k), request))
        for entries in wanted.values():
            self._flights.append(_Flight(self._depart([q for _, q in entries]), [a for a, _ in entries]))
        return bool(self._bodies)

    def _depart(self, requests: list[Any]) -> _Course:
        if isinstance(requests[0], Reduce):
            return self._comm.reduce(requests)
        if isinstance(requests[0], Gather):
            return self._comm.gather(requests)
        return self._comm.factorize(requests)

    def _resume(self, i: int) -> list[tuple[int, Request]]:
        """Runs body ``i`` until it needs others; returns what it needs."""
        while True:
            answers = self._answers[i]
            try:
                asked = self._bodies[i].send(answers[0] if self._single[i] else tuple(answers))
            except StopIteration as stop:
                self._results[i] = stop.value
                del self._bodies[i]
                return []
            self._single[i] = not isinstance(asked, tuple)
            requests = asked if isinstance(asked, tuple) else (asked,)
            self._answers[i] = [alone(q) if q.group.size == 1 else None for q in requests]
            if away := [(k, q) for k, q in enumerate(requests) if q.group.size > 1]:
                return away


def _key(q: Request) -> tuple[Any, ...]:
    """Requests with one key travel in one buffer."""
    how = (q.op, q.rounded) if isinstance(q, Reduce) else ()
    return (type(q).__name__, q.group.ranks, q.tensor.dtype, q.tensor.device, *how)
