"""Every kernel compiles to machine code for each supported architecture, with next to no registers spilled."""

import re
from pathlib import Path

import pytest

from orthdion.backends.cupy.source import FILES, OPTIONS, kernels, text

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="torch brought no NVRTC: its CUDA builds do")

_SLOW = (pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "sm_100", "sm_120"))
ARCHITECTURES = ("sm_90", *_SLOW)
#: Bytes of spill stores, and of loads, that a kernel may have. On sm_80 `complete`, one block and rarely due, has more;
#: on sm_100 and sm_120 the products do, since they loop over tiles: what that costs is for a device to say.
SPILLS, MORE = 16, dict.fromkeys(("complete", "multiply", "multiply_formed"), 80)


def compiled(file, architecture):
    """The size of the machine code, and what the assembler said."""
    error, program = nvrtc.nvrtcCreateProgram(text(file).encode(), f"{file}.cu".encode(), 0, [], [])
    options = [f"--gpu-architecture={architecture}", "--ptxas-options=-v", *OPTIONS, "-ftz=true"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    return size, log.decode()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_compiles_without_spills(file, architecture):
    size, log = compiled(file, architecture)
    assert size > 0
    entries = re.findall(r"Compiling entry function '(\w+)'", log)
    assert sorted(entries) == sorted(k.name for k in kernels().values() if k.file == file)
    for part in log.split("Compiling entry function ")[1:]:
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", part)]
        assert len(spills) >= 2
        kernel = part.split("'")[1]
        assert max(spills) <= (SPILLS if architecture == "sm_90" else MORE.get(kernel, SPILLS)), part
    # Two blocks of 256 threads share a multiprocessor's 65536 registers; the rare products need not.
    registers = dict(zip(entries, map(int, re.findall(r"Used (\d+) registers", log)), strict=True))
    assert all(n <= 128 for kernel, n in registers.items() if kernel != "multiply_formed"), registers


def test_every_source_is_listed():
    folder = Path(__file__).parents[2] / "python/orthdion/backends/cupy/kernels"
    assert sorted(f.stem for f in folder.glob("*.cu")) == sorted(FILES)
    declared = sum(f.read_text().count('extern "C" __global__') for f in folder.glob("*.cu"))
    assert declared == len(kernels())
