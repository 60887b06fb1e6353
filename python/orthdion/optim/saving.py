"""Saving and loading: torch's state dict, of whole tensors or DTensors, for any number of ranks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..sharding import Communicator, Meshes, Placed, local, mean_over, meet, one_each, place, roles
from . import states
from .rates import Rates, Skips

__all__ = ["SavedOptimizer"]


class SavedOptimizer(Optimizer):
    """The part of :class:`LowRankOptimizer` that knows how states are kept."""

    #: What a copy has of its original, beyond torch's own.
    _kept: tuple[str, ...] = (
        *("_seed", "_momentum_dtype", "_q_dtype", "_half", "_tf32"),
        *("_backend", "_diagnose"),
    )

    _skips: Skips
    _meshes: Meshes
    _comm: Communicator
    _placed: dict[Tensor, Placed]
    _drifted: bool

    def _begin(self) -> None:
        """What an optimizer has that is no part of its state."""
        self._rates = Rates()
        self._skips = Skips(lambda: (p for g in self.param_groups for p in g["params"]), self._name)

    def _name(self, p: Tensor) -> str:
        for k, group in enumerate(self.param_groups):
            for i, candidate in enumerate(group["params"]):
                if candidate is p:
                    names = group.get("param_names")
                    name = names[i] if names else f"group {k}, parameter {i}"
                    return f"{name} {tuple(p.shape)}"
        return f"a parameter {tuple(p.shape)}"

    def _where(self, p: Tensor, group: dict[str, Any]) -> Placed:
        if p not in self._placed:  # after unpickling
            of = roles(p.ndim, group["flatten"]) if group["algorithm"] == "dion" else None
            self._placed[p] = place(p, self._name(p), of, self._meshes.replicas)
        return self._placed[p]

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch has it. Momenta that differ between replicas are averaged first, which changes no later
        weight but by rounding; so after a step every rank must call this.
        """
        self.synchronize_for_checkpoint()
        return super().state_dict()

    def synchronize_for_checkpoint(self) -> None:
        """Averages replicas' momenta in place; :meth:`state_dict` does it by itself. Every rank must call it.

        Raises:
            RuntimeError: if some rank does not (gloo; NCCL waits for its own time-out).
        """
        if not self._drifted:
            return
        meet(self._meshes.replicas, "state_dict() averages the replicas' momenta, so every rank must call it")
        bodies, targets = [], []
        for group in self.param_groups:
            for p in group["params"]:
                at = self._where(p, group).layout
                if group["algorithm"] == "dion" and at.replicas.size > 1:
                    m = local(self.state[p]["momentum"])
                    bodies.append(mean_over(at.replicas, m, "momentum"))
                    targets.append(m)
        for m, average in zip(targets, self._comm.run(bodies, one_each(bodies)), strict=True):
            m.copy_(average)
        self._drifted = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, this library's or microsoft/dion's, keeping each state tensor's dtype to the bit.

        It may come from another number of ranks or another layout: whole tensors and DTensors are cut to this one's.

        Raises:
            ValueError: if groups, algorithms or the shapes of states do not fit; then nothing has changed.
        """
        state_dict = state_dict.copy()
        pre, post = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        for before in pre.values():
            state_dict = before(self, state_dict) or state_dict
        own, given = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in given] != [len(g["params"]) for g in own]:
            raise ValueError("the loaded state has other parameter groups than this optimizer; build them alike first")
        groups = [states.merged(i, own[i], g, self.defaults) for i, g in enumerate(given)]
        loaded = {}
        for group, saved in zip(own, groups, strict=True):
            for p, i in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(i, {})
                if state:  # an optimizer that makes states late has none for a parameter it never stepped
                    # microsoft/dion counts steps a group
                    state = {"step": torch.tensor(float(saved["step"])), **state}
                    where = self._where(p, group)
                    loaded[p] = states.fitted(self._name(p), p, group, where, self.state[p], state)
        # torch would cast states to the weights' dtype: it gets the groups only, and hooks run around all of it.
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        kept = {p: self.state[p] for group in own for p in group["params"]}
        try:
            super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = pre, post
        for p, state in {**kept, **loaded}.items():
            self.state[p] = state
        for after in post.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        if self._meshes.replicas.size > 1:
            raise TypeError(
                "an optimizer with a replicate_mesh cannot be copied or pickled, as it belongs to a process group; "
                "save its state_dict() and build a new one"
            )
        skipped = self._skips.read()
        fresh = {
            "_reports": {},
            "_seen": {},
            "_placed": {},
            "_meshes": Meshes(),
            "_drifted": False,
            "_skipped": skipped,
        }
        state: dict[str, Any] = super().__getstate__()
        return {**state, **{k: self.__dict__[k] for k in self._kept}, **fresh, "_comm": self._comm.fresh()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.pop("_skipped", None)
        super().__setstate__(state)
        if skipped is not None:  # a copy or an unpickled one; torch also loads state dicts through here
            self._begin()
            self._skips.counts.update(skipped)
