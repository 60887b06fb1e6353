"""What is done to optimizers outside of textbooks: every registered one survives it, or says what is wrong."""

import os
import signal
import warnings

import pytest
import torch
from oracles import parameter, randn
from torch import nn

import orthdion
from orthdion.core import work
from orthdion.optim import OPTIMIZERS

NAMES = list(OPTIMIZERS)
MATRIX_RULES = [name for name, kind in OPTIMIZERS.items() if not kind.rule.elementwise]
#: As many options as a rule may have that change what it writes.
VARIANTS = [
    *NAMES,
    "orth-dion:feedback=pure",
    "orth-dion:right_factor=column",
    "completed-dion:residual=linear",
    "muon:polar=polar-express",
    "muon:nesterov=False",
]


def make(spec, params, **options):
    name, _, rest = spec.partition(":")
    for pair in rest.split(",") if rest else []:
        key, value = pair.split("=")
        options[key] = value == "True" if value in ("True", "False") else value
    return orthdion.create(name, params, **options)


def kept_together(name):
    """Whether the core has its step in one piece."""
    return OPTIMIZERS[name].rule().fused() is not None or name == "curvadion"


def first(o, p):
    """The name of a state of more than a number: the momentum, if there is one."""
    return "momentum" if "momentum" in o.state[p] else next(k for k, t in o.state[p].items() if t.ndim)


def finite(o, p):
    return bool(torch.isfinite(p).all()) and all(bool(torch.isfinite(t).all()) for t in o.state[p].values())


# ---------------------------------------------------------------- states that cannot be poisoned


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("momentum_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", VARIANTS)
def test_large_gradients_do_not_stop_a_matrix_for_ever(spec, momentum_dtype, backend):
    p = parameter(torch.zeros(64, 48))
    o = make(spec, [p], lr=0.01, momentum_dtype=momentum_dtype, backend=backend)
    base = randn(64, 48)
    for size in (4000.0, 6e4, 1e-3):
        for k in range(4):
            p.grad = size * (base + 0.3 * randn(64, 48, seed=k))
            before = p.detach().clone()
            o.step()
            assert finite(o, p), (size, k)
        assert not torch.equal(before, p.detach()), size
    assert not o.skipped_steps


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("spec", VARIANTS)
def test_gradients_at_the_end_of_single_precision_write_no_infinity(spec, backend):
    p = parameter(torch.zeros(12, 9))
    o = make(spec, [p], lr=0.01, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in (1e20, 3e38, 3e38, 1e30, 1.0, 1.0):
            p.grad = size * randn(12, 9).sign()
            o.step()
            assert finite(o, p), size


def test_float16_weights_have_states_of_single_precision_by_default():
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        p = parameter(randn(12, 9).to(dtype))
        o = orthdion.OrthDion([p])
        assert {t.dtype for t in o.state[p].values()} == {kept}
    p = parameter(randn(12, 9).half())
    o = orthdion.OrthDion([p], momentum_dtype=torch.float16, q_dtype=torch.float16)
    assert {t.dtype for t in o.state[p].values()} == {torch.float16}


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_nan_is_told_with_the_way_out(name):
    model = nn.Linear(9, 12, bias=False)
    o = orthdion.create(name, [{"params": [model.weight], "param_names": ["inner.weight"]}], lr=0.1)
    fresh = {k: t.clone() for k, t in o.state[model.weight].items()}
    state = o.state_dict()
    key = first(o, model.weight)
    state["state"][0][key] = torch.full_like(fresh[key], float("nan"))
    with pytest.warns(UserWarning, match=rf"{key} of inner\.weight .*reset_state"):
        o.load_state_dict(state)
    o.reset_state(model.weight)
    assert all(torch.equal(t, o.state[model.weight][k]) for k, t in fresh.items())
    model.weight.grad = randn(12, 9)
    before = model.weight.detach().clone()
    o.step()
    assert finite(o, model.weight) and not torch.equal(before, model.weight.detach())


def test_a_state_that_was_spoilt_by_hand_is_told_by_name_and_reset():
    p = parameter(randn(12, 9), randn(12, 9, seed=1))
    o = orthdion.OrthDion([{"params": [p], "param_names": ["inner.weight"]}])
    o.state[p]["momentum"][3, 4] = float("inf")
    with pytest.warns(UserWarning, match=r"inner\.weight .*reset_state"):
        o.step()
    o.reset_state(p)
    before = p.detach().clone()
    o.step()
    assert not torch.equal(before, p.detach())
    with pytest.raises(ValueError, match="does not have"):
        o.reset_state(parameter(randn(3, 3)))


# ---------------------------------------------------------------- a step is whole, or did not happen


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_a_step_comes_after_it(monkeypatch, number):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
        o = orthdion.OrthDion(orthdion.param_groups(model), lr=0.1)
        model(torch.ones(2, 8)).square().sum().backward()
        return model, o

    def handler(*_):
        raise Interrupted

    (whole, o), (model, other) = made(), made()
    o.step()
    run = work.Work.run

    def interrupted(self, *args):
        os.kill(os.getpid(), number)
        run(self, *args)

    monkeypatch.setattr(work.Work, "run", interrupted)
    before = signal.signal(number, handler)
    try:
        with pytest.raises(Interrupted):
            other.step()
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert [g["step"] for g in other.param_groups] == [g["step"] for g in o.param_groups]
    assert all(
        torch.equal(a, b)
        for p, q in zip(whole.parameters(), model.parameters(), strict=True)
        for a, b in zip(o.state[p].values(), other.state[q].values(), strict=True)
    )


def test_every_signal_that_waited_is_handled_though_the_first_raises():
    from orthdion.core.held import Held

    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("terminate"))
    try:
        with pytest.raises(KeyboardInterrupt), Held():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert not seen
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["terminate"]


