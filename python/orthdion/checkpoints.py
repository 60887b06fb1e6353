"""Reading checkpoints with torch.distributed.checkpoint: of other layouts and options, and other libraries'."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan

from .core.rule import LATE
from .core.states import base_name
from .distributed import is_dtensor, local

__all__ = ["LayoutPlanner", "MicrosoftDionPlanner"]

#: Keys of their groups that are read.
_THEIRS = {
    *("params", "algorithm", "step", "lr", "weight_decay", "mu", "beta1", "beta2", "epsilon"),
    *("rank_fraction", "rank_multiple_of"),
}


class LayoutPlanner(DefaultLoadPlanner):
    """Reads a checkpoint of this library into a model and an optimizer that were not built quite as they were saved::

        weights, states = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": states}
        dcp.load(state, checkpoint_id=folder, planner=LayoutPlanner())
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    States of another rank (``adaptive_rank``) are read as they were saved. Those that only some layouts or options need
    (``memory``, ``effective_rank``) start at zero where they were not saved.

    Raises:
        ValueError: if anything else is missing.
    """

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Gives states their saved ranks before anything is read."""
        if metadata is not None:
            sizes = {tuple(path): metadata.state_dict_metadata[key] for key, path in metadata.planner_data.items()}
            _take_ranks(state_dict, (), sizes)
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """What is to be read."""
        assert self.metadata is not None
        there = self.metadata.state_dict_metadata
        absent = [key for key in self.state_dict if key not in there]
        if lost := [key for key in absent if not self.may_lack(key)]:
            some = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            raise ValueError(f"the checkpoint has no {some}; build the model and the optimizer as they were saved")
        for key in absent:
            del self.state_dict[key]
            *path, last = self.mappings[key]
            parent: Any = self.original_state_dict
            for step in path:
                parent = parent[step]
            # torch asks for the key all the same.
            parent[last] = self.stands_for(key, parent[last])
        return super().create_local_plan()

    def may_lack(self, key: str) -> bool:
        """Whether the checkpoint may be without it, as flattened: ``optimizer.state.<name>.<state>``."""
        return ".state." in f".{key}" and base_name(key.rpartition(".")[2]) in LATE

    def stands_for(self, key: str, value: Any) -> Any:
        """What is taken in place of what the checkpoint has not."""
        return torch.zeros_like(value)


def _take_ranks(state: Any, path: tuple[Any, ...], sizes: dict[tuple[Any, ...], Any]) -> None:
    """Replaces tensors whose last axis alone is of another length than what was saved under their path."""
    if isinstance(state, (dict, list)):
        for key, value in list(state.items() if isinstance(state, dict) else enumerate(state)):
            size = getattr(sizes.get((*path, key)), "size", None)
            if isinstance(value, (dict, list)):
                _take_ranks(value, (*path, key), sizes)
            elif isinstance(value, Tensor) and size is not None and "state" in path and _another_rank(value, size):
                state[key] = _of_rank(value, torch.Size(size))


def _another_rank(t: Tensor, size: Any) -> bool:
    return t.ndim == len(size) > 1 and t.shape[:-1] == size[:-1] and t.shape[-1] != size[-1]


def _of_rank(t: Tensor, size: torch.Size) -> Tensor:
    here = local(t)
    made = here.new_zeros(*here.shape[:-1], size[-1])
    if not is_dtensor(t):
        return made
    from torch.distributed.tensor import DTensor

    stride = torch.empty(size, device="meta").stride()
    like: Any = t
    return DTensor.from_local(made, like.device_mesh, like.placements, run_check=False, shape=size, stride=stride)


class MicrosoftDionPlanner(LayoutPlanner):
    """Reads a checkpoint that microsoft/dion's optimizers were saved in, as :class:`LayoutPlanner` is used.

    Their AdamW counts steps a group, ours a parameter: where parameters' counters are missing they become NaN, and
    ``load_state_dict`` takes the group's. Group keys that only this library has keep their values.

    Raises:
        ValueError: if anything else is missing.
    """

    def may_lack(self, key: str) -> bool:
        """Counters, and what only this library has."""
        return _is_counter(key) or _is_ours(key) or super().may_lack(key)

    def stands_for(self, key: str, value: Any) -> Any:
        """NaN says that nobody has counted."""
        if _is_ours(key):
            return value
        return torch.full_like(value, float("nan")) if _is_counter(key) else super().stands_for(key, value)


def _is_counter(key: str) -> bool:
    """Of a parameter, as flattened: ``optimizer.state.<name>.step``."""
    return ".state." in f".{key}" and key.endswith(".step")


def _is_ours(key: str) -> bool:
    """A group's key that they do not have, as flattened: ``optimizer.param_groups.<number>.<key>``."""
    return re.search(r"(^|\.)param_groups\.", key) is not None and key.rpartition(".")[2] not in _THEIRS
