"""Two checkouts in alternation: ``python -m benches.alternate BEFORE AFTER --rounds 5 --out FILE``.

A machine drifts by more than most changes are worth. So each round runs every case once in a fresh process of either
checkout, one right after the other, and what is told is the median of the rounds' ratios. Steps are timed by the wall,
what Python does beside the core by the thread's own processor time, with the core's calls left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

#: Runs in either checkout; prints seconds of a step, and of Python, as JSON.
_WORKER = """
import importlib, json, sys, time
from statistics import median
import torch, orthdion
from orthdion import _core

torch.set_num_threads(2)
case = sys.argv[1]
shapes = {"block": [(768, 768)] * 4 + [(3072, 768), (768, 3072)], "small": [(64, 64)] * 1000}[case.split("-")[0]]
draw = torch.Generator().manual_seed(0)
params = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in shapes]
for p in params:
    p.grad = torch.randn(p.shape, generator=draw)
kind = case.split("-")[1]
if kind == "completed":
    make = getattr(orthdion, "CompletedDion", None)
    o = make(params, rank_fraction=0.25) if make else orthdion.OrthDion(params, rank_fraction=0.25, tail="normalized")
elif kind == "adamw":
    o = orthdion.Dion([{"params": params, "algorithm": "adamw"}])
else:
    o = orthdion.OrthDion(params, rank_fraction=0.125)
a = torch.randn(512, 512)

def seconds(clock, count):
    times = []
    for _ in range(count):
        a @ a  # as in training, torch has just worked
        began = clock()
        o.step()
        times.append(clock() - began)
    return median(times)

seconds(time.perf_counter, 3)
wall = seconds(time.perf_counter, 15)

class Idle:
    def __getattr__(self, name):
        return (lambda *a: None) if name.endswith("_step") else getattr(_core, name)

for name in ("fused", "rust"):
    try:
        importlib.import_module(f"orthdion.backends.{name}")._core = Idle()
    except ImportError:
        pass
print(json.dumps([wall, seconds(time.thread_time, 15)]))
"""

CASES = ("block-orth", "block-completed", "small-orth", "small-adamw")


def run(tree: Path, case: str) -> tuple[float, float]:
    """Seconds of a step, and of its Python, of one case in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "python")}
    command = [sys.executable, "-c", _WORKER, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} in {tree} failed:\n{done.stderr}")
    wall, python = json.loads(done.stdout)
    return wall, python


def main() -> None:
    """Prints and keeps the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for case in CASES:
        pairs = [(run(options.before, case), run(options.after, case)) for _ in range(options.rounds)]
        figures[case] = {
            "step_ms_before": 1e3 * median(b[0] for b, _ in pairs),
            "step_ms_after": 1e3 * median(a[0] for _, a in pairs),
            "step_ratio": median(a[0] / b[0] for b, a in pairs),
            "python_ms_before": 1e3 * median(b[1] for b, _ in pairs),
            "python_ms_after": 1e3 * median(a[1] for _, a in pairs),
            "python_ratio": median(a[1] / b[1] for b, a in pairs),
        }
        print(case, json.dumps({k: round(v, 3) for k, v in figures[case].items()}), flush=True)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
