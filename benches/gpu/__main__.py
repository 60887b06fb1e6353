"""``python3 -m benches.gpu``: verify, then measure, then write ``gpu.json`` and ``gpu.md``; ends in time, whatever
happens.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cases import MODELS, Candidate, Model, candidates
from .clock import Clock
from .launches import kernels
from .verify import verify

_WORDS = {True: "holds", False: "FAILS", None: "not run"}
FRACTIONS = (1 / 8, 1 / 16, 1 / 4, 1 / 2, 1.0)


def rates(clock: Clock, size: int) -> dict[str, float]:
    """10⁹ a second: products in float32, TF32, bfloat16 and float64, and bytes read and written by a copy."""
    device, found = clock.device, {}
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    for name, dtype in kinds.items():
        a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[name] = 2 * size**3 / clock.time(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 0.3).low / 1e6
    if device.type == "cuda":
        from orthdion.backends.cupy.device import device_for

        there = device_for(device)
        a, b, c = (torch.randn(1, size, size, device=device) for _ in range(3))

        def tf32() -> None:
            with there.active():
                there.multiply(c, a, b, tf32=True)

        found["tf32"] = 2 * size**3 / clock.time(tf32, 0.3).low / 1e6
    else:
        found["tf32"] = found["float32"]
    x = torch.empty(16 * size * size, device=device)
    y = torch.empty_like(x)
    found["copy"] = 2 * 4 * x.numel() / clock.time(lambda: y.copy_(x), 0.3).low / 1e6
    return found


def measure(
    clock: Clock, model: Model, candidate: Candidate, dtype: torch.dtype, seconds: float, left: float
) -> dict[str, Any]:
    """One optimizer's step on a model's matrices: times, memory beyond weights, gradients and states. One that would
    take a third of the seconds ``left`` for its six calls is given up after two.
    """
    device = clock.device
    params = [nn.Parameter(0.02 * torch.randn(s, device=device, dtype=dtype)) for s in model.shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    try:
        o = candidate.build(params)
        o.step()
        clock.wait()
        start = time.perf_counter()
        o.step()
        clock.wait()
        if (one := time.perf_counter() - start) * 6 > left / 3:
            return {"error": f"{1e3 * one:.0f} ms a step: no time to repeat it"}
        kept = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            kept = torch.cuda.memory_allocated(device)
        timing = clock.time(o.step, seconds)
        peak = torch.cuda.max_memory_allocated(device) - kept if device.type == "cuda" else 0
        return {**asdict(timing), "scratch_mib": peak / 2**20}
    except Exception as e:  # a peer that does not run is a finding, not an end
        return {"error": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"}
    finally:
        del params
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def first_step(clock: Clock, model: Model, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the first and the second step in this process: kernels are compiled, or read from CuPy's cache."""
    import orthdion

    params = [nn.Parameter(torch.randn(s, device=clock.device, dtype=dtype)) for s in model.shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    o = orthdion.OrthDion(params, momentum_dtype=torch.float32, q_dtype=torch.float32, backend="cupy")
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        o.step()
        clock.wait()
        taken.append(time.perf_counter() - start)
    return {"first": taken[0], "second": taken[1]}


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    found = {"python": platform.python_version(), "torch": str(torch.__version__), "dion": version("dion")}
    found["cupy"] = next(
        (v for n in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if (v := version(n)) != "not installed"), ""
    )
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return {**found, "commit": "unknown"}
    return {**found, "commit": done.stdout.strip() or "unknown"}


def check(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """All of it into ``result``, as far as the time goes; what was not run is listed by name."""
    end, device = time.monotonic() + 60 * arguments.minutes, torch.device(arguments.device)
    clock, dtype = Clock(device), torch.bfloat16
    models = [MODELS[name] for name in arguments.models.split(",")]
    result["machine"] = machine(device)
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()), flush=True)
    _part(result, "first step, seconds", lambda: first_step(clock, models[0], dtype))
    shapes = [(96, 40), (40, 136), (300, 70)] if device.type == "cpu" else [(512, 256), (256, 1024), (3000, 700)]
    for finding in verify(device, shapes):
        result["checks"].append(asdict(finding))
        print(f"{_WORDS[finding.holds]}: {finding.name}: {finding.found}", flush=True)
    found = _part(result, "rates", lambda: rates(clock, 8192 if device.type == "cuda" else 256))
    if found is None:
        return
    print(", ".join(f"{k} {v:.0f}" for k, v in found.items()) + " (10⁹ flops or bytes a second)", flush=True)
    _part(result, "kernels", lambda: kernels(clock, models[-1], found["copy"], arguments.compute))
    seen: set[tuple[str, str]] = set()
    for fraction in FRACTIONS[: arguments.fractions]:
        for model in models:
            everybody, missing = candidates(fraction, arguments.compute)
            result["not run"] += [m for m in missing if m not in result["not run"]]
            for candidate in everybody:
                if (model.name, candidate.name) in seen:  # whose time does not depend on r
                    continue
                if not candidate.ranked:
                    seen.add((model.name, candidate.name))
                row = {"model": model.name, "candidate": candidate.name, "ours": candidate.ours}
                row["fraction"] = fraction if candidate.ranked else None
                name = f"{model.name}, r/d = {fraction:g}, {candidate.name}"
                if (left := end - time.monotonic()) < 10:
                    result["not run"].append(f"{name}: out of time")
                    continue
                row |= measure(clock, model, candidate, dtype, arguments.seconds, left)
                row["floor"] = candidate.floor(model, fraction, found, arguments.compute)
                result["steps"].append(row)
                print(f"{name}: {row.get('error') or format(row['median'], '.2f') + ' ms'}", flush=True)


