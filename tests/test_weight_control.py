"""Norms that are kept and rows that are made even, on top of any matrix rule."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from oracles import parameter, randn

import orthdion
from orthdion.core.registry import rules
from orthdion.optim import OPTIMIZERS

#: Rules of matrices, and options with which they are worth a look.
OF_MATRICES = [name for name, kind in OPTIMIZERS.items() if not kind.rule.elementwise and name != "curvadion"]
#: Rules whose rows are even already, or not all stepped.
OWN_VARIANCE = ("dion2", "dion3", "trasmuon")
EVEN = [name for name in OF_MATRICES if name not in OWN_VARIANCE]
MORE = [
    ("completed-dion", {"residual": "linear"}),
    ("completed-dion", {"nesterov": False}),
    ("muon", {"maximize": True}),
]
#: shape, group keys, and the matrices that it is: tall, wide, a stack, parts of which some are seen transposed.
SHAPES = [
    ((16, 10), {}, lambda t: [t]),
    ((9, 14), {}, lambda t: [t]),
    ((3, 6, 8), {}, lambda t: list(t)),
    ((18, 7), {"split_sizes": (10, 4, 4)}, lambda t: list(t.split((10, 4, 4)))),
]
STEPS = 4


def trained(name, steps=STEPS, backend="auto", dtype=torch.float64, **options):
    """The weights after each step; gradients do not depend on them."""
    params = [parameter(randn(*s, seed=i, dtype=dtype)) for i, (s, _, _) in enumerate(SHAPES)]
    groups = [{"params": [p], **keys} for p, (_, keys, _) in zip(params, SHAPES, strict=True)]
    o = orthdion.create(name, groups, backend=backend, **options)
    found = [[p.detach().clone() for p in params]]
    for k in range(steps):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * k + i, dtype=dtype)
        o.step()
        found.append([p.detach().clone() for p in params])
    return found, o


def directions(name, **options):
    """η·scale·D of each step and matrix, as η = ½ without decay takes them."""
    found, _ = trained(name, lr=0.5, weight_decay=0.0, **options)
    return [
        [d for a, b, (_, _, parts) in zip(before, after, SHAPES, strict=True) for d in parts(a - b)]
        for before, after in pairwise(found)
    ]


def matrices(tensors):
    return [x for t, (_, _, parts) in zip(tensors, SHAPES, strict=True) for x in parts(t)]


def on_the_ball(x, d, lr, decay):
    """arXiv 2606.16899, with a decay before the norm is restored."""
    r = x.norm()
    moved = (1 - lr * decay) * x - lr * r * d / d.norm()
    return r * moved / moved.norm()


def even(d, v, beta):
    """arXiv 2510.05491 at D's norm; v is written to."""
    v.copy_(beta * v + (1 - beta) * d.square().mean(1))
    e = d / (v.sqrt() + 1e-7)[:, None]
    return e * d.norm() / e.norm()


@pytest.mark.parametrize(("name", "more"), [*((n, {}) for n in OF_MATRICES), *MORE], ids=str)
def test_hyperball_is_its_paper_on_top_of_any_matrix_rule(name, more):
    """DeMo's Δ holds η, so its directions are those of one η."""
    lr = 0.5 if name == "demo" else 0.1
    for decay in (0.0, 0.3):
        found, _ = trained(name, lr=lr, weight_decay=decay, hyperball=True, **more)
        expected = matrices(found[0])
        for after, moved in zip(found[1:], directions(name, **more), strict=True):
            expected = [on_the_ball(x, d, lr, decay) for x, d in zip(expected, moved, strict=True)]
            for x, e in zip(matrices(after), expected, strict=True):
                assert (x - e).norm() <= 1e-10 * e.norm()


@pytest.mark.parametrize(("name", "more"), [*((n, {}) for n in EVEN if n != "normuon"), *MORE], ids=str)
def test_row_variance_makes_the_outputs_steps_even_whatever_the_rule(name, more):
    """Rows are the weight's own, also of matrices that are seen transposed. The scale is in D here."""
    found, _ = trained(name, lr=0.5, weight_decay=0.0, row_variance=0.8, **more)
    expected = matrices(found[0])
    kept = [x.new_zeros(x.shape[0]) for x in expected]
    rule = OPTIMIZERS[name].rule(**more)
    scales = [0.5 * rule.scale(*x.shape, rule.rank(*x.shape)) for x in expected]
    for after, moved in zip(found[1:], directions(name, **more), strict=True):
        for i, (d, s) in enumerate(zip(moved, scales, strict=True)):
            expected[i] = expected[i] - s * even(d / s, kept[i], 0.8)
        for x, e in zip(matrices(after), expected, strict=True):
            assert (x - e).norm() <= 1e-9 * e.norm()


