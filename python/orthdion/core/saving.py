"""Saving and loading: torch's state dict, of whole tensors or DTensors, for any number of ranks."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from ..distributed import Communicator, Meshes, local, meet
from ..requests import Rounding
from . import states
from .capture import Rates, Skips
from .entries import Entry
from .fold import SHAPE_KEYS
from .gradients import mean_over
from .options import names_of, options_of, unpack_betas
from .ranks import Ranks, refuse
from .registry import find, rules
from .resolved import Resolved
from .rule import Rule
from .runtime import Runtime, one_each
from .states import base_name
from .work import Done

__all__ = ["Member", "SavedOptimizer"]


class Member(NamedTuple):
    """A parameter that is the ``i``-th of group ``k``; ``number`` counts over all groups, and seeds its start."""

    p: Tensor
    group: dict[str, Any]
    k: int
    i: int
    number: int

    @property
    def name(self) -> str:
        """As the model calls it, if the groups say so, and its shape."""
        names = self.group.get("param_names")
        return f"{names[self.i] if names else f'group {self.k}, parameter {self.i}'} {_shape(self.p)}"


class SavedOptimizer(Optimizer):
    """The part of an optimizer that knows how states are kept."""

    #: What a copy has of its original, beyond torch's own.
    _kept_in_copies: tuple[str, ...] = ("_own", "_given", "_seed", "_formats", "_rounding", "_backend", "_diagnose")

    _own: type[Rule]
    _given: dict[str, Any]
    _seed: int
    _formats: states.Formats
    _rounding: Rounding | None
    _backend: str
    _diagnose: bool
    _meshes: Meshes

    def _start_afresh(self, reduce_dtype: torch.dtype | None) -> None:
        """Everything that is no part of what is saved or copied."""
        self._comm = Communicator(reduce_dtype)
        #: By the identity of parameters, which keep their entries from being taken for another's.
        self._entries: dict[int, Entry] = {}
        self._resolved: dict[int, Resolved] = {}
        #: Backends' tables, by backend and device.
        self._kept: dict[tuple[str, torch.device], dict[Any, Any]] = {}
        #: Backends and devices, one object for all parameters that they serve.
        self._wheres: dict[tuple[str, torch.device], tuple[str, torch.device]] = {}
        #: What the last step did.
        self._done: list[Done] = []
        self._rates = Rates()
        self._skips = Skips(self)
        #: Whether a parameter lies over several ranks.
        self._spread = False
        #: Kinds of devices whose fallback has been told.
        self._warned: set[str] = set()
        #: Whether replicas' momenta have gone separate ways since they were last averaged.
        self._drifted = False
        self._ranks = Ranks()

    def _settle_ranks(self) -> None:
        raise NotImplementedError

    def _meet(self, quiet: bool = False) -> None:
        raise NotImplementedError

    def _rule(self, k: int, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    def _members(self) -> list[Member]:
        """What the groups hold now, in their order."""
        held = [(p, g, k, i) for k, g in enumerate(self.param_groups) for i, p in enumerate(g["params"])]
        return [Member(*one, number) for number, one in enumerate(held)]

    def _name(self, p: Tensor) -> str:
        return next((m.name for m in self._members() if m.p is p), f"a parameter {_shape(p)}")

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch has it; every group names its rule (``algorithm``) and its resolved options.

        Momenta that differ between replicas are averaged first, so after a step every rank must call this. It changes
        no later weight but by rounding, and by what a residual in few bits (``residual_bits``) leaves of each one's.
        """
        self._meet()
        self._settle_ranks()
        self.synchronize_for_checkpoint()
        return super().state_dict()

    def synchronize_for_checkpoint(self) -> None:
        """Averages in place what replicas have apart: momenta, and what they remember to have sent. Every rank must
        call it; :meth:`state_dict` does it by itself.

        Raises:
            RuntimeError: if some rank does not (gloo; NCCL waits for its own time-out).
        """
        if not self._drifted:
            return
        self._meet()
        meet(self._meshes.replicas, "state_dict() averages the replicas' momenta, so every rank must call it")
        bodies, targets = [], []
        for k, group in enumerate(self.param_groups):
            for p in group["params"]:
                entry = self._entries[id(p)]
                replicas, kept = entry.placed.layout.replicas, self._rule(k, group).kept_in(entry.layout)
                for key, t in self.state[p].items() if replicas.size > 1 else ():
                    name = base_name(key)
                    if name in kept and kept[name].apart:
                        bodies.append(mean_over(replicas, local(t), name))
                        targets.append(local(t))
        for t, average in zip(targets, Runtime(self._comm).run(bodies, one_each(bodies)), strict=True):
            t.copy_(average)
        self._drifted = False

    def load_state_dict(self, state_dict: dict[str, Any], algorithms: Mapping[str, str] | None = None) -> None:
        """Loads a state, this library's or microsoft/dion's, keeping each state tensor's dtype, bit-exact.

        It may come from another number of ranks or another layout: whole tensors and DTensors are cut to this one's.

        Args:
            state_dict: what :meth:`state_dict` returned.
            algorithms: saved rule → the rule here that goes on with its states, {"dion": "orth-dion"} say. Options that
                both have are loaded, the others stay as they are here.

        Raises:
            ValueError: if groups, rules or the shapes of states do not fit; then nothing has changed.
        """
        state_dict = state_dict.copy()
        pre, post = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        for before in pre.values():
            state_dict = before(self, state_dict) or state_dict
        own, given = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in given] != [len(g["params"]) for g in own]:
            raise ValueError("the loaded state has other parameter groups than this optimizer; build them alike first")
        self._meet(quiet=True)
        merged = [_merged(i, own[i], g, dict(algorithms or {})) for i, g in enumerate(given)]
        groups = [g for g, _ in merged]
        loaded = {}
        for group, (saved, rule) in zip(own, merged, strict=True):
            for p, i in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(i, {})
                if state:  # an optimizer that makes states late has none for a parameter it never stepped
                    if is_lazy(p):
                        raise ValueError(
                            f"{self._name(p)} has no shape yet that states could be fitted to; run the model once, "
                            "then load"
                        )
                    entry = self._entries[id(p)]
                    if "step" in entry.rule.states and _uncounted(state):  # microsoft/dion counts steps a group
                        state = {**state, "step": torch.tensor(float(saved["step"]), dtype=torch.float32)}
                    name = self._name(p)
                    self._warn_of_nan(name, state)
                    if (why := rule.unsupported(entry.layout)) is not None:
                        raise ValueError(f"{name}: {why}")
                    refuse(name, rule, entry.fold, entry.placed)
                    kept = rule.kept_in(entry.layout)
                    loaded[p] = states.fitted(
                        name, p, entry.fold, entry.placed, rule, kept, self._formats, self.state[p], state
                    )
        # torch would cast states to the weights' dtype: it gets the groups only, and hooks run around all of it.
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        kept = {p: self.state[p] for group in own for p in group["params"]}
        indices = {i for g in given for i in g["params"]}
        others = {k: v for k, v in state_dict["state"].items() if k not in indices}
        try:
            super().load_state_dict({**state_dict, "state": others, "param_groups": groups})
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = pre, post
        for p, state in {**kept, **loaded}.items():
            self.state[p] = state
        self._resolved.clear()
        self._ranks = Ranks()
        for group in self.param_groups:
            for p in group["params"]:
                if (known := self._entries.get(id(p))) is not None:
                    known.group, known.seen = group, None
        for after in post.values():
            after(self)

    @staticmethod
    def _warn_of_nan(name: str, state: dict[str, Any]) -> None:
        for key, t in state.items():
            if isinstance(t, Tensor) and t.is_floating_point() and not bool(torch.isfinite(local(t)).all()):
                warnings.warn(
                    f"the loaded {key} of {name} holds NaN or infinity, which no step takes away; "
                    "optimizer.reset_state(p) starts its states afresh",
                    stacklevel=4,
                )

    def __getstate__(self) -> dict[str, Any]:
        if self._meshes.replicas.size > 1:
            raise TypeError(
                "an optimizer with a replicate_mesh cannot be copied or pickled, as it belongs to a process group; "
                "save its state_dict() and build a new one"
            )
        self._settle_ranks()
        kept = {k: self.__dict__[k] for k in self._kept_in_copies}
        state: dict[str, Any] = super().__getstate__()
        return {**state, **kept, "_comm": self._comm.fresh(), "_skipped": self._skips.read()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped, comm = state.pop("_skipped", None), state.pop("_comm", None)
        super().__setstate__(state)
        if skipped is not None:  # a copy or an unpickled one; torch also loads state dicts through here
            self._meshes = Meshes()
            self._start_afresh(None)
            self._comm = comm
            self._skips.counts.update(skipped)


def _shape(p: Tensor) -> tuple[int, ...] | str:
    return "(not initialised)" if is_lazy(p) else tuple(p.shape)


def _uncounted(state: dict[str, Any]) -> bool:
    """Whether nobody has counted the parameter's steps; see :class:`orthdion.checkpoints.MicrosoftDionPlanner`."""
    return "step" not in state or math.isnan(float(state["step"]))


def _merged(
    index: int, own: dict[str, Any], saved: dict[str, Any], algorithms: dict[str, str]
) -> tuple[dict[str, Any], Rule]:
    """A saved group, checked, and its rule; keys that its library does not have keep this optimizer's values."""
    saved = dict(saved)
    name = saved.get("algorithm", own["algorithm"])
    name = algorithms.get(name, name)
    if name != own["algorithm"]:
        raise ValueError(
            f"the loaded group {index} has algorithm={saved['algorithm']!r}, this one {own['algorithm']!r}; build them "
            f"alike first, or say that the states are to go on so: load_state_dict(…, algorithms="
            f"{{{saved['algorithm']!r}: {own['algorithm']!r}}})"
        )
    switched = saved.get("algorithm", name) != name
    saved["algorithm"] = name
    for key in SHAPE_KEYS:
        if key in saved and (tuple(saved[key]) if isinstance(saved[key], list) else saved[key]) != own[key]:
            raise ValueError(
                f"the loaded group {index} has {key}={saved[key]!r}, this one {own[key]!r}; build them alike first"
            )
    unpack_betas(saved)
    rule = find(name)
    known = names_of(rule)
    others = {option for r in rules().values() for option in names_of(r)} - {*known}
    saved = {k: v for k, v in saved.items() if k not in others}  # microsoft/dion puts every option into every group
    for option, what in options_of(rule).items():
        # Muon and NorMuon are one rule with another value of row_variance, which is why one takes over from the other.
        if what.here or (option == "row_variance" and switched):
            saved.pop(option, None)
        elif option in saved:
            saved[option] = what.check(option, saved[option])
    result = {**{k: v for k, v in own.items() if k != "params"}, **saved}
    plain: dict[str, Any] = {k: float(v) if isinstance(v, Tensor) else v for k, v in result.items() if k in known}
    made = rule(**plain)
    made.check()
    return result, made
