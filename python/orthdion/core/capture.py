"""What lives on a device from step to step besides states: learning rates, and which steps were skipped."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rates", "Skips", "is_capturing"]


def is_capturing(device: torch.device) -> bool:
    """Whether launches are being recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Rates:
    """``[lr, weight_decay]`` of each group in device memory, where steps read them, captured ones too."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device], tuple[Tensor, list[Any]]] = {}

    def of(self, index: int, group: dict[str, Any], device: torch.device) -> Tensor:
        """The group's numbers, brought up to date. While a graph is captured only tensors on the device are followed:
        plain numbers would be frozen into it.
        """
        key = (index, device)
        if key not in self._made:
            self._made[key] = (torch.zeros(2, dtype=torch.float64, device=device), [None, None])
        there, last = self._made[key]
        for i, name in enumerate(("lr", "weight_decay")):
            value = group[name]
            if isinstance(value, Tensor) and value.device == device:
                there[i].copy_(value.detach().reshape(()))
                last[i] = None
            elif not is_capturing(device) and last[i] != (number := float(value)):
                there[i].fill_(number)
                last[i] = number
        return there


class Skips:
    """How often parameters were left alone because something was not finite, counted where that is known.

    ``owner`` has ``param_groups`` and names parameters (``_name``); it is not kept alive from here.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)
        self.counts: Counter[str] = Counter()
        self._slots: dict[Tensor, Tensor] = {}
        #: Of each device: whose slots they are, this step's flags, all steps' sums, and the last total that arrived.
        self._books: dict[torch.device, tuple[list[Tensor], Tensor, Tensor, Tensor]] = {}
        self._warned = False

    def forget(self, p: Tensor) -> None:
        """Lets go of a parameter that has left; what was counted stays."""
        self._slots.pop(p, None)

    def slot(self, p: Tensor) -> Tensor:
        """An int32 on the parameter's device that a skipped step sets to 1."""
        if p not in self._slots or self._slots[p].device != p.device:
            self.read()
            mine = [q for g in self._owner().param_groups for q in g["params"] if q.device == p.device]  # type: ignore[union-attr]
            flags = torch.zeros(len(mine), dtype=torch.int32, device=p.device)
            arrived = torch.zeros(1, dtype=torch.int64, device="cpu")
            if p.device.type == "cuda":
                arrived = arrived.pin_memory()
            self._books[p.device] = (mine, flags, torch.zeros_like(flags, dtype=torch.int64), arrived)
            self._slots |= dict(zip(mine, flags.unbind(0), strict=True))
        return self._slots[p]

    def close_step(self) -> bool:
        """Books the step's flags without waiting; whether a device is known to have skipped something by now."""
        known = False
        for device, (_, flags, sums, arrived) in self._books.items():
            sums += flags
            flags.zero_()
            if not is_capturing(device):
                arrived.copy_(sums.sum().reshape(1), non_blocking=True)
                # On a GPU the copy may be under way, and this the sum that an earlier step sent: either will do.
                known |= bool(arrived[0] > 0)
        return known

    def news(self) -> bool:
        """True once: somebody has to be told of skipped steps."""
        self._warned, before = True, self._warned
        return not before

    def read(self) -> Counter[str]:
        """The counts by parameter. Waits for the devices."""
        for mine, flags, sums, _ in self._books.values():
            sums += flags  # of a step that is under way
            flags.zero_()
            for p, n in zip(mine, sums.tolist(), strict=True):
                if n:
                    self.counts[self._owner()._name(p)] += n  # type: ignore[union-attr]
            sums.zero_()
        return Counter(self.counts)
