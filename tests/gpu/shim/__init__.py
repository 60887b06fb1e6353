"""The kernels' real sources, compiled by g++ and run on the processor (shim.h)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from orthdion.backends import choose
from orthdion.backends.cupy.device import Device, register
from orthdion.backends.cupy.source import kernels, text

HEADER = Path(__file__).parent / "shim.h"
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernels for the processor with")


def translation(file, change=None):
    """A kernel file as C++ with one plain function a kernel, which takes the addresses of its arguments. ``change`` may
    spoil the source first, for tests of this shim.
    """
    source = text(file)
    lines = [f'#include "{HEADER}"', change(source) if change else source]
    for k in kernels().values():
        if k.file == file:
            loads = ", ".join(
                f"({t}) *(u64*)a[{i}]" if t.endswith("*") else f"*({t}*)a[{i}]" for i, t in enumerate(k.types)
            )
            lines.append(
                f"static void call_{k.name}(void* args) {{ void** a = (void**)args; {k.name}({loads}); }}\n"
                f'extern "C" const char* run_{k.name}(void** a, const unsigned* grid, unsigned block, long seed) '
                f"{{ return shim::run(call_{k.name}, a, grid, block, seed); }}"
            )
    lines.append(
        'extern "C" void counts(unsigned long long* out) '
        "{ out[0] = shim::loaded; out[1] = shim::stored; shim::loaded = shim::stored = 0; }"
    )
    return "\n".join(lines)


@cache
def library(file, sanitize=False, change=None):
    """The compiled file. Kept in the temporary directory under a hash of all that went into it."""
    source = translation(file, change)
    # Rounding as on the device: fused where the compiler likes is allowed, reassociation is not.
    # Kernels' names may be the C library's too (`advance` is): each file keeps to its own.
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-shared",
        "-w",
        "-Wl,-Bsymbolic",
        *(["-fsanitize=address", "-g"] if sanitize else []),
    ]
    key = hashlib.sha256("\0".join([source, HEADER.read_text(), *flags]).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"orthdion-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"{file}-{key}.so"
    if not built.exists():
        code, part = folder / f"{key}.{os.getpid()}.cpp", folder / f"{key}.{os.getpid()}.so"
        code.write_text(source)
        done = subprocess.run([COMPILER, *flags, str(code), "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{file}.cu does not compile under the shim:\n{done.stderr}")
        part.rename(built)
        code.unlink()
    return ctypes.CDLL(str(built))


class ShimDevice(Device):
    """Launches on the shim, products with NumPy. Little room, so that small matrices are cut into panels."""

    def __init__(self, panel_bytes=2 << 14, factor_bytes=1 << 28, seed=-1, sanitize=False, change=None):
        self.panel_bytes, self.factor_bytes = panel_bytes, factor_bytes
        self.seed, self.sanitize, self.change = seed, sanitize, change
        #: What was launched: name, grid, arguments as declared, bytes loaded and stored.
        self.log = []
        self.logging = False

    def launch(self, kernel, grid, threads, *arguments):
        super().launch(kernel, grid, threads, *arguments)
        if self.logging and 0 not in grid:
            self.log.append((kernel, grid, arguments, self._counts(kernels()[kernel].file)))

    def _counts(self, file):
        out = np.zeros(2, np.uint64)
        library(file, self.sanitize, self.change).counts(ctypes.c_void_p(out.ctypes.data))
        return int(out[0]), int(out[1])

    def _launch(self, kernel, grid, threads, arguments):
        lib = library(kernels()[kernel].file, self.sanitize, self.change)
        if self.logging:
            self._counts(kernels()[kernel].file)
        cells = [np.atleast_1d(np.asarray(a)) for a in arguments]
        pointers = (ctypes.c_void_p * len(cells))(*(c.ctypes.data for c in cells))
        dims = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        run = getattr(lib, f"run_{kernel}")
        run.restype = ctypes.c_char_p
        trouble = run(pointers, dims, ctypes.c_uint(threads), ctypes.c_long(self.seed))
        if trouble:
            raise RuntimeError(f"kernel {kernel}: {trouble.decode()}")
        if self.seed >= 0:
            self.seed += 1

    def multiply(self, out, a, b, add=False, tf32=False):
        """Checks what cuBLAS would ask of the operands, then lets NumPy multiply in single precision."""
        assert out.dtype == torch.float32 and out.stride(2) == 1, "cuBLAS needs a row-major float32 result"
        assert a.dtype == b.dtype and a.dtype in (torch.float32, torch.bfloat16)
        assert all(1 in t.stride()[1:] or 1 in t.shape[1:] for t in (a, b)), "cuBLAS needs a contiguous side"
        left, right = (_rounded(t, tf32).numpy() for t in (a, b))
        with np.errstate(all="ignore"):  # what overflows here, or holds NaN, is what the step must cope with
            product = torch.from_numpy(np.matmul(left, right))
        if add:
            out += product
        else:
            out.copy_(product)


@contextmanager
def serving(device):
    """While it lasts, backend="cupy" serves CPU tensors through this device."""
    undo = register(torch.device("cpu"), device)
    choose.cache_clear()
    try:
        yield device
    finally:
        undo()
        choose.cache_clear()


def _rounded(t, tf32):
    t = t.float()
    if not tf32:
        return t
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
