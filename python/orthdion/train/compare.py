"""Several optimizers, or one at several learning rates, from the same start on the same batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data
from .config import TrainConfig
from .gpt import GPT
from .loop import Progress, Result, train
from .parallel import Parallel
from .specs import OptimizerSpec, build

__all__ = ["best", "compare", "plot", "report"]

#: Colours that people with colour-vision deficiencies can tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a8a8a")


def compare(
    config: TrainConfig,
    optimizers: Sequence[str],
    lrs: Sequence[float] | None = None,
    *,
    path: str | Path | None = None,
    out: Path | None = None,
    device: str = "cpu",
    watch: Callable[[str], AbstractContextManager[Progress]] | None = None,
) -> list[Result]:
    """Trains once for each optimizer (and learning rate), in the order given.

    Args:
        config: everything but the optimizer and its learning rate.
        optimizers: specs (:mod:`.specs`).
        lrs: learning rates to try for each; None is each spec's own.
        path: as :func:`orthdion.train.train`.
        device: where to train.
        out: a folder; each run writes into one of its own there, and the comparison ``comparison.json`` and ``.png``.
            An earlier comparison there is replaced.
        watch: called with a run's label, gives a context whose value is called after each step.

    Raises:
        ValueError, TypeError: an unknown optimizer or option; no optimizer at all.
    """
    if not optimizers:
        raise ValueError("optimizers must name at least one, such as completed-dion; `orthdion list` shows them")
    for name in optimizers:  # every mistake is found before the first run, not after hours of it
        for lr in lrs or (None,):
            build(GPT(2 * config.heads, 1, config.heads, 1), config.with_(optimizer=name, lr=lr))
    corpus = data.load(path, config.context)
    rates: Sequence[float | None] = lrs or [None]
    results = []
    for name in optimizers:
        for lr in rates:
            spec, suffix = OptimizerSpec.parse(name), "" if lr is None else f"-{lr:g}"
            with watch(spec.label + suffix) if watch else nullcontext() as progress:
                run = train(
                    config.with_(optimizer=name, lr=lr),
                    corpus=corpus,
                    out=out / (spec.folder + suffix) if out else None,
                    overwrite=True,
                    parallel=Parallel(device=device),
                    progress=progress,
                )
            results.append(run)
    if out is not None:
        text = json.dumps(finite(report(results, corpus.source)), indent=1, allow_nan=False)
        checkpoint.write_atomically(out / "comparison.json", lambda f: f.write(text.encode()))
        plot(results, out / "comparison.png")
    return results


def best(results: Sequence[Result]) -> list[Result]:
    """The run of lowest validation loss for each spec, in order of first appearance."""
    chosen: dict[str, Result] = {}
    for r in results:
        held = chosen.setdefault(r.config.optimizer, r)
        if _rank(r.validation_loss) < _rank(held.validation_loss):
            chosen[r.config.optimizer] = r
    return list(chosen.values())


def _rank(loss: float) -> float:
    """For comparisons: a run that diverged is behind every other."""
    return loss if math.isfinite(loss) else math.inf


def report(results: Sequence[Result], source: str) -> dict[str, object]:
    """All figures, as plain values."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "text": source,
        "runs": [asdict(r) for r in results],
    }


def finite(value: Any) -> Any:
    """NaN and infinity as None, which JSON can say."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(results: Sequence[Result], path: Path) -> None:
    """Validation loss over steps and over time, the best learning rate of each optimizer, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, constrained_layout=True)
    for r, colour in zip(best(results), _COLOURS * 3, strict=False):
        losses = [row["validation"] for row in r.history]
        label = f"{OptimizerSpec.parse(r.config.optimizer).label}  {r.validation_loss:.3f}"
        axes[0].plot([row["step"] for row in r.history], losses, color=colour, label=label, linewidth=1.8)
        axes[1].plot([row["seconds"] for row in r.history], losses, color=colour, linewidth=1.8)
    seen = [row["validation"] for r in results for row in r.history if math.isfinite(row["validation"])]
    early = [row["validation"] for r in results for row in r.history[:2] if math.isfinite(row["validation"])]
    axes[0].set(xlabel="step", ylabel="validation loss, nats a byte")
    if seen:
        axes[0].set_ylim(min(seen) - 0.05, max(early or seen) + 0.01)
    axes[1].set(xlabel="seconds of training")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, title="final loss")
    config = results[0].config
    figure.suptitle(
        f"GPT {config.width} wide, {config.layers} layers, r = {config.rank_fraction:g}·d, "
        f"{config.steps} steps of {config.tokens_per_step} bytes"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
