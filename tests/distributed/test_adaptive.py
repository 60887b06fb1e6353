"""Ranks that follow the effective rank are one process's, in every layout; what is sent follows them."""

from itertools import pairwise

import adaptive
import pytest

DION = {"optimizer": "orth-dion", "rank_fraction": 0.5, "feedback": "pure"}
COMPLETED = {"optimizer": "completed-dion", "rank_fraction": 0.5}


def assert_as_alone(found, tolerance=1e-9):
    here, expected = found["ranks"]
    assert here == expected
    assert found["error"] < tolerance and found["states"] < 1e-7 and found["same"]
    changes = [b - a for before, after in pairwise(here) for a, b in zip(before, after, strict=True)]
    assert min(changes) < 0 < max(changes), "ranks have not fallen and risen"


@pytest.mark.parametrize(
    ("size", "layout", "options", "shared"),
    [
        (2, "fsdp", DION, False),
        (2, "fsdp", COMPLETED, True),
        (2, "columns", DION, True),
        (4, "fsdp+tp", DION, False),
        (4, "hsdp", COMPLETED, True),
    ],
)
def test_ranks_and_steps_are_one_processs(world, size, layout, options, shared):
    every = world(size).run(adaptive.as_on_one_process, layout, options, shared)
    for found in every:
        assert_as_alone(found)
        assert found["means"] == every[0]["means"]
    if layout == "fsdp" and not shared:  # of the second matrix, which is seen transposed, columns are divided
        for (a, b, c), sent in zip(every[0]["ranks"][0], every[0]["sent"], strict=False):
            assert (sent["R"], sent["P"]) == (8 * (48 * a + 43 * c), 8 * 80 * b)


@pytest.mark.parametrize("size", [2, 4])
def test_replicas_send_factors_of_the_rank_that_they_have(world, size):
    for found in world(size).run(adaptive.replicas_of_their_own, DION):
        assert_as_alone(found)
        for ranks, sent in zip(found["ranks"][0], found["sent"], strict=False):
            wide = sum((m + n) * r for (m, n), r in zip(adaptive.SHAPES, ranks, strict=True))
            assert sent["P"] + sent["R"] == 8 * wide


def test_a_sharded_run_goes_on_alone_with_the_ranks_that_it_had(world):
    for kept, error in world(2).run(adaptive.continued_on_one_process, DION, 3):
        assert kept == [32, 32, 24] and error < 1e-9


def test_stacks_and_parts_change_their_rank_together(world):
    for found in world(2).run(adaptive.matrices_with_one_rank):
        for error, here, alone in found:
            assert here == alone and len(set(here)) > 1
            assert error < 1e-9


def test_a_stack_of_which_ranks_hold_different_matrices_is_refused(world):
    for words in world(2).run(adaptive.a_stack_that_is_shared_out):
        assert "adaptive_rank=False" in words


def test_a_distributed_checkpoint_brings_its_ranks_along(world, tmp_path):
    for loaded, error, plain in world(2).run(adaptive.through_dcp, str(tmp_path), 3):
        assert loaded == [32, 32, 24] and error < 1e-9
        assert "ize mismatch" in plain


def test_a_distributed_checkpoint_may_lack_what_starts_afresh_and_nothing_else(world, tmp_path):
    for afresh, said in world(2).run(adaptive.late_states_through_dcp, str(tmp_path)):
        assert afresh and "the checkpoint has no" in said and "variance" in said
