"""Whole optimizer steps through the host code of the CUDA backend, its kernels on the shim, against plain torch."""

import copy
import warnings

import pytest
import torch
from grids import named, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import orth, parameter, randn, with_spectrum
from shim import ShimDevice, needs_compiler, serving

import orthdion

pytestmark = needs_compiler

RIGHTS = ("qr", "column", "polar")
#: None: the published step, without a residual.
RESIDUALS = (None, "linear", "normalized")
FEEDBACKS = ("dion", "orth-dion", "pure", "momentum", (0.95, 0.7))


def optimizer(params, residual=None, **options):
    """Of the family: with a residual CompletedDion, without one OrthDion."""
    if residual is None:
        options.pop("nesterov", None)
        return orthdion.OrthDion(params, **options)
    return orthdion.CompletedDion(params, residual=residual, **options)


def run(backend, shapes, steps, dtype=torch.float32, **options):
    """The optimizer and its parameters after some steps on a signal with a gap after it."""
    params = [parameter(randn(*s, seed=7 + i, dtype=dtype)) for i, s in enumerate(shapes)]
    o = optimizer(params, lr=0.02, weight_decay=0.1, backend=backend, **options)
    for k in range(steps):
        for i, p in enumerate(params):
            g = randn(*p.shape, seed=1000 * k + i)
            if p.ndim == 2:
                rank = max(1, min(5, *(s // 2 for s in p.shape)))
                g = with_spectrum(*p.shape, torch.linspace(3, 1, rank).double(), seed=i).float() + 0.02 * g
            p.grad = g.to(dtype)
        o.step()
    return o, params


def distance(ours, theirs):
    """The largest relative distance of weights, momenta and warm starts."""
    (a, ps), (b, qs) = ours, theirs
    worst = 0.0
    for p, q in zip(ps, qs, strict=True):
        pairs = [(p.detach(), q.detach()), *((a.state[p][key], b.state[q][key]) for key in a.state[p])]
        for x, y in pairs:
            worst = max(worst, float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1.0)))
    return worst


OPTIONS = pairwise(
    right_factor=RIGHTS,
    residual=RESIDUALS,
    feedback=FEEDBACKS,
    nesterov=(False, True),
    maximize=(False, True),
    cautious_weight_decay=(False, True),
)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_every_option_equals_plain_torch(shim, options):
    shapes = [(70, 40), (40, 150), (17, 17)]
    ours, theirs = (run(b, shapes, 3, rank_fraction=0.5, **options) for b in ("cupy", "torch"))
    assert distance(ours, theirs) < 5e-5


@pytest.mark.parametrize(
    "options", [{"hyperball": True}, {"row_variance": 0.9}, {"hyperball": True, "row_variance": 0.9}]
)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_what_is_done_to_directions_equals_plain_torch(shim, residual, options):
    """The last matrix is zero: with a norm to keep it is skipped, and counted."""
    found = []
    for backend in ("cupy", "torch"):
        o, params = run(backend, [(70, 40), (40, 150)], 3, rank_fraction=0.5, residual=residual, **options)
        zero = parameter(torch.zeros(20, 10), randn(20, 10))
        o.add_param_group({"params": [zero], **options})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            o.step()
        assert bool(zero.detach().any()) != ("hyperball" in options)
        assert sum(o.skipped_steps.values()) == ("hyperball" in options)
        found.append((o, [*params, zero]))
    assert distance(*found) < 5e-5


@settings(max_examples=16, deadline=None)
@given(
    m=st.integers(1, 140),
    n=st.integers(1, 140),
    fraction=st.floats(0.01, 1.0),
    residual=st.sampled_from(RESIDUALS),
    right_factor=st.sampled_from(RIGHTS),
    maximize=st.booleans(),
    cache=st.sampled_from([1 << 12, 1 << 17]),
    seed=st.integers(0, 1000),
)
def test_shapes_and_ranks(m, n, fraction, residual, right_factor, maximize, cache, seed):
    options = {"rank_fraction": fraction, "residual": residual, "right_factor": right_factor, "maximize": maximize}
    with serving(ShimDevice(panel_bytes=cache, seed=seed)):
        ours, theirs = (run(b, [(m, n)], 2, **options) for b in ("cupy", "torch"))
    assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [None, "normalized"])
