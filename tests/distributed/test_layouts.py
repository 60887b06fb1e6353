"""Every layout computes what one process computes on the averaged gradient."""

import itertools

import cases
import pytest
import torch

EVEN, UNEVEN, EMPTY = [(16, 8), (8, 16), (12, 12)], [(13, 7), (7, 13), (9, 10)], [(3, 9), (9, 3), (2, 5), (1, 6)]
SHAPES = EVEN + UNEVEN + EMPTY
RIGHTS, TAILS = ("qr", "column", "polar"), ("feedback", "linear", "normalized")
#: After ten steps, whose own dynamics amplify rounding: in double by up to 10⁵ (5·10⁻¹² was seen), so in single too.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
WORLDS = [(2, layout) for layout in ("fsdp", "columns", "replicated")] + [(4, layout) for layout in cases.LAYOUTS]


@pytest.mark.parametrize(("size", "layout"), WORLDS)
@pytest.mark.parametrize("right_factor", RIGHTS)
@pytest.mark.parametrize("tail", TAILS)
def test_a_sharded_step_is_one_processs_step(world, size, layout, right_factor, tail):
    for feedback, dtype in itertools.product(("dion", "orth-dion"), (torch.float64, torch.float32)):
        options = {"right_factor": right_factor, "tail": tail, "feedback": feedback, "rank_fraction": 0.5}
        for error, same, _ in world(size).run(cases.layout_equals_one_process, layout, SHAPES, 10, dtype, options):
            assert error < TOLERANCE[dtype], (feedback, dtype)
            assert same


@pytest.mark.parametrize(("size", "sharded"), [(2, False), (4, False), (4, True)])
@pytest.mark.parametrize("right_factor", RIGHTS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_replicas_with_gradients_of_their_own_step_as_one_process_on_the_mean(
    world, size, sharded, right_factor, nesterov
):
    for feedback, dtype in itertools.product(("dion", "orth-dion"), (torch.float64, torch.float32)):
        options = {"right_factor": right_factor, "feedback": feedback, "rank_fraction": 0.3, "nesterov": nesterov}
        for error, same, _ in world(size).run(cases.replicas_equal_one_process, SHAPES, 10, dtype, options, sharded):
            assert error < TOLERANCE[dtype], (feedback, dtype)
            assert same


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", [{}, {"right_factor": "column"}, {"tail": "normalized"}], ids=str)
def test_stacks_convolutions_fused_blocks_and_vectors(world, size, options):
    for found in world(size).run(cases.special_shapes, options):
        assert max(found) < 1e-8, found


def test_strided_shards_of_fsdp_over_tensor_parallel(world):
    assert max(world(4).run(cases.strided_shards)) < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {"diagnostics": True},
        {"diagnostics": True, "tail": "linear", "backend": "reference"},
        {"compute_dtype": "bfloat16"},
        {"momentum_dtype": torch.bfloat16, "q_dtype": torch.bfloat16},
        {"maximize": True, "nesterov": True, "feedback": (0.9, 0.5)},
    ],
    ids=str,
)
def test_further_options_and_the_diagnostics(world, options):
    rounded = any(v in ("bfloat16", torch.bfloat16) for v in options.values())
    for error, alone, spread in world(2).run(cases.options_in_both, options):
        assert error < (2e-3 if rounded else 1e-5)
        assert len(alone) == len(spread) == (2 if options.get("diagnostics") else 0)
        for a, b in zip(alone, spread, strict=True):
            assert a == pytest.approx(b, rel=1e-3)


def test_states_of_another_rank_and_of_the_other_side_load(world):
    for shapes in world(2).run(cases.another_rank_loads):
        assert shapes == [(24, 6), (40, 6)]
