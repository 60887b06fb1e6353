"""A rule's options, written once: its dataclass fields are group keys, constructor keywords, checks, errors and docs.

A field is made by :func:`number`, :func:`whole`, :func:`flag`, :func:`choice` or :func:`option`, which say what it may
be and what it means.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from torch import Tensor

from .fold import SHAPE_KEYS

__all__ = [
    "FOREIGN",
    "Option",
    "check_number",
    "choice",
    "flag",
    "names_of",
    "number",
    "one_of",
    "option",
    "options_of",
    "pair",
    "refuse_unknown",
    "unpack_betas",
    "whole",
]

#: Group keys of torch, its schedulers, and frameworks that put their own into every group. They mean nothing here.
FOREIGN = frozenset(
    {
        *("params", "param_names", "algorithm", *SHAPE_KEYS, "step", "name"),
        *("initial_lr", "max_lr", "min_lr", "base_lr", "base_momentum", "max_momentum", "swa_lr"),
        *("fused", "foreach", "capturable", "differentiable", "lr_scale", "lr_mult", "wd_mult", "rho", "oversample"),
        *("use_fallback", "fix_step", "layer_decay", "group_name", "decoupled_weight_decay"),
    }
)

#: What other libraries call our options.
_SYNONYMS = {
    "learning_rate": "lr",
    "eta": "lr",
    "momentum": "mu",
    "eps": "epsilon",
    "wd": "weight_decay",
    "rank": "rank_fraction",
}

Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Option:
    """What a field may be, what it means, and whether states depend on it, so that it cannot be edited later. ``here``:
    it belongs to where a run is, not to what it has learnt, so that a checkpoint's is not loaded.
    """

    check: Check
    doc: str
    structural: bool = False
    here: bool = False


def option(default: Any, check: Check, doc: str, structural: bool = False, here: bool = False) -> Any:
    """A field with a check of its own: called with the name and the value, it returns what is kept, or raises."""
    return field(default=default, metadata={"option": Option(check, doc, structural, here)})


def number(
    default: float,
    low: float,
    high: float = math.inf,
    *,
    doc: str,
    open_low: bool = False,
    open_high: bool = False,
    structural: bool = False,
) -> Any:
    """A field that is a number in [low, high], without ``low`` or ``high`` where that is open."""

    def check(name: str, value: Any) -> Any:
        return check_number(name, value, low, high, open_low=open_low, open_high=open_high)

    return option(default, check, doc, structural)


def whole(default: int, low: int, *, doc: str, structural: bool = False) -> Any:
    """A field that is a whole number of at least ``low``."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
        return int(check_number(name, int(value), low))

    return option(default, check, doc, structural)


def flag(default: bool, *, doc: str, structural: bool = False) -> Any:
    """A field that is True or False."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")
        return value

    return option(default, check, doc, structural)


def choice(default: Any, *choices: Any, doc: str) -> Any:
    """A field that is one of some strings, or None if that is among them."""

    def check(name: str, value: Any) -> Any:
        if value is None and None in choices:
            return None
        return one_of(name, value, [c for c in choices if c is not None])

    return option(default, check, doc)


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> Any:
    """The value, as a float unless it is whole or a tensor, which is read at each step.

    Raises:
        TypeError: for what is no number. ValueError: for what is not finite, or out of range.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, not a tensor of shape {tuple(value.shape)}")
        kept: Any = value
        value = value.item()
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    else:
        # NumPy's numbers would not survive torch.load(weights_only=True).
        kept = value = int(value) if isinstance(value, numbers.Integral) else float(value)
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not math.isfinite(value) or not inside:
        top = "∞)" if math.isinf(high) else f"{high:g}" + (")" if open_high else "]")
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low:g}, {top}, but it is {value}")
    return kept


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """The value, if it is one of the choices.

    Raises:
        ValueError: suggesting the nearest.
    """
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but it is {value!r}{hint}")
    return value


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Two of something, from any sequence (a list of OmegaConf, a NumPy array).

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or hasattr(value, "__array__")):
        raise TypeError(f"{name} must be two numbers, not {value!r}")
    found = tuple(value)
    if len(found) != 2:
        raise TypeError(f"{name} must be two numbers, not {value!r}")
    return found


def options_of(rule: type[Any]) -> dict[str, Option]:
    """A rule's options by name.

    Raises:
        TypeError: for a field that was not made by one of this module's functions.
    """
    found = {}
    for f in fields(rule):
        if "option" not in f.metadata or f.default is MISSING:
            raise TypeError(
                f"{rule.__name__}.{f.name} is no option; give it a default, a check and a meaning: "
                f'{f.name}: float = number(0.1, 0.0, doc="…")'
            )
        found[f.name] = f.metadata["option"]
    return found


def names_of(rule: type[Any]) -> tuple[str, ...]:
    """The names of a rule's options."""
    return tuple(f.name for f in fields(rule))


def refuse_unknown(group: Mapping[str, Any], known: Iterable[str], everywhere: Iterable[str] = ()) -> None:
    """Refuses keys that resemble one of ours; others may be a framework's own, and pass.

    ``known`` are the options of the group's rule, ``everywhere`` those of others, which it does not have.

    Raises:
        ValueError: with the suggestion.
    """
    known = tuple(known)
    for key in group:
        if key in known or key in FOREIGN or key in everywhere:
            continue
        meant = _SYNONYMS.get(key)
        near = [meant] if meant in known else difflib.get_close_matches(str(key), known, n=1, cutoff=0.7)
        if near:
            raise ValueError(f"unknown parameter group key {key!r}; did you mean {near[0]!r}?")


def unpack_betas(group: dict[str, Any]) -> None:
    """Replaces ``betas`` by ``beta1`` and ``beta2``, in place.

    Raises:
        TypeError: for anything but two numbers. ValueError: for numbers out of range.
    """
    if "betas" in group:
        first, second = pair("betas", group["betas"])
        first = check_number("betas[0]", first, 0.0, 1.0, open_high=True)
        second = check_number("betas[1]", second, 0.0, 1.0, open_high=True)
        del group["betas"]
        group["beta1"], group["beta2"] = first, second
