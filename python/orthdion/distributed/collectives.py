"""Requests of many matrices answered by few collectives: one flat buffer for each group and kind.

A collective is a *course*: a generator that posts, yields the handle, is resumed when that has been waited for, and
returns the answers in the order of its requests. What an owner computes between two collectives is asked of
``compute``, which answers a list of requests as the runtime does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..requests import (
    ALONE,
    Average,
    AverageChanges,
    CompressedMean,
    Factor,
    Gather,
    Group,
    Pack,
    PackChange,
    Reduce,
    Request,
    Unpack,
    Whole,
)
from .traffic import Traffic, elements

__all__ = ["Communicator", "Course", "Traffic"]

#: Factorizations are spread over the ranks if padding their shares to one length costs no more than this factor,
_PADDING = 1.25
#: and if that saves each rank so many flops: some milliseconds of a core, which two more collectives take easily.
WORTH = 2**28

Course = Generator[Any, None, list[Any]]
Compute = Callable[[list[Request]], list[Any]]


class Communicator:
    """Posts collectives and counts them; ``reduce_dtype`` rounds factors and gradients on the wire."""

    def __init__(self, reduce_dtype: torch.dtype | None = None) -> None:
        self.reduce_dtype = reduce_dtype
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
        other = Communicator(self.reduce_dtype)
        other.uniform = self.uniform
        return other

    def course(self, requests: list[Any], compute: Compute) -> Course:
        """The course of requests of one kind and group."""
        if isinstance(requests[0], Reduce):
            return self.reduce(requests)
        if isinstance(requests[0], Gather):
            return self.gather(requests)
        if isinstance(requests[0], CompressedMean):
            return self.compressed_mean(requests, compute)
        if isinstance(requests[0], Whole):
            return self.whole(requests, compute)
        return self.factor(requests, compute)

    def reduce(self, requests: list[Reduce]) -> Course:
        """One all-reduce for all of them."""
        first = requests[0]
        flat, dtype = self._flat([q.tensor for q in requests], first.rounded), first.tensor.dtype
        self._count("all_reduce", first.group, elements(requests), flat)
        op = dist.ReduceOp.MAX if first.op == "max" else dist.ReduceOp.SUM
        yield self._all_reduce(flat, op, first.group)
        parts = _split(flat.to(dtype), [q.tensor.shape for q in requests])
        return [t if q.divisor == 1 else t / q.divisor for t, q in zip(parts, requests, strict=True)]

    def gather(self, requests: list[Gather]) -> Course:
        """One all-gather for all of them."""
        group = requests[0].group
        flat = self._flat([q.tensor for q in requests], False)
        out = flat.new_empty(group.size * flat.numel())
        self._count("all_gather", group, elements(requests), flat)
        yield self._all_gather(out, flat, group)
        ranks = [_split(part, [q.tensor.shape for q in requests]) for part in out.view(group.size, -1)]
        return [torch.stack(parts) for parts in zip(*ranks, strict=True)]

    def compressed_mean(self, requests: list[CompressedMean], compute: Compute) -> Course:
        """All-to-all of packed rows to their owners, who average and pack again; all-gather of what they have."""
        group, like = requests[0].group, requests[0].tensor
        found = compute([_compressed(q) for q in requests])
        packed = [one if q.memory is None else one[0] for one, q in zip(found, requests, strict=True)]
        cuts = [[even_cut(len(rows), group.size, rank) for rows in packed] for rank in range(group.size)]
        sent = torch.cat([rows[a:b].reshape(-1) for cut in cuts for rows, (a, b) in zip(packed, cut, strict=True)])
        #: Bytes that each rank owns.
        sizes = [sum((b - a) * rows.shape[1] for (a, b), rows in zip(cut, packed, strict=True)) for cut in cuts]
        content, own = elements(requests), cuts[group.index]

        arrived = sent.new_empty(group.size * sizes[group.index])
        self._count("all_to_all", group, content, sent)
        back = [sizes[group.index]] * group.size
        yield self._all_to_all(arrived, sent, back, sizes, group)

        jobs: list[Request] = []
        first, every = 0, arrived.view(group.size, -1)
        for q, rows, (a, b) in zip(requests, packed, own, strict=True):
            width = (b - a) * rows.shape[1]
            part = every[:, first : first + width].reshape(group.size, b - a, rows.shape[1])
            if q.memory is None:
                jobs.append(Average(part, q.tensor.shape[1], q.bits, like.dtype))
            else:
                jobs.append(AverageChanges(part, q.tensor[a:b], q.memory[a:b], group.index, q.bits, q.fade))
            first += width
        owned = compute(jobs)
        means = torch.cat(
            [(one if q.memory is None else one[0]).reshape(-1) for one, q in zip(owned, requests, strict=True)]
        )

        out = sent.new_empty(group.size * max(sizes))
        mine = _padded(means, max(sizes))
        self._count("all_gather", group, content, mine)
        yield self._all_gather(out, mine, group)
        shares = [
            _split(part, [torch.Size((b - a, rows.shape[1])) for rows, (a, b) in zip(packed, cut, strict=True)])
            for part, cut in zip(out.view(group.size, -1), cuts, strict=True)
        ]
        whole = [torch.cat(rows) for rows in zip(*shares, strict=True)]
        answers = compute(
            [Unpack(rows, q.tensor.shape[1], q.bits, like.dtype) for q, rows in zip(requests, whole, strict=True)]
        )
        for k, (q, (a, b)) in enumerate(zip(requests, own, strict=True)):
            if q.memory is not None:
                memory = found[k][1]
                memory[a:b] = owned[k][1]
                answers[k] = answers[k], memory
        return answers

    def factor(self, requests: list[Factor], compute: Compute) -> Course:
        """Reduce-scatter to each matrix's owner, the work there, all-gather; or all-reduce, and the work everywhere."""
        group = requests[0].group
        owners = balanced([q.tensor.numel() for q in requests], group.size)
        shares = [[q for q, o in zip(requests, owners, strict=True) if o == rank] for rank in range(group.size)]
        longest = max(sum(q.tensor.numel() for q in share) for share in shares)
        padded = longest * group.size > _PADDING * sum(q.tensor.numel() for q in requests)
        saved = sum(4 * q.tensor.numel() * q.tensor.shape[1] for q in requests) * (1 - 1 / group.size)
        # A factor that was rounded on its way back would not be orthonormal: then only the sums are.
        if self.reduce_dtype is not None or padded or saved < WORTH:
            plain = [Reduce(q.tensor, group, q.what, q.divisor, rounded=True) for q in requests]
            reduced = yield from self.reduce(plain)
            return compute([_here(q, a) for q, a in zip(requests, reduced, strict=True)])

        like = requests[0].tensor
        rows = [torch.cat([like.new_empty(0), *(q.tensor.reshape(-1) for q in share)]) for share in shares]
        flat = torch.stack([_padded(row, longest) for row in rows])
        mine = flat.new_empty(longest)
        self._count("reduce_scatter", group, elements(requests), flat)
        yield self._reduce_scatter(mine, flat.view(-1), group)

        own = shares[group.index]
        sums = zip(own, _split(mine, [q.tensor.shape for q in own]), strict=True)
        done = compute([_here(q, a if q.divisor == 1 else a / q.divisor) for q, a in sums])
        thick = [[q.tensor.shape for q in share] for share in shares]
        # Null flags and T: r + r² numbers a matrix, in double.
        thin = [[torch.Size((s[1] + s[1] ** 2,)) for s in row] for row in thick]
        tall = yield from self._exchange([v for v, _, _ in done], thick, owners, group, requests[0].what, flat)
        small = [_flags_and_triangle(*d) for d in done]
        small = yield from self._exchange(small, thin, owners, group, "triangles", flat.double())
        answers = []
        for v, x in zip(tall, small, strict=True):
            r = v.shape[1]
            answers.append((v, x[:r] != 0, v @ x[r:].view(r, r).to(v.dtype)))
        return answers

    def whole(self, requests: list[Whole], compute: Compute) -> Course:
        """All-to-all of the parts to each matrix's owner, the work there, all-to-all of the results' parts."""
        group, like = requests[0].group, requests[0].tensor
        owners = balanced([q.w.shape[0] * q.w.shape[1] * min(q.w.shape) for q in requests], group.size)
        extents = [_extents(q) for q in requests]
        here = [i for i, o in enumerate(owners) if o == group.index]
        #: Who is sent how many elements on the way there, and on the way back.
        out = [sum(requests[i].tensor.numel() for i, o in enumerate(owners) if o == k) for k in range(group.size)]
        back = [sum(_area(extents[i][k]) for i in here) for k in range(group.size)]
        order = sorted(range(len(requests)), key=owners.__getitem__)
        content = elements(requests)

        sent = torch.cat([like.new_empty(0), *(requests[i].tensor.reshape(-1) for i in order)])
        arrived = like.new_empty(sum(back))
        self._count("all_to_all", group, content, sent)
        yield self._all_to_all(arrived, sent, back, out, group)

        wholes = [like.new_zeros(requests[i].w.shape) for i in here]
        for part, k in zip(arrived.split(back), range(group.size), strict=True):
            pieces = part.split([_area(extents[i][k]) for i in here])
            for whole, i, piece in zip(wholes, here, pieces, strict=True):
                target = _piece(whole, extents[i][k])
                target.copy_(piece.view(target.shape))
        done = compute([requests[i].work(whole) for i, whole in zip(here, wholes, strict=True)])

        parts = [
            _piece(result.to(like.dtype), extents[i][k]).reshape(-1)
            for k in range(group.size)
            for i, result in zip(here, done, strict=True)
        ]
        sent, arrived = torch.cat([like.new_empty(0), *parts]), like.new_empty(sum(out))
        self._count("all_to_all", group, content, sent)
        yield self._all_to_all(arrived, sent, out, back, group)
        answers: dict[int, Tensor] = {}
        for i, piece in zip(order, arrived.split([requests[i].tensor.numel() for i in order]), strict=True):
            answers[i] = piece.view(requests[i].tensor.shape)
        return [answers[i] for i in range(len(requests))]

    def _exchange(
        self,
        tensors: list[Tensor],
        shapes: list[list[torch.Size]],
        owners: list[int],
        group: Group,
        what: str,
        like: Tensor,
    ) -> Course:
        """An all-gather of what each rank has of its matrices, in the order of the matrices."""
        width = max(sum(shape.numel() for shape in row) for row in shapes)
        flat = _padded(torch.cat([like.new_empty(0), *(t.reshape(-1) for t in tensors)]), width)
        out = like.new_empty(group.size * width)
        self._count("all_gather", group, {what: 1}, flat)
        yield self._all_gather(out, flat, group)
        split = [_split(part, row) for part, row in zip(out.view(group.size, -1), shapes, strict=True)]
        return _in_order(split, owners)

    # What is posted, and nothing else: a planner counts without posting. Each returns what can be waited for.

    def _all_reduce(self, flat: Tensor, op: Any, group: Group) -> Any:
        return dist.all_reduce(flat, op=op, group=group.handle, async_op=True)

    def _all_gather(self, out: Tensor, flat: Tensor, group: Group) -> Any:
        return dist.all_gather_into_tensor(out, flat, group=group.handle, async_op=True)

    def _reduce_scatter(self, out: Tensor, flat: Tensor, group: Group) -> Any:
        return dist.reduce_scatter_tensor(out, flat, group=group.handle, async_op=True)

    def _all_to_all(self, out: Tensor, sent: Tensor, to_come: list[int], to_go: list[int], group: Group) -> Any:
        return dist.all_to_all_single(out, sent, to_come, to_go, group=group.handle, async_op=True)

    def _flat(self, tensors: list[Tensor], rounded: bool) -> Tensor:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        return flat.to(self.reduce_dtype) if rounded and self.reduce_dtype is not None else flat

    def _count(self, collective: str, group: Group, numbers: dict[str, int], flat: Tensor) -> None:
        """Shares a buffer's bytes, padding included, out to what is in it."""
        halves = {"all_reduce": 2, "reduce_scatter": 1, "all_to_all": 1, "all_gather": group.size}[collective]
        size, total = halves * flat.numel() * flat.element_size() // 2, max(sum(numbers.values()), 1)
        content = {what: size * n // total for what, n in numbers.items()}
        content[next(iter(content))] += size - sum(content.values())
        self.traffic.add(collective, content)


def even_cut(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Which rows of a matrix a rank owns: as many as any other, or one more."""
    return rows * rank // ranks, rows * (rank + 1) // ranks


def _compressed(q: CompressedMean) -> Request:
    return Pack(q.tensor, q.bits) if q.memory is None else PackChange(q.tensor, q.memory, q.bits, q.fade)


def _here(q: Factor, a: Tensor) -> Factor:
    """The same of a tensor that is whole here."""
    return Factor(a, q.kind, q.tol, ALONE, q.what)


def _flags_and_triangle(v: Tensor, null: Tensor, a: Tensor) -> Tensor:
    """Null flags with ``T = VᵀA`` behind them: V is a partial isometry, V Vᵀ projects onto its range."""
    return torch.cat([null.double(), (v.double().T @ a.double()).flatten()])


def _padded(t: Tensor, to: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, to - t.numel()))


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = flat[: sum(s.numel() for s in shapes)].split([s.numel() for s in shapes]) if shapes else ()
    return [t.view(s) for t, s in zip(parts, shapes, strict=True)]


def _in_order(split: list[list[Tensor]], owners: list[int]) -> list[Tensor]:
    queues = [iter(parts) for parts in split]
    return [next(queues[o]) for o in owners]


def _extents(q: Whole) -> list[tuple[int, int, int, int]]:
    assert q.w.extents is not None, "a sharded matrix knows where its parts lie"
    return q.w.extents()


def _area(extent: tuple[int, int, int, int]) -> int:
    top, bottom, left, right = extent
    return (bottom - top) * (right - left)


def _piece(whole: Tensor, extent: tuple[int, int, int, int]) -> Tensor:
    top, bottom, left, right = extent
    return whole[top:bottom, left:right]


def balanced(work: Sequence[int], ranks: int) -> list[int]:
    """An owner for each piece of work: largest first, each to the rank that has the least so far."""
    loads, owners = [0] * ranks, [0] * len(work)
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        owners[i] = min(range(ranks), key=loads.__getitem__)
        loads[owners[i]] += work[i]
    return owners
