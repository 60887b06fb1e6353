"""What launches say they move is what their loads and stores add up to; a step's sum is the passes that docs/gpu.md
tells of.
"""

import subprocess
import sys

import pytest
import torch
from grids import named, pairwise
from oracles import parameter, randn

import orthdion
from orthdion.backends.cupy.traffic import declared

#: A residual, and the passes over float32 matrices of a step with it: two to sketch, five to write; two more for the
#: sums of a normalized residual, and two for the feedback of what M⁺ has of P where B looks ahead.
PASSES = {None: 7.0, "linear": 7.0, "normalized": 11.0}
#: With weights and gradients of half that size.
HALF_PASSES = {None: 5.0, "linear": 5.0, "normalized": 8.0}
#: More, where there is no room to keep B from B Q to Bᵀ P: M and G.
PANELS, HALF_PANELS = 2.0, 1.5


def launches(shim, shape, dtype=torch.float32, residual=None, **options):
    """The launches of one step of a matrix and a vector, after a first step that does not count."""
    p, vector = parameter(randn(*shape, dtype=dtype)), parameter(randn(5000, dtype=dtype))
    groups = [{"params": [p]}, {"params": [vector], "algorithm": "adamw"}]
    options |= {"backend": "cupy", "rank_fraction": 0.125}
    o = (
        orthdion.CompletedDion(groups, residual=residual, **options)
        if residual
        else orthdion.OrthDion(groups, **options)
    )
    for k in range(2):
        for t in (p, vector):
            t.grad = randn(*t.shape, seed=k, dtype=dtype)
        shim.logging, shim.log = k == 1, []
        o.step()
    shim.logging = False
    return shim.log


GRID = pairwise(
    residual=list(PASSES),
    right_factor=("qr", "column", "polar"),
    dtype=(torch.float32, torch.bfloat16),
    shape=((140, 70), (70, 260)),
    diagnostics=(False, True),
)


@pytest.mark.parametrize("options", GRID, ids=named)
def test_declared_bytes_are_those_that_are_moved(shim, options):
    seen = set()
    for kernel, grid, arguments, counted in launches(shim, **options):
        said = declared(kernel, grid, arguments)
        if said is None:
            continue
        seen.add(kernel)
        if said.exact or kernel in ("apply", "elementwise", "keep"):  # nothing is skipped here
            assert (said.loaded, said.stored) == counted, kernel
        else:
            assert counted[0] <= said.loaded and counted[1] <= said.stored, kernel
    expected = {"form", "apply", "multiply", "keep", "elementwise", "find_bad"}
    assert expected <= seen


def passes(log, shape):
    """Bytes of X, M and G that a step reads from and writes to memory, in float32 matrices of this shape."""
    total = 0
    for kernel, grid, arguments, _ in log:
        said = declared(kernel, grid, arguments)
        if said is not None and kernel in ("form", "apply", "residual_rows"):
            total += said.matrix_loads + said.matrix_stores
    return total / (4 * shape[0] * shape[1])


@pytest.mark.parametrize("residual", PASSES)
@pytest.mark.parametrize("shape", [(256, 256), (130, 516)])
def test_a_step_takes_seven_passes_over_the_matrix_and_eleven_with_a_normalized_residual(shim, residual, shape):
    for room, more, of_half in ((1 << 14, PANELS, HALF_PANELS), (1 << 20, 0.0, 0.0)):
        shim.panel_bytes = room
        assert passes(launches(shim, shape, residual=residual), shape) == PASSES[residual] + more
        half = launches(shim, shape, torch.bfloat16, residual=residual, momentum_dtype=torch.float32)
        assert passes(half, shape) == HALF_PASSES[residual] + of_half
        assert shim.kept_bytes == 0


def test_a_residual_without_look_ahead_takes_a_pass_of_its_own_for_energies(shim):
    log = launches(shim, (256, 256), residual="linear", nesterov=False)
    assert passes(log, (256, 256)) == PASSES["linear"] + PANELS + 2.0


def test_whether_b_is_kept_changes_no_bit(shim):
    def weights(room):
        shim.panel_bytes = room
        p = parameter(randn(60, 40))
        o = orthdion.CompletedDion([p], backend="cupy", rank_fraction=0.25)
        for k in range(2):
            p.grad = randn(60, 40, seed=k)
            p.grad[:, :3] = 1e-30 * k
            o.step()
        return p.detach()

    one_piece = 4 * 60 * 40
    assert torch.equal(weights(one_piece), weights(2 * one_piece))
    shim.kept_bytes = one_piece  # somebody else's
    assert torch.equal(weights(one_piece), weights(2 * one_piece))
    assert shim.kept_bytes == one_piece


def test_no_more_than_the_room_there_is_is_allocated(shim, monkeypatch):
    shape, largest = (512, 1024), 0

    def watched(new):
        def watching(*args, **kwargs):
            nonlocal largest
            t = new(*args, **kwargs)
            largest = max(largest, t.numel() * t.element_size())
            return t

        return watching

    for name in ("empty", "empty_like", "zeros", "stack", "where"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    for residual in PASSES:
        launches(shim, shape, residual=residual)
    # The largest are the first Q in double precision, and panels of 128 rows of B and of a product.
    assert largest <= max(8 * 1024 * 64, 4 * 128 * 512)


@pytest.mark.parametrize("residual", PASSES)
def test_four_like_matrices_are_launched_as_one_is(shim, residual):
    shim.panel_bytes = 1 << 16

    def count(number):
        params = [parameter(randn(40, 24, seed=i)) for i in range(number)]
        options = {"backend": "cupy", "rank_fraction": 0.25, "right_factor": "polar"}
        o = (
            orthdion.CompletedDion(params, residual=residual, **options)
            if residual
            else orthdion.OrthDion(params, **options)
        )
        for i, p in enumerate(params):
            p.grad = randn(40, 24, seed=10 + i)
        shim.logging, shim.log = True, []
        o.step()
        shim.logging = False
        return len(shim.log)

    assert count(4) == count(1)


def test_steps_need_no_rust_core():
    code = (
        "import sys; sys.modules['orthdion._core'] = None\n"
        "import benches.gpu.parts.steps, orthdion, torch\n"
        "p = torch.nn.Parameter(torch.randn(8, 6)); p.grad = torch.randn(8, 6)\n"
        "o = orthdion.OrthDion([p]); o.step(); print(repr(o).splitlines()[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend torch: plain torch; the Rust core is not built")
