"""Whole training runs: the same losses in every layout, broken off and continued in another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orthdion.train import TrainConfig, data
from orthdion.train.loop import train
from orthdion.train.parallel import ONE, Parallel

SMALL = TrainConfig(
    width=32, layers=2, heads=2, context=32, batch=8, steps=8, eval_every=1, eval_windows=16, checkpoint_every=4
)
TEXT = Path(__file__).parents[2] / "docs" / "algorithms.md"


class Broken(Exception):
    """A run that was told to stop."""


def corpus() -> data.Corpus:
    return data.load(TEXT, SMALL.context)


def losses(config: TrainConfig, mode: str | None, out: str | None = None, resume: bool = False, stop: int = 0) -> Any:
    """Validation losses by step; ``stop`` breaks off after that step."""

    def progress(step: int, loss: float, speed: float) -> None:
        if step == stop:
            raise Broken

    spread = Parallel.start(mode, "cpu") if mode is not None else ONE
    folder = Path(out) if out is not None else None
    try:
        result = train(config, corpus=corpus(), parallel=spread, out=folder, resume=resume, progress=progress)
    except Broken:
        return None
    return [row["validation"] for row in result.history], result.skipped


def die_in(what: str, out: str) -> str:
    """Rank 1 is killed in the middle of a step, or of a checkpoint; what the others see."""
    if dist.get_rank() == 1:
        if what == "step":
            from orthdion.optim import completed_dion

            completed_dion.next_q = lambda *args: os._exit(1)  # P and R have been sent, nothing has been written
        else:
            from torch.distributed.checkpoint import state_dict_saver

            state_dict_saver.save = lambda *args, **options: os._exit(1)
    try:
        losses(SMALL, "fsdp", out, resume=True)
    except Exception as e:
        return type(e).__name__
    return "finished"


def init_step_changes_nothing(mode: str) -> None:
    """torch.distributed.checkpoint makes a step with lr 0 and zero gradients to create states: ours exist already."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    import orthdion
    from orthdion.distributed import local
    from orthdion.train.gpt import GPT

    model = Parallel.start(mode, "cpu").wrap(GPT(32, 2, 2, 32))
    o = orthdion.OrthDion(orthdion.param_groups(model))

    def bits() -> list[torch.Tensor]:
        states = [t for s in o.state.values() for t in s.values()]
        return [local(t.detach()).clone() for t in (*model.parameters(), *states)]

    before = bits()
    _init_optim_state(o)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(), strict=True))
