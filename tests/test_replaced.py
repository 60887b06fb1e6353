"""Parameters that are replaced after the optimizer was built, as wrappers that shard a model do."""

import warnings

import pytest
import torch
from oracles import randn
from torch import nn

import orthdion
from orthdion.optim import OPTIMIZERS

NAMES = list(OPTIMIZERS)


def built(name, seed=0):
    params = [nn.Parameter(randn(*s, seed=seed + i)) for i, s in enumerate([(12, 8), (8, 12), (3, 6, 6)])]
    return params, orthdion.create(name, params, lr=0.02)


def train(optimizer, params, start, stop):
    for k in range(start, stop):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * k + i)
        optimizer.step()


def replace(optimizer, params):
    """Other objects with the same numbers, put where the first ones were."""
    new = [nn.Parameter(p.detach().clone()) for p in params]
    swap = dict(zip(map(id, params), new, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [swap.get(id(p), p) for p in group["params"]]
    return new


@pytest.mark.parametrize("name", NAMES)
def test_parameters_replaced_before_the_first_step_train_as_the_first_ones_would(name):
    old, plain = built(name)
    train(plain, old, 0, 3)
    first, optimizer = built(name)
    new = replace(optimizer, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, new, 0, 3)
    for p, q in zip(old, new, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[q].keys() == plain.state[p].keys()
        assert all(torch.equal(plain.state[p][k], optimizer.state[q][k]) for k in plain.state[p])
    assert not any(p in optimizer.state for p in first), "states of what has left are kept alive"


@pytest.mark.parametrize("name", NAMES)
def test_states_are_saved_and_loaded_before_the_first_step_of_replaced_parameters(name):
    old, source = built(name)
    train(source, old, 0, 2)
    first, optimizer = built(name)
    new = replace(optimizer, [p.detach().copy_(q) for p, q in zip(first, old, strict=True)] and first)
    assert len(optimizer.state_dict()["state"]) == 3
    optimizer.load_state_dict(source.state_dict())
    train(source, old, 2, 5)
    train(optimizer, new, 2, 5)
    assert all(torch.equal(p, q) for p, q in zip(old, new, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_loading_goes_to_replaced_parameters(name):
    old, source = built(name)
    train(source, old, 0, 2)
    first, optimizer = built(name)
    with torch.no_grad():
        for p, q in zip(first, old, strict=True):
            p.copy_(q)
    new = replace(optimizer, first)
    optimizer.load_state_dict(source.state_dict())
    train(source, old, 2, 5)
    train(optimizer, new, 2, 5)
    assert all(torch.equal(p, q) for p, q in zip(old, new, strict=True))
    assert len(optimizer.state) == 3


def test_momenta_that_are_lost_by_a_replacement_are_told():
    params, optimizer = built("orth-dion")
    train(optimizer, params, 0, 2)
    new = replace(optimizer, params)
    with pytest.warns(UserWarning, match=r"3 parameters .* after 2 steps.*start afresh.*load_state_dict") as told:
        train(optimizer, new, 2, 3)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, new, 3, 4)


def test_a_parameter_that_has_left_is_in_no_state_dict():
    params, optimizer = built("orth-dion")
    train(optimizer, params, 0, 2)
    optimizer.param_groups[0]["params"].pop(1)
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]
    train(optimizer, [params[0], params[2]], 2, 3)


def test_a_parameter_moved_to_another_group_is_stepped_by_that_groups_rule():
    p, q = nn.Parameter(randn(8, 6, seed=1)), nn.Parameter(randn(8, 6, seed=2))
    groups = [{"params": [p]}, {"params": [q], "algorithm": "adamw", "lr": 0.001}]
    optimizer = orthdion.create("orth-dion", groups, lr=0.02)
    train(optimizer, [p, q], 0, 1)
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    with pytest.warns(UserWarning, match="start afresh"):
        train(optimizer, [q, p], 1, 2)
    assert "Q" not in optimizer.state[p]
    assert optimizer.state[p].keys() == optimizer.state[q].keys()


def test_what_cannot_be_stepped_is_refused_when_it_is_met_and_nothing_has_changed():
    params, optimizer = built("orth-dion")
    vector = nn.Parameter(torch.ones(5))
    optimizer.param_groups[0]["params"].append(vector)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"group 0, parameter 3 \(5,\)"):
        train(optimizer, [*params, vector], 0, 1)
    assert torch.equal(params[0], before)
    optimizer.param_groups[0]["params"].pop()
    train(optimizer, params, 0, 1)
    assert not torch.equal(params[0], before)


def test_parameters_put_in_later_must_not_share_memory_with_others():
    params, optimizer = built("orth-dion")
    optimizer.param_groups[0]["params"].append(nn.Parameter(params[0].detach()[:6]))
    with pytest.raises(ValueError, match="share memory"):
        train(optimizer, optimizer.param_groups[0]["params"], 0, 1)


def test_states_of_a_lazy_parameter_are_refused_until_it_has_a_shape():
    lazy, plain = nn.LazyLinear(4, bias=False), nn.Linear(6, 4, bias=False)
    source = orthdion.create("orth-dion", plain.parameters())
    optimizer = orthdion.create("orth-dion", lazy.parameters())
    with pytest.raises(ValueError, match="run the model once"):
        optimizer.load_state_dict(source.state_dict())
    lazy(torch.ones(1, 6))
    optimizer.load_state_dict(source.state_dict())
    assert torch.equal(optimizer.state[lazy.weight]["Q"], source.state[plain.weight]["Q"])
