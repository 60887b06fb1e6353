"""Hyperparameters: what a group may say, and the errors for what it may not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["FEEDBACK", "check_group", "feedback_numbers", "number"]

ALGORITHMS = ("dion", "adamw", "lion")
RIGHT_FACTORS = ("qr", "column", "polar")
TAILS = ("feedback", "linear", "normalized")

#: Published forms of the error feedback ``M ← a·(B − P Rᵀ) + b·P Rᵀ`` by μ (docs/algorithms.md, section 3).
FEEDBACK: dict[str, Callable[[float], tuple[float, float]]] = {
    "dion": lambda mu: (1.0, mu),
    "orth-dion": lambda mu: (mu, 0.0),
    "pure": lambda mu: (1.0, 0.0),
    "momentum": lambda mu: (mu, mu),
}

#: Keys that torch, its schedulers and our grouping put into groups.
_FOREIGN = {
    *("params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
    *("step", "name", "oversample"),  # the last one is microsoft/dion's and means nothing here
}


def number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Refuses what is no finite number in [low, high], or (low, high] if ``open_low``."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, not a tensor of shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    inside = low < value <= high if open_low else low <= value <= high
    if not math.isfinite(value) or not inside:
        bracket = "(" if open_low else "["
        top = "∞)" if math.isinf(high) else f"{high:g}]"
        raise ValueError(f"{name} must be in {bracket}{low:g}, {top}, but it is {value}")


def _one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but it is {value!r}{hint}")


def feedback_numbers(feedback: Any, mu: float) -> tuple[float, float]:
    """``(a, b)`` of a published form's name or of two numbers.

    Raises:
        ValueError: for an unknown name or numbers outside [0, 1].
    """
    if isinstance(feedback, str):
        _one_of("feedback", feedback, FEEDBACK)
        return FEEDBACK[feedback](mu)
    try:
        a, b = feedback
    except (TypeError, ValueError):
        raise TypeError(
            f"feedback must be a name ({', '.join(FEEDBACK)}) or two numbers (a, b), not {feedback!r}"
        ) from None
    number("feedback's a", a, 0.0, 1.0)
    number("feedback's b", b, 0.0, 1.0)
    return float(a), float(b)


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Checks keys and values of a parameter group (defaults filled in or not).

    Raises:
        ValueError: naming the key, its value and what it may be.
        TypeError: for a value of the wrong kind.
    """
    for key in group:
        if key not in defaults and key not in _FOREIGN and key != "betas":
            near = difflib.get_close_matches(key, [*defaults, "betas"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(defaults))}"
            raise ValueError(f"unknown parameter group key {key!r}{hint}")
    g = {**defaults, **group}
    _one_of("algorithm", g["algorithm"], ALGORITHMS)
    number("lr", g["lr"], 0.0)
    number("mu", g["mu"], 0.0, 1.0)
    for beta in ("beta1", "beta2"):
        number(beta, g[beta], 0.0, 1.0)
        if g[beta] == 1.0:
            raise ValueError(f"{beta} must be below 1")
    number("weight_decay", g["weight_decay"], 0.0)
    number("epsilon", g["epsilon"], 0.0)
    number("rank_fraction", g["rank_fraction"], 0.0, 1.0, open_low=True)
    for key in ("rank_multiple_of", "row_blocks"):
        if isinstance(g[key], bool) or not isinstance(g[key], int):
            raise TypeError(f"{key} must be a whole number, not {g[key]!r}")
        number(key, g[key], 1)
    number("tail_scale", g["tail_scale"], 0.0)
    _one_of("tail", g["tail"], TAILS)
    if g["right_factor"] is not None:
        _one_of("right_factor", g["right_factor"], RIGHT_FACTORS)
    if g["feedback"] is not None:
        feedback_numbers(g["feedback"], float(g["mu"]))
    for key in ("nesterov", "flatten"):
        if g[key] is not None and not isinstance(g[key], bool):
            raise TypeError(f"{key} must be True, False or None, not {g[key]!r}")
    if not isinstance(g["maximize"], bool):
        raise TypeError(f"maximize must be True or False, not {g['maximize']!r}")


def unpack_betas(group: dict[str, Any]) -> None:
    """Replaces ``betas`` by ``beta1`` and ``beta2``, in place."""
    if "betas" not in group:
        return
    betas = group.pop("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, not {betas!r}")
    number("betas[0]", betas[0], 0.0, 1.0)
    number("betas[1]", betas[1], 0.0, 1.0)
    group["beta1"], group["beta2"] = betas
