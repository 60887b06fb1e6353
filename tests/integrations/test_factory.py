"""The factory without any framework: whose word counts, what is missing, what is read."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import orthdion
from orthdion.integrations import Factory

ARGS = SimpleNamespace(learning_rate=0.01, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-5)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
        self.head = nn.Linear(8, 10)


def group_of(optimizer, p):
    return next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))


def test_the_class_and_an_instance_are_called_as_trainers_call_them():
    for factory, options in ((Factory, {"optimizer": "muon", "lr": 0.02}), (Factory("muon", lr=0.02), {})):
        model = Model()
        optimizer = factory()(model, **options)
        assert isinstance(optimizer, orthdion.Muon)
        assert group_of(optimizer, model.body[0].weight)["algorithm"] == "muon"
        for p in (model.embedding.weight, model.head.weight, model.body[0].bias):
            assert group_of(optimizer, p)["algorithm"] == "adamw"
        assert {(g["algorithm"], g["lr"]) for g in optimizer.param_groups} == {("muon", 0.02), ("adamw", 0.001)}


def test_training_arguments_count_where_options_say_nothing():
    for args, options in (((ARGS,), {}), ((), {"training_args": ARGS})):  # as axolotl does; by keyword
        model = Model()
        optimizer = Factory()(model, *args, optimizer="normuon", scalar_lr=0.003, **options)
        matrix, plain = (group_of(optimizer, p) for p in (model.body[0].weight, model.body[0].bias))
        assert (matrix["lr"], plain["lr"]) == (0.01, 0.003)
        assert (matrix["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
        assert group_of(optimizer, model.head.weight)["weight_decay"] == 0.2
        assert (plain["beta1"], plain["beta2"], plain["epsilon"]) == (0.8, 0.7, 1e-5)
        assert (matrix["row_variance"], plain["row_variance"]) == (0.95, None)
    model = Model()
    optimizer = Factory("muon", ARGS, lr=0.5)(model, weight_decay=0.0, betas=(0.6, 0.61), eps=1e-3)
    plain = group_of(optimizer, model.body[0].bias)
    assert (plain["lr"], plain["beta1"], plain["beta2"], plain["epsilon"]) == (0.001, 0.6, 0.61, 1e-3)
    assert all(g["weight_decay"] == 0.0 for g in optimizer.param_groups)
    optimizer = Factory("adamw", ARGS)(model)
    assert {(g["beta1"], g["epsilon"]) for g in optimizer.param_groups} == {(0.8, 1e-5)}


def test_strings_of_a_configuration_file_are_read():
    model = Model()
    options = {"lr": "1e-2", "rank_fraction": "0.5", "scalar": "lion", "scalar_lr": "none", "maximize": "True"}
    optimizer = Factory()(model, optimizer="completed-dion", **options)
    group = group_of(optimizer, model.body[0].weight)
    assert (group["lr"], group["rank_fraction"], group["maximize"]) == (0.01, 0.5, True)
    assert group_of(optimizer, model.body[0].bias)["algorithm"] == "lion"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "optimizer is missing"),
        ({"optimizer": "muon"}, '"training_args": args'),
        ({"optimizer": "moun", "lr": 0.1}, "did you mean 'muon'"),
        ({"optimizer": "muon", "lr": 0.1, "nesterv": True}, "did you mean 'nesterov'"),
        ({"optimizer": "muon", "lr": 0.1, "eps": 1e-8, "epsilon": 1e-8}, "pass one of them"),
        ({"optimizer": "muon", "lr": 0.1, "overrides": {"nothing": "adamw"}}, "no parameter matches"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Factory()(Model(), **options)


def test_parameters_in_place_of_a_model_are_refused():
    with pytest.raises(TypeError, match="pass the model, not its parameters"):
        Factory("muon", lr=0.1)(Model().parameters())


def test_a_class_in_place_of_the_factory_is_told_of_it():
    with pytest.raises(ValueError, match=r"(?s)orthdion\.create.*param_groups.*orthdion\.integrations\.Factory"):
        orthdion.OrthDion([{"params": list(Model().parameters())}])


def test_the_decisions_are_logged(caplog):
    with caplog.at_level(logging.INFO, "orthdion.integrations"):
        Factory("muon", lr=0.1)(Model())
    assert "body.0.weight" in caplog.text and "embedding.weight" in caplog.text


def test_what_it_makes_trains():
    torch.manual_seed(0)
    model = Model()
    optimizer, x = Factory("completed-dion", lr=0.02, scalar_lr=0.02)(model), torch.arange(10)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model.head(model.body(model.embedding(x)).tanh()), (x + 3) % 10)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_omegaconfs_containers_will_do_for_options(tmp_path):
    omegaconf = pytest.importorskip("omegaconf", reason="needs omegaconf")
    text = (
        "{optimizer: completed-dion, lr: 0.02, betas: [0.8, 0.9], feedback: [1, 0.7], overrides: {'body.1.*': {lr: 1}}}"
    )
    model = Model()
    optimizer = Factory()(model, **omegaconf.OmegaConf.create(text))
    group, other = (group_of(optimizer, model.body[i].weight) for i in (0, 1))
    assert (group["feedback"], group["lr"], other["lr"]) == ((1, 0.7), 0.02, 1)
    assert group_of(optimizer, model.body[0].bias)["beta1"] == 0.8
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    optimizer.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))  # nothing of OmegaConf is in it
