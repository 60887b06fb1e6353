"""Ranks that follow the effective rank: within their bounds, with what was learnt kept, in checkpoints as they are."""

import copy
import io
import itertools
import math

import pytest
import torch
from oracles import parameter, randn, with_spectrum
from torch import nn

import orthdion
from orthdion.core.ranks import effective_rank, next_rank

NAMES = ["orth-dion", "dion", "completed-dion", "numuon"]


def make(name, params, **options):
    return orthdion.create(name, params, **{"lr": 0.02, "rank_fraction": 0.5, "adaptive_rank": True, **options})


def gradient(shape, k, rank=None, noise=1e-3):
    """Noise, on what is of this rank."""
    g = randn(*shape, seed=1000 + k).double()
    if rank is None:
        return g
    m, n = shape[-2:]
    return with_spectrum(m, n, torch.ones(rank).double()) * math.sqrt(m * n) + noise * g


def run(o, p, start, stop, **kind):
    """Steps; the ranks and what they follow."""
    found = []
    for k in range(start, stop):
        p.grad = gradient(p.shape, k, **kind).to(p.dtype)
        o.step()
        found.append((o.state[p]["Q"].shape[-1], float(o.state[p]["effective_rank"])))
    return found


# ---------------------------------------------------------------- the numbers


def test_the_effective_rank_is_the_exponential_of_the_norms_entropy():
    assert effective_rank([4.0] * 5) == pytest.approx(5.0)
    norms = torch.tensor([3.0, 2.0, 1.0]).double()
    share = norms / norms.sum()
    assert effective_rank((norms**2).tolist()) == pytest.approx(float((-(share * share.log()).sum()).exp()))
    assert effective_rank([9.0, 0.0, 0.0]) == pytest.approx(1.0)
    for nothing in ([], [0.0, 0.0], [1.0, math.nan], [math.inf, 1.0]):
        assert effective_rank(nothing) == 0.0


@pytest.mark.parametrize(
    ("r", "d", "mean", "multiple", "expected"),
    [
        (48, 96, 30.0, 1, 48),  # 1.5 · 30 = 45, the nearest multiple of 8
        (48, 96, 4.0, 1, 40),  # 8 fewer at most
        (20, 96, 4.0, 1, 16),  # never below 16
        (16, 96, 60.0, 1, 32),  # 16 more at most
        (56, 96, 60.0, 1, 64),  # never above 0.7 · 96 = 67.2
        (96, 96, 90.0, 1, 88),  # and back from above, 8 at a time
        (8, 16, 12.0, 1, 8),  # 0.7 · 16 = 11.2
        (5, 8, 3.0, 1, 5),  # too small to have a choice
        (48, 96, 4.0, 12, 24),  # in steps of 24
    ],
)
def test_the_next_rank_is_within_its_bounds(r, d, mean, multiple, expected):
    assert next_rank(r, d, mean, multiple) == expected


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(128, 96), (96, 128)])
def test_the_rank_falls_to_what_gradients_have_and_rises_again(name, shape):
    p = parameter(torch.zeros(shape))
    o = make(name, [p], feedback="pure")
    ranks = [r for r, _ in run(o, p, 0, 6, rank=4)]
    assert ranks == [40, 32, 24, 16, 16, 16]
    risen = run(o, p, 6, 40)
    assert risen[-1][0] > 16 and risen[-1][1] > 8.0
    for (before, _), (after, mean) in itertools.pairwise(risen):
        assert -8 <= after - before <= 16 and 16 <= after <= 64
        assert after == next_rank(before, 96, mean)


def test_a_rank_that_stays_changes_no_step():
    """Where there is no choice the step is the fixed rank's, and where there is one until it is made."""
    for shape, steps in (((12, 9), 4), ((128, 96), 1)):
        p, q = (parameter(randn(*shape).double()) for _ in range(2))
        adaptive, fixed = make("completed-dion", [p]), make("completed-dion", [q], adaptive_rank=False)
        for k in range(steps):
            p.grad, q.grad = gradient(shape, k), gradient(shape, k)
            adaptive.step()
            fixed.step()
        assert (p - q).norm() < 1e-12 * q.norm()


def test_what_was_learnt_stays_and_new_columns_are_the_parameters_own():
    """A shrunk Q still has the gradient's leading directions; a grown one all the old columns, and random ones that no
    global stream and no other parameter has a part in.
    """
    p = parameter(torch.zeros(128, 96).double())
    o = make("orth-dion", [p])
    run(o, p, 0, 6, rank=4, noise=1e-6)
    q, g = o.state[p]["Q"], gradient(p.shape, 0, rank=4, noise=0.0)
    assert q.shape == (96, 16)
    lost = g - g @ torch.linalg.pinv(q).T @ q.T
    assert lost.norm() < 1e-3 * g.norm()
    twins = [parameter(torch.zeros(128, 96).double()) for _ in range(2)]
    both = make("orth-dion", twins, rank_fraction=0.17)
    for t in twins:
        t.grad = gradient(t.shape, 7)
    fixed = parameter(torch.zeros(128, 96).double(), gradient(p.shape, 7))
    still = make("orth-dion", [fixed], rank_fraction=0.17, adaptive_rank=False)
    random = torch.random.get_rng_state()
    both.step()
    still.step()
    first, second = (both.state[t]["Q"] for t in twins)
    assert torch.equal(random, torch.random.get_rng_state())
    kept = still.state[fixed]["Q"].shape[1]
    assert kept == 17 and first.shape == second.shape == (96, 24)
    assert torch.allclose(first[:, :kept], still.state[fixed]["Q"], atol=1e-12)
    assert torch.allclose(first[:, kept:].norm(dim=0), torch.ones(7).double(), atol=0.2)
    assert not torch.allclose(first[:, kept:], second[:, kept:], atol=0.1)
    assert int(torch.linalg.matrix_rank(first)) == 24


