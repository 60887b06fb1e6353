"""One process of a leg: trains from the last checkpoint on, with troubles that depend on the step alone."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orthdion.distributed import local
from orthdion.train import TrainConfig, data, loop
from orthdion.train.parallel import ONE, Parallel

__all__ = ["TEXT", "Leg", "leg", "stacks"]

TEXT = Path(__file__).parents[2] / "docs" / "algorithms.md"
#: Seconds until a process that waits for a dead one gives up.
PATIENCE = 30


@dataclass(frozen=True)
class Leg:
    """What a process is told. ``slow``: the rank that now and then sleeps; ``troubles`` seeds the gradients' faults."""

    config: TrainConfig
    out: str
    troubles: int
    size: int = 1
    mode: str | None = None
    resume: bool = False
    slow: int | None = None


def leg(rank: int, told: Leg, store: str, step: Any, pipe: Any) -> None:
    """Runs until the end; sends (rank, weights, history, skipped, memory) on rank 0, or what went wrong."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(told.size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")  # of skipped steps, which are meant
    with open(stacks(told, rank), "w") as file:  # where it is, should it hang
        faulthandler.register(signal.SIGUSR1, file)
        _answer(rank, told, store, step, pipe)


def stacks(told: Leg, rank: int) -> str:
    """The file that a process writes its stacks to when it gets SIGUSR1."""
    return f"{told.out}-stacks-{rank}"


def _answer(rank: int, told: Leg, store: str, step: Any, pipe: Any) -> None:
    try:
        spread = ONE
        if told.mode is not None:
            handle = dist.FileStore(store, told.size)
            dist.init_process_group(
                "gloo", rank=rank, world_size=told.size, store=handle, timeout=timedelta(seconds=PATIENCE)
            )
            spread = Parallel.start(told.mode, "cpu")
        found = _run(rank, told, spread, step)
    except BaseException as e:  # a signal, or a dead neighbour; the driver knows whether there was one
        pipe.send(("lost", f"{type(e).__name__}: {e}"))
        os._exit(1)
    pipe.send(("done", found if rank == 0 else None))
    pipe.close()
    os._exit(0)


def _run(rank: int, told: Leg, spread: Parallel, step: Any) -> dict[str, Any]:
    memory: list[tuple[int, int]] = []
    models: list[nn.Module] = []
    plain, plain_build = loop._gradients, loop.build

    def build(model: nn.Module, config: TrainConfig) -> Any:
        models.append(model)
        return plain_build(model, config)

    def gradients(model: nn.Module, corpus: Any, config: TrainConfig, k: int, parallel: Parallel) -> float:
        if rank == told.slow and random.random() < 0.1:
            time.sleep(random.uniform(0.1, 0.6))
        loss = plain(model, corpus, config, k, parallel)
        trouble(model, told.troubles, k)
        return loss

    def progress(done: int, loss: float, speed: float) -> None:
        step.value = done
        if done % max(1, told.config.steps // 30) == 0:
            memory.append((done, _resident()))

    loop._gradients, loop.build = gradients, build
    loop.loss_of = _loss
    corpus = data.load(TEXT, told.config.context)
    result = loop.train(
        told.config,
        corpus=corpus,
        out=Path(told.out),
        resume=told.resume,
        overwrite=not told.resume,
        parallel=spread,
        progress=progress,
    )
    weights = [_whole(p) for p in models[0].parameters()]
    return {"weights": weights, "history": result.history, "skipped": result.skipped, "memory": memory}


def _loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In double, so that layouts differ by no more than the order of sums."""
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def trouble(model: nn.Module, seed: int, k: int) -> None:
    """At some steps a gradient is missing, at others one holds NaN or infinity: the same in every layout."""
    draw = random.Random(f"{seed}/{k}")
    params = list(model.parameters())
    kind, which = draw.random(), draw.randrange(len(params))
    p = params[which]
    if kind < 0.06:
        p.grad = None
    elif kind < 0.12 and p.grad is not None:
        here = local(p.grad)
        if here.numel() and _holds_first(p):
            here.view(-1)[0] = float("nan") if kind < 0.09 else float("inf")


def _holds_first(p: torch.Tensor) -> bool:
    """Whether the parameter's first entry is in this process's part."""
    if local(p) is p:
        return True
    where = p.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    return all(c == 0 for c, s in zip(where, p.placements, strict=True) if s.is_shard())  # type: ignore[attr-defined]


def _whole(p: torch.Tensor) -> Any:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().numpy().copy()


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
