"""Parameter groups: which rule steps them, and what it is told."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, cast

from torch import Tensor

from . import states
from .fold import SHAPE_KEYS, check_shape_keys
from .options import names_of, options_of, refuse_unknown, unpack_betas
from .registry import find, register, rules
from .resolved import Resolved
from .rule import OF_MATRICES, Rule
from .saving import SavedOptimizer
from .signature import Common, companions

__all__ = ["MATRIX", "Groups"]

#: The algorithm of groups that the optimizer's own rule steps.
MATRIX = "matrix"
#: Options that groups of every rule take from the optimizer's constructor.
_SHARED = ("lr", "weight_decay", "maximize")


class Groups(SavedOptimizer):
    """The part of an optimizer that knows its groups."""

    def _begin(self, rule: type[Rule], common: Common, given: dict[str, Any]) -> None:
        """What an optimizer has that is no part of its state. ``given`` are the options that the caller named."""
        self._own = rule if rule.name in rules() else register(rule)
        checks = {n: o for r in (self._own, *rules().values()) for n, o in options_of(r).items()}
        checks.update(options_of(self._own))
        self._given = {name: checks[name].check(name, value) for name, value in given.items()}
        self._seed = int(common.seed)
        self._formats = states.Formats(common.momentum_dtype, common.q_dtype)
        self._rounding = common.rounding
        self._backend, self._diagnose = common.backend, bool(common.diagnostics)
        self._start_afresh(common.reduce_dtype)

    def _defaults(self) -> dict[str, Any]:
        """What torch calls the optimizer's defaults: its rule's options, and those of its companions."""
        own = {f.name: f.default for f in fields(self._own)}
        return {"algorithm": self._own.name, **companions(self._own), **own, **self._given}

    # ------------------------------------------------------------------ what a group is given

    def _named_alike(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group, its parameters a list; with names if the others have them, as torch wants all or none."""
        params = group.get("params", [])
        group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        has = "param_names" in group or any(isinstance(p, tuple) for p in params)
        if not self.param_groups or has == ("param_names" in self.param_groups[0]):
            return group
        if has:
            raise ValueError(
                "this optimizer's parameters have no names: add the group without param_names, or build the optimizer "
                "from named groups (orthdion.param_groups(model))"
            )
        k = len(self.param_groups)
        return {**group, "param_names": [f"group {k}, parameter {i}" for i in range(len(params))]}

    def _filled(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group with every option of its rule."""
        name = group.get("algorithm", MATRIX)
        rule = self._own if name in (MATRIX, self._own.name) else find(name)
        group["algorithm"] = rule.name
        unpack_betas(group)
        refuse_unknown(group, (*names_of(rule), *SHAPE_KEYS, "algorithm", "betas"), self.defaults)
        filled = {f.name: f.default for f in fields(rule)}
        for f in fields(rule):
            if rule.elementwise and not self._own.elementwise and f.name in OF_MATRICES:
                continue
            if f.name in self._given or (f.name in _SHARED and f.name in self.defaults):
                filled[f.name] = self.defaults[f.name]
        own = {k: v for k, v in group.items() if k in filled}
        for option, value in own.items():
            own[option] = options_of(rule)[option].check(option, value)
        filled = cast(dict[str, Any], rule.resolve({**filled, **own}))
        rest = {k: v for k, v in group.items() if k not in filled and k not in self.defaults}
        return {
            **SHAPE_KEYS,
            **rest,
            "algorithm": rule.name,
            **filled,
            "step": group.get("step", 0),
        }

    # ------------------------------------------------------------------ options, as they are now

    def _rules(self) -> dict[int, Rule]:
        """Every group's rule, by the identity of the group; what was edited since the last step is checked."""
        return {id(group): self._rule(k, group) for k, group in enumerate(self.param_groups)}

    def _settle_ranks(self) -> None:
        """Gives the parameters of rules that adapt the ranks that the last step's figures call for."""
        if self._ranks:
            self._ranks.settle(self._entries, self.state, self._rules(), self._seed)

    def _rule(self, k: int, group: dict[str, Any]) -> Rule:
        known = self._resolved.get(k)
        if known is not None and known.group is group and not known.live and len(group) == known.size:
            try:
                values = [group[name] for name in known.names]
                if not any(isinstance(v, Tensor) for v in values) and values == known.values:
                    return known.rule
            except KeyError as e:
                raise ValueError(f"group {k} has lost its key {e}; put it back") from None
        return self._resolve(k, group, known)

    def _resolve(self, k: int, group: dict[str, Any], before: Resolved | None) -> Rule:
        """Makes the group's rule from its keys.

        Raises:
            ValueError, TypeError: for what an option may not be, or one that states depend on.
        """
        kind = find(group["algorithm"])
        unpack_betas(group)
        refuse_unknown(group, (*names_of(kind), *SHAPE_KEYS, "algorithm", "betas"))
        options = options_of(kind)
        if before is not None and before.group is group:
            self._refuse_structural(k, group, before)
        if lost := [name for name in (*options, *SHAPE_KEYS) if name not in group]:
            raise ValueError(f"group {k} has lost its key {lost[0]!r}; put it back")
        plain: dict[str, Any] = {}
        for name, option in options.items():
            value = group[name]
            if isinstance(value, Tensor) and value.device.type != "cpu":
                if name not in ("lr", "weight_decay"):
                    raise TypeError(
                        f"{name} of group {k} is a tensor on {value.device}; only lr and weight_decay are read there: "
                        f"group[{name!r}] = float({name})"
                    )
                plain[name] = float("nan")  # read on the device
                continue
            group[name] = option.check(name, value)
            plain[name] = float(value) if isinstance(value, Tensor) else group[name]
        check_shape_keys(group)
        rule = kind(**plain)
        rule.check()
        names = (*options, *SHAPE_KEYS, "algorithm")
        values = [group[name] for name in names]
        live = any(isinstance(v, Tensor) for v in values)
        if before is None or _apart_from_rates(rule) != _apart_from_rates(before.rule):
            for entry in self._entries.values():
                if entry.group is group:
                    entry.forget()
        self._resolved[k] = Resolved(group, names, values, len(group), rule, live)
        return rule

    def _position(self, group: dict[str, Any]) -> int:
        return next(k for k, g in enumerate(self.param_groups) if g is group)

    def _refuse_structural(self, k: int, group: dict[str, Any], before: Resolved) -> None:
        options = options_of(type(before.rule))
        for name, old in zip(before.names, before.values, strict=True):
            fixed = name not in options or options[name].structural
            if fixed and group.get(name) != old:
                raise ValueError(
                    f"{name} of group {k} was edited from {old!r} to {group.get(name)!r}, but its states were made for "
                    f"{old!r}; build a new optimizer with it, or put it back"
                )


def _apart_from_rates(rule: Rule) -> Rule:
    return replace(rule, lr=0.0, weight_decay=0.0)
