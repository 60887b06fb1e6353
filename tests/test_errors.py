"""Bad input: an error that names the parameter and the remedy, and nothing is lost."""

import pytest
import torch
from oracles import parameter, randn
from torch import nn

import orthdion

NAN = float("nan")


@pytest.mark.parametrize("kind", [orthdion.OrthDion, orthdion.Dion])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": NAN}, ValueError, "lr"),
        ({"lr": "fast"}, TypeError, "lr"),
        ({"lr": torch.ones(2)}, ValueError, "one number"),
        ({"mu": 1.5}, ValueError, "mu"),
        ({"mu": NAN}, ValueError, "mu"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]"),
        ({"betas": (0.9,)}, TypeError, "betas"),
        ({"betas": (-0.1, 0.9)}, ValueError, "betas"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"epsilon": -1e-8}, ValueError, "epsilon"),
        ({"rank_fraction": 0.0}, ValueError, "rank_fraction"),
        ({"rank_fraction": 1.01}, ValueError, "rank_fraction"),
        ({"rank_fraction": NAN}, ValueError, "rank_fraction"),
        ({"rank_multiple_of": 0}, ValueError, "rank_multiple_of"),
        ({"rank_multiple_of": 1.5}, TypeError, "rank_multiple_of"),
        ({"right_factor": "columns"}, ValueError, "did you mean 'column'"),
        ({"tail": "normalized"}, TypeError, "CompletedDion"),
        ({"rank_fracton": 0.5}, TypeError, "did you mean 'rank_fraction'"),
        ({"mixed_precision_config": None}, TypeError, "momentum_dtype"),
        ({"feedback": "diom"}, ValueError, "did you mean 'dion'"),
        ({"feedback": (0.5, 2.0)}, ValueError, "feedback's b"),
        ({"feedback": 0.5}, TypeError, "feedback"),
        ({"maximize": None}, TypeError, "maximize"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"momentum_dtype": torch.int8}, TypeError, "momentum_dtype"),
        ({"q_dtype": torch.complex64}, TypeError, "q_dtype"),
        ({"compute_dtype": torch.float16}, ValueError, "compute_dtype"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"replicate_mesh": 7}, TypeError, "replicate_mesh"),
    ],
    ids=str,
)
def test_hyperparameters(kind, options, error, words):
    with pytest.raises(error, match=words):
        kind([parameter(randn(4, 4))], **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"residual": "normalised"}, ValueError, "did you mean 'normalized'"),
        ({"residual": None}, ValueError, "residual"),
        ({"residual_scale": -1}, ValueError, "residual_scale"),
        ({"nesterov": 1}, TypeError, "nesterov"),
        ({"residual_bits": 2}, ValueError, "residual_bits must be 1, 4 or None"),
        ({"residual_bits": True}, ValueError, "residual_bits"),
        ({"residual_bits": "1"}, ValueError, "residual_bits"),
    ],
    ids=str,
)
def test_hyperparameters_of_the_completed_step(options, error, words):
    with pytest.raises(error, match=words):
        orthdion.CompletedDion([parameter(randn(4, 4))], **options)


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        ({"learning_rate": 0.1}, ValueError, "did you mean 'lr'"),
        ({"rank_frac": 0.1}, ValueError, "did you mean 'rank_fraction'"),
        ({"algorithm": "adam"}, ValueError, "did you mean 'adamw'"),
        ({"num_heads": 3}, ValueError, "num_heads=3 does not divide"),
        ({"lr": -1.0}, ValueError, "lr"),
    ],
)
def test_groups_and_a_refused_one_leaves_no_trace(group, error, words):
    o = orthdion.OrthDion([parameter(randn(4, 4))])
    p = parameter(randn(4, 4))
    with pytest.raises(error, match=words):
        o.add_param_group({"params": [p], **group})
    assert len(o.param_groups) == 1 and p not in o.state
    o.add_param_group({"params": [p]})


