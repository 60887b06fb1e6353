"""The completed step where replicas have gradients of their own: its residual travels in few bits."""

import math

import bits as few
import pytest

SHAPES = [(32, 20), (12, 70), (15, 9)]
LAYOUTS = [(2, False), (4, False), (4, True)]


def row_bytes(n, bits):
    return 8 * (1 if bits == 1 else math.ceil(n / 64)) + math.ceil(n * bits / 8)


@pytest.mark.parametrize(("size", "hybrid"), LAYOUTS)
@pytest.mark.parametrize("bits", [1, 4])
def test_replicas_step_as_one_process_by_hand(world, size, hybrid, bits):
    """Over 50 steps. A sign at the edge of rounding would move an entry of X by a step at once."""
    for apart, momenta, agree, sent in world(size).run(few.few_bits_equal_the_hand, SHAPES, 50, bits, hybrid):
        assert apart < 1e-8 and momenta < 1e-8
        assert agree and sent.last_step.by_content["residual"] > 0


@pytest.mark.parametrize("bits", [1, 4])
def test_stacks_and_convolutions_are_matrices_here_too(world, bits):
    assert max(world(2).run(few.a_stack_and_a_convolution, bits)) < 1e-9


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bits", [1, 4])
def test_bytes_are_those_of_the_rows_and_of_the_longest_share(world, size, bits):
    """Half of all rows' bytes go to their owners, and half of as many shares of the longest come back."""
    shapes = [(32, 20), (40, 24), (17, 9)]
    _, _, _, sent = world(size).run(few.few_bits_equal_the_hand, shapes, 2, bits, False)[0]
    total = sum(m * row_bytes(n, bits) for m, n in shapes)
    shares = [sum(row_bytes(n, bits) * (m * (k + 1) // size - m * k // size) for m, n in shapes) for k in range(size)]
    assert sent.last_step.by_content["residual"] == total // 2 + size * max(shares) // 2


@pytest.mark.parametrize("bits", [1, 4])
def test_a_nan_on_one_replica_leaves_the_matrix_alone_on_all(world, bits):
    assert world(2).run(few.a_nan_on_one_replica, bits) == [(True, 1)] * 2


@pytest.mark.parametrize("bits", [1, 4])
def test_what_has_no_gradient_anywhere_does_not_move(world, bits):
    for row, column in world(2).run(few.dead_columns_and_rows, bits):
        assert row < 1e-5 and column == 0.0


@pytest.mark.parametrize("bits", [1, 4])
def test_a_resumed_run_goes_on_to_the_same_bits(world, bits):
    assert all(world(2).run(few.resumed, bits))


def test_what_was_sent_is_remembered_in_checkpoints_where_there_are_replicas(world):
    assert world(2).run(few.memories_of_other_runs) == [(True,) * 4] * 2


def test_what_is_remembered_does_not_depend_on_the_size_that_b_is_brought_to(world):
    assert max(world(2).run(few.tiny_then_ordinary)) < 1e-3
