"""Matrices over several ranks through the CUDA backend: real processes on gloo, its kernels on the shim.

The step's body is the same as on the CPU; what differs is that nothing is decided on the host.
"""

import shutil

import cases
import launches
import pytest
import torch

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++ to compile the kernels for the processor with"
)

SHAPES = [(16, 8), (13, 7), (3, 9), (1, 6)]
#: After two steps in single precision.
TOLERANCE = 1e-4
#: Every layout and every form of the step; and each with another.
STEPS = [
    (2, "fsdp", {"right_factor": "qr"}),
    (2, "fsdp", {"right_factor": "polar", "residual": "normalized"}),
    (2, "fsdp", {"right_factor": "column", "residual": "linear"}),
    (2, "columns", {"right_factor": "column", "residual": "normalized"}),
    (2, "columns", {"right_factor": "polar"}),
    (2, "replicated", {"right_factor": "polar", "residual": "linear"}),
    (4, "fsdp+tp", {"right_factor": "qr", "residual": "normalized"}),
    (4, "fsdp+tp", {"right_factor": "column"}),
    (4, "hsdp", {"right_factor": "qr", "residual": "linear", "nesterov": False}),
    (4, "fsdp", {"right_factor": "qr"}),  # of the matrices with 1 and 3 rows some ranks have none
]


@pytest.mark.parametrize(("size", "layout", "options"), STEPS)
def test_a_sharded_step_is_one_processs_step(world, size, layout, options):
    args = ("layout_equals_one_process", layout, SHAPES, 2, torch.float32, {"rank_fraction": 0.5, **options})
    for error, same, _ in world(size).run(cases.on_the_device, *args):
        assert error < TOLERANCE
        assert same


@pytest.mark.parametrize("right_factor", ["qr", "column", "polar"])
def test_replicas_with_gradients_of_their_own(world, right_factor):
    options = {"right_factor": right_factor, "rank_fraction": 0.3}
    args = ("replicas_equal_one_process", SHAPES, 2, torch.float32, options)
    for error, same, _ in world(2).run(cases.on_the_device, *args):
        assert error < TOLERANCE
        assert same


@pytest.mark.parametrize("backend", ["cupy", "torch"])
def test_a_nan_on_one_rank_skips_that_matrix_on_all(world, backend):
    for kept, counted, other_moved in world(2).run(cases.a_nan_on_one_rank, backend):
        assert kept
        assert counted == 1
        assert other_moved


def test_the_bytes_are_those_of_the_algebra(world):
    """P and R count (m + n)·r numbers, as on the CPU; Gram matrices of two passes come on top."""
    args = ("fsdp", [(64, 32)], 2, torch.float32, {"rank_fraction": 0.25})
    ours = world(2).run(cases.on_the_device, "layout_equals_one_process", *args)
    theirs = world(2).run(cases.layout_equals_one_process, *args)
    cupy, plain = (found[0][2].last_step.by_content for found in (ours, theirs))
    for what in ("P", "R"):
        assert cupy.get(what, 0) == plain.get(what, 0)
    assert cupy["gram"] <= 2 * max(plain["gram"], 8 * 8 * 8)


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize(("completed", "right_factor"), [(False, "qr"), (False, "column"), (True, "polar")])
def test_four_sharded_matrices_are_launched_as_one_is(world, dimension, completed, right_factor):
    one, four = (
        world(2).run(launches.of_a_step, number, dimension, completed, {"right_factor": right_factor})
        for number in (1, 4)
    )
    assert all(b <= a + 4 for a, b in zip(one, four, strict=True)), (one, four)
