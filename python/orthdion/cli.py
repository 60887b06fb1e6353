"""The command line: ``orthdion train | compare | list | plan | doctor | bench``."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_type_hints

try:
    if find_spec("matplotlib") is None:
        raise ImportError("no matplotlib", name="matplotlib")
    import typer
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as e:  # the optimizers themselves need none of these
    raise SystemExit(f"orthdion's command line needs {e.name}: pip install 'orthdion[cli]'") from e

from .plan import PRESETS as SIZES
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

Out = Annotated[Path | None, typer.Option(help="Folder for checkpoints, metrics and plots.")]


def _option(words: str, default: Any = None) -> Any:
    """A field that is an option; None is not shown as a default."""
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Options:
    """What train and compare share. Those that are None are the preset's."""

    preset: str = _option(f"Sizes to start from: {', '.join(PRESETS)}.", "demo")
    data: Path | None = field(
        default=None, metadata={"help": "A text file or a folder; the standard library's sources if left out."}
    )
    device: str = _option("Torch device; 'auto' takes a GPU if there is one.", "auto")
    steps: int | None = _option("Optimizer steps.")
    width: int | None = _option("Of the residual stream; a multiple of twice the heads.")
    layers: int | None = _option("Transformer blocks.")
    heads: int | None = _option("Attention heads.")
    context: int | None = _option("Bytes in a sequence.")
    batch: int | None = _option("Sequences in a micro-batch.")
    accumulate: int | None = _option("Micro-batches in a step.")
    seed: int | None = _option("Of weights, batches and starts.")
    scalar_lr: float | None = _option("Learning rate of AdamW on what is no hidden matrix.")
    rank_fraction: float | None = _option("Rank over the smaller side, in (0, 1].")
    weight_decay: float | None = _option("Decoupled decay.")
    clip: float | None = _option("Largest gradient norm; 0 is none.")
    warmup: float | None = _option("Share of the steps that the learning rate rises over.")
    schedule: str | None = _option("cosine, linear or constant.")
    eval_every: int | None = _option("Steps between evaluations.")
    checkpoint_every: int | None = _option("Steps between checkpoints.")

    def config(self, **more: Any) -> TrainConfig:
        """The preset with what was given."""
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")
        known = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(self)}
        return PRESETS[self.preset].with_(**{name: getattr(self, name) for name in known}, **more)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, whose first parameter is an :class:`Options`, the options of those fields after its own."""
    hints = get_type_hints(Options)
    parameters = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    for f in fields(Options):
        option = typer.Option(help=f.metadata["help"], show_default=f.default is not None)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(
            inspect.Parameter(f.name, kind, default=f.default, annotation=Annotated[hints[f.name], option])
        )

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(Options(**{f.name: given.pop(f.name) for f in fields(Options)}), **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


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
    names = ("optimizer", "lr", "validation", "tokens/s", "ms/step", "state MB")
    title = "validation loss in nats a byte; ms/step is the optimizer's part"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in names:
        if name == "optimizer":  # in a narrow terminal a long spec is folded, never a figure cut short
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
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
            console.print(f"{r.config.optimizer}: {note}", markup=False)


_SPEC_HELP = (
    "NAME or NAME:key=value,…. NAME is one of `orthdion list`, or module:Class for an optimizer class or a Rule of "
    "your own, in the current folder too; values are Python literals or words. completed-dion:rank_fraction=0.125 · "
    "orth-dion:feedback=(1,0.7) · torch.optim:Muon:matrices_only=true (AdamW for the rest) · my_rules:SignedMomentum"
)
_COMPARED = "orth-dion orth-dion:feedback=(1,0.7) completed-dion dion muon torch.optim:Muon:matrices_only=true adamw"


@app.command()
@_with_options
def train(
    options: Options,
    optimizer: Annotated[str, typer.Option(help=_SPEC_HELP)] = "completed-dion",
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate; if left out, of its sweep on the demo, or its default.", show_default=False),
    ] = None,
    out: Out = Path("runs/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, bit for bit.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
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

    config = options.config(optimizer=optimizer, lr=lr)
    if processes is not None and "RANK" not in os.environ:
        raise SystemExit(launch(processes, sys.argv[1:]))
    spread = Parallel.start(parallel, _device(options.device))
    console.quiet = spread.rank > 0
    try:
        with _watch(optimizer, config.steps) as progress:
            result = run(
                config,
                path=options.data,
                out=out,
                resume=resume,
                overwrite=overwrite,
                parallel=spread,
                progress=progress,
            )
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
@_with_options
def compare(
    options: Options,
    optimizers: Annotated[
        str, typer.Option(help="Specs as of `orthdion train --optimizer`, separated by spaces: in quotes, then.")
    ] = _COMPARED,
    lrs: Annotated[
        str | None,
        typer.Option(help="Learning rates to sweep for each, separated by commas; each spec's own if left out."),
    ] = None,
    out: Out = Path("runs/compare"),
) -> None:
    """Train with several optimizers from the same start on the same batches, and show the curves. An earlier comparison
    in the same folder is replaced.
    """
    from .train.compare import best
    from .train.compare import compare as run
    from .train.specs import split_specs

    config = options.config()
    try:
        rates = [float(x) for x in lrs.split(",")] if lrs else None
    except ValueError:
        raise ValueError(f"--lrs must be numbers separated by commas, not {lrs!r}") from None
    results = run(
        config,
        split_specs(optimizers),
        rates,
        path=options.data,
        out=out,
        device=_device(options.device),
        watch=lambda label: _watch(label, config.steps),
    )
    _print(results)
    if rates:
        lowest = ", ".join(f"{r.config.optimizer} {r.lr:g}" for r in best(results))
        console.print(f"best learning rate of each: {lowest}", markup=False)
    if out is not None:
        console.print(f"the curves are in {out / 'comparison.png'}, all figures in {out / 'comparison.json'}")


@app.command(name="list")
def list_(
    counted: Annotated[bool, typer.Option("--counted", help="Figures of a GPT block, by a counting run.")] = False,
) -> None:
    """List the registered optimizers: the step of each, what it keeps, computes, sends, and is for."""
    from .create import list_optimizers
    from .plan.catalogue import RANKS
    from .plan.catalogue import counted as row_of

    refused = {}
    if counted:
        title = f"numbers for each weight of a GPT block 768 wide, r = d/8; sent by each of {RANKS} ranks"
        table = Table(title=title, title_justify="left", box=SIMPLE)
        for column in ("name", "state", "flops", "sent, FSDP", "sent, DDP"):
            table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
        for known in list_optimizers():
            try:
                row = row_of(known)
            except ValueError as e:
                refused[known.name] = e
                continue
            sent = ("varies" if x is None else f"{x:.3g}" for x in (row.sharded, row.replicas))
            table.add_row(row.info.name, f"{row.state:.3g}", f"{row.flops:.3g}", *sent)
    else:
        table = Table(title="m×n matrices at rank r", title_justify="left", box=SIMPLE)
        for column in ("name", "step", "state", "flops", "sent", "what it is for", "paper"):
            table.add_column(column, no_wrap=column == "name", overflow="fold")
        for known in list_optimizers():
            cells = (known.summary, known.state, known.flops, known.sent, known.use, known.paper)
            table.add_row(known.name, *cells)
    (console if console.is_terminal else Console(width=160)).print(table)
    for name, why in refused.items():
        console.print(f"not counted: {name}: {why}", markup=False, highlight=False)


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(SIZES)}, or a .json file: shapes by name, or a transformers config.")
    ] = "llama-3-8b",
    optimizers: Annotated[
        str | None,
        typer.Option(
            help="Specs separated by spaces, in quotes; all of `orthdion list` if left out.", show_default=False
        ),
    ] = None,
    ranks: Annotated[str, typer.Option(help="How many processes; several numbers separated by commas.")] = "8",
    layout: Annotated[str, typer.Option(help="ddp, fsdp, hsdp, tp, fsdp+tp or hsdp+tp.")] = "fsdp",
    shard: Annotated[int, typer.Option(help="Ranks that shard a weight under hsdp.")] = 8,
    tensor: Annotated[int, typer.Option(help="Ranks of a tensor-parallel group.")] = 8,
    hardware: Annotated[
        str, typer.Option(help="h100, b200, or here: this machine, measured for some seconds.")
    ] = "h100",
    link: Annotated[
        float | None,
        typer.Option(help="Gbit/s of each rank between nodes; the hardware's if left out.", show_default=False),
    ] = None,
    rank_fraction: Annotated[
        float | None, typer.Option(help="Of the optimizers that have one and do not say.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """What a step costs on any model, mesh and machine: flops, memory, elements on the wire, predicted time."""
    from .plan import plan as run
    from .train.specs import OptimizerSpec, split_specs

    try:
        counts = [int(n) for n in ranks.split(",")]
    except ValueError:
        raise ValueError(f"--ranks must be whole numbers separated by commas, not {ranks!r}") from None
    specs = [OptimizerSpec.parse(text) for text in split_specs(optimizers)] if optimizers else None
    found = run(
        model,
        None if specs is None else {spec.label: (spec.name, spec.options) for spec in specs},
        ranks=counts,
        layout=layout,
        shard=shard,
        tensor=tensor,
        hardware=hardware,
        link=link,
        options={} if rank_fraction is None else {"rank_fraction": rank_fraction},
    )
    if json:
        print(found.to_json())
        return
    head, rows = found.cells()
    table = Table(title=found.title, title_justify="left", box=SIMPLE)
    for column in head:
        table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    (console if console.is_terminal else Console(width=140)).print(table)
    for note in found.notes():
        console.print(note, markup=False, highlight=False)


@app.command()
def doctor(quick: Annotated[bool, typer.Option(help="Leave the ten-second speed check out.")] = False) -> None:
    """Say what is installed, which backend serves which device and why, and how fast it is."""
    from .doctor import examine

    for section in examine(speed=not quick):
        table = Table(title=section.title, title_justify="left", show_header=False)
        for name, value in section.rows:
            table.add_row(name, value)
        console.print(table)
    console.print("python -m orthdion.selftest checks that it computes what it should")


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
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # optimizers may come from the current folder
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, OSError) as e:
        Console(stderr=True).print(f"[red]error:[/] {e}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
