"""Weights of two bytes, rounded stochastically: unbiased, the same for everybody, and what it is for."""

import copy
import io

import pytest
import torch
from oracles import parameter, randn

import orthdion
from orthdion.backends import get
from orthdion.core import optimizer as core
from orthdion.core.fold import Copies
from orthdion.numerics.rounding import NARROW, drawn, key_of, words
from orthdion.optim import OPTIMIZERS
from orthdion.requests import Draws

SHAPES = [(40, 24), (24, 70), (3, 12, 8), (30,)]


def trained(name, steps=3, dtype=torch.bfloat16, params=None, start=0, **options):
    """Weights of a rule after some steps, and the optimizer; vectors go to AdamW."""
    if params is None:
        params = [parameter(randn(*s, seed=i, dtype=dtype)) for i, s in enumerate(SHAPES)]
    vectors = {} if OPTIMIZERS[name].rule.elementwise else {"algorithm": "adamw"}
    groups = [{"params": params[:-1]}, {"params": params[-1:], **vectors}]
    o = orthdion.create(name, groups, lr=0.01, **{"weight_rounding": "stochastic", **options})
    go_on(o, steps, start)
    return params, o


def go_on(o, steps, start):
    for k in range(start, start + steps):
        for i, p in enumerate(p for g in o.param_groups for p in g["params"]):
            p.grad = randn(*p.shape, seed=100 * k + i, dtype=p.dtype)
        o.step()


def share(ours, theirs):
    """Of the entries that differ."""
    count = sum(p.numel() for p in ours)
    return sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True)) / count


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("x", [1.003456, -3.1415927, 7.3e-6, -6.1e-5, 0.1, 65503.0])
def test_it_is_right_on_average_and_takes_neighbours_only(backend, dtype, x):
    """The mean of 2¹⁶ draws is within five of its standard deviations: one case in two million would be outside."""
    value, target = torch.full((256, 256), x), torch.empty(256, 256, dtype=dtype)
    get(backend).draw(target, value, Draws(key_of(3), 7, 256, 1))
    low, high = (float(t) for t in target.double().aminmax())
    exact = float(torch.tensor(x))
    assert low < exact < high and bool(((target == low) | (target == high)).all())
    near = torch.tensor([low, high], dtype=dtype).view(torch.int16).tolist()
    assert abs(near[0] - near[1]) == 1  # nothing lies between them
    p = (exact - low) / (high - low)
    assert abs(float(target.double().mean()) - exact) < 5.0 * (high - low) * (p * (1.0 - p) / 2**16) ** 0.5


@pytest.mark.parametrize("dtype", NARROW)
def test_the_core_draws_as_plain_torch_does_for_every_kind_of_number_and_view(dtype):
    kinds = torch.cat([randn(500), 1e-5 * randn(500), 1e-8 * randn(300), 1e30 * randn(200), torch.zeros(60)])
    kinds[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    value = kinds[:1560].reshape(40, 39)
    for turned in (False, True):
        for draws in (Draws(key_of(1, 2), 0, 39, 1), Draws(-5, 2**40, 1, 1000), Draws(2**63 - 1, 11, 0, 3)):
            ours = [
                torch.empty(39, 40, dtype=dtype).T if turned else torch.empty(40, 39, dtype=dtype) for _ in range(2)
            ]
            for backend, target in zip(("rust", "torch"), ours, strict=True):
                get(backend).draw(target, value, draws)
            assert torch.equal(*(t.contiguous().view(torch.int16) & 0x7FFF for t in ours))
            assert torch.equal(ours[0] < 0, ours[1] < 0)
    exact = randn(40, 39).to(dtype).float()  # what needs no rounding stays
    assert torch.equal(drawn(exact, words(1, 2, 39, 1, exact.shape, exact.device), dtype).float(), exact)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_steps_bodies_and_backends_draw_alike(name, monkeypatch):
    """What is rounded differs by float32's own rounding, so a draw in some hundred falls otherwise; of draws that had
    nothing in common a third would.
    """
    options = {"local_step": "dion"} if name == "curvadion" else {}
    fused, _ = trained(name, backend="rust", **options)
    reference, _ = trained(name, backend="torch", **options)
    assert share(fused, reference) < 0.03
    monkeypatch.setattr(type(get("rust")), "fused", {})
    body, _ = trained(name, backend="rust", **options)
    assert share(body, reference) < 0.03
    other, _ = trained(name, backend="rust", rounding_seed=1, **options)
    assert share(other, reference) > 0.1


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["completed-dion", "muon", "adamw"])
def test_threads_and_resumed_runs_draw_the_same_bits(name, dtype):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, o = trained(name, dtype=dtype, rounding_seed=5)
        torch.set_num_threads(2)
        both, _ = trained(name, dtype=dtype, rounding_seed=5)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    file = io.BytesIO()
    torch.save(o.state_dict(), file)
    file.seek(0)
    params, other = trained(name, steps=0, params=[parameter(p.detach()) for p in alone], seed=9)
    other.load_state_dict(torch.load(file, weights_only=True))
    go_on(o, 3, 3)
    go_on(other, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, params, strict=True))
    assert other.param_groups[0]["rounding_seed"] == 5
    copied = copy.deepcopy(o)
    go_on(o, 1, 7)
    go_on(copied, 1, 7)
    assert all(
        torch.equal(a, b) for a, b in zip(alone, (p for g in copied.param_groups for p in g["params"]), strict=True)
    )


