"""Missing gradients, NaN, nothing at all, rank deficiency: every rank decides the same, and none waits for ever."""

import pytest
import troubles


@pytest.mark.parametrize("replicated", [False, True], ids=["sharded", "replicas"])
class TestOnOneRank:
    @pytest.mark.parametrize("size", [2, 4])
    def test_a_missing_gradient_is_zero_and_missing_everywhere_is_no_step(self, world, size, replicated):
        world(size).run(troubles.missing_gradient, replicated)

    def test_a_nan_on_one_rank_skips_that_matrix_on_all(self, world, replicated):
        world(4).run(troubles.nan_on_one_rank, replicated)

    def test_a_zero_gradient_changes_nothing_but_the_decay(self, world, replicated):
        world(4).run(troubles.zero_gradient, replicated)


def test_a_gradient_may_be_missing_at_the_first_step(world):
    world(2).run(troubles.missing_at_the_first_step)


@pytest.mark.parametrize("poisoned", [False, True], ids=["missing", "NaN"])
@pytest.mark.parametrize("name", ["orth-dion", "muon", "completed-dion", "signed-momentum-of-tests"])
def test_experts_without_a_gradient_stay_and_all_ranks_clip_alike(world, name, poisoned):
    world(2).run(troubles.experts_without_a_gradient, name, poisoned)


@pytest.mark.parametrize("count", [3, 5])
def test_ranks_with_unlike_numbers_of_experts(world, count):
    assert max(world(2).run(troubles.unlike_numbers_of_experts, count)) < 1e-10


@pytest.mark.parametrize("right_factor", ["qr", "column", "polar"])
def test_rank_deficient_gradients_and_their_warm_start(world, right_factor):
    world(4).run(troubles.rank_deficient, right_factor)


def test_the_scale_of_the_gradient_does_not_matter(world):
    world(4).run(troubles.extreme_scales)


def test_what_cannot_be_handled_is_refused_by_name(world):
    expected = [
        ("ValueError", "the completed step"),
        ("ValueError", "one dimension"),
        ("TypeError", "replicate_mesh"),
        ("ValueError", "same ranks"),
        ("ValueError", "outer_shard_mesh"),
        ("NotImplementedError", "convolution"),
        ("TypeError", "DistributedDataParallel"),
        ("TypeError", "state_dict"),
        ("TypeError", "replicate_mesh_grad_sync"),
        ("ValueError", "float16"),
        ("ValueError", "replicate_mesh"),
        ("accepted", ""),
    ]
    for messages in world(4).run(troubles.refusals):
        for message, (kind, words) in zip(messages, expected, strict=True):
            assert message.startswith(kind) and words in message, message
