"""AdamW and Lion on the device, up to 64 tensors a launch."""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...requests import Deferred, Elementwise, Matrix, Outcome, Report
from .arguments import MATRICES, TYPES, counters, pack
from .device import Device, device_for

__all__ = ["elementwise"]

_CHUNK = 4096


def elementwise(matrices: Sequence[Matrix], forms: Sequence[Elementwise], kept: dict[Any, Any]) -> list[Outcome]:
    """The step of each matrix in place (docs/algorithms.md, 6), by [lr, weight_decay] on the device (``rates``). One
    whose gradient holds NaN or infinity is left alone and its flag set; counters of the others advance there.
    """
    outcomes: list[Outcome] = [Report()] * len(matrices)
    groups: dict[Hashable, list[int]] = {}
    for i, (w, form) in enumerate(zip(matrices, forms, strict=True)):
        if w.x.numel():
            assert w.rates is not None, "steps of this backend read learning rates on the device"
            numbers = (form.rule, form.beta1, form.beta2, form.epsilon, form.maximize, form.cautious, form.compensate)
            key = (w.rates.data_ptr(), numbers, w.draws is None, *(t.dtype for t in _views(w, form)))
            groups.setdefault(key, []).append(i)
    if not groups:
        return outcomes
    device, where = device_for(matrices[0].x.device), matrices[0].x.device
    nothing = torch.zeros((), dtype=torch.int32, device=where)
    with device.active():
        for members in groups.values():
            for start in range(0, len(members), MATRICES):
                part = members[start : start + MATRICES]
                flags = _launch(device, [matrices[i] for i in part], forms[part[0]])
                for i, flag in zip(part, flags.unbind(0), strict=True):
                    outcomes[i] = Deferred(flag, nothing)
    written = [t for w, form in zip(matrices, forms, strict=True) for k, t in enumerate(_views(w, form)) if k != 1]
    torch.autograd.graph.increment_version(written)
    return outcomes


def _views(w: Matrix, form: Elementwise) -> tuple[Tensor, ...]:
    """X, G, M, and AdamW's V."""
    views = (w.x, w.g, w.state["momentum"])
    return views if form.rule == "lion" else (*views, w.state["variance"])


def _launch(device: Device, matrices: list[Matrix], form: Elementwise) -> Tensor:
    """Steps up to 64 tensors of one form; the flags of those that were left alone."""
    copied: list[tuple[Tensor, Tensor]] = []
    lists: list[list[int]] = [[], [], [], [], []]
    entries, chunks = list[int](), [0]
    keep_alive = []
    for w in matrices:
        for k, t in enumerate(_views(w, form)):
            if not t.is_contiguous():
                dense = t.contiguous()
                keep_alive.append(dense)
                if k != 1:
                    copied.append((t, dense))
                t = dense
            lists[k].append(t.data_ptr())
        if form.rule == "lion":
            lists[3].append(0)
        lists[4].append(w.state["step"].data_ptr() if "step" in w.state else 0)
        entries.append(w.x.numel())
        chunks.append(chunks[-1] + -(-entries[-1] // _CHUNK))
    packed, first = _tensors(lists, entries, chunks), matrices[0]
    lion, sign = form.rule == "lion", -1.0 if form.maximize else 1.0
    numbers = (float(form.beta1), float(form.beta2), float(form.epsilon), sign, lion, form.cautious)
    shared = pack(first.rates, *numbers, *(TYPES[t.dtype] for t in _views(first, form)[:3]))
    flags = torch.zeros(len(matrices), dtype=torch.int32, device=first.x.device)
    device.launch("find_bad", (chunks[-1],), 256, packed, shared, flags)
    corrections = torch.empty(len(matrices), 2, dtype=torch.float64, device=flags.device)
    if not lion:
        device.launch("advance", (1,), 64, packed, shared, flags, corrections)
    draws = [w.draws for w in matrices]
    drawn = counters(draws)[0] + pack(form.compensate and draws[0] is not None)
    device.launch("elementwise", (chunks[-1],), 256, packed, shared, flags, corrections, drawn)
    for t, dense in copied:
        t.copy_(dense)
    return flags


def _tensors(lists: list[list[int]], entries: list[int], chunks: list[int]) -> bytes:
    """The struct ``Tensors``."""
    short = MATRICES - len(entries)
    words = [w for column in (*lists, entries) for w in (*column, *[0] * short)]
    return struct.pack(f"={6 * MATRICES}q{MATRICES + 2}i", *words, *chunks, *[0] * short, len(entries))
