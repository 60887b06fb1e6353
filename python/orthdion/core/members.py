"""An optimizer's parameters: how they are met, what is made for them, and that they may be replaced.

Wrappers that shard a model make new parameters and put them into the groups of an optimizer that was built before. So
whatever a group holds is a member: at ``step``, ``state_dict`` and ``load_state_dict`` one that was not met before is
placed and gets the states that it would have had at construction, and what has left is dropped.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends import choose, passed_over, rust_core_error
from ..distributed import Placed, local, place
from ..requests import Layout
from . import gradients, states
from .entries import Entry, has_no_data
from .fold import Fold, as_matrix, is_view
from .groups import Groups
from .registry import find
from .rule import Rule
from .saving import Member

__all__ = ["Members", "compressed"]


class Members(Groups):
    """The part of an optimizer that knows its parameters."""

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
            self._take_up([m for m in self._members() if m.group is added and not is_lazy(m.p)])
        except BaseException:
            del self.param_groups[before:]
            self._resolved.pop(before, None)
            raise

    def _meet(self, quiet: bool = False) -> None:
        """Takes up what groups hold that was not met before, and drops what has left; every rank must come here.

        ``quiet``: states that are lost are not told of, as others are about to be loaded.
        """
        members = self._members()
        here = {id(m.p) for m in members}
        new = [m for m in members if self._unmet(m) and not is_lazy(m.p)]
        gone = [p for p in self.state if isinstance(p, Tensor) and id(p) not in here]
        moved = {id(m.p) for m in new if self._has_other_states(m)}
        if new:
            self._take_up(new)
        for p in gone:
            del self.state[p]
            self._skips.forget(p)
        for i in self._entries.keys() - here:
            del self._entries[i]
        steps = max((int(m.group["step"]) for m in new), default=0)
        if steps and not quiet and (moved or gone):
            count = len(moved) or len(new)
            warnings.warn(
                f"{count} parameters were put into their groups after {steps} steps"
                + (f", in place of {len(gone)} others" if gone else ", by other rules than before")
                + ": their momenta start afresh. Replace parameters before the first step, or go on with saved states: "
                "load_state_dict(…)",
                stacklevel=7,
            )

    def _unmet(self, m: Member) -> bool:
        entry = self._entries.get(id(m.p))
        return entry is None or entry.p is not m.p or entry.group is not m.group

    def _has_other_states(self, m: Member) -> bool:
        """Whether the parameter has been stepped by another rule than its group's."""
        entry = self._entries.get(id(m.p))
        return entry is not None and entry.p is m.p and entry.rule is not find(m.group["algorithm"])

    def _take_up(self, new: list[Member]) -> None:
        """Checks parameters, then makes their states; ones that have states of their rule already keep them."""
        members = self._members()
        if len({id(m.p) for m in members}) < len(members):
            seen: set[int] = set()
            twice = next(m for m in members if id(m.p) in seen or seen.add(id(m.p)))  # type: ignore[func-returns-value]
            raise ValueError(f"{twice.name} is in the groups twice; pass each parameter once")
        made = []
        for m in new:
            kept = m.p in self.state and self.state[m.p] and not self._has_other_states(m)
            made.append((self._known(m), self.state[m.p]) if kept else self._made(m))
        self._check_overlap()
        for m, (entry, state) in zip(new, made, strict=True):
            self._entries[id(m.p)], self.state[m.p] = entry, cast(Any, state)
            self._comm.uniform &= not entry.placed.stack_is_shared(entry.fold is not None and entry.fold.stacked)

    def _made(self, m: Member) -> tuple[Entry, dict[str, Tensor]]:
        """A parameter's entry and first states, if it can be stepped."""
        p, group = m.p, m.group
        if p.dtype not in gradients.FLOATS:
            raise TypeError(f"{m.name} has dtype {p.dtype}; only real floating-point parameters can be stepped")
        if p.layout != torch.strided:
            raise TypeError(f"{m.name} is sparse; make it dense (embedding: sparse=False)")
        self._warn_of_a_fallback(m)
        rule = self._rule(m.k, group)
        fold, sides = self._fold(m), states.Sides((), ())
        placed = self._placed(m, fold)
        if fold is not None:
            sides = states.Sides.of(fold, rule)
        kept = rule.kept_in(compressed(placed.layout, rule, fold, sides))
        layout = states.stored(fold, kept, sides, (m.name, p, placed))
        seed = None if has_no_data(p) else self._seed
        state = states.initial(p, fold, sides, placed, layout, self._formats, seed, m.number)
        return self._entered(m, rule, placed, fold, sides), state

    def _known(self, m: Member) -> Entry:
        """The entry of a parameter that has states: of a copy, or one that was moved to another group."""
        rule, fold, sides = self._rule(m.k, m.group), self._fold(m), states.Sides((), ())
        if fold is not None:
            sides = states.Sides.read_off(fold, rule, self.state[m.p])
        return self._entered(m, rule, self._placed(m, fold), fold, sides)

    def _warn_of_a_fallback(self, m: Member) -> None:
        """Once for each device, where the backend that is made for it cannot serve."""
        p = m.p
        name, _ = choose(self._backend, p.device, p.dtype)  # refuses what nobody serves
        if self._backend != "auto" or p.device.type in self._warned:
            return
        if why := passed_over(p.device, p.dtype):
            self._warned.add(p.device.type)
            warnings.warn(
                f"{m.name} on {p.device} is stepped by {name}, which is slower: {'; '.join(why)}. "
                f"backend={name!r} says that this is meant",
                stacklevel=7,
            )

    def _fold(self, m: Member) -> Fold | None:
        if find(m.group["algorithm"]).elementwise:
            return None
        try:
            return Fold.of(m.p.shape, m.group)
        except ValueError as e:
            flattened = hasattr(m.p, "ds_shape") or hasattr(m.p, "_is_flat_param")
            why = "ZeRO-3 or FSDP1 has flattened it; use FSDP2 (torch.distributed.fsdp.fully_shard)"
            raise ValueError(f"{m.name}: {why if flattened else e}") from None

    def _placed(self, m: Member, fold: Fold | None) -> Placed:
        placed = place(m.p, m.name, None if fold is None else fold.roles, self._meshes.replicas)
        self._meshes.check(m.name, placed)
        return placed

    def _entered(self, m: Member, rule: Rule, placed: Placed, fold: Fold | None, sides: states.Sides) -> Entry:
        """The entry; over replicas, factors travel if they are smaller than the gradient (section 7)."""
        p, at, kind = m.p, placed.layout, type(rule)
        at = compressed(at, rule, fold, sides)
        self._spread |= at.whole.size > 1
        if (why := rule.unsupported(at)) is not None:
            raise ValueError(f"{m.name}: {why}")
        size = p.numel() * p.element_size() // at.shards.size
        return Entry(p, m.group, kind, m.number, placed, fold, at, size, has_no_data(p))

    def reset_state(self, p: Tensor) -> None:
        """Starts a parameter's states afresh, in place of ones that hold NaN or do not fit. Every rank must call it.

        Raises:
            ValueError: if the optimizer does not have the parameter.
        """
        for m in self._members():
            if m.p is p:
                self._entries[id(p)], state = self._made(m)
                self.state[p] = cast(Any, state)
                return
        raise ValueError(f"the optimizer does not have a parameter of shape {tuple(p.shape)} that is this one")

    def _shares(self) -> str:
        """How much of the parameters each rule steps."""
        elements: dict[str, int] = {}
        counts: dict[str, int] = {}
        for group in self.param_groups:
            name = group["algorithm"]
            elements[name] = elements.get(name, 0) + sum(p.numel() for p in group["params"] if not is_lazy(p))
            counts[name] = counts.get(name, 0) + len(group["params"])
        total = sum(elements.values())
        shares = [
            f"{name} steps {n / max(total, 1):.1%} of {total:,} elements ({counts[name]:,} parameters)"
            for name, n in sorted(elements.items(), key=lambda one: -one[1])
        ]
        return ", ".join(shares)

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


def compressed(at: Layout, rule: Rule, fold: Fold | None, sides: states.Sides) -> Layout:
    """The layout of a parameter's matrices: over replicas, factors travel if they are smaller than the gradient."""
    if at.replicas.size == 1 or not rule.averages_factors or fold is None:
        return at
    factors = sum((rows + fold.cols) * r for rows, r in zip(fold.sizes, sides.ranks, strict=True))
    return replace(at, compressed=factors < fold.rows * fold.cols)


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