def test_gradients_in_one_storage_with_their_weights_are_no_overlap():
    """As flat buffers have it; and another error of the core keeps its own words."""
    flat = torch.randn(96)
    p = nn.Parameter(flat[:48].view(6, 8))
    p.grad = flat[48:].view(6, 8)
    o = orthdion.OrthDion([p])
    o.step()
    o._check_gradients_overlap()


def test_a_second_interrupt_gets_through():
    from orthdion.core.held import Held

    reached = []
    with pytest.raises(KeyboardInterrupt), Held():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(2)
    assert reached == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---------------------------------------------------------------- parameters that change under it


@pytest.mark.parametrize("name", NAMES)
def test_meta_parameters_that_get_memory_later(name):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.device("meta"):
            model = nn.Linear(8, 6, bias=False)
        o = orthdion.create(name, [model.weight], lr=0.1)
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    other = nn.Parameter(model.weight.detach().clone())
    p = orthdion.create(name, [other], lr=0.1)
    for x, optimizer in ((model.weight, o), (other, p)):
        x.grad = randn(6, 8)
        optimizer.step()
    assert torch.equal(model.weight.detach(), other.detach())


@pytest.mark.parametrize("name", NAMES)
def test_meta_and_fake_parameters_are_stepped_without_a_word(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    p = nn.Parameter(torch.empty(6, 8, device="meta"))
    o = orthdion.create(name, [p])
    p.grad = torch.empty(6, 8, device="meta")
    o.step()
    assert (o.state[p][first(o, p)].device, o.param_groups[0]["step"]) == (torch.device("meta"), 1)
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
        o = orthdion.create(name, model)
        model(torch.randn(2, 8)).sum().backward()
        o.step()


@pytest.mark.parametrize("name", NAMES)
def test_lazy_parameters_get_their_states_when_they_get_their_shape(name):
    model = nn.LazyLinear(4, bias=False)
    o = orthdion.create(name, [model.weight], lr=0.1)
    o.step()
    assert "not initialised" in o._name(model.weight)
    model(torch.ones(2, 3)).sum().backward()
    before = model.weight.detach().clone()
    o.step()
    assert o.state[model.weight][first(o, model.weight)].shape[0] == 4 and not torch.equal(
        before, model.weight.detach()
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda o, p: p.__setattr__("data", randn(8, 6)), "shape"),
        (lambda o, p: o.state[p].__setitem__(first(o, p), 0), "no tensor"),
        (lambda o, p: o.state[p].__setitem__(first(o, p), torch.zeros(5)), r"\(5,\)"),
        (lambda o, p: o.state[p].__delitem__(first(o, p)), "lost its state '(momentum|U)'"),
    ],
)
def test_states_that_do_not_fit_are_refused_by_name(name, spoil, words):
    p, other = parameter(randn(6, 8), randn(6, 8, seed=1)), parameter(randn(5, 5), randn(5, 5))
    o = orthdion.create(name, [{"params": [other, p], "param_names": ["first", "inner.weight"]}])
    o.step()
    p.grad = None
    spoil(o, p)
    p.grad = torch.ones_like(p)
    before = other.detach().clone()
    with pytest.raises(ValueError, match=rf"inner\.weight .*{words}.*reset_state"):
        o.step()
    assert torch.equal(before, other.detach())
    o.reset_state(p)
    o.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_the_weight_is_refused_by_name(name):
    p = parameter(randn(6, 8))
    o = orthdion.create(name, [{"params": [p], "param_names": ["inner.weight"]}], backend="rust")
    p.grad = p.detach()
    if not kept_together(name):  # plain torch reads before it writes
        other = parameter(p.detach().clone(), p.detach().clone())
        orthdion.create(name, [other], backend="rust").step()
        o.step()
        assert torch.equal(p.detach(), other.detach())
        return
    with pytest.raises(ValueError, match=r"inner\.weight .*shares memory.*clone"):
        o.step()


# ---------------------------------------------------------------- around it


def test_groups_added_later_are_named_as_the_others_are():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    o = orthdion.OrthDion(orthdion.param_groups(model))
    o.add_param_group({"params": [parameter(randn(3, 3))]})
    assert o.param_groups[-1]["param_names"] == [f"group {len(o.param_groups) - 1}, parameter 0"]
    o = orthdion.OrthDion([parameter(randn(3, 3))])
    with pytest.raises(ValueError, match="param_groups"):
        o.add_param_group({"params": [parameter(randn(3, 3))], "param_names": ["late"]})


