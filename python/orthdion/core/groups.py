"""Parameter groups: which rule steps them, what it is told, and their states."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends import choose, passed_over, rust_core_error
from ..distributed import Placed, local, place
from . import gradients, states
from .entries import Entry, has_no_data
from .fold import SHAPE_KEYS, Fold, as_matrix, check_shape_keys, is_view
from .options import names_of, options_of, refuse_unknown, unpack_betas
from .registry import find, register, rules
from .resolved import Resolved
from .rule import Rule
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
        self._rounding = cast(Literal["bfloat16", "tf32"] | None, common.rounding)
        self._backend, self._diagnose = common.backend, bool(common.diagnostics)
        self._start_afresh(common.reduce_dtype)

    def _defaults(self) -> dict[str, Any]:
        """What torch calls the optimizer's defaults: its rule's options, and those of its companions."""
        own = {f.name: f.default for f in fields(self._own)}
        return {"algorithm": self._own.name, **companions(self._own), **own, **self._given}

    # ------------------------------------------------------------------ adding

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and makes its states; see :class:`torch.optim.Optimizer`.

        Raises:
            ValueError: misspelt keys, values out of range, a vector in a group of matrices.
            TypeError: complex or integer parameters.
        """
        group = self._filled(self._named_alike(dict(param_group)))
        before, keys = len(self.param_groups), set(group)
        super().add_param_group(group)
        added = self.param_groups[before]
        for key in added.keys() - keys - {"params", "param_names"}:
            del added[key]  # torch fills in the defaults of other rules
        try:
            self._resolve(before, added, None)
            self._admit(before, added)
        except BaseException:
            del self.param_groups[before:]
            self._resolved.pop(before, None)
            raise

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

    def _admit(self, k: int, group: dict[str, Any]) -> None:
        """Checks every parameter of a new group, then makes all their states."""
        if len({id(p) for p in group["params"]}) < len(group["params"]):
            raise ValueError("a group holds a parameter twice; pass each one once")
        index = sum(len(g["params"]) for g in self.param_groups[:k])
        there = [(p, index + i) for i, p in enumerate(group["params"]) if not is_lazy(p)]
        made = [self._made(p, group, i) for p, i in there]
        self._check_overlap()
        for (p, _), (entry, state) in zip(there, made, strict=True):
            self._entries[id(p)], self.state[p] = entry, state
            self._comm.uniform &= not entry.placed.stack_is_shared(entry.fold is not None and entry.fold.stacked)

    def _made(self, p: Tensor, group: dict[str, Any], index: int) -> tuple[Entry, dict[str, Tensor]]:
        """A parameter's entry and first states, if it can be stepped."""
        name = self._name(p)
        if p.dtype not in gradients.FLOATS:
            raise TypeError(f"{name} has dtype {p.dtype}; only real floating-point parameters can be stepped")
        if p.layout != torch.strided:
            raise TypeError(f"{name} is sparse; make it dense (embedding: sparse=False)")
        self._warn_of_a_fallback(p)
        kind, rule = find(group["algorithm"]), self._rule(self._position(group), group)
        fold, sides = self._fold(p, group, kind, name), states.Sides((), ())
        placed = self._placed(p, fold, name)
        if fold is not None:
            sides = states.Sides.of(fold, rule)
        layout = states.stored(fold, rule, sides, (name, p, placed))
        seed = None if has_no_data(p) else self._seed
        state = states.initial(p, fold, sides, placed, layout, self._formats, seed, index)
        return self._entered(p, group, kind, rule, placed, fold, sides, index), state

    def _warn_of_a_fallback(self, p: Tensor) -> None:
        """Once for each device, where the backend that is made for it cannot serve."""
        name, _ = choose(self._backend, p.device, p.dtype)  # refuses what nobody serves
        if self._backend != "auto" or p.device.type in self._warned:
            return
        if why := passed_over(p.device, p.dtype):
            self._warned.add(p.device.type)
            warnings.warn(
                f"{self._name(p)} on {p.device} is stepped by {name}, which is slower: {'; '.join(why)}. "
                f"backend={name!r} says that this is meant",
                stacklevel=7,
            )

    def _fold(self, p: Tensor, group: dict[str, Any], kind: type[Rule], name: str) -> Fold | None:
        if kind.elementwise:
            return None
        try:
            return Fold.of(p.shape, group)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None

    def _placed(self, p: Tensor, fold: Fold | None, name: str) -> Placed:
        placed = place(p, name, None if fold is None else fold.roles, self._meshes.replicas)
        self._meshes.check(name, placed)
        return placed

    def _entered(
        self,
        p: Tensor,
        group: dict[str, Any],
        kind: type[Rule],
        rule: Rule,
        placed: Placed,
        fold: Fold | None,
        sides: states.Sides,
        index: int,
    ) -> Entry:
        """The entry; over replicas, factors travel if they are smaller than the gradient (section 7)."""
        at = placed.layout
        if at.replicas.size > 1 and kind.averages_factors and fold is not None:
            factors = sum((m + fold.cols) * r for m, r in zip(fold.sizes, sides.ranks, strict=True))
            at = replace(at, compressed=factors < fold.rows * fold.cols)
        self._spread |= at.whole.size > 1
        if (why := rule.unsupported(at)) is not None:
            raise ValueError(f"{self._name(p)}: {why}")
        size = p.numel() * p.element_size() // at.shards.size
        return Entry(p, group, kind, index, placed, fold, at, size, has_no_data(p))

    def _entry(self, p: Tensor, group: dict[str, Any]) -> Entry:
        """A parameter's entry; made where there is none, as after unpickling, or for a parameter that has been put into
        the group since.
        """
        known = self._entries.get(id(p))
        if known is not None and known.p is p:
            return known
        kind, k, index = find(group["algorithm"]), self._position(group), self._index(p, group)
        if p not in self.state or not self.state[p]:
            entry, state = self._made(p, group, index)
            self.state[p] = cast(Any, state)
        else:
            name, rule = self._name(p), self._rule(k, group)
            fold, sides = self._fold(p, group, kind, name), states.Sides((), ())
            if fold is not None:
                sides = states.Sides.read_off(fold, rule, self.state[p])
            entry = self._entered(p, group, kind, rule, self._placed(p, fold, name), fold, sides, index)
        self._entries[id(p)] = entry
        return entry

    def _index(self, p: Tensor, group: dict[str, Any]) -> int:
        """The parameter's number, which seeds its start."""
        before = sum(len(g["params"]) for g in self.param_groups[: self._position(group)])
        return before + next(i for i, q in enumerate(group["params"]) if q is p)

    def reset_state(self, p: Tensor) -> None:
        """Starts a parameter's states afresh, in place of ones that hold NaN or do not fit. Every rank must call it.

        Raises:
            ValueError: if the optimizer does not have the parameter.
        """
        for group in self.param_groups:
            if any(q is p for q in group["params"]):
                self._entries[id(p)], state = self._made(p, group, self._index(p, group))
                self.state[p] = cast(Any, state)
                return
        raise ValueError(f"the optimizer does not have a parameter of shape {tuple(p.shape)} that is this one")

    def _check_overlap(self) -> None:
        """Refuses parameters that share memory: one step would write over the other's."""
        params = [p for g in self.param_groups for p in g["params"] if not (is_lazy(p) or has_no_data(p))]
        if (pair := _overlap(params)) is not None:
            a, b = map(self._name, pair)
            raise ValueError(
                f"parameters {a} and {b} share memory; give the optimizer one of them, or the whole tensor"
            )

    def _check_gradients_overlap(self) -> None:
        """Refuses a gradient that is its own weight or state, by name.

        Raises:
            ValueError: with the remedy.
        """
        for group in self.param_groups:
            for p in group["params"]:
                others = [t for t in self.state[p].values() if isinstance(t, Tensor)]
                if p.grad is not None and any(_overlap([p.grad, t]) for t in (p, *others)):
                    raise ValueError(
                        f"the gradient of {self._name(p)} shares memory with the parameter or one of its states; give "
                        "it memory of its own: p.grad = p.grad.clone()"
                    )

    # ------------------------------------------------------------------ options, as they are now

    def _rules(self) -> dict[int, Rule]:
        """Every group's rule, by the identity of the group; what was edited since the last step is checked."""
        return {id(group): self._rule(k, group) for k, group in enumerate(self.param_groups)}

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


def _overlap(tensors: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Two CPU tensors of which one's entries are the other's; None if there are none, or no core to find them."""
    from ..backends.table import operands

    if rust_core_error() is not None:
        return None
    from .. import _core

    views, owners = [], []
    for t in tensors:
        here = local(t.detach())
        if here.device.type == "cpu" and here.ndim > 0 and here.numel():
            matrix = here[None] if here.ndim == 1 else as_matrix(here, here)
            if is_view(matrix, here):
                views.append(matrix)
                owners.append(t)
    pair = _core.overlap(operands(*views)) if views else None
    return None if pair is None else (owners[pair[0]], owners[pair[1]])


def _apart_from_rates(rule: Rule) -> Rule:
    return replace(rule, lr=0.0, weight_decay=0.0)
