"""Matrices over several ranks through the CUDA backend: real processes on gloo, its kernels on the shim.

The step's body is the same as on the CPU; what differs is that nothing is decided on the host.
"""

import shutil

import cases
import pytest
import torch

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++ to compile the kernels for the processor with"
)

SHAPES = [(16, 8), (8, 16), (13, 7), (3, 9), (1, 6)]
#: After four steps in single precision.
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("size", "layout"), [(2, "fsdp"), (2, "columns"), (2, "replicated"), (4, "fsdp+tp"), (4, "hsdp")]
)
@pytest.mark.parametrize(
    ("right_factor", "tail"), [("qr", "feedback"), ("column", "normalized"), ("polar", "linear"), ("polar", "feedback")]
)
def test_a_sharded_step_is_one_processs_step(world, size, layout, right_factor, tail):
    options = {"right_factor": right_factor, "tail": tail, "rank_fraction": 0.5}
    args = ("layout_equals_one_process", layout, SHAPES, 4, torch.float32, options)
    for error, same, _ in world(size).run(cases.on_the_device, *args):
        assert error < TOLERANCE
        assert same


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("right_factor", ["qr", "column"])
def test_replicas_with_gradients_of_their_own(world, right_factor, nesterov):
    options = {"right_factor": right_factor, "rank_fraction": 0.3, "nesterov": nesterov}
    args = ("replicas_equal_one_process", SHAPES, 4, torch.float32, options)
    for error, same, _ in world(2).run(cases.on_the_device, *args):
        assert error < TOLERANCE
        assert same


@pytest.mark.parametrize("backend", ["cupy", "reference"])
def test_a_nan_on_one_rank_skips_that_matrix_on_all(world, backend):
    for kept, counted, other_moved in world(2).run(cases.a_nan_on_one_rank, backend):
        assert kept
        assert counted == 1
        assert other_moved


def test_the_bytes_are_those_of_the_algebra(world):
    """P and R count (m + n)·r words, as on the CPU; Gram matrices of two passes come on top."""
    options = {"rank_fraction": 0.25}
    sent = {}
    for backend in ("cupy", "reference"):
        case = (
            (cases.on_the_device, "layout_equals_one_process")
            if backend == "cupy"
            else (cases.layout_equals_one_process,)
        )
        found = world(2).run(*case, "fsdp", [(64, 32)], 2, torch.float32, options)
        sent[backend] = found[0][2].last_step.by_content
    for what in ("P", "R"):
        assert sent["cupy"][what] == sent["reference"][what]
    assert sent["cupy"]["gram"] <= 2 * max(sent["reference"]["gram"], 8 * 8 * 8)
