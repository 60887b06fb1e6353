"""What is measured on, the first step, and what the compiler made of the kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import orthdion
from orthdion.backends.cupy.device import device_for
from orthdion.backends.cupy.source import FILES, OPTIONS, kernels, text

from ..cases import parameters
from ..context import Context
from .timing import model_of

__all__ = ["double_instructions", "machine", "tool"]

_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,driver_version"
#: Instructions in double precision, of the vector units and of the tensor cores.
_DOUBLE = re.compile(r"\b(DFMA|DADD|DMUL|DMMA|DSETP|MUFU\.R(?:CP|SQ)64H)\b")


def machine(context: Context) -> None:
    """Findings ``machine``, ``clocks``, ``first step``, and ``compiled`` and ``sass`` of each kernel."""
    context.found("machine", **_machine(context.device))
    _clocks(context)
    _first_step(context)
    if context.dry:
        context.absent("registers", "the kernels are compiled for this processor in a dry run")
        return
    _registers(context)
    _sass(context)


def tool(name: str) -> str | None:
    """Where a tool of the CUDA toolkit is."""
    found = shutil.which(name)
    if found:
        return found
    at = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    return str(at) if at.exists() else None


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{type(e).__name__}"
    return done.stdout.strip()


def _machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    found |= {"cuda": torch.version.cuda, "cupy": _version("cupy-cuda13x", "cupy-cuda12x", "cupy")}
    found |= {"triton": _version("triton"), "cores": os.cpu_count(), "processor": platform.machine()}
    found |= {
        "orthdion": orthdion.__version__,
        "commit": _said(["git", "describe", "--always", "--dirty"]) or "unknown",
    }
    if device.type != "cuda":
        return {**found, "device": "this processor, through the shim"}
    p = torch.cuda.get_device_properties(device)
    own = {"device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
    return {**found, **own, "memory_gib": p.total_memory / 2**30, "l2_mib": p.L2_cache_size / 2**20}


def _clocks(context: Context) -> None:
    if shutil.which("nvidia-smi") is None:
        context.absent("clocks", "there is no nvidia-smi")
        return
    said = _said(["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"])
    context.found("clocks", **dict(zip(_CLOCKS.split(","), (s.strip() for s in said.split(",")), strict=False)))


def _first_step(context: Context) -> None:
    """Kernels are compiled, or read from CuPy's cache."""
    params = parameters(model_of(context, "gpt-2-small").with_layers(1).shapes, context.device)
    o = orthdion.OrthDion(params, momentum_dtype=torch.float32, q_dtype=torch.float32, backend="cupy")
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        o.step()
        context.clock.wait()
        taken.append(time.perf_counter() - start)
    context.found("first step", first=taken[0], second=taken[1])


def _registers(context: Context) -> None:
    there: Any = device_for(context.device)
    for name in kernels():
        kept = there._function(name).attributes
        wanted = {"registers": "num_regs", "local": "local_size_bytes", "shared": "shared_size_bytes"}
        context.found("compiled", kernel=name, **{k: kept.get(v) for k, v in wanted.items()})


def _sass(context: Context) -> None:
    """Double-precision instructions of each kernel, where the toolkit's disassembler is there."""
    disassembler = tool("cuobjdump")
    if disassembler is None:
        context.absent("double-precision instructions", "there is no cuobjdump")
        return
    from cupy.cuda import compiler

    major, minor = torch.cuda.get_device_capability(context.device)
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            made = compiler.compile_using_nvrtc(text(file), OPTIONS, f"{major}{minor}")
            code = made[0] if isinstance(made, tuple) else made
            at = Path(folder) / f"{file}.cubin"
            at.write_bytes(code if isinstance(code, bytes) else code.encode())
            for kernel, counts in double_instructions(_said([disassembler, "-sass", str(at)])).items():
                context.found("sass", kernel=kernel, **counts)


def double_instructions(sass: str) -> dict[str, dict[str, int]]:
    """Double-precision instructions by kernel, from a disassembler's text."""
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in sass.splitlines():
        if "Function :" in line:
            counts = found.setdefault(line.split("Function :")[1].strip(), Counter())
        elif match := _DOUBLE.search(line):
            counts[match[1]] += 1
    return {kernel: dict(of_kernel) for kernel, of_kernel in found.items()}
