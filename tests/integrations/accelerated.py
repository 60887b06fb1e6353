"""Cases of accelerate on every rank: FSDP2 swaps the parameters of an optimizer that is there already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import orthdion

STEPS, BROKEN_OFF = 10, 5


class Model(nn.Module):
    """Sizes that two ranks cannot share evenly, some of them odd, one of a single row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 13), nn.Linear(13, 9)
        self.thin, self.head = nn.Linear(9, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.thin(self.second(self.first(x).tanh()).tanh()).tanh())


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of all ranks together."""
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x[:, :3].sin()


def model() -> Model:
    return Model().double()


def optimizer(of: nn.Module, name: str) -> Any:
    low_rank = {} if name == "muon" else {"rank_fraction": 0.4}
    return orthdion.create(name, of, lr=0.05, scalar_lr=0.02, weight_decay=0.1, **low_rank)


def accelerator(fsdp: bool) -> Any:
    """A new one, whatever the last one was."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # asked for, though the group is there already
    os.environ.setdefault("MASTER_PORT", "29500")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    plugin = None
    if fsdp:
        policy = {"auto_wrap_policy": "size_based_wrap", "min_num_params": 60}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", **policy)
    a = Accelerator(cpu=True, fsdp_plugin=plugin)
    if fsdp:  # accelerate takes FSDP on accelerators only; everything behind this choice runs on CPUs as well
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
        a.state.fsdp_plugin = plugin
        assert a.is_fsdp2
    return a


def run(a: Any, of: nn.Module, o: Any, start: int, stop: int, norm: float | None) -> list[float]:
    """Steps on this rank's part of each batch; the gradients' norms before clipping."""
    size, norms = a.num_processes, []
    for k in range(start, stop):
        x, y = (t.chunk(size)[a.process_index] for t in data(k))
        o.zero_grad()
        a.backward((of(x) - y).square().mean())
        if norm is not None:
            total = a.clip_grad_norm_(of.parameters(), norm)
            norms.append(float(total.full_tensor() if hasattr(total, "full_tensor") else total))
        o.step()
    return norms


def full(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def named(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace("_orig_mod.", ""): full(p) for name, p in of.named_parameters()}


def alone(name: str, norm: float | None, stop: int = STEPS) -> tuple[dict[str, torch.Tensor], list[float], Any]:
    """One process's run without accelerate."""
    of = model()
    o, norms = optimizer(of, name), []
    for k in range(stop):
        x, y = data(k)
        o.zero_grad()
        (of(x) - y).square().mean().backward()
        if norm is not None:
            norms.append(float(nn.utils.clip_grad_norm_(of.parameters(), norm)))
        o.step()
    return named(of), norms, o


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).abs().max()) for n in wanted)


def sharded_after_construction(name: str, norm: float | None) -> dict[str, Any]:
    """``prepare(model, optimizer)`` under FSDP2; how far the weights are from one process's."""
    a = accelerator(True)
    of = model()
    before = {id(p) for p in of.parameters()}
    made = optimizer(of, name)
    of, o = a.prepare(of, made)
    params = [p for g in made.param_groups for p in g["params"]]
    found = {
        "type": type(o).__name__,
        "swapped": not any(id(p) in before for p in params),
        "own": {id(p) for p in params} == {id(p) for p in of.parameters()},
        "uneven": sorted(p.to_local().shape[0] * 2 != p.shape[0] for p in of.parameters()),
    }
    norms = run(a, of, o, 0, STEPS, norm)
    wanted, their_norms, plain = alone(name, norm)
    states = {p: {k: full(t) for k, t in made.state[p].items()} for p in params}
    return found | {
        "error": worst(named(of), wanted),
        "norms": max([abs(x - y) for x, y in zip(norms, their_norms, strict=True)], default=0.0),
        "clipped": [x > (norm or 0.0) for x in norms],
        "met": set(made.state) == set(params),
        "states": max(
            float((states[p][k].double() - t.double()).abs().max())
            for p, q in zip(params, [p for g in plain.param_groups for p in g["params"]], strict=True)
            for k, t in plain.state[q].items()
        ),
    }


def saved_and_continued(name: str, folder: str) -> dict[str, float]:
    """``save_state``; goes on over as many ranks, and on one rank by itself without accelerate."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    a = accelerator(True)
    first = model()
    first, o = a.prepare(first, optimizer(first, name))
    run(a, first, o, 0, BROKEN_OFF, None)
    a.save_state(str(Path(folder) / "accelerate"))
    weights, states = get_state_dict(first, o.optimizer)
    dcp_save({"model": weights, "optimizer": states}, checkpoint_id=str(Path(folder) / "dcp"))
    run(a, first, o, BROKEN_OFF, STEPS, None)

    a = accelerator(True)
    second = model()
    second, p = a.prepare(second, optimizer(second, name))
    run(a, second, p, 0, 2, None)  # what is loaded replaces what was there
    a.load_state(str(Path(folder) / "accelerate"))
    run(a, second, p, BROKEN_OFF, STEPS, None)
    dist.barrier()

    third = model()
    q = optimizer(third, name)
    weights, states = get_state_dict(third, q)
    state: dict[str, Any] = {"model": weights, "optimizer": states}
    dcp_load(state, checkpoint_id=str(Path(folder) / "dcp"), no_dist=True)
    set_state_dict(third, q, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for k in range(BROKEN_OFF, STEPS):
        x, y = data(k)
        q.zero_grad()
        (third(x) - y).square().mean().backward()
        q.step()
    unbroken = named(first)
    return {
        "alone": worst(unbroken, alone(name, None)[0]),
        "resumed": worst(named(second), unbroken),
        "on one": worst(named(third), unbroken),
    }


def model_first() -> str:
    """What accelerate says to a model without its optimizer."""
    try:
        accelerator(True).prepare(model())
    except ValueError as e:
        return str(e)
    return "accepted"


def scheduled(name: str) -> list[Any]:
    """A prepared scheduler steps as often as accelerate says, over every group's own rate."""
    a = accelerator(True)
    of = model()
    made = optimizer(of, name)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda k: 0.5**k)
    of, o, schedule = a.prepare(of, made, schedule)
    for k in range(2):
        run(a, of, o, k, k + 1, None)
        schedule.step()
    return [g["lr"] for g in made.param_groups]
