"""Reading other libraries' checkpoints with torch.distributed.checkpoint."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan

__all__ = ["MicrosoftDionPlanner"]

#: Keys of their groups that are read.
_THEIRS = {
    *("params", "algorithm", "step", "lr", "weight_decay", "mu", "beta1", "beta2", "epsilon"),
    *("rank_fraction", "rank_multiple_of"),
}


class MicrosoftDionPlanner(DefaultLoadPlanner):
    """Reads a checkpoint that microsoft/dion's optimizers were saved in::

        weights, states = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": states}
        dcp.load(state, checkpoint_id=folder, planner=MicrosoftDionPlanner())
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    Their AdamW counts steps a group, ours a parameter: where parameters' counters are missing they become NaN, and
    ``load_state_dict`` takes the group's. Group keys that only this library has keep their values.

    Raises:
        ValueError: if anything else is missing.
    """

    def create_local_plan(self) -> LoadPlan:
        """What is to be read."""
        assert self.metadata is not None
        there = self.metadata.state_dict_metadata
        absent = [key for key in self.state_dict if key not in there]
        if lost := [key for key in absent if not (_is_counter(key) or _is_ours(key))]:
            some = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            raise ValueError(f"the checkpoint has no {some}; build the model and the optimizer as they were saved")
        for key in absent:
            del self.state_dict[key]
            if _is_counter(key):
                *path, last = self.mappings[key]
                parent: Any = self.original_state_dict
                for step in path:
                    parent = parent[step]
                # torch asks for the key all the same; NaN says that nobody has counted.
                parent[last] = torch.full_like(parent[last], float("nan"))
        return super().create_local_plan()


def _is_counter(key: str) -> bool:
    """Of a parameter, as flattened: ``optimizer.state.<name>.step``."""
    return ".state." in f".{key}" and key.endswith(".step")


def _is_ours(key: str) -> bool:
    """A group's key that they do not have, as flattened: ``optimizer.param_groups.<number>.<key>``."""
    return re.search(r"(^|\.)param_groups\.", key) is not None and key.rpartition(".")[2] not in _THEIRS
