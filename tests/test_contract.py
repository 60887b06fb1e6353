"""What torch.optim's users expect of any optimizer."""

import copy
import io
import pickle

import pytest
import torch
from oracles import lion_step, parameter, randn
from torch import nn

import orthdion
from orthdion import _core

KINDS = [orthdion.OrthDion, orthdion.Dion, orthdion.CompletedDion, orthdion.Muon, orthdion.AdamW, orthdion.Lion]
LOW_RANK = KINDS[:3]


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(11, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16), nn.Linear(16, 11)
    )


def train(m, o, steps, start=0):
    for k in range(start, start + steps):
        x = torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(k))
        o.zero_grad()
        nn.functional.cross_entropy(m(x), x.roll(1)).backward()
        o.step()
    return [p.detach().clone() for p in m.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scalar", ["adamw", "lion"])
@pytest.mark.parametrize("options", [{}, {"momentum_dtype": torch.bfloat16, "q_dtype": torch.bfloat16}])
def test_saved_loaded_and_continued_is_the_same_to_the_bit(kind, scalar, options):
    m = model()
    o = kind(orthdion.param_groups(m, scalar=scalar, scalar_lr=0.02), lr=0.02, **options)
    train(m, o, 5)
    file = io.BytesIO()
    torch.save({"m": m.state_dict(), "o": o.state_dict()}, file)
    expected = train(m, o, 5, start=5)

    torch.manual_seed(999)
    fresh = model(seed=4)
    other = kind(orthdion.param_groups(fresh, scalar=scalar, scalar_lr=0.02), lr=0.5, seed=77, **options)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh.load_state_dict(saved["m"])
    other.load_state_dict(saved["o"])
    assert all(
        v.dtype == w.dtype
        for s, t in zip(o.state.values(), other.state.values(), strict=True)
        for v, w in zip(s.values(), t.values(), strict=True)
    )
    assert same(expected, train(fresh, other, 5, start=5))


@pytest.mark.parametrize("kind", LOW_RANK)
def test_the_global_random_stream_is_never_touched_and_seeds_count(kind):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    m = [parameter(randn(20, 30), randn(20, 30, seed=1)) for _ in range(2)]
    o = kind(m, rank_fraction=0.5, seed=5)
    o.step()
    assert torch.equal(before, torch.get_rng_state())
    q = [o.state[p]["Q"].clone() for p in m]
    assert not torch.equal(q[0], q[1])
    again = kind([parameter(randn(20, 30))], rank_fraction=0.5, seed=5)
    other = kind([parameter(randn(20, 30))], rank_fraction=0.5, seed=6)
    first = [next(iter(x.state.values()))["Q"] for x in (again, other)]
    assert not torch.equal(first[0], first[1])
    assert torch.allclose(first[0].T @ first[0], torch.eye(10), atol=1e-5)


def test_states_exist_from_construction_and_after_add_param_group():
    a, b, c = parameter(randn(6, 8)), parameter(randn(5)), parameter(randn(7, 3))
    o = orthdion.Dion([{"params": [a]}, {"params": [b], "algorithm": "adamw"}])
    assert {k: tuple(v.shape) for k, v in o.state[a].items()} == {"momentum": (6, 8), "Q": (6, 6)}
    assert set(o.state[b]) == {"momentum", "variance", "step"}
    o.add_param_group({"params": [c], "algorithm": "lion", "lr": 0.5})
    assert set(o.state[c]) == {"momentum"}
    o.step()  # no gradients: nothing to do, nothing breaks


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle_step_alike(kind):
    def once(o):
        for p in (p for g in o.param_groups for p in g["params"]):
            p.grad = randn(*p.shape, seed=9)
        o.step()
        return [p.detach() for g in o.param_groups for p in g["params"]]

    o = kind([parameter(randn(12, 8)), parameter(randn(8, 12))], seed=3, momentum_dtype=torch.float64)
    once(o)
    copies = [copy.deepcopy(o), pickle.loads(pickle.dumps(o))]
    expected = once(o)
    for c in copies:
        assert same(expected, once(c))
        assert "backend rust" in repr(c) and c._seed == 3


def test_closures_schedulers_and_tensor_rates():
    m = model()
    rate = torch.tensor(0.02)
    o = orthdion.OrthDion(orthdion.param_groups(m), lr=rate)
    x = torch.arange(8)
    losses = []

    def closure():
        o.zero_grad()
        loss = nn.functional.cross_entropy(m(x), x)
        loss.backward()
        return loss

    for _ in range(5):
        losses.append(o.step(closure).item())
    assert losses[-1] < losses[0]
    o = orthdion.OrthDion(orthdion.param_groups(m), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(o, 4)
    for _ in range(4):
        o.step(closure)
        schedule.step()
    assert o.param_groups[0]["lr"] < 1e-6
    before = [p.detach().clone() for p in m.parameters()]
    for g in o.param_groups:
        g["lr"] = 0.0
    o.step(closure)
    assert same(before, [p.detach() for p in m.parameters()])


def test_maximize_is_minimizing_the_negative():
    g = randn(20, 10, seed=2)
    up, down = parameter(randn(20, 10), g), parameter(randn(20, 10), -g)
    orthdion.OrthDion([up], maximize=True).step()
    orthdion.OrthDion([down]).step()
    assert torch.equal(up.detach(), down.detach())
    ups = [parameter(randn(7), g[0, :7].clone()) for _ in range(2)]
    ups[1].grad = -ups[1].grad
    for p, flag in zip(ups, (True, False), strict=True):
        orthdion.Dion([{"params": [p], "algorithm": "lion"}], maximize=flag).step()
    assert torch.equal(ups[0].detach(), ups[1].detach())


def test_hooks_run_and_autograd_notices_the_write():
    p = parameter(randn(6, 4), randn(6, 4, seed=1))
    o = orthdion.OrthDion([p])
    calls = []
    o.register_step_post_hook(lambda *_: calls.append(1))
    before = p._version
    x = (p * p).sum()
    o.step()
    assert calls == [1] and p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.backward()


def test_torchs_adamw_and_lions_equations():
    for shape in [(7,), (5, 6), (2, 3, 4), ()]:
        x = randn(*shape, dtype=torch.float64)
        ours, theirs = parameter(x), parameter(x)
        o = orthdion.Dion(
            [{"params": [ours], "algorithm": "adamw"}], lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, epsilon=1e-6
        )
        t = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, eps=1e-6)
        lion, y, m = parameter(x), x.clone(), torch.zeros_like(x)
        o2 = orthdion.Dion([{"params": [lion], "algorithm": "lion"}], lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
        for k in range(20):
            g = randn(*shape, seed=k, dtype=torch.float64)
            ours.grad, theirs.grad, lion.grad = g.clone(), g.clone(), g.clone()
            o.step()
            t.step()
            o2.step()
            lion_step(y, g, m, 0.1, (0.8, 0.9), 0.2)
        assert torch.allclose(ours, theirs, atol=1e-12)
        assert torch.allclose(lion.detach(), y, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_elementwise_rust_equals_the_reference(algorithm, dtype):
    shapes = [(100,), (33, 17), (3, 4, 5)]
    results = []
    for backend in ("rust", "torch"):
        params = [parameter(randn(*s).to(dtype)) for s in shapes]
        params.append(parameter(randn(20, 30).to(dtype).T))
        o = orthdion.Dion([{"params": params, "algorithm": algorithm}], backend=backend, lr=0.05)
        for k in range(5):
            for p in params:
                p.grad = randn(*p.shape, seed=k).to(dtype)
            o.step()
        results.append([p.detach().float() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=2e-6 if dtype == torch.float32 else 0.02)


def test_two_hundred_matrices_of_twenty_shapes_are_one_call(monkeypatch):
    params = [parameter(randn(8 + i % 20, 12), randn(8 + i % 20, 12, seed=i)) for i in range(200)]
    params += [parameter(randn(9), randn(9, seed=i)) for i in range(50)]
    o = orthdion.OrthDion([{"params": params[:200]}, {"params": params[200:], "algorithm": "adamw"}])
    calls = []
    for name in ("lowrank_step", "elementwise_step"):
        original = getattr(_core, name)
        monkeypatch.setattr(_core, name, lambda *a, f=original, n=name: (calls.append(n), f(*a))[1])
    for _ in range(2):
        o.step()
    assert calls == ["lowrank_step", "elementwise_step"] * 2


def test_microsofts_checkpoint_loads_and_missing_keys_keep_their_values():
    wide, vector = parameter(randn(6, 10)), parameter(randn(4))
    o = orthdion.Dion([{"params": [wide]}, {"params": [vector], "algorithm": "adamw"}], rank_fraction=0.5)
    q = randn(10, 3, seed=1)
    group = {
        "rank_fraction": 0.5,
        "rank_multiple_of": 1,
        "lr": 0.3,
        "mu": 0.9,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.0,
        "epsilon": 1e-8,
        "oversample": 1.25,
        "step": 12,
    }
    theirs = {
        "state": {0: {"momentum": randn(6, 10, seed=2), "Q": q}},
        "param_groups": [{**group, "algorithm": "dion", "params": [0]}, {**group, "algorithm": "adamw", "params": [1]}],
    }
    o.load_state_dict(theirs)
    assert torch.equal(o.state[wide]["Q"], q) and o.param_groups[0]["step"] == 12
    assert o.param_groups[0]["feedback"] == "dion" and o.param_groups[0]["lr"] == 0.3
    for p in (wide, vector):
        p.grad = randn(*p.shape, seed=3)
    o.step()
    assert o.state[wide]["Q"].shape == (10, 3)


def test_a_late_first_gradient_has_its_own_bias_correction():
    ours, theirs = [[parameter(randn(5)), parameter(randn(5, seed=1))] for _ in range(2)]
    o = orthdion.Dion([{"params": ours, "algorithm": "adamw"}], lr=0.1, weight_decay=0.0)
    t = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(8):
        for i in range(2):
            g = randn(5, seed=10 * k + i) if i == 0 or k > 4 else None
            ours[i].grad, theirs[i].grad = g, None if g is None else g.clone()
        o.step()
        t.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("theirs", ["adamw", "lion", "dion"])
@pytest.mark.parametrize("ours", ["adamw", "lion", "dion"])
def test_a_state_of_another_algorithm_or_library_is_refused(ours, theirs):
    def make(algorithm):
        p = parameter(randn(4, 3), randn(4, 3))
        o = orthdion.Dion([{"params": [p], "algorithm": algorithm}], lr=0.25)
        o.step()
        return o

    o = make(ours)
    if ours == theirs:
        o.load_state_dict(make(theirs).state_dict())
        return
    with pytest.raises(ValueError, match="algorithm"):
        o.load_state_dict(make(theirs).state_dict())
    foreign = torch.optim.SGD([parameter(randn(4, 3), randn(4, 3))], lr=9.0, momentum=0.9)
    foreign.step()
    with pytest.raises(ValueError, match="another kind of optimizer"):
        o.load_state_dict(foreign.state_dict())
    assert o.param_groups[0]["lr"] == 0.25


def test_load_hooks_see_and_change_the_state():
    p = parameter(randn(4, 3), randn(4, 3))
    o = orthdion.OrthDion([p])
    o.step()
    saved, seen = o.state_dict(), []

    def before(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["momentum"].fill_(7.0)
        return state_dict

    o.register_load_state_dict_pre_hook(before)
    o.register_load_state_dict_post_hook(lambda optimizer: seen.append(float(optimizer.state[p]["momentum"][0, 0])))
    o.load_state_dict(saved)
    assert seen == [7.0] and bool((o.state[p]["momentum"] == 7.0).all())
    o.load_state_dict(saved)
    assert seen == [7.0, 7.0]


def test_group_betas_may_be_set_as_torch_users_do():
    p = parameter(randn(4), randn(4))
    o = orthdion.Dion([{"params": [p], "algorithm": "adamw"}])
    o.param_groups[0]["betas"] = (0.5, 0.6)
    o.step()
    assert (o.param_groups[0]["beta1"], o.param_groups[0]["beta2"]) == (0.5, 0.6)
    assert torch.allclose(o.state[p]["momentum"], 0.5 * p.grad)


def _copied(p, state):
    p.data = p.data.clone()


def _turned(p, state):
    p.data = p.data.T


def _state_replaced(p, state):
    state["momentum"] = state["momentum"].clone()


def _state_moved(p, state):
    state["Q"].data = state["Q"].data.clone()


@pytest.mark.parametrize("move", [_copied, _turned, _state_replaced, _state_moved])
def test_a_weight_or_state_that_was_moved_is_stepped_where_it_lies_now(move):
    p = nn.Parameter(torch.randn(8, 8))
    optimizer = orthdion.OrthDion([p], rank_fraction=0.5)
    for _ in range(2):
        p.grad = torch.randn(8, 8)
        optimizer.step()
    move(p, optimizer.state[p])
    fresh = copy.deepcopy(optimizer)  # it has seen nothing yet
    (q,) = fresh.param_groups[0]["params"]
    q.grad = p.grad
    optimizer.step()
    fresh.step()
    assert torch.equal(p, q)
    assert all(torch.equal(x, fresh.state[q][key]) for key, x in optimizer.state[p].items())