def test_weights_are_rounded_by_the_draws_of_plain_torch(shim, residual, dtype):
    """In panels too, of wide matrices as they lie; AdamW and Lion. Draws of their own would differ in a third."""
    options = {"rank_fraction": 0.5, "residual": residual, "weight_rounding": "stochastic", "compute_dtype": "float32"}
    found = []
    for backend in ("cupy", "torch"):
        o, params = run(backend, [(70, 40), (40, 150), (17, 17)], 3, dtype=dtype, **options)
        for algorithm, shape, how in (
            ("adamw", (5000,), "stochastic"),
            ("lion", (40, 30), "stochastic"),
            ("adamw", (70, 9), "eco"),
        ):
            p = parameter(randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype))
            o.add_param_group({"params": [p], "algorithm": algorithm, "weight_rounding": how})
            params.append(p)
        o.step()
        o.step()
        found.append((o, params))
    (_, ours), (_, theirs) = found
    differ = [float((p != q).float().mean()) for p, q in zip(ours, theirs, strict=True)]
    assert max(differ) < 0.04, differ
    ours, theirs = (o.state[params[-1]]["momentum"].float() for o, params in found)
    assert (ours - theirs).norm() < 0.01 * theirs.norm()  # what eco lost and put there is some ten times as much


FORMATS = pairwise(
    dtype=(torch.float32, torch.bfloat16, torch.float16),
    states=(None, torch.float32, torch.bfloat16, torch.float64),
    residual=RESIDUALS,
)


@pytest.mark.parametrize("formats", FORMATS, ids=named)
def test_formats_of_weights_and_states(shim, formats):
    dtype, states = formats["dtype"], formats["states"]
    options = {"momentum_dtype": states, "q_dtype": states, "residual": formats["residual"], "rank_fraction": 0.5}
    options["compute_dtype"] = "float32"  # which is not what 16-bit weights take by themselves
    ours, theirs = (run(b, [(70, 40), (40, 72)], 2, dtype=dtype, **options) for b in ("cupy", "torch"))
    # A weight or state that lies between two of its format's numbers may be rounded to either.
    low = dtype != torch.float32 or states == torch.bfloat16
    assert distance(ours, theirs) < (2e-3 if low else 5e-5)
    o, params = ours
    default = torch.float32 if dtype == torch.float16 else dtype
    assert all(o.state[p]["momentum"].dtype == (states or default) for p in params)


ROUNDED = pairwise(compute_dtype=("bfloat16", "tf32"), right_factor=RIGHTS, residual=RESIDUALS)


@pytest.mark.parametrize("options", ROUNDED, ids=named)
def test_products_in_less_precision_follow_plain_torch(shim, options):
    exactly = {**options, "compute_dtype": None}
    bound = 2e-2 if options["compute_dtype"] == "bfloat16" else 3e-3
    for shape in ((130, 70), (40, 200)):
        ours, theirs = (run(b, [shape], 1, rank_fraction=0.3, **options) for b in ("cupy", "torch"))
        exact = run("cupy", [shape], 1, rank_fraction=0.3, **exactly)
        assert distance(ours, theirs) < bound
        assert 1e-6 < distance(ours, exact) < bound


