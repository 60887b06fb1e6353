"""The training loop: one run, resumable to the bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim.lowrank import LowRankOptimizer
from . import checkpoint, data, sharded
from .config import TrainConfig, learning_rate
from .gpt import GPT, loss_of
from .parallel import ONE, Parallel
from .recipes import RECIPES, build, notes, state_bytes

__all__ = ["Result", "train"]

#: Called after each step with (step, training loss, tokens a second).
Progress = Callable[[int, float, float], None]


@dataclass(frozen=True)
class Result:
    """How a run ended. Losses are nats a byte, times seconds; ``optimizer_ms`` is the mean of a step's optimizer
    part.
    """

    config: TrainConfig
    lr: float
    train_loss: float
    validation_loss: float
    tokens_per_second: float
    optimizer_ms: float
    state_megabytes: float
    skipped: int
    history: list[dict[str, Any]]
    notes: list[str]


def train(
    config: TrainConfig,
    *,
    corpus: data.Corpus | None = None,
    path: str | Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    parallel: Parallel = ONE,
    progress: Progress | None = None,
) -> Result:
    """Trains a GPT.

    Args:
        config: the run.
        corpus: the text; None loads ``path``.
        path: a text file or a folder; None is the standard library.
        out: a folder for ``checkpoint.pt`` and ``metrics.jsonl``; None writes nothing.
        resume: continue from ``out``'s checkpoint. The rest of the run is the same, bit for bit, as without the break;
            over several processes to rounding, as another number of them or another layout may continue.
        parallel: the device, and how the run is spread over processes.
        progress: called after each step.

    Raises:
        ValueError: unknown optimizer, no usable text, a damaged or different checkpoint.
    """
    corpus = corpus or data.load(path, config.context)
    if config.lr is None and config.optimizer in RECIPES:
        config = config.with_(lr=RECIPES[config.optimizer].lr)
    device, alone = parallel.device, parallel.mode is None
    model = parallel.wrap(GPT(config.width, config.layers, config.heads, config.context, config.seed).to(device))
    optimizers = build(model, config)
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    rows: list[dict[str, Any]] = []
    first = 0
    if resume:
        if out is None:
            raise ValueError("resume needs out, the folder of the run to continue")
        whole = not (out / "latest.json").is_file()
        state = checkpoint.load(out / "checkpoint.pt") if whole else sharded.load_meta(out)
        first = _check(state, config, corpus)
        if whole:
            sharded.load_whole(state, model, optimizers)
        else:
            sharded.load(out, state, model, optimizers)
        rows = checkpoint.read_metrics(out / "metrics.jsonl", below=first)
    elif out is not None and parallel.rank == 0:
        for name in ("checkpoint.pt", "latest.json", "metrics.jsonl"):  # a later --resume must not find another run's
            (out / name).unlink(missing_ok=True)
    before_break = rows[-1]["seconds"] if rows else 0.0
    metrics = _Metrics(out if parallel.rank == 0 else None, rows)
    inputs, targets = (t.to(device) for t in corpus.evaluation(config.eval_windows, config.context))
    spent = optimizer_time = 0.0
    loss = float("nan")
    for step in range(first, config.steps):
        began = time.perf_counter()
        for o, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(config, step)
        loss = _gradients(model, corpus, config, step, parallel)
        if config.clip > 0:
            _clip(model, optimizers, config.clip, alone)
        before = time.perf_counter()
        for o in optimizers:
            o.step()
        now = time.perf_counter()
        optimizer_time += now - before
        spent += now - began
        done = step + 1
        speed = (done - first) * config.tokens_per_step / spent
        if progress:
            progress(done, loss, speed)
        if done % config.eval_every == 0 or done == config.steps:
            validation = _evaluate(model, inputs, targets)
            metrics.add(
                {
                    "step": done,
                    "loss": loss,
                    "validation": validation,
                    "lr": learning_rate(config, step),
                    "seconds": before_break + spent,
                    "tokens_per_second": speed,
                }
            )
        if out is not None and (done % config.checkpoint_every == 0 or done == config.steps):
            state = {"step": done, "config": asdict(config), "text": corpus.checksum()}
            if alone:
                states = [o.state_dict() for o in optimizers]
                checkpoint.save(out / "checkpoint.pt", {**state, "model": model.state_dict(), "optimizers": states})
                (out / "latest.json").unlink(missing_ok=True)  # of several processes, and older
            else:
                sharded.save(out, state, model, optimizers)
    steps = max(config.steps - first, 1)
    last = metrics.rows[-1] if metrics.rows else {"loss": loss, "validation": _evaluate(model, inputs, targets)}
    return Result(
        config=config,
        lr=float("nan") if config.lr is None else config.lr,
        train_loss=last["loss"],
        validation_loss=last["validation"],
        tokens_per_second=steps * config.tokens_per_step / spent if spent else 0.0,
        optimizer_ms=1e3 * optimizer_time / steps,
        state_megabytes=state_bytes(optimizers) / 1e6,
        skipped=sum(sum(getattr(o, "skipped_steps", {}).values()) for o in optimizers),
        history=metrics.rows,
        notes=notes(optimizers),
    )


def _gradients(model: nn.Module, corpus: data.Corpus, config: TrainConfig, step: int, parallel: Parallel) -> float:
    """Accumulates the step's gradients; returns the mean loss."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=parallel.device)
    for micro in range(config.accumulate):
        inputs, targets = corpus.batch(config.batch, config.context, config.seed, step, micro)
        loss = loss_of(model, parallel.part(inputs), parallel.part(targets)) / config.accumulate
        loss.backward()
        total += loss.detach()
    return parallel.mean(total)


def _clip(model: nn.Module, optimizers: list[Optimizer], most: float, alone: bool) -> None:
    """By the norm of all gradients together, whole or sharded; the mean of replicas' norms where factors are sent."""
    if not alone and isinstance(optimizers[0], LowRankOptimizer):
        optimizers[0].clip_grad_norm_(most)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), most)


@torch.no_grad()
def _evaluate(model: nn.Module, inputs: Tensor, targets: Tensor, size: int = 64) -> float:
    model.eval()
    parts = zip(inputs.split(size), targets.split(size), strict=True)
    total = sum(float(loss_of(model, x, y)) * len(x) for x, y in parts)
    model.train()
    return total / len(inputs)


def _check(state: dict[str, Any], config: TrainConfig, corpus: data.Corpus) -> int:
    """The step that a checkpoint stands at, if it is of this run."""
    saved, wanted = state["config"], asdict(config)
    changed = [k for k in wanted if k not in ("eval_every", "checkpoint_every") and saved.get(k) != wanted[k]]
    if changed:
        raise ValueError(
            "resume: the checkpoint is of another run, with "
            + ", ".join(f"{k}={saved.get(k)!r} (now {wanted[k]!r})" for k in changed)
        )
    if state["text"] != corpus.checksum():
        raise ValueError(f"resume: the checkpoint was trained on another text than {corpus.source}; pass its --data")
    return int(state["step"])


class _Metrics:
    """Rows of ``metrics.jsonl``; the file is rewritten whole, so that a kill leaves the old one or the new one."""

    def __init__(self, out: Path | None, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self._path = out / "metrics.jsonl" if out is not None else None

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._path is not None:
            text = "".join(json.dumps(r) + "\n" for r in self.rows)
            checkpoint.write_atomically(self._path, lambda f: f.write(text.encode()))