def test_the_scale_follows_the_rank():
    p = parameter(torch.zeros(128, 96))
    o = make("orth-dion", [p], lr=1.0, weight_decay=0.0, adjust_lr="match_rms_adamw", feedback="pure")
    for k in range(5):
        before = p.detach().clone()
        p.grad = gradient(p.shape, k, rank=8, noise=0.1).float()
        o.step()
        assert float((p.detach() - before).square().mean().sqrt()) == pytest.approx(0.2, rel=0.02)
    assert o.state[p]["Q"].shape[1] < 48


@pytest.mark.parametrize("keys", [{}, {"split_sizes": (40, 40, 40)}, {"num_heads": 3}])
def test_the_matrices_of_a_parameter_share_a_rank(keys):
    shape = (3, 40, 60) if not keys else (120, 60)
    p = parameter(torch.zeros(shape))
    o = make("completed-dion", [{"params": [p], **keys}], rank_fraction=1.0)
    for k in range(4):
        p.grad = randn(*shape, seed=k)
        o.step()
    q = o.state[p]["Q"]
    assert q.shape == ((3, 40, 24) if not keys else (120, 24)) and torch.isfinite(p).all() and torch.isfinite(q).all()


def test_no_figures_change_nothing():
    p = parameter(randn(128, 96))
    o = make("orth-dion", [p])
    for g in (torch.zeros_like(p), torch.full_like(p, math.nan)):
        p.grad = g
        with pytest.warns(UserWarning, match="NaN") if g.isnan().any() else torch.no_grad():
            o.step()
        assert o.state[p]["Q"].shape == (96, 48) and float(o.state[p]["effective_rank"]) == 0.0
    p.grad = None
    o.step()
    assert o.state[p]["Q"].shape == (96, 48)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_bit_exact_with_the_rank_that_it_had(name):
    p = parameter(randn(128, 96))
    o = make(name, [p], seed=3)
    run(o, p, 0, 2, rank=4)
    file = io.BytesIO()
    torch.save(o.state_dict(), file)
    file.seek(0)
    q = parameter(p.detach())
    other = make(name, [q], seed=3)
    other.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(o)
    (r,) = twin.param_groups[0]["params"]
    assert other.state[q]["Q"].shape == o.state[p]["Q"].shape == (96, 32)
    for rank in (4, None):
        assert run(o, p, 2, 8, rank=rank) == run(other, q, 2, 8, rank=rank) == run(twin, r, 2, 8, rank=rank)
    assert torch.equal(p, q) and torch.equal(p, r)


def test_a_saved_option_decides_whether_states_have_what_it_needs():
    p, q = parameter(randn(48, 32)), parameter(randn(48, 32))
    fixed, adaptive = make("dion", [p], adaptive_rank=False), make("dion", [q])
    adaptive.load_state_dict(fixed.state_dict())
    assert adaptive.param_groups[0]["adaptive_rank"] is False and "effective_rank" not in adaptive.state[q]
    q.grad = randn(48, 32, seed=1)
    adaptive.step()
    saved = fixed.state_dict()
    del saved["param_groups"][0]["adaptive_rank"]  # of a library that has no such option
    another = make("dion", [q])
    another.load_state_dict(saved)
    another.step()
    assert float(another.state[q]["effective_rank"]) > 1.0


# ---------------------------------------------------------------- what is refused


def test_what_cannot_adapt_is_refused_with_the_remedy():
    p = parameter(randn(40, 12))
    with pytest.raises(ValueError, match=r"parts of one size.*adaptive_rank=False"):
        make("orth-dion", [{"params": [p], "split_sizes": (24, 8, 8)}])
    with pytest.raises(ValueError, match="step_fraction=None"):
        make("numuon", [p], step_fraction=0.2)
    with pytest.raises(ValueError, match=r"orthdion\.Dion"):
        make("curvadion", [p])
    with pytest.raises(TypeError, match="True or False"):
        make("dion", [p], adaptive_rank=0.5)
    o = make("dion", [p])
    o.param_groups[0]["adaptive_rank"] = False
    p.grad = randn(40, 12)
    with pytest.raises(ValueError, match="adaptive_rank of group 0 was edited"):
        o.step()
    x = randn(40, 12)
    state = orthdion.functional.init("dion", x)
    with pytest.raises(ValueError, match="a single step keeps its rank"):
        orthdion.functional.step("dion", x, x, state, adaptive_rank=True)


def test_a_model_trains_with_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    x = torch.randn(256, 64)
    y = x.flip(1).sign()
    o = orthdion.create("completed-dion", model, lr=0.02, scalar_lr=0.01, adaptive_rank=True)
    losses = []
    for _ in range(40):
        loss = (model(x) - y).square().mean()
        losses.append(float(loss.detach()))
        o.zero_grad()
        loss.backward()
        o.step()
    assert losses[-1] < 0.5 * losses[0]
