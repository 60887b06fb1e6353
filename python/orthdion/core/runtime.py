"""Runs the bodies of many matrices side by side, and has what they ask for answered together.

A *bucket* of bodies runs until each waits for other ranks. On the way, whatever they ask of their own rank is
collected, and requests of one key are answered by one call of the backend. What they ask of other ranks is laid into
one flat buffer for each group and kind and sent off; while that travels, the next bucket computes. Every rank has the
same matrices in the same order and takes every decision from reduced numbers, so all post the same collectives in the
same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from ..backends import Backend
from ..distributed import Communicator
from ..distributed.collectives import Course
from ..requests import Body, Gather, Reduce, Request, Whole

__all__ = ["BUCKET_BYTES", "Runtime", "one_each"]

#: Matrices up to this many bytes travel together.
BUCKET_BYTES = 16 << 20

T = TypeVar("T")
#: A body's number, and the place of one of the requests that it waits for.
_Address = tuple[int, int]


def one_each(bodies: Sequence[Body[Any]]) -> list[int]:
    """Offsets that put every body into a bucket of its own."""
    return [i * BUCKET_BYTES for i in range(len(bodies))]


class Runtime:
    """A communicator and a backend; bodies that ask for no computation need none."""

    def __init__(self, comm: Communicator, backend: Backend | None = None) -> None:
        self.comm, self._backend = comm, backend

    def run(self, bodies: Sequence[Body[T]], offsets: Iterable[int], together: int = 0) -> list[T]:
        """What the bodies return, in their order. ``offsets``: how many bytes come before each one; ascending, and of
        bodies that talk to each other the same on every rank. Those in the same ``BUCKET_BYTES`` travel together, or in
        so many as ``together`` says, where that is more.
        """
        # One bucket computes while the other's collectives travel.
        most = 2 if self.comm.uniform else 1
        results: dict[int, T] = {}
        waiting = deque(_Bucket(self, part, results) for part in _cut(bodies, offsets, together))
        flying: deque[_Bucket] = deque()
        while waiting or flying:
            bucket = waiting.popleft() if waiting and len(flying) < most else flying.popleft()
            if bucket.advance():
                flying.append(bucket)
        return [results[i] for i in range(len(bodies))]

    def compute(self, requests: list[Request]) -> list[Any]:
        """The answers of this rank's backend, in the order of the requests."""
        together: dict[Hashable, list[int]] = {}
        assert self._backend is not None or not requests, "a body asked for a computation without a backend"
        for i, q in enumerate(requests):
            together.setdefault(self._backend.key(q), []).append(i)  # type: ignore[union-attr]
        answers: list[Any] = [None] * len(requests)
        for members in together.values():
            found = self._backend.answer([requests[i] for i in members])  # type: ignore[union-attr]
            for i, answer in zip(members, found, strict=True):
                answers[i] = answer
        return answers


def _cut(bodies: Sequence[Body[T]], offsets: Iterable[int], together: int) -> list[list[tuple[int, Body[T]]]]:
    pairs, size = zip(offsets, enumerate(bodies), strict=True), max(together, BUCKET_BYTES)
    return [[body for _, body in part] for _, part in groupby(pairs, key=lambda pair: pair[0] // size)]


class _Flight:
    """A collective under way, and the addresses that wait for it."""

    def __init__(self, course: Course, addresses: list[_Address]) -> None:
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

    def __init__(self, runtime: Runtime, bodies: list[tuple[int, Body[Any]]], results: dict[int, Any]) -> None:
        self._runtime, self._bodies, self._results = runtime, dict(bodies), results
        self._flights: list[_Flight] = []
        self._answers: dict[int, list[Any]] = {i: [None] for i in self._bodies}
        self._single: dict[int, bool] = dict.fromkeys(self._bodies, True)

    def advance(self) -> bool:
        """Waits for what is under way, computes on, posts what is asked; False when every body has returned."""
        under_way = []
        for flight in self._flights:
            if flight.land():
                self._take(flight.addresses, flight.answers)
            else:
                under_way.append(flight)
        self._flights = under_way
        if under_way:
            return True
        away: dict[Hashable, list[tuple[_Address, Request]]] = {}
        ready = list(self._bodies)
        while ready:
            here: list[tuple[_Address, Request]] = []
            for i in ready:
                for address, request in self._resume(i):
                    if request.away:
                        away.setdefault(_buffer(request), []).append((address, request))
                    else:
                        here.append((address, request))
            self._take([a for a, _ in here], self._runtime.compute([q for _, q in here]))
            # A body that also waits for other ranks goes on when they have answered.
            elsewhere = {i for entries in away.values() for (i, _), _ in entries}
            ready = [i for i in dict.fromkeys(i for (i, _), _ in here) if i not in elsewhere]
        for entries in away.values():
            course = self._runtime.comm.course([q for _, q in entries], self._runtime.compute)
            self._flights.append(_Flight(course, [a for a, _ in entries]))
        return bool(self._bodies)

    def _take(self, addresses: list[_Address], answers: list[Any]) -> None:
        for (i, k), answer in zip(addresses, answers, strict=True):
            self._answers[i][k] = answer

    def _resume(self, i: int) -> list[tuple[_Address, Request]]:
        """Runs body ``i`` until it needs what must be computed or asked of others; returns that."""
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
            self._answers[i] = [None] * len(requests)
            wanted: list[tuple[_Address, Request]] = []
            for k, q in enumerate(requests):
                if not q.away and isinstance(q, (Reduce, Gather)):
                    self._answers[i][k] = q.tensor if isinstance(q, Reduce) else q.tensor[None]
                else:
                    wanted.append(((i, k), q.work(q.tensor) if isinstance(q, Whole) and not q.away else q))
            if wanted:
                return wanted


def _buffer(q: Any) -> Hashable:
    """Requests with one key travel in one buffer."""
    how = (q.op, q.rounded) if isinstance(q, Reduce) else ()
    return (type(q), q.group.ranks, q.tensor.dtype, q.tensor.device, *how)