@pytest.mark.parametrize(
    ("p", "error", "words"),
    [
        (nn.Parameter(torch.zeros(5)), ValueError, "no matrix.*param_groups"),
        (nn.Parameter(torch.zeros(())), ValueError, "no matrix"),
        (nn.Parameter(torch.zeros(5, 4, dtype=torch.complex64)), TypeError, "complex64"),
        (nn.Parameter(torch.zeros(5, 4, dtype=torch.int32), requires_grad=False), TypeError, "int32"),
    ],
    ids=str,
)
def test_parameters_that_cannot_be_stepped(p, error, words):
    good = parameter(randn(4, 4))
    o = orthdion.OrthDion([good])
    with pytest.raises(error, match=words):
        o.add_param_group({"params": [parameter(randn(3, 3)), p]})
    assert len(o.state) == 1
    with pytest.raises(error, match=words):
        orthdion.OrthDion([p])


def bad_gradients():
    p = parameter(randn(6, 4))
    p.grad = randn(6, 4).to_sparse()
    yield p, TypeError, "sparse"
    q = parameter(randn(6, 4), randn(6, 4))
    q.grad.data = randn(4, 6)  # what an in-place resize under autograd's feet would leave
    yield q, ValueError, "shape"


@pytest.mark.parametrize("case", [0, 1])
def test_a_refused_gradient_leaves_everything_as_it_was(case):
    bad, error, words = list(bad_gradients())[case]
    good = parameter(randn(6, 4), randn(6, 4, seed=1))
    o = orthdion.OrthDion([good, bad])
    before = [good.detach().clone(), *(t.clone() for s in o.state.values() for t in s.values())]
    with pytest.raises(error, match=words):
        o.step()
    after = [good.detach(), *(t for s in o.state.values() for t in s.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert o.param_groups[0]["step"] == 0


@pytest.mark.parametrize(("key", "shape"), [("momentum", (4, 6)), ("Q", (5, 2)), ("Q", (4, 5)), ("Q", (1, 4, 2))])
def test_a_state_of_the_wrong_shape_is_refused_and_the_old_one_kept(key, shape):
    p = parameter(randn(6, 4), randn(6, 4, seed=1))
    o = orthdion.OrthDion([p], rank_fraction=0.5)
    o.step()
    saved = o.state_dict()
    before = {k: v.clone() for k, v in o.state[p].items()}
    saved["state"][0] = {**saved["state"][0], key: torch.zeros(shape)}
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=key):
        o.load_state_dict(saved)
    assert all(torch.equal(before[k], v) for k, v in o.state[p].items())
    assert o.param_groups[0]["lr"] != 7.0


def test_a_state_of_other_groups_is_refused():
    o = orthdion.OrthDion([parameter(randn(6, 4))])
    other = orthdion.OrthDion([parameter(randn(6, 4)), parameter(randn(6, 4))])
    with pytest.raises(ValueError, match="parameter groups"):
        o.load_state_dict(other.state_dict())


def test_names_appear_in_errors():
    m = nn.Linear(4, 3)
    groups = orthdion.param_groups(m)
    o = orthdion.OrthDion(groups)
    m.weight.grad = randn(3, 4).to_sparse()
    with pytest.raises(TypeError, match=r"weight \(3, 4\)"):
        o.step()


def test_the_core_refuses_what_python_got_wrong():
    import numpy as np

    from orthdion import _core
    from orthdion.backends.table import table

    a, v = randn(6, 3), torch.zeros(6, 3)
    for change, words in [((0, 7), "spans"), ((10, int(v.data_ptr()) + 1), "aligned"), ((5, 9), "dtype code")]:
        rows = table([((6, 3, 0, 0), (a, v))])
        rows[0, change[0]] = change[1]
        with pytest.raises(ValueError, match=words):
            _core.factors(rows, np.zeros(9), False, False, 0.0, False, 1)
    assert not v.any()