def _part(result: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Keeps a part's figures, or why there are none: the parts after it are wanted all the same."""
    try:
        result[name] = work()
    except Exception as e:
        traceback.print_exc()
        result["not run"].append(f"{name}: {type(e).__name__}: {e}")
    return result.get(name)


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = ["# On " + result["machine"]["device"], "", ", ".join(f"{k} {v}" for k, v in result["machine"].items()), ""]
    lines += ["| check | | found |", "|---|---|---|"]
    lines += [f"| {c['name']} | {_WORDS[c['holds']]} | {c['found']} |" for c in result["checks"]]
    if first := result.get("first step, seconds"):
        lines += ["", f"First step {first['first']:.2f} s, second {first['second']:.2f} s."]
    rates_found = ", ".join(f"{k} {v:.0f}" for k, v in result.get("rates", {}).items())
    lines += ["", f"Rates, 10⁹ a second: {rates_found}.", ""]
    lines += [
        "Kernels of one layer's step at r/d = 1/8, residual normalized, each waited for; cuBLAS is not among them.",
        "",
    ]
    lines += ["| kernel | launches | ms | GB/s | of the copy rate |", "|---|---|---|---|---|"]
    for k in result.get("kernels", []):
        lines.append(f"| {k['kernel']} | {k['launches']} | {k['ms']:.3f} | {k['rate']:.0f} | {k['share']:.2f} |")
    lines += [
        "",
        "Weights and gradients are bfloat16, our momenta float32; peers keep what states they make of such weights.",
    ]
    head = ["model", "r/d", "optimizer", "ms", "quartiles", "× floor", "host ms", "scratch MiB"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in result["steps"]:
        start = f"| {r['model']} | {_fraction(r)} | {r['candidate']} | "
        if "error" in r:
            lines.append(f"{start}{r['error']} | | | | |")
            continue
        over = f"{r['median'] / r['floor']:.2f}" if r["floor"] else ""
        cells = (r["median"], r["host"], r["scratch_mib"])
        spread = f"{r['low']:.2f} to {r['high']:.2f}"
        lines.append(start + "{:.2f} | {} | {} | {:.2f} | {:.0f} |".format(cells[0], spread, over, *cells[1:]))
    if result["not run"]:
        lines += ["", "Not run:", "", *(f"* {line}" for line in result["not run"])]
    return "\n".join(lines) + "\n"


def _fraction(row: dict[str, Any]) -> str:
    return "any" if row["fraction"] is None else f"{row['fraction']:g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every check holds."""
    parser = argparse.ArgumentParser(prog="python3 -m benches.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="where; cuda")
    parser.add_argument("--models", default="gpt-2-small,llama-3.2-1b,llama-3-8b", help=", ".join(MODELS))
    parser.add_argument("--compute", default="tf32", choices=("tf32", "bfloat16"), help="products of our steps")
    parser.add_argument("--fractions", type=int, default=5, help="how many of r/d = 1/8, 1/16, 1/4, 1/2, 1")
    parser.add_argument("--seconds", type=float, default=0.5, help="a candidate")
    parser.add_argument("--minutes", type=float, default=7.5, help="altogether")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.json and gpu.md")
    chosen = parser.parse_args(arguments)
    if unknown := [m for m in chosen.models.split(",") if m not in MODELS]:
        parser.error(f"--models {', '.join(unknown)}: known are {', '.join(MODELS)}")
    if torch.device(chosen.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; a driver and a CUDA build of torch are needed")
    result: dict[str, Any] = {"machine": {"device": chosen.device}, "checks": [], "steps": [], "not run": []}
    try:
        check(chosen, result)
    finally:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "gpu.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
        (chosen.out / "gpu.md").write_text(markdown(result))
        print(f"figures in {chosen.out / 'gpu.json'} and {chosen.out / 'gpu.md'}")
    complete = all(part in result for part in ("first step, seconds", "rates", "kernels"))
    return 0 if complete and not any(c["holds"] is False for c in result["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
