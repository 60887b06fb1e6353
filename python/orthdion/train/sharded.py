"""Checkpoints of a run over several processes (torch.distributed.checkpoint): any number of them may continue it.

That module takes longer to import than most of torch, so it is imported where it is used.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..distributed import is_dtensor, place
from ..requests import ALONE
from .checkpoint import write_atomically

__all__ = ["load", "load_meta", "load_whole", "save"]


def save(out: Path, meta: dict[str, Any], model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Saves into a folder of its own, and only then names it the latest: a kill leaves the one before."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    folder = out / f"checkpoint-{meta['step']}"
    weights, states = get_state_dict(model, optimizers)
    dcp_save({"model": weights, "optimizers": states}, checkpoint_id=str(folder))
    if dist.get_rank() == 0:
        text = json.dumps({**meta, "folder": folder.name})
        write_atomically(out / "latest.json", lambda f: f.write(text.encode()))
        (out / "checkpoint.pt").unlink(missing_ok=True)  # of one process, and older
        for other in out.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    dist.barrier()


def load_meta(out: Path) -> dict[str, Any]:
    """What ``save`` was told of the latest checkpoint.

    Raises:
        ValueError: if there is none.
    """
    try:
        meta: dict[str, Any] = json.loads((out / "latest.json").read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise ValueError(f"resume: there is no checkpoint of several processes in {out} ({e})") from e
    return meta


def load_whole(state: dict[str, Any], model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Loads a checkpoint of one process (:mod:`.checkpoint`) into a model that lies over several."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, state["model"], options=StateDictOptions(full_state_dict=True))
    for o, s in zip(optimizers, state["optimizers"], strict=True):
        o.load_state_dict(s)
        for p, states in o.state.items():  # torch's optimizers keep whole states beside a sharded weight
            placed = place(p, "a weight", None, ALONE)
            for key, t in states.items():
                if placed.mesh is not None and not is_dtensor(t) and t.shape == p.shape:
                    states[key] = placed.wrap(placed.cut(t).clone(), p.shape, {a: a for a in range(p.ndim)})


def load(out: Path, meta: dict[str, Any], model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Loads the latest checkpoint, into whatever layout the model has now."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    from ..checkpoints import LayoutPlanner

    weights, states = get_state_dict(model, optimizers)
    whole: dict[str, Any] = {"model": weights, "optimizers": states}
    dcp_load(whole, checkpoint_id=str(out / meta["folder"]), planner=LayoutPlanner())
    set_state_dict(model, optimizers, model_state_dict=whole["model"], optim_state_dict=whole["optimizers"])
