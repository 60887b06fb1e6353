"""AdamW and Lion on the device, up to 64 tensors a launch."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ...optim.elementwise import Rule
from .arguments import MATRICES, TYPES, pack
from .device import Device, device_for
from .pending import note

__all__ = ["elementwise_step"]

_CHUNK = 4096


def elementwise_step(tensors: Sequence[tuple[tuple[Tensor, ...], Rule]], slots: Sequence[Tensor]) -> None:
    """AdamW (X, G, M, V) or Lion (X, G, M) on 2-D views in place. A tensor whose gradient holds NaN or infinity is left
    alone and its slot set to 1; the others' ``rule.counter`` advances.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (views, rule) in enumerate(tensors):
        if views[0].numel():
            assert rule.hyper is not None
            # The numbers of a group are one tensor; beyond them only formats must agree.
            key = (rule.hyper.data_ptr(), rule.algorithm, *(t.dtype for t in views))
            groups.setdefault(key, []).append(i)
    if not groups:
        return
    device = device_for(tensors[0][0][0].device)
    written: list[Tensor] = []
    with device.active():
        for members in groups.values():
            for start in range(0, len(members), MATRICES):
                part = members[start : start + MATRICES]
                _launch(device, [tensors[i] for i in part], [slots[i] for i in part])
    for views, _ in tensors:
        written.extend(t for k, t in enumerate(views) if k != 1)
    torch.autograd.graph.increment_version(written)


def _launch(device: Device, tensors: list[tuple[tuple[Tensor, ...], Rule]], slots: list[Tensor]) -> None:
    copied: list[tuple[Tensor, Tensor]] = []
    lists: list[list[int]] = [[], [], [], [], []]
    entries, chunks = [], [0]
    keep_alive = []
    for views, rule in tensors:
        for k, t in enumerate(views):
            if not t.is_contiguous():
                dense = t.contiguous()
                keep_alive.append(dense)
                if k != 1:
                    copied.append((t, dense))
                t = dense
            lists[k].append(t.data_ptr())
        if len(views) == 3:
            lists[3].append(0)
        lists[4].append(0 if rule.counter is None else rule.counter.data_ptr())
        entries.append(views[0].numel())
        chunks.append(chunks[-1] + -(-entries[-1] // _CHUNK))
    packed = _tensors(lists, entries, chunks)
    first, rule = tensors[0]
    lion = rule.algorithm == "lion"
    shared = pack(
        rule.hyper,
        float(rule.beta1),
        float(rule.beta2),
        float(rule.epsilon),
        -1.0 if rule.maximize else 1.0,
        lion,
        *(TYPES[t.dtype] for t in first[:3]),
    )
    flags = torch.zeros(len(tensors), dtype=torch.int32, device=first[0].device)
    device.launch("find_bad", (chunks[-1],), 256, packed, shared, flags)
    corrections = torch.empty(len(tensors), 2, dtype=torch.float64, device=flags.device)
    if not lion:
        device.launch("advance", (1,), 64, packed, shared, flags, corrections)
    device.launch("elementwise", (chunks[-1],), 256, packed, shared, flags, corrections)
    note(device, flags, 1, slots)
    for t, dense in copied:
        t.copy_(dense)


def _tensors(lists: list[list[int]], entries: list[int], chunks: list[int]) -> bytes:
    """The struct ``Tensors``."""
    short = MATRICES - len(entries)
    words = [w for column in (*lists, entries) for w in (*column, *[0] * short)]
    return struct.pack(f"={6 * MATRICES}q{MATRICES + 2}i", *words, *chunks, *[0] * short, len(entries))