def test_stacks_convolutions_blocks_strides_and_vectors(shim):
    def model(backend):
        ps = [
            parameter(randn(5, 24, 12, seed=1)),
            parameter(randn(16, 8, 3, 3, seed=2)),
            parameter(randn(16, 8, 3, 3, seed=3).to(memory_format=torch.channels_last)),
            parameter(randn(60, 20, seed=4)),
            parameter(randn(40, 30, seed=5).T),
            parameter(randn(80, 60, seed=6)[::2, ::3]),
            parameter(randn(24, 60, seed=7)),
        ]
        vectors = [parameter(randn(33, seed=8)), parameter(randn(7, 5, seed=9).T), parameter(randn(1, seed=10)[0])]
        groups = [
            {"params": [*ps[:3], *ps[4:6]]},
            {"params": [ps[3]], "split_sizes": (20, 20, 20)},
            {"params": [ps[6]], "transposed": True, "split_sizes": (9, 3, 3), "interleaved": 4},
            {"params": vectors[:2], "algorithm": "adamw"},
            {"params": vectors[2:], "algorithm": "lion"},
        ]
        o = orthdion.OrthDion(groups, lr=0.02, rank_fraction=0.5, backend=backend)
        everything = [*ps, *vectors]
        for k in range(3):
            for i, p in enumerate(everything):
                p.grad = torch.empty_like(p).copy_(randn(*p.shape, seed=100 * k + i))
            everything[4].grad = randn(1, 40, seed=k).expand(30, 40)  # every row the same memory
            o.step()
        return o, everything

    ours, theirs = model("cupy"), model("torch")
    assert distance(ours, theirs) < 1e-5
    assert all(float(ours[0].state[p]["step"]) == 3.0 for p in ours[1][7:9])


@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cautious", [False, True])
def test_many_vectors_equal_plain_torch(shim, algorithm, dtype, cautious):
    shapes = [(3,), (5000,), (1,), (4096,), (33, 7), *((k + 1,) for k in range(80))]

    def go(backend):
        params = [parameter(randn(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]
        o = orthdion.OrthDion(
            [{"params": params, "algorithm": algorithm, "cautious_weight_decay": cautious}],
            lr=0.01,
            weight_decay=0.3,
            backend=backend,
            momentum_dtype=torch.float32,
        )
        for k in range(3):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=k * 100 + i, dtype=dtype)
            o.step()
        return o, params

    assert distance(go("cupy"), go("torch")) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize(("right_factor", "residual"), list(zip(RIGHTS, RESIDUALS, strict=True)))
class TestClaims:
    def test_a_zero_gradient_is_a_no_op(self, shim, right_factor, residual):
        x = randn(30, 20)
        p = parameter(x, torch.zeros(30, 20))
        o = optimizer([p], weight_decay=0.0, right_factor=right_factor, residual=residual, backend="cupy")
        q = o.state[p]["Q"].clone()
        o.step()
        assert torch.equal(p.detach(), x)
        assert torch.equal(o.state[p]["Q"], q)
        assert not o.state[p]["momentum"].any()

    def test_a_rank_two_gradient_moves_only_in_its_spaces_and_leaves_a_warm_start(self, shim, right_factor, residual):
        u, v = orth(randn(60, 2)), orth(randn(40, 2, seed=1))
        g = u @ torch.diag(torch.tensor([2.0, 1.0])) @ v.T
        after = {}
        for backend in ("cupy", "torch"):
            p = parameter(torch.zeros(60, 40))
            o = optimizer([p], rank_fraction=0.3, right_factor=right_factor, residual=residual, backend=backend)
            for _ in range(3):
                p.grad = g.clone()
                o.step()
            x, q = p.detach(), o.state[p]["Q"].double()
            after[backend] = x
            assert (x - u @ (u.T @ x @ v) @ v.T).norm() < 0.01 * x.norm()
            if right_factor != "column":
                assert (q.T @ q - torch.eye(q.shape[1]).double()).norm() < 1e-5
        assert (after["cupy"] - after["torch"]).norm() < 1e-3 * x.norm()

    def test_the_step_does_not_see_the_gradients_scale(self, shim, right_factor, residual):
        def after(factor):
            p = parameter(torch.zeros(50, 30))
            o = optimizer([p], right_factor=right_factor, residual=residual, backend="cupy")
            for k in range(2):
                p.grad = randn(50, 30, seed=k) * factor
                o.step()
            return p.detach(), o.state[p]["momentum"] / factor

        one, momentum = after(1.0)
        for factor in (1e-36, 1e-30, 1e-12, 1e12, 1e30):
            x, m = after(factor)
            assert (x - one).norm() < 1e-4 * one.norm(), factor
            assert (m - momentum).norm() < 1e-4 * momentum.norm().clamp_min(1e-3), factor

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_one_bad_entry_changes_nothing_but_a_counter(self, shim, right_factor, residual, bad):
        p, other, vector = parameter(randn(30, 20)), parameter(randn(30, 20)), parameter(randn(9))
        groups = [{"params": [p, other]}, {"params": [vector], "algorithm": "adamw"}]
        o = optimizer(groups, right_factor=right_factor, residual=residual, backend="cupy")
        for t in (p, other, vector):
            t.grad = randn(*t.shape, seed=5)
        o.step()
        before = [t.clone() for t in (p.detach(), vector.detach(), *o.state[p].values(), *o.state[vector].values())]
        elsewhere = other.detach().clone()
        p.grad[3, 4] = vector.grad[2] = bad
        with pytest.warns(UserWarning, match="NaN or infinity"):
            o.step()
        o.step()
        now = (p.detach(), vector.detach(), *o.state[p].values(), *o.state[vector].values())
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        assert sorted(o.skipped_steps.values()) == [2, 2]
        assert not torch.equal(elsewhere, other.detach())


@pytest.mark.parametrize("decay", [0.0, 3.0, 5.0, 7.0])
@pytest.mark.parametrize("right_factor", RIGHTS)
def test_ill_conditioned_momenta_take_the_second_pass_and_stay_orthonormal(shim, decay, right_factor):
    sigma = torch.logspace(0, -decay, 40).double()
    g = with_spectrum(90, 40, sigma).float()
    after = {}
    for backend in ("cupy", "torch"):
        p = parameter(torch.zeros(90, 40))
        o = orthdion.OrthDion(
            [p], lr=1.0, weight_decay=0.0, rank_fraction=0.5, right_factor=right_factor, backend=backend
        )
        for _ in range(3):
            p.grad = g.clone()
            with torch.no_grad():
                p.zero_()
            o.step()
        after[backend] = p.detach().double() / (90 / 40) ** 0.5
        q = o.state[p]["Q"].double()
        if right_factor != "column":
            assert (q.T @ q - torch.eye(20).double()).norm() < 30 * 20**0.5 * 2.0**-24
            assert torch.linalg.matrix_norm(after[backend], 2) < 1 + 1e-5
    if decay <= 5.0:  # beyond, some directions are rounding noise of B Q, another in each backend
        assert (after["cupy"] - after["torch"]).norm() < 2e-2 * after["torch"].norm()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_no_bit(shim, default):
    """Of matrices and vectors: thresholds, scratch, counters and rates have formats of their own."""

    def go():
        params = [parameter(randn(70, 40, seed=1)), parameter(randn(20, 60, seed=2)), parameter(randn(99, seed=3))]
        groups = [{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}]
        o = optimizer(groups, residual="normalized", lr=0.02, backend="cupy", compute_dtype="tf32")
        for k in range(3):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=10 * k + i)
            if k:
                params[0].grad[:, :3] = 0.0  # null directions to fill
            o.step()
        return [*params, *(o.state[p][key] for p in params for key in o.state[p])]

    expected = go()
    torch.set_default_dtype(default)
    try:
        found = go()
    finally:
        torch.set_default_dtype(torch.float32)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, "bfloat16", "tf32", "float32"])
