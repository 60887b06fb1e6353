"""Replicas with gradients of their own: DDP models, clipping, saving, and CurvaDion's rare meetings."""

import copy

import apart
import pytest
import torch
from world import World

import orthdion


def test_a_decoupled_ddp_model_keeps_gradients_apart_and_weights_together(world):
    for kept_apart, warned, together in world(2).run(apart.ddp, True):
        assert kept_apart and together
        assert not any("already synchronised" in w for w in warned)


def test_gradients_that_ddp_has_averaged_already_are_noticed(world):
    for kept_apart, warned, together in world(2).run(apart.ddp, False):
        assert not kept_apart and together
        assert sum("already synchronised" in w for w in warned) == 1


def test_an_optimizer_that_lacks_parameters_of_a_decoupled_model_is_refused(world):
    for message in world(2).run(apart.uncovered):
        assert "0.bias, 1.weight, 1.bias" in message


def test_clipping_bounds_the_norm_of_unsynchronised_gradients(world):
    for after, bound in world(4).run(apart.clipping):
        assert after <= bound * (1 + 1e-12)


def test_a_state_dict_that_only_one_rank_asks_for_is_an_error_in_time():
    alone = World(2)  # gloo's connection does not survive it
    first, second = alone.run(apart.saved_by_one_rank)
    alone.close()
    assert "every rank must call it" in first and not second


@pytest.mark.parametrize("local_step", ["gradient", "dion"])
def test_replicas_are_equal_after_each_synchronisation_and_send_a_flag_in_between(world, local_step):
    for report, equal, sent in world(4).run(apart.replicas_meet, local_step):
        assert equal == [k % 4 == 0 for k in range(13)]
        assert [b for k, b in enumerate(sent) if k % 4] == [8] * 9
        assert (report.steps, report.synchronised, report.forced) == (13, 4, 3)
        assert report.rate == 4 / 13 and 0 < report.drift < 1


def test_one_ranks_change_synchronises_all(world):
    results = world(4).run(apart.gate)
    assert results[0][0] == 0 and 7 in results[0] and all(r == results[0] for r in results)
    assert len(results[0]) < 6


def test_with_threshold_zero_it_is_dion(world):
    assert all(world(2).run(apart.always))


def test_troubles_between_meetings_are_local_and_end_with_them(world):
    assert all(world(2).run(apart.troubles_between_meetings))


def test_a_nan_on_one_shard_skips_the_whole_matrix_between_meetings_too(world):
    assert all(world(2).run(apart.shards_between_meetings))


def test_a_copy_goes_on_alike():
    p = torch.nn.Parameter(torch.randn(6, 4))
    o = orthdion.CurvaDion([p], threshold=0.3, max_interval=3)
    p.grad = torch.randn(6, 4)
    o.step()
    twin = copy.deepcopy(o)
    q = twin.param_groups[0]["params"][0]
    for _ in range(4):
        q.grad = p.grad.clone()
        o.step()
        twin.step()
    assert torch.equal(p, q) and twin.synchronisation() == o.synchronisation()


def test_the_papers_local_step_in_one_process():
    x, g = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    p = torch.nn.Parameter(x.clone())
    o = orthdion.CurvaDion([p], threshold=1e9, local_lr=0.3, lr=0.1, weight_decay=0.5, mu=0.9, max_interval=10)
    p.grad = g
    o.step()  # nothing is known yet: synchronised
    assert o.synchronisation().largest_change == float("inf")
    x, m = p.detach().clone(), o.state[p]["momentum"].clone()
    o.step()
    assert torch.allclose(p.detach(), (1 - 0.1 * 0.5) * x - 0.3 * g, atol=1e-14)
    assert torch.allclose(o.state[p]["momentum"], 0.9 * m + g, atol=1e-14)
    assert o.synchronisation().largest_change == pytest.approx(float(abs((m + g).norm() - m.norm()) / m.norm()))
    for option in ({"threshold": -1.0}, {"max_interval": 0}, {"local_step": "adam"}, {"local_lr": -1.0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            orthdion.CurvaDion([p], **option)