@pytest.mark.parametrize("backend", ["rust", "torch"])
def test_to_nearest_is_the_default_and_single_precision_is_not_rounded(backend):
    default, _ = trained("completed-dion", backend=backend, weight_rounding="nearest")
    unasked, _ = trained("completed-dion", backend=backend, **{"weight_rounding": "nearest", "rounding_seed": 3})
    assert all(torch.equal(a, b) for a, b in zip(default, unasked, strict=True))
    drawn_, _ = trained("completed-dion", backend=backend)
    assert share(default, drawn_) > 0.1
    for dtype in (torch.float32, torch.float64):
        plain, _ = trained("muon", dtype=dtype, backend=backend, weight_rounding="nearest")
        other, _ = trained("muon", dtype=dtype, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        ((12, 20), {}),
        ((20, 12), {"transposed": True}),
        ((3, 8, 10), {}),
        ((6, 4, 3, 3), {}),
        ((24, 7), {"split_sizes": (12, 8, 4)}),
        ((36, 10), {"split_sizes": (6, 2, 1), "interleaved": 4}),
        ((15, 25), {"num_heads": 3}),
        ((9, 4), {"algorithm": "lion"}),
        ((9,), {"algorithm": "lion"}),
    ],
)
def test_every_entry_of_a_weight_has_a_number_of_its_own(shape, keys):
    p = parameter(randn(*shape, dtype=torch.bfloat16), randn(*shape, seed=1, dtype=torch.bfloat16))
    o = orthdion.OrthDion([{"params": [p], **keys}], weight_rounding="stochastic")
    o.step()
    numbers, entry = [], o._entries[id(p)]
    rule = o._rules()[id(entry.group)]
    for w in entry.matrices(p.grad, o.state[p], rule, entry.layout, Copies(), False):
        first, row, col = w.place
        i, j = (torch.arange(n) for n in w.x.shape)
        numbers.append((first + row * i[:, None] + col * j).flatten())
    assert torch.equal(torch.cat(numbers).sort().values, torch.arange(p.numel()))


@pytest.mark.parametrize(("name", "lr"), [("muon", 0.02), ("completed-dion", 0.003), ("adamw", 0.001)])
def test_small_steps_stall_to_nearest_and_go_on_by_draws(name, lr):
    """W goes from 1.5 to about 1 by steps that are a small part of the distance of W's neighbours in bfloat16, 2⁻⁷."""
    goal, left = 1.0 + 0.1 * randn(24, 16, seed=3), {}
    how = {} if name == "adamw" else {"adjust_lr": None}
    for rounding, dtype in (("nearest", torch.bfloat16), ("stochastic", torch.bfloat16), ("nearest", torch.float32)):
        p = parameter(torch.full((24, 16), 1.5, dtype=dtype))
        o = orthdion.create(name, [p], lr=lr, weight_decay=0.0, weight_rounding=rounding, **how)
        for _ in range(400):
            p.grad = (p.detach().float() - goal).to(dtype)
            o.step()
        left[rounding, dtype] = float((p.detach().float() - goal).norm() / (1.5 - goal).norm())
    stalled, by_draws, single = left.values()
    assert abs(by_draws - single) < 0.05 and single < stalled - 0.1 and stalled > 0.85


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("dtype", NARROW)
def test_eco_puts_what_rounding_loses_into_adamws_momentum(backend, dtype):
    """arXiv 2601.22101: m += (1 − 1/β₁)·e/η, e seen through Adam's denominator. The draws are not looked at."""
    p = parameter(randn(30, 20, dtype=dtype))
    options = {"weight_decay": 0.2, "betas": (0.8, 0.9), "momentum_dtype": torch.float32, "backend": backend}
    o = orthdion.AdamW([p], lr=0.01, weight_rounding="eco", **options)
    m, v = torch.zeros(30, 20).double(), torch.zeros(30, 20).double()
    for t in range(1, 5):
        x, g = p.detach().double().clone(), randn(30, 20, seed=t, dtype=dtype)
        p.grad = g
        o.step()
        m, v = 0.8 * m + 0.2 * g.double(), 0.9 * v + 0.1 * g.double() ** 2
        below = (v / (1 - 0.9**t)).sqrt() + 1e-8
        exact = (1 - 0.01 * 0.2) * x - 0.01 * m / (1 - 0.8**t) / below
        lost = exact - p.detach().double()
        assert lost.abs().max() > 1e-4
        m = m + (1 - 1 / 0.8) / 0.01 * lost * (1 - 0.8**t) * below
        # Single precision's error of X̃ comes in multiplied by 25 as well.
        assert (o.state[p]["momentum"] - m).abs().max() < 1e-4
        m = o.state[p]["momentum"].double().clone()
        assert torch.allclose(o.state[p]["variance"].double(), v, rtol=1e-5)


