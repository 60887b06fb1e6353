"""What sets single relatives apart: schedules, forms of the released code, where they equal others, what they keep."""

import itertools
import math

import pytest
import torch
from oracles import parameter, randn, with_spectrum

import orthdion
from orthdion.numerics.cosines import basis, transform


def steps(name, gradients, **options):
    """The moves of a zero weight at rate 1 without decay."""
    p = parameter(torch.zeros_like(gradients[0]))
    o = orthdion.create(name, [p], **{"lr": 1.0, "weight_decay": 0.0, "adjust_lr": None, **options})
    moves = []
    for g in gradients:
        before = p.detach().clone()
        p.grad = g.clone()
        o.step()
        moves.append(before - p.detach())
    return moves, o.state[p]


# ---------------------------------------------------------------- NuMuon


def exact(g, k):
    u, _, wt = torch.linalg.svd(g)
    return u[:, :k] @ wt[:k]


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_numuons_pairs_become_those_of_a_momentum_that_stays_at_the_rate_of_power_iteration(shape):
    sigma = torch.tensor([8.0, 6.0, 5.0, 4.0, *[2.0] * 16], dtype=torch.float64)
    g = with_spectrum(*shape, sigma)
    moves, _ = steps("numuon", [g] * 10, rank_fraction=0.2, step_fraction=0.1)  # r = 4, k = 2
    errors = [float((d - exact(g, 2)).norm()) for d in moves]
    assert errors[0] > 0.3 and errors[-1] < 1e-5
    for before, after in itertools.pairwise(errors[2:]):
        assert after < 1.3 * (2.0 / 6.0) ** 2 * before or after < 1e-10


def test_numuons_rank_follows_a_schedule():
    p = parameter(torch.zeros(12, 9).double())
    o = orthdion.NuMuon([p], lr=1.0, weight_decay=0.0, rank_fraction=1.0, step_fraction=1.0)
    for share in (1.0, 0.7, 0.34, 0.1):
        o.param_groups[0]["step_fraction"] = share
        before, p.grad = p.detach().clone(), randn(12, 9, seed=int(100 * share)).double()
        o.step()
        sigma = torch.linalg.svdvals(before - p.detach()) / math.sqrt(12 / 9)
        k = math.ceil(share * 9)
        assert torch.allclose(sigma[:k], torch.ones(k).double(), atol=1e-9) and (sigma[k:] < 1e-9).all()


def test_numuon_refuses_more_pairs_than_it_tracks():
    for options, words in (
        ({"step_fraction": 0.5}, "at most rank_fraction"),
        ({"step_fraction": 0.0}, "step_fraction must be in"),
        ({"step_fraction": 0.1, "right_factor": "qr"}, "needs right_factor='polar'"),
    ):
        with pytest.raises(ValueError, match=words):
            orthdion.NuMuon([parameter(randn(8, 8))], **options)


# ---------------------------------------------------------------- TrasMuon


def test_trasmuon_without_damping_is_normuon():
    gradients = [randn(12, 9, seed=k).double() for k in range(4)]
    ours, _ = steps("trasmuon", gradients, alpha=0.0)
    theirs, _ = steps("normuon", gradients, nesterov=False)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_burst_in_one_column_is_damped_there_and_shows_in_no_other():
    calm = [randn(12, 9, seed=k).double() for k in range(6)]
    moves, state = steps("trasmuon", calm)
    plain, _ = steps("normuon", calm, nesterov=False)
    c = (moves[-1] / plain[-1]).mean(0)
    burst = [*calm[:5], calm[5].clone()]
    burst[5][:, 3] *= 100.0
    shaken, after = steps("trasmuon", burst)
    undamped, _ = steps("normuon", burst, nesterov=False)
    d = (shaken[-1] / undamped[-1]).mean(0)
    assert d[3] < 0.5 * c[3] and d.min() >= 0.1 - 1e-12 and d.max() <= 1.0
    assert torch.allclose(torch.cat([c[:3], c[4:]]), torch.cat([d[:3], d[4:]]), rtol=0.05)
    assert float(after["reference"]) == pytest.approx(float(state["reference"]), rel=0.02)


# ---------------------------------------------------------------- AuON


