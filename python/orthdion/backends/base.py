"""What a backend is, which ones there are, and who serves what."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from ..requests import Form, Matrix, Outcome, Request, Rounding

__all__ = ["Backend", "Entry", "Fused", "choose", "entries", "get", "register"]


class Fused(Protocol):
    """A whole step in one piece: steps every matrix in place by its form, and tells what happened to each.

    ``kept`` belongs to the caller and lives as long as its matrices are stepped: room for tables of them.
    """

    def __call__(self, matrices: Sequence[Matrix], forms: Sequence[Form], kept: dict[Any, Any], /) -> Sequence[Outcome]:
        """Steps them."""
        ...


class Backend(Protocol):
    """Answers requests about matrices that lie on one rank.

    ``fused`` has whole steps by the type of their form; the rules' own bodies serve where there is none, and the tests
    hold one to the other.
    """

    name: str
    fused: Mapping[type[Form], Fused]
    #: What products of weights of a format are rounded to where nobody has said anything (``compute_dtype=None``).
    unasked: Mapping[torch.dtype, Rounding]
    #: Bytes of matrices that are best stepped together where none lies on several ranks; 0: it makes no difference.
    together: int
    #: Whether steps read learning rates on the device (``Matrix.rates``) and leave flags there.
    deferred: bool

    def key(self, request: Request, /) -> Hashable:
        """Requests with equal keys come in one call of :meth:`answer`."""
        ...

    def answer(self, requests: list[Any], /) -> list[Any]:
        """The answers to requests of one key, in their order."""
        ...


@dataclass(frozen=True)
class Entry:
    """A registered backend.

    Attributes:
        name: what ``backend=`` says.
        serves: what it is for, in words.
        devices: types of devices that ``backend="auto"`` takes it for; None is all. Of several the last registered is
            taken.
        why_not: why tensors of a device and dtype cannot be served, or None if they can.
        make: makes it, once.
    """

    name: str
    serves: str
    devices: tuple[str, ...] | None
    why_not: Callable[[torch.device, torch.dtype], str | None]
    make: Callable[[], Backend]


_ENTRIES: dict[str, Entry] = {}


def register(entry: Entry) -> None:
    """Makes a backend known; one of the same name is replaced."""
    _ENTRIES[entry.name] = entry
    choose.cache_clear()
    get.cache_clear()


def entries() -> dict[str, Entry]:
    """All of them, by name."""
    return dict(_ENTRIES)


@cache
def get(name: str) -> Backend:
    """The backend of this name."""
    return _ENTRIES[name].make()


@cache
def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that serves tensors of this device and dtype, and the reason.

    Raises:
        ValueError: if ``name`` is unknown or names a backend that cannot serve them.
    """
    if name != "auto":
        entry = _ENTRIES.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, _ENTRIES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(map(repr, ("auto", *_ENTRIES)))
            raise ValueError(f"backend must be one of {known}, not {name!r}{hint}")
        why_not = entry.why_not(device, dtype)
        if why_not is not None:
            raise ValueError(f"backend={name!r} cannot serve these parameters: {why_not}; use backend='auto'")
        return name, entry.serves
    found, reasons = _search(device, dtype)
    if found is None:
        raise ValueError(f"no backend serves {dtype} on {device}: {'; '.join(reasons)}")
    return found.name, "; ".join([found.serves, *reasons])


def passed_over(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why backends that are made for this device do not serve it, where another one does."""
    return _search(device, dtype)[1]


def _search(device: torch.device, dtype: torch.dtype) -> tuple[Entry | None, list[str]]:
    reasons: list[str] = []
    for entry in reversed(_ENTRIES.values()):
        if entry.devices is None or device.type in entry.devices:
            why_not = entry.why_not(device, dtype)
            if why_not is None:
                return entry, reasons
            reasons.append(why_not)
    return None, reasons