def test_large_products_go_to_the_tensor_cores_where_they_may(shim, dtype, asked):
    seen = set()

    def watched(out, a, b, add=False, tf32=False):
        seen.add((a.dtype, b.dtype, tf32))
        ShimDevice.multiply(shim, out, a, b, add, tf32)

    shim.multiply = watched
    for residual in RESIDUALS:
        run("cupy", [(24, 16)], 1, dtype=dtype, residual=residual, momentum_dtype=torch.float32, compute_dtype=asked)
    rounding = asked or ("float32" if dtype == torch.float32 else "tf32")
    kind = torch.bfloat16 if rounding == "bfloat16" else torch.float32
    assert seen == {(kind, kind, rounding == "tf32")}


@pytest.mark.parametrize("name", ["muon", "normuon", "dion2", "dion3"])
def test_full_rank_rules_equal_plain_torch_and_multiply_on_the_tensor_cores(shim, name):
    """One iteration for all matrices of a shape, its products asked of cuBLAS in the format that may be rounded to."""
    seen = []

    def watched(out, a, b, add=False, tf32=False):
        seen.append((a.dtype, b.dtype, tf32, len(out)))
        ShimDevice.multiply(shim, out, a, b, add, tf32)

    def go(backend, compute, count):
        params = [parameter(randn(40, 24, seed=i)) for i in range(count)] + [parameter(randn(24, 60, seed=9))]
        o = orthdion.create(name, params, lr=0.02, backend=backend, compute_dtype=compute)
        for k in range(2):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=10 * k + i)
            seen.clear()
            o.step()
        return o, params

    shim.multiply = watched
    for compute, bound in ((None, 1e-5), ("tf32", 2e-2), ("bfloat16", 1e-1)):
        ours, theirs = (go(backend, compute, 3) for backend in ("cupy", "torch"))
        assert distance(ours, theirs) < bound
        products = []
        for count in (3, 1):
            go("cupy", compute, count)
            products.append(len(seen))
            kind = torch.bfloat16 if compute == "bfloat16" else torch.float32
            assert {s[:3] for s in seen} == {(kind, kind, compute == "tf32")}
            assert max(s[3] for s in seen) == count
        assert products[0] == products[1] == 2 * 15


