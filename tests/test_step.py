"""The Rust backend against the reference, for every option; the claims that the step must keep."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dion_step, low_rank, orth, pairwise, parameter, randn, with_spectrum

import orthdion
from orthdion.backends.torch import TorchBackend
from orthdion.core.runtime import Runtime
from orthdion.core.starts import start
from orthdion.distributed import Communicator
from orthdion.requests import Matrix, Precision

RIGHTS = ("qr", "column", "polar")
RESIDUALS = (None, "linear", "normalized")
FEEDBACKS = ("dion", "orth-dion", "pure", "momentum", (0.95, 0.7))
#: Every two values together; the core's own oracle test has the whole product.
OPTIONS = pairwise(right_factor=RIGHTS, feedback=FEEDBACKS) + pairwise(
    residual=RESIDUALS[1:], right_factor=RIGHTS, nesterov=(False, True), feedback=FEEDBACKS
)


def run(backend, shapes, steps, dtype=torch.float64, lr=0.02, seed=0, grads=None, **options):
    """Weights, momenta and warm starts after some steps on random gradients."""
    params = [parameter(randn(*s, seed=7 + i, dtype=dtype)) for i, s in enumerate(shapes)]
    o = low_rank(params, lr=lr, weight_decay=0.1, backend=backend, seed=seed, **options)
    for k in range(steps):
        for i, p in enumerate(params):
            p.grad = grads(k, i) if grads else randn(*p.shape, seed=1000 * k + i, dtype=dtype)
        o.step()
    return [p.detach() for p in params], [o.state[p]["momentum"] for p in params], [o.state[p]["Q"] for p in params]


def distance(ours, theirs):
    """Largest distance of weights and momenta, relative where they are larger than 1 (a momentum that is fed back
    whole is 0).
    """
    pairs = zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True)
    return max(float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1.0)) for x, y in pairs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rust_equals_the_reference_after_one_and_after_fifty_steps(options):
    shapes = [(24, 16), (12, 40), (17, 17)]

    def grads(k, i):  # a signal with a gap after it: pure noise would amplify rounding by its own dynamics
        g = with_spectrum(*shapes[i], torch.linspace(3, 1, 5).double(), seed=i)
        return g + 0.02 * randn(*shapes[i], seed=1000 * k + i, dtype=torch.float64)

    for steps in (1, 50):
        ours, theirs = (run(b, shapes, steps, grads=grads, **options) for b in ("rust", "torch"))
        assert distance(ours, theirs) < 1e-10, steps
        assert all(torch.allclose(x, y, atol=1e-8) for x, y in zip(ours[2], theirs[2], strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_single_precision_equals_the_double_oracle_to_rounding(options):
    shapes = [(60, 33), (20, 75)]
    ours = run("rust", shapes, 1, dtype=torch.float32, **options)
    # The same problem in double, with single's thresholds.
    theirs = run("torch", shapes, 1, dtype=torch.float32, **options)
    params = [randn(*s, seed=7 + i).double() for i, s in enumerate(shapes)]
    momenta = []
    for i, x in enumerate(params):
        o = low_rank([parameter(x.float())], lr=0.02, weight_decay=0.1, **options)
        q = start((1, min(x.shape), o.state[next(iter(o.state))]["Q"].shape[1]), 0, i)[0]
        q = q.float().double()
        g, m = randn(*x.shape, seed=i).double(), torch.zeros_like(x)
        flip = x.shape[0] < x.shape[1]
        views = [t.T if flip else t for t in (x, g, m)]
        scale = (x.shape[0] / x.shape[1]) ** 0.5
        rule = o._rule(0, o.param_groups[0])
        states = {"momentum": views[2], "Q": q}
        w = Matrix(*views[:2], states, tuple(views[0].shape), tuple(x.shape), scale)
        w.precision = Precision(torch.float64, None, 2.0**-24)
        Runtime(Communicator(), TorchBackend()).run([rule.step(w)], [0])
        momenta.append(m)
    oracle = (params, momenta)
    assert distance(ours[:2], oracle) < 5e-6
    assert distance(theirs[:2], oracle) < 5e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 5), (64, 48), (130, 70), (33, 200)])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_shapes_and_ranks(shape, fraction, residual):
    ours, theirs = (run(b, [shape], 3, residual=residual, rank_fraction=fraction) for b in ("rust", "torch"))
    assert distance(ours, theirs) < 1e-9


@pytest.mark.parametrize(("shape", "untransposed"), [((40, 24), False), ((24, 40), False), ((24, 40), True)])
def test_dion_follows_its_own_five_lines(shape, untransposed):
    x = randn(*shape, seed=1)
    o = orthdion.Dion([parameter(x)], lr=0.02, mu=0.9, weight_decay=0.1, rank_fraction=0.4)
    (p,) = o.param_groups[0]["params"]
    m, n = shape
    q = orth(randn(n if untransposed or m > n else m, o.state[p]["Q"].shape[1], seed=2))
    o.state[p]["Q"] = q.clone()
    x, q, mom = x.double(), q.double(), torch.zeros(shape, dtype=torch.float64)
    flip = q.shape[0] == m and m < n
    for k in range(50):
        g = randn(*shape, seed=100 + k)
        p.grad = g
        o.step()
        if flip:  # the oracle's scale is that of the transposed problem: correct it
            dion_step(x.T, g.double().T, mom.T, q, 0.02 * m / n, 0.9, 0.1 * n / m)
        else:
            dion_step(x, g.double(), mom, q, 0.02, 0.9, 0.1)
        assert (p.double() - x).norm() < 1e-5 * x.norm(), k
    assert (o.state[p]["momentum"].double() - mom).norm() < 1e-5 * mom.norm()


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize(("right_factor", "residual"), list(itertools.product(RIGHTS, RESIDUALS)))
class TestClaims:
    def test_a_zero_gradient_is_a_no_op(self, backend, right_factor, residual):
        x = randn(30, 20)
        p = parameter(x, torch.zeros(30, 20))
        o = low_rank([p], weight_decay=0.0, right_factor=right_factor, residual=residual, backend=backend)
        q = o.state[p]["Q"].clone()
        o.step()
        assert torch.equal(p.detach(), x)
        assert torch.equal(o.state[p]["Q"], q)
        assert not o.state[p]["momentum"].any()

    def test_a_rank_two_gradient_moves_only_in_its_spaces(self, backend, right_factor, residual):
        u, v = orth(randn(60, 2)), orth(randn(40, 2, seed=1))
        g = u @ torch.diag(torch.tensor([2.0, 1.0])) @ v.T
        p = parameter(torch.zeros(60, 40))
        o = low_rank([p], rank_fraction=0.3, right_factor=right_factor, residual=residual, backend=backend)
        for _ in range(3):
            p.grad = g.clone()
            o.step()
        x = p.detach()
        assert (x - u @ (u.T @ x @ v) @ v.T).norm() < 0.01 * x.norm()

    def test_the_step_does_not_see_the_gradients_scale(self, backend, right_factor, residual):
        def after(factor):
            p = parameter(torch.zeros(50, 30))
            o = low_rank([p], right_factor=right_factor, residual=residual, backend=backend)
            p.grad = randn(50, 30) * factor
            o.step()
            return p.detach()

        one = after(1.0)
        for factor in (1e-30, 1e-12, 1e12, 1e30):
            assert (after(factor) - one).norm() < 1e-4 * one.norm(), factor

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_one_bad_entry_changes_nothing_but_a_counter(self, backend, right_factor, residual, bad):
        p, other = parameter(randn(30, 20)), parameter(randn(20, 20))
        o = low_rank([p, other], right_factor=right_factor, residual=residual, backend=backend)
        for t in (p, other):
            t.grad = randn(*t.shape, seed=5)
        o.step()
        before = [t.clone() for t in (p.detach(), *o.state[p].values())]
        moved = other.detach().clone()
        p.grad[3, 4] = bad
        with pytest.warns(UserWarning, match="NaN or infinity"):
            o.step()
        o.step()
        assert all(torch.equal(a, b) for a, b in zip(before, (p.detach(), *o.state[p].values()), strict=True))
        assert list(o.skipped_steps.values()) == [2]
        assert not torch.equal(moved, other.detach())


@settings(max_examples=50, deadline=None)
@given(
    m=st.integers(2, 80),
    n=st.integers(2, 80),
    decay=st.floats(0, 8),
    right_factor=st.sampled_from(RIGHTS),
    fraction=st.floats(0.05, 1.0),
    seed=st.integers(0, 10**6),
)
def test_the_step_is_bounded_and_points_downhill_for_every_spectrum(m, n, decay, right_factor, fraction, seed):
    g = with_spectrum(m, n, torch.logspace(0, -decay, min(m, n)), seed).float()
    p = parameter(torch.zeros(m, n), g)
    o = orthdion.OrthDion([p], lr=1.0, weight_decay=0.0, right_factor=right_factor, rank_fraction=fraction)
    o.step()
    assert float((p.detach() * g).sum()) < 0
    if right_factor != "column":
        norm = torch.linalg.matrix_norm(p.detach().double(), 2)
        assert norm <= (m / n) ** 0.5 * (1 + 1e-4)


@pytest.mark.parametrize("residual", ["linear", "normalized"])
def test_the_completed_step_has_unit_head_and_the_residuals_root_mean_square(residual):
    # Well inside its rank: B's left and right spaces are found exactly after a few iterations on one gradient.
    sigma = torch.cat([torch.linspace(10, 8, 6), torch.linspace(1.1, 0.9, 14)]).double()
    g = with_spectrum(40, 20, sigma)
    p = parameter(torch.zeros(40, 20, dtype=torch.float64))
    o = low_rank(
        [p], lr=1.0, weight_decay=0.0, rank_fraction=0.3, residual=residual, residual_scale=0.5, feedback="momentum"
    )
    for _ in range(30):
        p.grad = g.clone()
        with torch.no_grad():
            p.zero_()
        o.step()
    s = torch.linalg.svdvals(p.detach()) / 2**0.5
    assert torch.allclose(s[:6], torch.ones(6, dtype=torch.float64), atol=0.02)
    assert abs(float(s[6:].square().mean().sqrt()) - 0.5) < 0.01


@pytest.mark.parametrize("residual", ["linear", "normalized"])
@pytest.mark.parametrize("share", [0.0, 1e-9, 1e-7, 1e-5, 1e-4])
def test_a_residual_that_is_exactly_or_nearly_zero_adds_no_noise(residual, share):
    g = with_spectrum(60, 40, torch.cat([torch.ones(10), torch.full((30,), share)]).double()).float()
    p = parameter(torch.zeros(60, 40), g)
    options = {"lr": 1.0, "weight_decay": 0.0, "rank_fraction": 0.25}
    o = low_rank([p], residual=residual, **options)
    for _ in range(5):
        p.grad = g.clone()
        with torch.no_grad():
            p.zero_()
        o.step()
    q = orth(g.double()[:, :40] @ randn(40, 10, dtype=torch.float64))
    outside = (p.detach().double() - q @ (q.T @ p.detach().double())).norm()
    assert outside < 1e-2 * p.detach().norm()


def test_qr_and_column_track_the_same_subspace():
    def left(kind):
        p = parameter(torch.zeros(50, 30, dtype=torch.float64))
        o = orthdion.OrthDion([p], right_factor=kind, feedback="dion", rank_fraction=0.3)
        for k in range(8):
            p.grad = randn(50, 30, seed=k, dtype=torch.float64)
            if k == 7:
                b = o.state[p]["momentum"] + p.grad
                q = orth(b @ o.state[p]["Q"])
            o.step()
        return q @ q.T

    assert (left("qr") - left("column")).norm() < 1e-9
    assert (left("qr") - left("polar")).norm() < 1e-9


def test_threads_do_not_change_a_bit():
    def weights(threads):
        torch.set_num_threads(threads)
        return run("rust", [(128, 96), (64, 200), (300, 40)], 4, dtype=torch.float32, residual="normalized")

    one = weights(1)
    for threads in (2, 3):
        assert all(
            torch.equal(x, y) for a, b in zip(one, weights(threads), strict=True) for x, y in zip(a, b, strict=True)
        )


@pytest.mark.parametrize(("right_factor", "residual"), list(itertools.product(RIGHTS, RESIDUALS)))
@pytest.mark.parametrize("shape", [(130, 70), (40, 200)])
def test_bfloat16_products_follow_the_reference_and_leave_float64_alone(right_factor, residual, shape):
    options = {"right_factor": right_factor, "residual": residual, "rank_fraction": 0.3}
    half = dict(compute_dtype="bfloat16", **options)
    ours, theirs = (run(b, [shape], 1, dtype=torch.float32, **half) for b in ("rust", "torch"))
    exact = run("rust", [shape], 1, dtype=torch.float32, **options)
    # P and V may be rounded to either side where sums differ in their last bit: that is the distance of these two.
    assert distance(ours, theirs) < 1e-3
    assert 1e-7 < distance(ours, exact) < 2e-2
    doubles = (run("rust", [shape], 2, **o) for o in (half, options))
    assert all(torch.equal(x, y) for a, b in zip(*doubles, strict=True) for x, y in zip(a, b, strict=True))
