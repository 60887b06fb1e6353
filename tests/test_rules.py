"""What holds for every registered rule: a fused step is its body, edits are noticed, checkpoints say what they are."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from oracles import pairwise, parameter, randn

import orthdion
from orthdion.backends import get
from orthdion.core.low_rank import FEEDBACK
from orthdion.core.options import number
from orthdion.core.registry import rules
from orthdion.optim import OPTIMIZERS
from orthdion.requests import Matrix, Update

CAUTIOUS = {"cautious_weight_decay": (False, True)}
FORMS = {
    "dion": pairwise(
        right_factor=("column", "qr", "polar"), feedback=(*FEEDBACK, (0.9, 0.3)), maximize=(False, True), **CAUTIOUS
    ),
    "orth-dion": pairwise(right_factor=("column", "qr", "polar"), feedback=(*FEEDBACK, (0.9, 0.3)), **CAUTIOUS),
    "numuon": pairwise(right_factor=("column", "qr", "polar"), feedback=(*FEEDBACK, (0.9, 0.3)), **CAUTIOUS),
    "completed-dion": pairwise(
        residual=("normalized", "linear"),
        right_factor=("column", "qr", "polar"),
        nesterov=(False, True),
        feedback=(*FEEDBACK, (0.9, 0.3)),
        residual_scale=(0.5, 2.0),
        **CAUTIOUS,
    ),
    "adamw": pairwise(beta1=(0.8, 0.9), beta2=(0.9, 0.95), epsilon=(1e-8, 1e-3), maximize=(False, True), **CAUTIOUS),
    "lion": pairwise(beta1=(0.8, 0.9), beta2=(0.9, 0.95), maximize=(False, True), **CAUTIOUS),
}


def stepped(kind, steps=4, dtype=torch.float64, **options):
    """All tensors of an optimizer after some steps."""
    params = [parameter(randn(*s, seed=i, dtype=dtype)) for i, s in enumerate([(24, 16), (12, 40), (3, 9, 8)])]
    o = orthdion.create(kind, params, lr=0.02, weight_decay=0.1, **options)
    for k in range(steps):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * k + i, dtype=dtype)
        o.step()
    return [t for p in params for t in (p.detach(), *o.state[p].values())]


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, grid in FORMS.items() for o in grid], ids=str)
def test_a_step_in_one_piece_is_the_rules_own_body(name, options, monkeypatch):
    fused = stepped(name, backend="rust", **options)
    monkeypatch.setattr(type(get("rust")), "fused", {})
    for backend in ("rust", "torch"):
        body = stepped(name, backend=backend, **options)
        assert all((a - b).norm() <= 1e-10 * max(1.0, float(b.norm())) for a, b in zip(fused, body, strict=True)), (
            backend
        )


def test_every_rule_with_a_form_is_in_the_grid_above():
    assert set(FORMS) == {name for name, rule in rules().items() if rule().fused() is not None}


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestEveryOptimizer:
    def test_it_is_made_by_name_from_a_module_parameters_or_groups(self, name):
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5))
        for source in (model, [model[0].weight], [{"params": [model[0].weight], "lr": 0.5}]):
            o = orthdion.create(name, source, lr=0.01)
            assert type(o) is OPTIMIZERS[name]
        assert o.param_groups[0]["lr"] == 0.5
        assert {i.name for i in orthdion.list_optimizers()} >= set(OPTIMIZERS)

    @pytest.mark.parametrize("backend", ["rust", "torch"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_careful_decay_spares_entries_that_the_step_pushes_away_from_zero(self, name, backend, dtype):
        found = {}
        for decay, careful in ((0.0, False), (0.5, False), (0.5, True)):
            params = [parameter(randn(*s, seed=1, dtype=dtype)) for s in ((40, 24), (24, 70))]
            o = orthdion.create(
                name, params, lr=0.1, weight_decay=decay, cautious_weight_decay=careful, backend=backend
            )
            for p in params:
                p.grad = randn(*p.shape, seed=2, dtype=dtype)
            o.step()
            found[decay, careful] = [p.detach().double() for p in params]
        for bare, plain, careful, p in zip(*found.values(), params, strict=True):
            x = randn(*p.shape, seed=1, dtype=dtype).double()
            away = (bare - x) * x > 0
            assert 0 < int(away.sum()) < away.numel()
            expected = torch.where(away, bare, plain)
            steady = (bare - x).abs() > 1e-4  # a step so small that rounding hides its sign may be either
            error, unit = (careful - expected).abs()[steady], torch.finfo(dtype).eps
            assert bool((error <= 2.0 * unit * torch.maximum(x.abs(), expected.abs())[steady].clamp_min(0.1)).all())

    def test_a_zero_gradient_is_only_the_decay_and_nan_is_counted(self, name):
        p, other = parameter(randn(12, 8), torch.zeros(12, 8)), parameter(randn(8, 8), randn(8, 8, seed=2))
        o = orthdion.create(name, [p, other], lr=0.1, weight_decay=0.5)
        before = p.detach().clone()
        o.step()
        assert torch.allclose(p.detach(), 0.95 * before, atol=1e-6)
        kept = [t.clone() for t in (p.detach(), *o.state[p].values())]
        p.grad = torch.full_like(p, float("nan"))
        moved = other.detach().clone()
        with pytest.warns(UserWarning, match="NaN or infinity"):
            o.step()
        assert all(torch.equal(a, b) for a, b in zip(kept, (p.detach(), *o.state[p].values()), strict=True))
        assert sum(o.skipped_steps.values()) == 1 and not torch.equal(moved, other.detach())

    def test_it_goes_on_bit_exact_from_a_checkpoint_that_names_it(self, name):
        def run(o, start):
            p = o.param_groups[0]["params"][0]
            for k in range(start, start + 3):
                p.grad = randn(12, 8, seed=k)
                o.step()
            return p.detach().clone()

        a = orthdion.create(name, [parameter(randn(12, 8))], lr=0.03)
        run(a, 0)
        saved = copy.deepcopy(a.state_dict())
        rule = OPTIMIZERS[name].rule
        assert saved["param_groups"][0]["algorithm"] == rule.name
        b = orthdion.create(name, [parameter(a.param_groups[0]["params"][0].detach())], lr=0.5, seed=9)
        b.load_state_dict(saved)
        assert b.param_groups[0]["lr"] == 0.03
        assert torch.equal(run(a, 3), run(b, 3))

    def test_its_docs_and_signature_have_every_option(self, name):
        import inspect
        from dataclasses import fields

        kind = OPTIMIZERS[name]
        if name == "curvadion":
            return
        for f in fields(kind.rule):
            assert f.name in inspect.signature(kind).parameters and f"{f.name}: " in kind.__doc__


def test_an_optimizer_is_freed_without_the_garbage_collector_and_warnings_point_to_the_caller():
    import gc
    import weakref

    gc.disable()
    try:
        for name in OPTIMIZERS:
            p, v = parameter(randn(12, 8), randn(12, 8)), parameter(randn(5), randn(5))
            o = orthdion.create(name, [{"params": [p]}, {"params": [v], "algorithm": "adamw"}])
            o.step()
            p.grad[0, 0] = float("nan")
            with pytest.warns(UserWarning, match="NaN or infinity") as caught:
                o.step()
            assert caught[0].filename == __file__, name
            gone = weakref.ref(o)
            del o
            assert gone() is None, name
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("right_factor", "polr", ValueError, "did you mean 'polar'"),
        ("lr", float("nan"), ValueError, "lr must be in"),
        ("feedback", 0.5, TypeError, "feedback must be a name"),
        ("rank_fraction", 0.5, ValueError, "rank_fraction of group 0 was edited"),
        ("interleaved", 3, ValueError, "interleaved of group 0 was edited"),
        ("num_heads", 3, ValueError, "num_heads of group 0 was edited"),
        ("algorithm", "dion", ValueError, "algorithm of group 0 was edited"),
        ("rank_fracton", 0.5, ValueError, "did you mean 'rank_fraction'"),
    ],
)
def test_a_key_that_is_edited_to_what_it_may_not_be_is_noticed_at_the_next_step(key, value, error, words):
    p = parameter(randn(12, 9), randn(12, 9, seed=1))
    o = orthdion.OrthDion([p], lr=0.1)
    o.step()
    before = p.detach().clone()
    group = o.param_groups[0]
    known, old = set(group), group.get(key)
    group[key] = value
    with pytest.raises(error, match=words):
        o.step()
    assert torch.equal(before, p.detach())
    if key in known:
        group[key] = old
    else:
        del group[key]
    o.step()
    assert not torch.equal(before, p.detach())


def test_edits_that_are_allowed_take_effect():
    def after(edit):
        p = parameter(randn(12, 9), randn(12, 9, seed=1))
        o = orthdion.OrthDion([p], lr=0.1)
        o.step()
        o.param_groups[0].update(edit)
        o.step()
        return p.detach()

    plain = after({})
    for edit in (
        {"lr": 0.2},
        {"right_factor": "column"},
        {"feedback": "pure"},
        {"weight_decay": 0.5},
        {"maximize": True},
    ):
        o = after(edit)
        assert not torch.equal(o, plain) or edit == {"feedback": "pure"}, edit


def test_keys_of_torch_and_frameworks_pass_and_numpy_numbers_are_kept_as_pythons():
    p = parameter(randn(12, 9), randn(12, 9, seed=1))
    o = orthdion.OrthDion(
        [{"params": [p], "fused": True, "foreach": None, "lr_scale": 0.5, "rho": 0.05}], lr=np.float32(0.5)
    )
    o.step()
    group = o.param_groups[0]
    assert group["fused"] is True and group["lr_scale"] == 0.5 and type(group["lr"]) is float
    group["lr"] = np.float64(0.25)
    o.step()
    other = orthdion.OrthDion([parameter(randn(12, 9))])
    other.load_state_dict(o.state_dict())
    assert other.param_groups[0]["lr"] == 0.25 and other.param_groups[0]["rho"] == 0.05


def test_another_rules_checkpoint_loads_only_where_the_caller_says_so():
    p = parameter(randn(12, 9), randn(12, 9, seed=1))
    o = orthdion.Dion([p], rank_fraction=0.5, lr=0.1)
    o.step()
    saved = o.state_dict()
    q = parameter(p.detach())
    other = orthdion.OrthDion([q], rank_fraction=0.5)
    with pytest.raises(ValueError, match="algorithm='dion', this one 'orth-dion'"):
        other.load_state_dict(saved)
    other.load_state_dict(saved, algorithms={"dion": "orth-dion"})
    assert torch.equal(other.state[q]["momentum"], o.state[p]["momentum"])
    assert other.param_groups[0]["right_factor"] == "column"  # the saved option, which both rules have


def test_a_checkpoint_has_resolved_options_and_changed_defaults_change_nothing():
    o = orthdion.CompletedDion([parameter(randn(12, 9))], mu=0.9)
    assert o.param_groups[0]["feedback"] == (0.9, 0.7)
    other = orthdion.CompletedDion([parameter(randn(12, 9))], mu=0.8, residual="linear")
    assert other.param_groups[0]["feedback"] == "momentum"
    other.load_state_dict(o.state_dict())
    assert (other.param_groups[0]["feedback"], other.param_groups[0]["residual"]) == ((0.9, 0.7), "normalized")


def test_groups_name_any_registered_rule():
    sizes = [(12, 9), (9, 12), (10, 10), (8,)]
    params = [parameter(randn(*s), randn(*s, seed=1)) for s in sizes]
    names = ["matrix", "muon", "dion", "adamw"]
    o = orthdion.OrthDion([{"params": [p], "algorithm": a} for p, a in zip(params, names, strict=True)], lr=0.01)
    assert [g["algorithm"] for g in o.param_groups] == ["orth-dion", "muon", "dion", "adamw"]
    assert "nesterov" in o.param_groups[1] and "rank_fraction" not in o.param_groups[1]
    before = [p.detach().clone() for p in params]
    o.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, params, strict=True))


@pytest.mark.parametrize("name", ["orth-dion", "completed-dion", "muon", "adamw"])
@pytest.mark.parametrize("shape", [(12, 9), (9, 14)])
def test_the_functional_step_is_the_optimizers(name, shape):
    x, p = randn(*shape), parameter(randn(*shape))
    o = orthdion.create(name, [p], lr=0.05, seed=3)
    state = orthdion.functional.init(name, x, seed=3)
    for k in range(3):
        g = randn(*shape, seed=k)
        p.grad = g.clone()
        o.step()
        outcome = orthdion.functional.step(name, x, g, state, lr=0.05)
    assert torch.allclose(x, p.detach(), atol=1e-6) and not outcome.report().skipped
    assert orthdion.functional.step(name, x, torch.full(shape, float("nan")), state).report().skipped
    with pytest.raises(TypeError, match="has no option 'learning_rate'"):
        orthdion.functional.step(name, x, x, state, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"functional\.init"):
        orthdion.functional.step(name, x, x, {})


def test_a_rule_of_ones_own_is_registered_checked_and_runs():
    @dataclass(frozen=True)
    class Plain(orthdion.Rule):
        name: ClassVar[str] = "plain-descent"
        gain: float = number(1.0, 0.0, doc="What the gradient is multiplied by.")

        def step(self, w: Matrix):
            return (yield Update(w, self.gain * w.gradient, self.lr, self.weight_decay, {}))

    p = parameter(randn(5, 4), randn(5, 4, seed=1))
    expected = p.detach() - 0.1 * 2.0 * p.grad
    o = orthdion.create(Plain, [p], lr=0.1, weight_decay=0.0, gain=2.0)
    o.step()
    assert torch.allclose(p.detach(), expected)
    assert "plain-descent" in {i.name for i in orthdion.list_optimizers()}
    with pytest.raises(TypeError, match="did you mean 'gain'"):
        orthdion.create(Plain, [p], gian=1.0)

    class Nameless(orthdion.Rule):
        pass

    with pytest.raises(TypeError, match="needs a name"):
        orthdion.register(Nameless)
    with pytest.raises(ValueError, match="did you mean 'muon'"):
        orthdion.create("moun", [p])
