"""Rules by name: ours, and those that a program brings along."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

from .options import options_of
from .rule import Rule

__all__ = ["find", "register", "rules"]

_RULES: dict[str, type[Rule]] = {}

R = TypeVar("R", bound=type[Rule])


def register(rule: R) -> R:
    """Makes a rule known by its name: in groups (``algorithm=``), checkpoints and on the command line. A decorator.

    Raises:
        TypeError: for a rule without a name, or with fields that are no options.
        ValueError: if another rule has that name.
    """
    if not rule.name:
        raise TypeError(f"{rule.__name__} needs a name: a class attribute name = …")
    options_of(rule)
    known = _RULES.get(rule.name)
    if known is not None and (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
        raise ValueError(
            f"a rule is called {rule.name!r} already: {known.__module__}.{known.__qualname__}; rename yours"
        )
    _RULES[rule.name] = rule
    return rule


def rules() -> dict[str, type[Rule]]:
    """All registered rules."""
    return dict(_RULES)


def find(name: str, among: Iterable[str] | None = None) -> type[Rule]:
    """The rule of this name.

    Raises:
        ValueError: suggesting the nearest.
    """
    if isinstance(name, str) and name in _RULES:
        return _RULES[name]
    known = sorted(_RULES if among is None else among)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"algorithm must be one of {', '.join(map(repr, known))}, but it is {name!r}{hint}")