@pytest.mark.parametrize("backend", ["rust", "torch"])
def test_both_together_are_one_after_the_other_and_normuon_is_muon_with_the_option(backend):
    found, _ = trained("completed-dion", backend=backend, lr=0.1, weight_decay=0.0, hyperball=True, row_variance=0.8)
    expected = matrices(found[0])
    kept = [x.new_zeros(x.shape[0]) for x in expected]
    rule = OPTIMIZERS["completed-dion"].rule()
    scales = [0.5 * rule.scale(*x.shape, rule.rank(*x.shape)) for x in expected]
    for after, moved in zip(found[1:], directions("completed-dion"), strict=True):
        for i, (d, s) in enumerate(zip(moved, scales, strict=True)):
            expected[i] = on_the_ball(expected[i], even(d / s, kept[i], 0.8), 0.1, 0.0)
        assert all((x - e).norm() <= 1e-9 * e.norm() for x, e in zip(matrices(after), expected, strict=True))
    muon, normuon = (
        trained(n, backend=backend, **more)[0] for n, more in (("muon", {"row_variance": 0.95}), ("normuon", {}))
    )
    assert all(torch.equal(a, b) for a, b in zip(muon[-1], normuon[-1], strict=True))


@pytest.mark.parametrize("name", ["muon", "completed-dion", "orth-dion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_kept_over_many_steps_in_the_formats_of_weights(name, dtype):
    p = parameter(randn(64, 48, dtype=dtype))
    before = float(p.detach().double().norm())
    o = orthdion.create(name, [p], lr=0.1, hyperball=True)
    for k in range(60):
        p.grad = randn(64, 48, seed=k + 1, dtype=dtype)
        o.step()
    # Rounding to nearest is unbiased to first order: 60 steps of 3072 roundings of 2⁻⁹ each are far below a thousandth.
    assert abs(float(p.detach().double().norm()) / before - 1.0) < (1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("name", ["muon", "completed-dion"])
@pytest.mark.parametrize(
    "options", [{"hyperball": True}, {"row_variance": 0.9}, {"hyperball": True, "row_variance": 0.9}], ids=str
)
@pytest.mark.filterwarnings("ignore:the gradient or a state")
def test_zeros_nan_and_checkpoints_are_as_without(name, options):
    p, zero = parameter(randn(12, 20), torch.zeros(12, 20)), parameter(torch.zeros(8, 6), randn(8, 6))
    o = orthdion.create(name, [p, zero], lr=0.1, weight_decay=0.5 if "hyperball" in options else 0.0, **options)
    before = p.detach().clone()
    if "hyperball" in options:
        with pytest.warns(UserWarning, match="hyperball"):
            o.step()
        assert sum(o.skipped_steps.values()) == 1 and torch.equal(zero, torch.zeros(8, 6))
        assert not o.state[zero]["momentum"].any()  # nothing of it was written
    else:
        o.step()
        assert zero.detach().any()
    assert torch.equal(p.detach(), before)  # a zero gradient
    p.grad = torch.full_like(p, math.nan)
    kept = [t.clone() for t in (p.detach(), *o.state[p].values())]
    o.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, (p.detach(), *o.state[p].values()), strict=True))
    for k in range(3):
        p.grad = randn(12, 20, seed=k)
        o.step()
    saved, q = copy.deepcopy(o.state_dict()), parameter(p.detach())
    other = orthdion.create(name, [q, parameter(zero.detach())], lr=0.7, seed=5, **options)
    other.load_state_dict(saved)
    for k in range(3):
        p.grad, q.grad = randn(12, 20, seed=9 + k), randn(12, 20, seed=9 + k)
        o.step()
        other.step()
    assert torch.equal(p, q) and other.param_groups[0]["lr"] == 0.1


def test_elementwise_groups_do_not_take_them_and_say_so_where_they_are_asked_to():
    w, b = parameter(randn(8, 6), randn(8, 6, seed=1)), parameter(randn(8), randn(8, seed=1))
    groups = [{"params": [w]}, {"params": [b], "algorithm": "adamw"}]
    o = orthdion.Muon(groups, hyperball=True, row_variance=0.9)
    assert [(g["hyperball"], g["row_variance"]) for g in o.param_groups] == [(True, 0.9), (False, None)]
    o.step()
    for name in (n for n, rule in rules().items() if rule.elementwise):
        with pytest.raises(ValueError, match=f"hyperball is for matrices, and {name} sees none"):
            orthdion.Muon([{"params": [parameter(randn(8))], "algorithm": name, "hyperball": True}])
        with pytest.raises(ValueError, match="row_variance is for matrices"):
            orthdion.create(name, [parameter(randn(8))], row_variance=0.9)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("muon", {"hyperball": True, "cautious_weight_decay": True}, "no decay to be careful with"),
        ("dion2", {"row_variance": 0.9}, "dion3 is dion2"),
        ("dion3", {"row_variance": 0.9}, "has a variance of its own"),
        ("trasmuon", {"row_variance": 0.9}, "has a variance of its own"),
        ("muon", {"row_variance": 1.0}, "row_variance must be in"),
    ],
)
def test_what_does_not_go_together_is_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        orthdion.create(name, [parameter(randn(8, 6))], **options)