def test_eco_ends_nearer_to_single_precision_than_draws_alone():
    goal, ends = 1.0 + 0.1 * randn(48, 32, seed=3), {}
    for rounding, dtype in (("nearest", torch.float32), ("stochastic", torch.bfloat16), ("eco", torch.bfloat16)):
        p = parameter(torch.full((48, 32), 1.5, dtype=dtype))
        o = orthdion.AdamW([p], lr=0.001, weight_decay=0.0, weight_rounding=rounding)
        for k in range(600):
            p.grad = (p.detach().float() - goal + 0.1 * randn(48, 32, seed=k)).to(dtype)
            o.step()
        ends[rounding] = p.detach().float()
    single, by_draws, eco = ends.values()
    assert (eco - single).norm() < 0.8 * (by_draws - single).norm()
    assert (eco - goal).norm() < (by_draws - goal).norm()


@pytest.mark.parametrize("dtype", NARROW)
def test_eco_in_one_piece_and_by_its_body_is_the_same_and_single_precision_loses_nothing(dtype):
    ours, a = trained("adamw", dtype=dtype, backend="rust", weight_rounding="eco")
    theirs, b = trained("adamw", dtype=dtype, backend="torch", weight_rounding="eco")
    _, c = trained("adamw", dtype=dtype, backend="torch")
    assert share(ours, theirs) < 0.03
    moved = [torch.cat([o.state[p]["momentum"].float().flatten() for p in o.state]) for o in (a, b, c)]
    assert (moved[0] - moved[1]).norm() < 0.1 * (moved[1] - moved[2]).norm()
    for name in ("eco", "nearest"):
        single, _ = trained("adamw", dtype=torch.float32, weight_rounding=name, backend="torch")
        other, _ = trained("adamw", dtype=torch.float32, weight_rounding="stochastic", backend="torch")
        assert all(torch.equal(x, y) for x, y in zip(single, other, strict=True))


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw"])
def test_eco_is_refused_by_name_where_steps_are_of_one_size(name):
    options = {"local_step": "dion"} if name == "curvadion" else {}
    with pytest.raises(ValueError, match="whatever the momentum's; use 'stochastic', and 'eco' in groups of adamw"):
        orthdion.create(name, [parameter(randn(8, 6))], weight_rounding="eco", **options)
    groups = [{"params": [parameter(randn(8, 6))]}, {"params": [parameter(randn(8))], "algorithm": "adamw"}]
    groups[1]["weight_rounding"] = "eco"
    made = orthdion.create(name, groups, weight_rounding="stochastic", **options)
    assert made.param_groups[1]["weight_rounding"] == "eco"


def test_what_cannot_draw_says_so(monkeypatch):
    x = randn(6, 4, dtype=torch.bfloat16)
    state = orthdion.functional.init("muon", x)
    with pytest.raises(ValueError, match="single steps do not know"):
        orthdion.functional.step("muon", x, x.clone(), state, weight_rounding="stochastic")
    with pytest.raises(ValueError, match="beta1 is 0"):
        orthdion.AdamW([parameter(x)], weight_rounding="eco", betas=(0.0, 0.9))
    with pytest.raises(ValueError, match="weight_rounding must be one of"):
        orthdion.Muon([parameter(x)], weight_rounding="up")
    with pytest.raises(ValueError, match="local_step='dion'"):
        orthdion.CurvaDion([parameter(x)], weight_rounding="stochastic")
    monkeypatch.setattr(core, "is_capturing", lambda device: True)
    o = orthdion.Muon([parameter(x, randn(6, 4, dtype=torch.bfloat16))], weight_rounding="stochastic")
    with pytest.raises(RuntimeError, match="a captured graph would freeze"):
        o.step()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "rounding"), [("muon", "stochastic"), ("adamw", "stochastic"), ("adamw", "eco")])
def test_torchs_default_dtype_changes_no_bit(default, name, rounding):
    for backend in ("rust", "torch"):
        before, _ = trained(name, weight_rounding=rounding, backend=backend)
        params = [parameter(randn(*s, seed=i, dtype=torch.bfloat16)) for i, s in enumerate(SHAPES)]
        torch.set_default_dtype(default)
        try:
            after, _ = trained(name, params=params, weight_rounding=rounding, backend=backend)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
