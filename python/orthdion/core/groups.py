"""Parameter groups: which rule steps them, what it is told, and their states."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..backends import choose, rust_core_error
from ..distributed import Placed, local, place, roles
from . import gradients, matrices, states
from .entries import Entry
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
_SHAPE_KEYS = ("flatten", "row_blocks")


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
        group = self._filled(dict(param_group))
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

    def _filled(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group with every option of its rule."""
        name = group.get("algorithm", MATRIX)
        rule = self._own if name in (MATRIX, self._own.name) else find(name)
        group["algorithm"] = rule.name
        unpack_betas(group)
        refuse_unknown(group, (*names_of(rule), *_SHAPE_KEYS, "algorithm", "betas"), self.defaults)
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
            "flatten": None,
            "row_blocks": 1,
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
        made = [self._made(p, group, index + i) for i, p in enumerate(group["params"])]
        self._check_overlap()
        for p, (entry, state) in zip(group["params"], made, strict=True):
            self._entries[id(p)], self.state[p] = entry, state
            self._comm.uniform &= not entry.placed.stack_is_shared(p.ndim, group["flatten"])

    def _made(self, p: Tensor, group: dict[str, Any], index: int) -> tuple[Entry, dict[str, Tensor]]:
        """A parameter's entry and first states, if it can be stepped."""
        name = self._name(p)
        if p.dtype not in gradients.FLOATS:
            raise TypeError(f"{name} has dtype {p.dtype}; only real floating-point parameters can be stepped")
        if p.layout != torch.strided:
            raise TypeError(f"{name} is sparse; make it dense (embedding: sparse=False)")
        choose(self._backend, p.device, p.dtype)
        kind, rule = find(group["algorithm"]), self._rule(self._position(group), group)
        placed, start, r, flip = self._placed(p, group, kind, name), None, 0, False
        if not kind.elementwise:
            try:
                count, m, n = matrices.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
            r, flip = rule.rank(m, n), states.orientation(p, group, kind)
            sides = {"rows": n if flip else m, "cols": m if flip else n}
            for spec in kind.states.values():
                if spec.start == "orthonormal":
                    start = matrices.start((count, sides[spec.axes[0]], r), self._seed, index)
        layout = states.specs(name, p, group, placed, kind, r, flip)
        state = states.initial(p, kind, placed, layout, start, self._formats)
        return self._entered(p, group, kind, rule, placed, r, index), state

    def _placed(self, p: Tensor, group: dict[str, Any], kind: type[Rule], name: str) -> Placed:
        of = None if kind.elementwise else roles(p.ndim, group["flatten"])
        placed = place(p, name, of, self._meshes.replicas)
        self._meshes.check(name, placed)
        return placed

    def _entered(
        self, p: Tensor, group: dict[str, Any], kind: type[Rule], rule: Rule, placed: Placed, r: int, index: int
    ) -> Entry:
        """The entry; over replicas, factors travel if they are smaller than the gradient (section 7)."""
        at = placed.layout
        if at.replicas.size > 1 and kind.averages_factors:
            _, m, n = matrices.matrix_shape(p.shape, group["flatten"], group["row_blocks"])
            at = replace(at, compressed=(m + n) * r < m * n)
        if (why := rule.unsupported(at)) is not None:
            raise ValueError(f"{self._name(p)}: {why}")
        size = p.numel() * p.element_size() // at.shards.size
        return Entry(p, group, kind, index, placed, at, size)

    def _entry(self, p: Tensor, group: dict[str, Any]) -> Entry:
        """A parameter's entry; made where there is none, as after unpickling, or for a parameter that has been put into
        the group since.
        """
        known = self._entries.get(id(p))
        if known is not None and known.p is p:
            return known
        kind, k = find(group["algorithm"]), self._position(group)
        before = sum(len(g["params"]) for g in self.param_groups[:k])
        index = before + next(i for i, q in enumerate(group["params"]) if q is p)
        if p not in self.state or not self.state[p]:
            entry, state = self._made(p, group, index)
            self.state[p] = cast(Any, state)
        else:
            ranked = states.ranked_of(kind, self.state[p])
            placed, r = self._placed(p, group, kind, self._name(p)), 0 if ranked is None else ranked.shape[-1]
            entry = self._entered(p, group, kind, self._rule(k, group), placed, r, index)
        self._entries[id(p)] = entry
        return entry

    def _check_overlap(self) -> None:
        """Refuses parameters that share memory: one step would write over the other's."""
        from ..backends.table import operands

        if rust_core_error() is not None:
            return
        from .. import _core

        views, names = [], []
        for group in self.param_groups:
            for p in group["params"]:
                here = local(p.detach())
                if here.device.type == "cpu" and here.ndim > 0 and here.numel():
                    matrix = here[None] if here.ndim == 1 else matrices.as_matrix(here, here)
                    if matrices.is_view(matrix, here):
                        views.append(matrix)
                        names.append(p)
        if (pair := _core.overlap(operands(*views)) if views else None) is not None:
            a, b = (self._name(names[i]) for i in pair)
            raise ValueError(
                f"parameters {a} and {b} share memory; give the optimizer one of them, or the whole tensor"
            )

    # ------------------------------------------------------------------ options, as they are now

    def _rules(self) -> dict[int, Rule]:
        """Every group's rule, by the identity of the group; what was edited since the last step is checked."""
        return {id(group): self._rule(k, group) for k, group in enumerate(self.param_groups)}

    def _rule(self, k: int, group: dict[str, Any]) -> Rule:
        known = self._resolved.get(k)
        if known is not None and known.group is group and not known.live and len(group) == known.size:
            try:
                if [group[name] for name in known.names] == known.values:
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
        refuse_unknown(group, (*names_of(kind), *_SHAPE_KEYS, "algorithm", "betas"))
        options = options_of(kind)
        if before is not None and before.group is group:
            self._refuse_structural(k, group, before)
        plain: dict[str, Any] = {}
        for name, option in options.items():
            if name not in group:
                raise ValueError(f"group {k} has lost its key {name!r}; put it back")
            value = group[name]
            if isinstance(value, Tensor) and value.device.type != "cpu":
                plain[name] = float("nan")  # read on the device
                continue
            group[name] = option.check(name, value)
            plain[name] = float(value) if isinstance(value, Tensor) else group[name]
        _check_shape_keys(group)
        rule = kind(**plain)
        rule.check()
        names = (*options, *_SHAPE_KEYS, "algorithm")
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


def _check_shape_keys(group: dict[str, Any]) -> None:
    blocks, flatten = group["row_blocks"], group["flatten"]
    if isinstance(blocks, bool) or not isinstance(blocks, int):
        raise TypeError(f"row_blocks must be a whole number, not {blocks!r}")
    if blocks < 1:
        raise ValueError(f"row_blocks must be at least 1, but it is {blocks}")
    if flatten is not None and not isinstance(flatten, bool):
        raise TypeError(f"flatten must be True, False or None, not {flatten!r}")
