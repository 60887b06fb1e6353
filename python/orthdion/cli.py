"""The command line: ``orthdion train | compare | recipes | doctor | bench``."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

try:
    import matplotlib  # noqa: F401
    import typer
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as e:  # the optimizers themselves need none of these
    raise SystemExit(f"orthdion's command line needs {e.name}: pip install 'orthdion[cli]'") from e

from .train import PRESETS, TrainConfig
from .train.loop import Progress as Report
from .train.loop import Result

__all__ = ["main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Orth-Dion and its family, at work.",
    pretty_exceptions_enable=False,
)
console = Console()

Preset = Annotated[str, typer.Option(help=f"Sizes to start from: {', '.join(PRESETS)}.")]
Data = Annotated[Path | None, typer.Option(help="A text file or a folder; the standard library's sources if left out.")]
Out = Annotated[Path | None, typer.Option(help="Folder for checkpoints, metrics and plots.")]
Device = Annotated[str, typer.Option(help="Torch device; 'auto' takes a GPU if there is one.")]
ScalarLr = Annotated[float | None, typer.Option(help="Rate of AdamW on what is no hidden matrix.", show_default=False)]
Lr = Annotated[float | None, typer.Option(help="Learning rate; the recipe's own if left out.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.", show_default=False)]
Width = Annotated[
    int | None, typer.Option(help="Of the residual stream; a multiple of twice the heads.", show_default=False)
]
Layers = Annotated[int | None, typer.Option(help="Transformer blocks.", show_default=False)]
Heads = Annotated[int | None, typer.Option(help="Attention heads.", show_default=False)]
Context = Annotated[int | None, typer.Option(help="Bytes in a sequence.", show_default=False)]
Batch = Annotated[int | None, typer.Option(help="Sequences in a micro-batch.", show_default=False)]
Accumulate = Annotated[int | None, typer.Option(help="Micro-batches in a step.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Of weights, batches and starts.", show_default=False)]
RankFraction = Annotated[float | None, typer.Option(help="Rank over the smaller side, in (0, 1].", show_default=False)]
WeightDecay = Annotated[float | None, typer.Option(help="Decoupled decay.", show_default=False)]
Clip = Annotated[float | None, typer.Option(help="Largest gradient norm; 0 is none.", show_default=False)]
Warmup = Annotated[float | None, typer.Option(help="Share of the steps that the rate rises over.", show_default=False)]
EvalEvery = Annotated[int | None, typer.Option(help="Steps between evaluations.", show_default=False)]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints.", show_default=False)]


def _config(changes: dict[str, Any]) -> TrainConfig:
    preset = changes["preset"]
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    known = {f.name for f in fields(TrainConfig)}
    return PRESETS[preset].with_(**{k: v for k, v in changes.items() if k in known})


def _device(name: str) -> str:
    import torch

    if name != "auto":
        try:
            torch.empty(0, device=name)
        except RuntimeError as e:
            raise ValueError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from None
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _watch(label: str, steps: int) -> Iterator[Report]:
    """A progress bar with loss and tokens a second; a line every so often where nobody watches."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(None), TextColumn("{task.completed}/{task.total}"))
    more = (
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, *more, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=steps, loss=float("nan"), speed=0.0)

        def progress(step: int, loss: float, speed: float) -> None:
            bar.update(task, completed=step, loss=loss, speed=speed)
            if not console.is_terminal and (step % max(steps // 4, 1) == 0 or step == steps):
                console.print(f"{label}: step {step}/{steps}, loss {loss:.3f}, {speed:,.0f} tokens/s")

        yield progress


def _print(results: list[Result]) -> None:
    names = ("optimizer", "rate", "validation", "tokens/s", "ms/step", "state MB")
    title = "validation loss in nats a byte; ms/step is the optimizer's part"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in names:
        table.add_column(name, justify="left" if name == "optimizer" else "right", no_wrap=name == "optimizer")
    lowest = min((r.validation_loss for r in results if math.isfinite(r.validation_loss)), default=None)
    for r in results:
        style = "bold" if r.validation_loss == lowest else None
        cells = (
            f"{r.validation_loss:.4f}",
            f"{r.tokens_per_second:,.0f}",
            f"{r.optimizer_ms:.2f}",
        )
        table.add_row(r.config.optimizer, f"{r.lr:g}", *cells, f"{r.state_megabytes:.2f}", style=style)
    console.print(table)
    for r in results:
        for note in r.notes:
            console.print(f"{r.config.optimizer}: {note}")


@app.command()
def train(
    preset: Preset = "demo",
    optimizer: Annotated[str, typer.Option(help="A recipe; see `orthdion recipes`.")] = "orth-dion-completed",
    lr: Lr = None,
    scalar_lr: ScalarLr = None,
    data: Data = None,
    out: Out = Path("runs/train"),
    resume: Annotated[bool, typer.Option(help="Continue the run in --out, bit for bit.")] = False,
    device: Device = "auto",
    steps: Steps = None,
    width: Width = None,
    layers: Layers = None,
    heads: Heads = None,
    context: Context = None,
    batch: Batch = None,
    accumulate: Accumulate = None,
    seed: Seed = None,
    rank_fraction: RankFraction = None,
    weight_decay: WeightDecay = None,
    clip: Clip = None,
    warmup: Warmup = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear or constant.", show_default=False)] = None,
    eval_every: EvalEvery = None,
    checkpoint_every: CheckpointEvery = None,
    parallel: Annotated[
        str | None, typer.Option(help="Over several processes: ddp, fsdp, tp, hsdp or fsdp+tp.", show_default=False)
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--launch", help="Start so many processes on this machine.", show_default=False)
    ] = None,
) -> None:
    """Train a small GPT on real text. Options left out are the preset's."""
    from .train import train as run
    from .train.parallel import Parallel, launch

    config = _config(dict(locals()))
    if processes is not None and "RANK" not in os.environ:
        raise SystemExit(launch(processes, sys.argv[1:]))
    spread = Parallel.start(parallel, _device(device))
    console.quiet = spread.rank > 0
    try:
        with _watch(optimizer, config.steps) as progress:
            result = run(config, path=data, out=out, resume=resume, parallel=spread, progress=progress)
    finally:
        spread.finish()
    _print([result])
    if spread.rank > 0:
        return
    if out is not None:
        from .train.compare import plot

        plot([result], out / "loss.png")
        console.print(f"checkpoint, metrics and plot are in {out}")


@app.command()
def compare(
    preset: Preset = "demo",
    optimizers: Annotated[
        str, typer.Option(help="Recipes, separated by commas; see `orthdion recipes`.")
    ] = "orth-dion,orth-dion-tuned,orth-dion-completed,dion,muon,adamw",
    lrs: Annotated[
        str | None, typer.Option(help="Rates to sweep for each, separated by commas; each recipe's own if left out.")
    ] = None,
    scalar_lr: ScalarLr = None,
    data: Data = None,
    out: Out = Path("runs/compare"),
    device: Device = "auto",
    steps: Steps = None,
    width: Width = None,
    layers: Layers = None,
    heads: Heads = None,
    context: Context = None,
    batch: Batch = None,
    accumulate: Accumulate = None,
    seed: Seed = None,
    rank_fraction: RankFraction = None,
    weight_decay: WeightDecay = None,
    clip: Clip = None,
    eval_every: EvalEvery = None,
) -> None:
    """Train with several optimizers from the same start on the same batches, and show the curves."""
    from .train.compare import best
    from .train.compare import compare as run

    config = _config(dict(locals()))
    try:
        rates = [float(x) for x in lrs.split(",")] if lrs else None
    except ValueError:
        raise ValueError(f"--lrs must be numbers separated by commas, not {lrs!r}") from None
    names = [name.strip() for name in optimizers.split(",") if name.strip()]
    results = run(
        config,
        names,
        rates,
        path=data,
        out=out,
        device=_device(device),
        watch=lambda label: _watch(label, config.steps),
    )
    _print(results)
    if rates:
        console.print("best rate of each: " + ", ".join(f"{r.config.optimizer} {r.lr:g}" for r in best(results)))
    if out is not None:
        console.print(f"the curves are in {out / 'comparison.png'}, all figures in {out / 'comparison.json'}")


@app.command()
def recipes() -> None:
    """List the optimizers that train and compare know by name."""
    from .train.recipes import RECIPES

    table = Table("name", "rate", "what it is")
    for name, recipe in RECIPES.items():
        table.add_row(name, f"{recipe.lr:g}", recipe.summary)
    console.print(table)


@app.command()
def doctor(quick: Annotated[bool, typer.Option(help="Leave the ten-second speed check out.")] = False) -> None:
    """Say what is installed, which backend serves which device and why, and how fast it is."""
    from .doctor import examine

    for section in examine(speed=not quick):
        table = Table(title=section.title, title_justify="left", show_header=False)
        for name, value in section.rows:
            table.add_row(name, value)
        console.print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Run the benches suite of the repository; takes the options of `python -m benches`."""
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / "benches" / "__main__.py").is_file():
        raise ValueError("the benches live in the repository, not in the wheel: clone it and run `make bench`")
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benches", *context.args]
    raise SystemExit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode)


def main() -> None:
    """Entry point: errors in what was asked are one line, without a traceback."""
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, OSError) as e:
        Console(stderr=True).print(f"[red]error:[/] {e}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
