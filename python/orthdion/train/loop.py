"""The training loop: one run, whose resumption is bit-exact."""

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

from ..core.optimizer import MatrixOptimizer
from ..distributed import local
from ..optim import CurvaDion
from . import checkpoint, data, sharded
from .config import TrainConfig, learning_rate
from .gpt import GPT, loss_of
from .parallel import ONE, Parallel
from .specs import OptimizerSpec, build

__all__ = ["Result", "train"]

#: Of one process, and of several.
_CHECKPOINTS = ("checkpoint.pt", "latest.json")

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
    overwrite: bool = False,
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
        overwrite: without ``resume``, an earlier run in ``out`` is replaced instead of refused.
        parallel: the device, and how the run is spread over processes.
        progress: called after each step.

    Raises:
        ValueError: unknown optimizer, no usable text, a damaged or different checkpoint, an earlier run in ``out``.
    """
    if out is not None and not (resume or overwrite) and any((out / name).exists() for name in _CHECKPOINTS):
        raise ValueError(
            f"out: {out} holds an earlier run; pass --resume to continue it, another --out, or --overwrite"
        )
    config = config.with_(lr=OptimizerSpec.parse(config.optimizer).lr(config.lr))
    device, alone = parallel.device, parallel.mode is None
    model = parallel.wrap(GPT(config.width, config.layers, config.heads, config.context, config.seed).to(device))
    optimizers = build(model, config)  # before the text is read: a mistake is told at once
    corpus = corpus or data.load(path, config.context)
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    rows: list[dict[str, Any]] = []
    first = 0
    if resume:
        first, rows = _resume(out, model, optimizers, config, corpus)
    elif out is not None and parallel.rank == 0:
        for name in (*_CHECKPOINTS, "metrics.jsonl"):  # a later --resume must not find another run's
            (out / name).unlink(missing_ok=True)
    before_break = rows[-1]["seconds"] if rows else 0.0
    metrics = _Metrics(out if parallel.rank == 0 else None, rows)
    inputs, targets = (t.to(device) for t in corpus.evaluation(config.eval_windows, config.context))
    spent = optimizer_time = 0.0
    loss = float("nan")
    for step in range(first, config.steps):
        began, factor = time.perf_counter(), learning_rate(config, step)
        for o, lrs in zip(optimizers, base, strict=True):
            for group, lr in zip(o.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        loss = _gradients(model, corpus, config, step, parallel)
        if config.clip > 0:
            _clip(model, optimizers, config.clip)
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
            seen = {"step": done, "loss": loss, "validation": evaluate(model, inputs, targets), "lr": factor}
            metrics.add({**seen, "seconds": before_break + spent, "tokens_per_second": speed})
        if out is not None and (done % config.checkpoint_every == 0 or done == config.steps):
            state = {"step": done, "config": asdict(config), "text": corpus.checksum()}
            _save(out, state, model, optimizers, alone)
    steps = max(config.steps - first, 1)
    last = metrics.rows[-1] if metrics.rows else {"loss": loss, "validation": evaluate(model, inputs, targets)}
    return Result(
        config=config,
        lr=float(optimizers[0].defaults["lr"]),
        train_loss=last["loss"],
        validation_loss=last["validation"],
        tokens_per_second=steps * config.tokens_per_step / spent if spent else 0.0,
        optimizer_ms=1e3 * optimizer_time / steps,
        state_megabytes=_state_bytes(optimizers) / 1e6,
        skipped=sum(sum(getattr(o, "skipped_steps", {}).values()) for o in optimizers),
        history=metrics.rows,
        notes=_notes(optimizers),
    )


def _resume(
    out: Path | None, model: nn.Module, optimizers: list[Optimizer], config: TrainConfig, corpus: data.Corpus
) -> tuple[int, list[dict[str, Any]]]:
    """Loads the checkpoint in ``out``; its step, and the metrics up to there."""
    if out is None:
        raise ValueError("resume needs out, the folder of the run to continue")
    whole = not (out / "latest.json").is_file()
    state = checkpoint.load(out / "checkpoint.pt") if whole else sharded.load_meta(out)
    first = _check(state, config, corpus)
    if whole:
        sharded.load_whole(state, model, optimizers)
    else:
        sharded.load(out, state, model, optimizers)
    return first, checkpoint.read_metrics(out / "metrics.jsonl", below=first)


def _save(out: Path, state: dict[str, Any], model: nn.Module, optimizers: list[Optimizer], alone: bool) -> None:
    """Adds weights and optimizer states to ``state`` and saves it."""
    if not alone:
        sharded.save(out, state, model, optimizers)
        return
    states = [o.state_dict() for o in optimizers]
    checkpoint.save(out / "checkpoint.pt", {**state, "model": model.state_dict(), "optimizers": states})
    (out / "latest.json").unlink(missing_ok=True)  # of several processes, and older


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


def _clip(model: nn.Module, optimizers: list[Optimizer], most: float) -> None:
    """By the norm of all gradients together, whole or sharded; the mean of replicas' norms where factors are sent. Our
    own leaves gradients alone where one is not finite, so that the step skips that one only.
    """
    if len(optimizers) == 1 and isinstance(optimizers[0], MatrixOptimizer):
        optimizers[0].clip_grad_norm_(most)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), most)


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor, size: int = 64) -> float:
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


def _notes(optimizers: list[Optimizer]) -> list[str]:
    """What optimizers have to say of a run: bytes sent, steps skipped, how often replicas met."""
    lines = []
    for o in optimizers:
        if not isinstance(o, MatrixOptimizer):
            continue
        sent = o.communication()
        if sent.total.bytes:
            lines.append(f"each process sent {sent.total.bytes / max(sent.steps, 1) / 1e3:,.1f} kB a step by itself")
        if skipped := sum(o.skipped_steps.values()):
            lines.append(f"{skipped} steps of single parameters skipped for NaN or infinity")
        if isinstance(o, CurvaDion):
            met = o.synchronisation()
            lines.append(
                f"{met.synchronised} of {met.steps} steps synchronised, {met.forced} of them by the cap; "
                f"replicas' weights were up to {met.drift:.1e} of their norm apart"
            )
    return lines


def _state_bytes(optimizers: list[Optimizer]) -> int:
    """Bytes of all state tensors, on this rank."""
    states = (local(t) for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in states)


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
