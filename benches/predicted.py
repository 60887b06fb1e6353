"""``python -m benches.predicted``: what `orthdion.plan` predicts of a step here, held to what the step takes.

A GPT block 768 wide (4×768², 3072×768, 768×3072), low-rank rules at r = d/8, every optimizer of the library, on one
thread by the process's CPU time, which a busy machine disturbs less. The machine is measured before and after each
optimizer; where the two differ, so do the predictions, and both are written down.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import orthdion
from orthdion.optim import OPTIMIZERS
from orthdion.plan import Hardware, count, measured
from orthdion.plan.hardware import timed
from orthdion.plan.layouts import Spread
from orthdion.plan.models import model_of

from .machine import _commit, _processor
from .parts import _block, _parameters

console = Console(width=120)

#: A prediction is good to this share of the time.
GOOD = 0.25


def _options(name: str) -> dict[str, Any]:
    rule = OPTIMIZERS[name].rule
    return {"rank_fraction": 1 / 8} if rule is not None and hasattr(rule, "rank_fraction") else {}


def rows(seconds: float) -> tuple[list[Hardware], list[dict[str, Any]]]:
    """The machine before, between and after the steps, and a row for each optimizer."""
    shapes = _block(768)
    names = [name for name, kind in OPTIMIZERS.items() if kind.rule is not None and kind.rule.name == name]
    machines, found = [measured(seconds / 8, time.process_time)], []
    for name in names:
        step = orthdion.create(name, _parameters(shapes), **_options(name)).step
        took, median, _ = (1e3 * t for t in quantiles(timed(step, seconds, time.process_time), n=4))
        machines.append(measured(seconds / 8, time.process_time))
        counted = count(model_of(shapes), name, lambda w, g: Spread(None, ()), options=_options(name))
        around = [1e3 * machine.seconds(counted.work) for machine in machines[-2:]]
        predicted = sum(around) / 2
        kinds = Counter[str]()
        for cost, n in counted.work.items():
            kinds[cost.kind] += sum(1e3 * machine.seconds({cost: n}) / 2 for machine in machines[-2:])
        found.append(
            {
                "optimizer": name,
                "measured_ms": took,
                "median_ms": median,
                "predicted_ms": predicted,
                "predicted_before_and_after_ms": around,
                "ratio": predicted / took,
                "good": abs(predicted / took - 1) <= GOOD,
                "flops": counted.flops,
                "predicted_ms_by_kind": dict(kinds),
            }
        )
    return machines, found


def run(
    seconds: Annotated[float, typer.Option(help="Time for each optimizer.")] = 4.0,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = Path("runs/bench"),
) -> None:
    """Measures, predicts, prints a table, writes JSON."""
    torch.set_num_threads(1)  # else CPU time is not the time of a step
    machines, found = rows(seconds)
    table = Table(title="a step of a GPT block 768 wide, r = d/8", title_justify="left")
    for column in ("optimizer", "measured ms", "predicted ms", "predicted/measured", "before, after"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in found:
        pair = ", ".join(f"{t:.1f}" for t in row["predicted_before_and_after_ms"])
        cells = (f"{row['measured_ms']:.1f}", f"{row['predicted_ms']:.1f}", f"{row['ratio']:.2f}", pair)
        table.add_row(row["optimizer"], *cells, style=None if row["good"] else "bold")
    console.print(table)
    console.print(f"{sum(r['good'] for r in found)} of {len(found)} within {GOOD:.0%}; measured: the lower quartile")
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "what": "A step of 4×768², 3072×768 and 768×3072 in float32, low-rank rules at r = d/8: the lower quartile of "
        "its CPU times on one thread, and what orthdion.plan predicts from rates measured before and after",
        "command": f"python -m benches.predicted --seconds {seconds:g}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "commit": _commit(),
        "rates": [{"rates": dict(m.rates), "bandwidths": dict(m.bandwidths)} for m in machines],
        "rows": found,
    }
    (out / "predicted.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    console.print(f"figures in {out / 'predicted.json'}")


if __name__ == "__main__":
    typer.run(run)