def test_a_gradient_whose_norm_is_beyond_single_precision_is_skipped_as_in_plain_torch(shim):
    for size, skipped in ((2e36, False), (6e36, True)):  # of 90·40 entries
        for backend in ("cupy", "torch"):
            p = parameter(torch.zeros(90, 40))
            o = orthdion.OrthDion([p], backend=backend)
            p.grad = torch.full((90, 40), size)
            o.step()
            assert (sum(o.skipped_steps.values()) == 1) is skipped, (backend, size)
            assert bool(p.detach().any()) is not skipped


def test_the_order_of_threads_changes_no_bit(shim):
    def weights(seed):
        shim.seed = seed
        return run("cupy", [(130, 70), (64, 200), (130, 70)], 2, residual="normalized")

    plain = weights(-1)
    for seed in (3, 4):
        assert all(torch.equal(a, b) for a, b in zip(plain[1], weights(seed)[1], strict=True))


def test_a_stack_is_cut_into_launches_of_64(shim):
    ours, theirs = (run(b, [(70, 12, 8)], 2) for b in ("cupy", "torch"))
    assert distance(ours, theirs) < 1e-5


def test_diagnostics_equal_plain_torchs(shim):
    found = []
    for backend in ("cupy", "torch"):
        o, _ = run(backend, [(60, 40), (40, 90)], 3, diagnostics=True, residual="linear")
        found.append(orthdion.diagnostics.last_step(o))
    for a, b in zip(*found, strict=True):
        assert a.null == b.null
        assert a.nu == pytest.approx(b.nu, rel=1e-4)
        assert a.captured == pytest.approx(b.captured, rel=1e-4)
        assert a.alignment == pytest.approx(b.alignment, rel=1e-4)
        assert a.effective_rank == pytest.approx(b.effective_rank, rel=1e-4)


def test_saved_loaded_copied_and_continued_is_bit_exact(shim):
    def more(o, params):
        for k in range(2):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=50 + 10 * k + i)
            o.step()
        return [p.detach().clone() for p in params]

    o, params = run("cupy", [(40, 30), (30, 50)], 2, residual="normalized")
    o.add_param_group({"params": [torch.nn.Parameter(randn(9))], "algorithm": "adamw"})
    everything = [*params, o.param_groups[1]["params"][0]]
    fresh = copy.deepcopy(o)
    copies = [p for g in fresh.param_groups for p in g["params"]]
    groups = [
        {"params": [parameter(p.detach()) for p in params]},
        {"params": [parameter(everything[2].detach())], "algorithm": "adamw"},
    ]
    other = optimizer(groups, backend="cupy", residual="normalized")
    other.load_state_dict(o.state_dict())
    loaded = [p for g in other.param_groups for p in g["params"]]
    expected = more(o, everything)
    assert all(torch.equal(a, b) for a, b in zip(expected, more(fresh, copies), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, more(other, loaded), strict=True))
