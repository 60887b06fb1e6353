"""``python -m benches``: measures the machine, runs the parts, prints tables, writes JSON and a plot."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from orthdion.train.compare import finite

from .communication import communication
from .machine import Machine, measure
from .parts import FORMS, Row
from .parts import PARTS as LOCAL

PARTS = {**LOCAL, "communication": communication}

console = Console(width=140)


def run(
    parts: Annotated[str, typer.Option(help=f"Some of {', '.join(PARTS)}, separated by commas.")] = ",".join(PARTS),
    seconds: Annotated[
        float, typer.Option(help="Time for a pair of candidates; whole steps take eight times that.")
    ] = 1.0,
    threads: Annotated[
        int | None, typer.Option(help="Threads; torch's own number if left out.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the plot.")] = Path("runs/bench"),
) -> None:
    """Every figure with its floor, and as a ratio against a named peer timed in alternation in the same run."""
    names = [name.strip() for name in parts.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    machine = measure(seconds)
    console.print(
        f"{machine.processor}, {machine.threads} threads, {machine.instruction_set}, torch {machine.torch}, "
        f"commit {machine.commit}\n"
        f"float32 {machine.float32:.0f}, float64 {machine.float64:.0f}, bfloat16 {machine.bfloat16:.0f} GF/s "
        "(torch's products), "
        f"copy {machine.copy:.1f} GB/s"
    )
    rows: list[Row] = []
    for name in (n for n in PARTS if n in names):
        part = list(PARTS[name](machine, seconds))
        console.print(_table(name, part))
        rows += part
    out.mkdir(parents=True, exist_ok=True)
    _write(machine, rows, out)
    console.print(f"figures in {out / 'bench.json'}, plot in {out / 'bench.png'}")


def _table(name: str, rows: list[Row]) -> Table:
    table = Table(title=name, title_justify="left")
    for column in ("case", "candidate", "ms", "quartiles", "× floor", "ratio", "against", "note"):
        table.add_column(column, justify="right" if column in ("ms", "× floor", "ratio") else "left")
    last = None
    for r in rows:
        over = f"{r.sample.median / r.floor:.2f}" if r.floor else ""
        cells = (
            f"{r.sample.median:.2f}",
            f"{r.sample.low:.2f}–{r.sample.high:.2f}",
            over,
            "" if math.isnan(r.ratio) else f"{r.ratio:.2f}",
            r.peer,
            r.note,
        )
        table.add_row(r.case if r.case != last else "", r.candidate, *cells)
        last = r.case
    return table


def _write(machine: Machine, rows: list[Row], out: Path) -> None:
    figures = finite({"machine": asdict(machine), "rows": [asdict(r) for r in rows]})
    text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "bench.json").write_text(text)
    steps = [r for r in rows if r.part == "step" and r.sample.count]
    if not steps:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(r.case for r in steps))
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4.6 * len(cases), 4.2), constrained_layout=True)
    for axis, case in zip(axes if len(cases) > 1 else [axes], cases, strict=True):
        here = sorted((r for r in steps if r.case == case), key=lambda r: -r.sample.median)
        colours = ["#0072B2" if r.candidate in FORMS or "orthdion)" in r.candidate else "#b0b0b0" for r in here]
        axis.barh([r.candidate for r in here], [r.sample.median for r in here], color=colours)
        for i, r in enumerate(here):
            if r.floor:
                axis.plot([r.floor, r.floor], [i - 0.4, i + 0.4], color="#D55E00", linewidth=2)
        axis.set(title=case, xlabel="ms a step (orange: its floor)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "bench.png", dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(run)
