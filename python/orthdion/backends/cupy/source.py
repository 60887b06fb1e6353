"""The kernels' sources: CUDA C++ that stands beside this file, compiled at run time by whoever launches it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["FILES", "OPTIONS", "Kernel", "kernels", "text"]

_FOLDER = Path(__file__).parent / "kernels"
#: One translation unit each.
FILES = ("cholesky", "elementwise", "factor", "matrix", "multiply")
#: For NVRTC, beside the architecture. CuPy adds ``-ftz=true``: numbers below 2⁻¹²⁶ count as zero, which no rule minds.
OPTIONS = ("--std=c++17",)

_SIGNATURE = re.compile(
    r'extern "C" __global__ void(?: __launch_bounds__\([\d, ]+\))? (?P<name>\w+)\((?P<parameters>[^)]*)\)'
)


@dataclass(frozen=True)
class Kernel:
    """An entry point: its file, and its parameters' C types and names in order."""

    name: str
    file: str
    types: tuple[str, ...]
    names: tuple[str, ...]


@cache
def text(file: str) -> str:
    """The whole source of a file, with what it includes in place."""
    common = (_FOLDER / "common.cuh").read_text().replace("#pragma once\n", "")
    return (_FOLDER / f"{file}.cu").read_text().replace('#include "common.cuh"\n', common)


@cache
def kernels() -> dict[str, Kernel]:
    """All entry points by name, as the sources declare them."""
    found = {}
    for file in FILES:
        for match in _SIGNATURE.finditer((_FOLDER / f"{file}.cu").read_text()):
            pairs = [p.strip().rsplit(" ", 1) for p in match["parameters"].split(",")]
            types = tuple(t.removeprefix("const ") for t, _ in pairs)
            found[match["name"]] = Kernel(match["name"], file, types, tuple(n for _, n in pairs))
    return found