def test_states_that_are_nobodys_are_kept_on_loading():
    p = parameter(randn(6, 8))
    o = orthdion.OrthDion([p])
    saved = o.state_dict()
    saved["state"]["global"] = {"x": 1}
    saved["state"][0]["mine"] = 3
    o.load_state_dict(saved)
    assert o.state["global"] == {"x": 1} and o.state[p]["mine"] == 3
    p.grad = randn(6, 8)
    o.step()


def test_clipping_says_what_is_not_finite_if_asked_to():
    p = parameter(randn(6, 8), torch.full((6, 8), float("nan")))
    o = orthdion.OrthDion([p])
    assert not o.clip_grad_norm_(1.0).isfinite()
    with pytest.raises(RuntimeError, match="nan"):
        o.clip_grad_norm_(1.0, error_if_nonfinite=True)


def test_counts_that_are_handed_out_are_copies():
    p = parameter(randn(6, 8))
    o = orthdion.OrthDion([p])
    o.skipped_steps["x"] = 3
    assert not o.skipped_steps


def test_options_on_a_device_other_than_learning_rates_are_refused():
    p = parameter(randn(6, 8), randn(6, 8))
    o = orthdion.OrthDion([p])
    o.param_groups[0]["mu"] = torch.tensor(0.9, device="meta")
    with pytest.raises(TypeError, match="only lr and weight_decay"):
        o.step()


def test_a_fallback_to_plain_torch_is_told_once(monkeypatch):
    from orthdion.core import members

    monkeypatch.setattr(members, "passed_over", lambda *_: ["CuPy is not installed"])
    with pytest.warns(UserWarning, match="CuPy is not installed") as told:
        orthdion.OrthDion([parameter(randn(6, 8)), parameter(randn(6, 8))])
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        orthdion.OrthDion([parameter(randn(6, 8))], backend="torch")


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_around_a_training_step_changes_nothing(name):
    import torch._dynamo as dynamo

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False))
        o = orthdion.create(name, model.parameters(), lr=0.1)
        x = torch.randn(2, 8)

        def step():
            loss = model(x).square().sum()
            loss.backward()
            o.step()
            o.zero_grad()
            return loss

        return model, step

    dynamo.reset()
    dynamo.utils.counters.clear()
    (model, step), (plain, eager) = made(), made()
    compiled = torch.compile(step, backend="eager")
    for _ in range(3):
        compiled()
        eager()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert sum(dynamo.utils.counters["graph_break"].values()) <= 6


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_that_step_elsewhere_and_come_back(name):
    """Sharpness-aware minimisation: up along the gradient, a gradient there, back, and a step."""
    p = parameter(randn(6, 8))
    o = orthdion.create(name, [{"params": [p], "rho": 0.05}], lr=0.1)
    for _ in range(3):
        o.zero_grad()
        (p.square().sum() / 2).backward()
        up = 0.05 * p.grad / p.grad.norm()
        with torch.no_grad():
            p.add_(up)
        o.zero_grad()
        (p.square().sum() / 2).backward()
        with torch.no_grad():
            p.sub_(up)
        o.step()
    assert finite(o, p) and o.state[p][first(o, p)].norm() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(name, default):
    def after():
        p = parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32))
        o = orthdion.create(name, [p], lr=0.1)
        for k in range(3):
            p.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float32)
            o.step()
        return p.detach(), {k: t.dtype for k, t in o.state[p].items()}

    expected, dtypes = after()
    torch.set_default_dtype(default)
    try:
        found, others = after()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(expected, found) and dtypes == others


@pytest.mark.parametrize("name", NAMES)
def test_one_cycle_and_plateau_schedulers_and_a_scaler(name):
    p = parameter(randn(6, 8))
    o = orthdion.create(name, [p], lr=0.1)
    once = torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=4, cycle_momentum=False)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(4):
        o.zero_grad()
        scaler.scale(p.square().sum()).backward()
        scaler.step(o)
        scaler.update()
        once.step()
        plateau.step(1.0)
    assert finite(o, p)


def test_flushing_of_subnormals_set_after_the_first_step_counts_on_every_thread():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    torch.set_flush_denormal(False)
    threads = torch.get_num_threads()

    def after(n):
        torch.set_num_threads(n)
        params = [parameter(1e-38 * randn(64, 48, seed=i), randn(64, 48, seed=i)) for i in range(16)]
        o = orthdion.OrthDion([{"params": params, "algorithm": "adamw"}], lr=1e-39, weight_decay=0.5)
        o.step()  # threads are started here, before the mode changes
        for p in params:
            p.grad.mul_(1e-38)
            o.state[p]["momentum"].mul_(1e-37)
        torch.set_flush_denormal(True)
        o.step()
        torch.set_flush_denormal(False)
        return [t.clone() for p in params for t in (p.detach(), o.state[p]["momentum"])]

    try:
        one, two = after(1), after(2)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