def test_auons_released_form_is_momentum_with_a_brake():
    g = randn(6, 5, seed=1).double()
    (move,), _ = steps("auon", [g], normalized=False, gamma=1.5)
    u = 0.05 * g + 0.95 * 0.05 * g
    brake = (1.5 * u / u.norm()).cosh().square().mean().sqrt()
    assert 1.0 < brake < math.cosh(1.5) and torch.allclose(move, u / brake, atol=1e-14)


def test_auon_keeps_the_ratios_of_singular_values():
    g = with_spectrum(12, 9, torch.tensor([4.0, 2.0, 1.0]).double())
    (move,), _ = steps("auon", [g])
    sigma = torch.linalg.svdvals(move)
    assert torch.allclose(sigma[:3] / sigma[0], torch.tensor([1.0, 0.5, 0.25]).double())
    assert 0.9 < move.norm() < 1.0


# ---------------------------------------------------------------- cosines, DCT-Dion


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13, 64, 97])
def test_the_fast_transform_is_the_product_with_an_orthonormal_basis(n):
    every = torch.arange(n)
    c = basis(n, every, every)
    assert torch.allclose(c.T @ c, torch.eye(n, dtype=torch.float64), atol=1e-12)
    x = randn(3, 5, n).double()
    assert torch.allclose(transform(x), x @ c, atol=1e-12)
    assert torch.equal(basis(n, every[n // 2 :], every[: n // 3]), c[n // 2 :, : n // 3])
    assert (transform(x.float()) - x.float() @ c.float()).norm() < 1e-6 * x.norm()


@pytest.mark.parametrize("shape", [(30, 21), (21, 30)])
def test_dct_dions_step_has_as_many_singular_values_near_1_as_it_has_rank_and_may_change_it(shape):
    p = parameter(torch.zeros(shape))
    o = orthdion.DCTDion([p], lr=1.0, weight_decay=0.0, adjust_lr=None)
    for share in (0.25, 0.6, 0.1):
        o.param_groups[0]["rank_fraction"] = share
        before, p.grad = p.detach().clone(), randn(*shape, seed=int(100 * share))
        o.step()
        sigma = torch.linalg.svdvals((before - p.detach()).double())
        r = math.ceil(round(share * 21, 9))
        assert (sigma[:r] > 0.6).all() and (sigma[:r] < 1.3).all() and (sigma[r:] < 1e-5).all()


# ---------------------------------------------------------------- MoFaSGD


def test_mofasgd_keeps_nothing_of_the_weights_size():
    p = parameter(randn(40, 60))
    o = orthdion.MoFaSGD([p], rank_fraction=0.1)
    assert {k: tuple(t.shape) for k, t in o.state[p].items()} == {"U": (40, 4), "sigma": (4,), "V": (60, 4)}


def test_mofasgd_finds_the_leading_singular_vectors_of_a_gradient_that_stays():
    g = with_spectrum(30, 20, torch.tensor([8.0, 6.0, 5.0, 4.0, *[1.0] * 16], dtype=torch.float64))
    moves, state = steps("mofasgd", [g] * 25, rank_fraction=0.2, mu=0.5)
    assert (moves[-1] - exact(g, 4)).norm() < 1e-3 < 0.3 < (moves[0] - exact(g, 4)).norm()
    u, v = state["U"], state["V"]
    for factor in (u, v):
        assert torch.allclose(factor.T @ factor, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert (state["sigma"].diff() < 0).all()


# ---------------------------------------------------------------- DeMo


def test_demo_sends_what_is_largest_and_keeps_the_rest():
    """A gradient of two cosines: with one coefficient a step, the larger one moves weights first, the other waits."""
    every = torch.arange(8)
    c = basis(8, every, every)
    first, second = torch.outer(c[:, 2], c[:, 5]), torch.outer(c[:, 1], c[:, 7])
    p = parameter(torch.zeros(8, 8).double())
    o = orthdion.DeMo([p], lr=0.01, weight_decay=0.0, top_k=1)
    p.grad = 3.0 * first + 2.0 * second
    o.step()
    assert torch.equal(p.detach().sign(), -first.sign())
    assert torch.allclose(o.state[p]["momentum"], 0.01 * 2.0 * second, atol=1e-12)
    before, p.grad = p.detach().clone(), torch.zeros(8, 8).double()
    o.step()
    assert torch.equal((p.detach() - before).sign(), -second.sign())
    assert o.state[p]["momentum"].norm() < 1e-12
