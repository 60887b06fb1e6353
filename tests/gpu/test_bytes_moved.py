"""What launches say they move is what their loads and stores add up to; a step's sum is the passes that are
promised.
"""

import pytest
import torch
from oracles import parameter, randn

import orthdion
from orthdion.backends.cupy.traffic import declared


def launches(shim, shape, dtype=torch.float32, **options):
    """The launches of one step of a matrix and a vector, after a first step that does not count."""
    p, vector = parameter(randn(*shape, dtype=dtype)), parameter(randn(5000, dtype=dtype))
    o = orthdion.OrthDion(
        [{"params": [p]}, {"params": [vector], "algorithm": "adamw"}], backend="cupy", rank_fraction=0.125, **options
    )
    for k in range(2):
        for t in (p, vector):
            t.grad = randn(*t.shape, seed=k, dtype=dtype)
        shim.logging, shim.log = k == 1, []
        o.step()
    shim.logging = False
    return shim.log


@pytest.mark.parametrize("tail", ["feedback", "linear", "normalized"])
@pytest.mark.parametrize("right_factor", ["qr", "column", "polar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(140, 70), (70, 260)])
def test_declared_bytes_are_those_that_are_moved(shim, tail, right_factor, dtype, shape):
    seen = set()
    for kernel, grid, arguments, counted in launches(shim, shape, dtype, tail=tail, right_factor=right_factor):
        said = declared(kernel, grid, arguments)
        if said is None:
            continue
        seen.add(kernel)
        if said.exact or kernel in ("apply", "elementwise"):  # nothing is skipped here
            assert (said.loaded, said.stored) == counted, kernel
        else:
            assert counted[0] <= said.loaded and counted[1] <= said.stored, kernel
    expected = {"form", "apply", "multiply", "gather", "keep", "elementwise", "find_bad"}
    assert expected <= seen


def passes(log, shape):
    """Bytes of X, M and G that a step reads from and writes to memory, in float32 matrices of this shape."""
    total = 0
    for kernel, grid, arguments, _ in log:
        said = declared(kernel, grid, arguments)
        if said is not None and kernel in ("form", "apply", "tail_rows"):
            total += said.matrix_loads + said.matrix_stores
    return total / (4 * shape[0] * shape[1])


@pytest.mark.parametrize("tail", ["feedback", "linear", "normalized"])
@pytest.mark.parametrize("shape", [(256, 256), (130, 516)])
def test_a_step_takes_seven_passes_over_the_matrix_and_five_with_half_weights(shim, tail, shape):
    assert passes(launches(shim, shape, tail=tail), shape) == 7.0
    half = launches(shim, shape, torch.bfloat16, tail=tail, momentum_dtype=torch.float32)
    assert passes(half, shape) == 5.0


def test_nothing_of_the_matrixs_size_is_allocated(shim, monkeypatch):
    shape, largest = (512, 1024), 0
    new = torch.empty

    def watched(*args, **kwargs):
        nonlocal largest
        t = new(*args, **kwargs)
        largest = max(largest, t.numel() * t.element_size())
        return t

    monkeypatch.setattr(torch, "empty", watched)
    for tail in ("feedback", "linear", "normalized"):
        launches(shim, shape, tail=tail)
    # The largest are a factor of rank 64 in single precision, and panels of a third of the cache.
    assert largest <= max(4 * 1024 * 64, 4 * 128 * 512 * 4)


def test_gpu_check_runs_from_end_to_end_and_names_what_it_did_not(shim, tmp_path, capsys):
    import json

    from benches.gpu.__main__ import main

    arguments = ["--device", "cpu", "--models", "tiny", "--fractions", "1", "--seconds", "0.01", "--out", str(tmp_path)]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [c["holds"] for c in result["checks"]] == [True] * 5 + [None] * 2
    assert {r["candidate"] for r in result["steps"]} >= {
        "OrthDion qr",
        "OrthDion normalized tail",
        "torch.optim.AdamW fused",
    }
    assert {k["kernel"] for k in result["kernels"]} >= {"form", "apply", "multiply", "elementwise"}
    page = (tmp_path / "gpu.md").read_text()
    assert "| equals the reference | holds |" in page and "First step" in page
    with pytest.raises(SystemExit):
        main(["--models", "llama-9"])
    assert "--models llama-9: known are" in capsys.readouterr().err


def test_gpu_check_needs_no_rust_core():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['orthdion._core'] = None\n"
        "import benches.gpu.__main__, orthdion, torch\n"
        "p = torch.nn.Parameter(torch.randn(8, 6)); p.grad = torch.randn(8, 6)\n"
        "o = orthdion.OrthDion([p]); o.step(); print(repr(o).splitlines()[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend reference: the Rust core is not built")