def test_row_variance_is_a_state_so_it_is_not_edited_and_single_steps_have_both():
    p = parameter(randn(8, 12), randn(8, 12, seed=1))
    o = orthdion.OrthDion([p], row_variance=0.9, hyperball=True, lr=0.1, rank_fraction=0.5, seed=3)
    o.param_groups[0]["row_variance"] = None
    with pytest.raises(ValueError, match="row_variance of group 0 was edited"):
        o.step()
    o.param_groups[0]["row_variance"] = 0.9
    options = {"row_variance": 0.9, "hyperball": True, "rank_fraction": 0.5}
    x = randn(8, 12)
    state = orthdion.functional.init("orth-dion", x, seed=3, **options)
    assert state["variance"].shape == (8,)
    for _ in range(2):
        o.step()
        orthdion.functional.step("orth-dion", x, p.grad, state, lr=0.1, **options)
    assert torch.allclose(x, p.detach(), atol=1e-6)


def test_curvadion_has_neither_in_local_gradient_steps():
    with pytest.raises(ValueError, match="local_step='dion'"):
        orthdion.CurvaDion([parameter(randn(8, 6))], row_variance=0.9)
    orthdion.CurvaDion([parameter(randn(8, 6), randn(8, 6, seed=1))], row_variance=0.9, local_step="dion").step()


@pytest.mark.parametrize("option", ["hyperball", "adaptive_rank"])
def test_curvadion_refuses_what_replicas_apart_cannot_keep(option):
    with pytest.raises(ValueError, match=option):
        orthdion.CurvaDion([parameter(randn(80, 60))], **{option: True}, local_step="dion")
    o = orthdion.CurvaDion([parameter(randn(80, 60))], local_step="dion")
    p = parameter(randn(80, 60), randn(80, 60, seed=1))
    o.add_param_group({"params": [p], option: True})
    with pytest.raises(ValueError, match=option):
        o.step()


def test_muon_and_normuon_take_over_from_each_other_with_their_own_variance():
    """From NorMuon Muon goes on without; the other way round the variance is missing. Nothing of one is left behind."""
    made = {}
    for name in ("muon", "normuon"):
        p = parameter(randn(8, 6), randn(8, 6, seed=1))
        made[name] = (orthdion.create(name, [p]), p)
        made[name][0].step()
    muon, p = made["muon"]
    muon.load_state_dict(made["normuon"][0].state_dict(), algorithms={"normuon": "muon"})
    assert muon.param_groups[0]["row_variance"] is None and "variance" not in muon.state[p]
    muon.step()
    with pytest.raises(ValueError, match="has no variance"):
        made["normuon"][0].load_state_dict(muon.state_dict(), algorithms={"muon": "normuon"})


def test_options_are_loaded_with_the_states_that_they_need():
    p, q = (parameter(randn(80, 60), randn(80, 60, seed=1)) for _ in range(2))
    saved = orthdion.OrthDion([p], row_variance=0.9, adaptive_rank=True)
    saved.step()
    plain = orthdion.OrthDion([q])
    plain.load_state_dict(saved.state_dict())
    assert plain.param_groups[0]["row_variance"] == 0.9 and torch.equal(
        plain.state[q]["variance"], saved.state[p]["variance"]
    )
    assert float(plain.state[q]["effective_rank"]) == float(saved.state[p]["effective_rank"]) > 0.0
    q.data.copy_(p.detach())
    saved.step()
    plain.step()
    assert torch.equal(p, q)
