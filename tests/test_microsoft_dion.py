"""What microsoft/dion saved (tests/data/make_microsoft_dion.py) goes on here, to the weights that it would have had;
and its other optimizers' steps (tests/data/make_microsoft_relatives.py) are those that are taken here.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import orthdion
from orthdion.checkpoints import MicrosoftDionPlanner

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))
import make_microsoft_dion as made  # noqa: E402
import make_microsoft_relatives as relatives  # noqa: E402


@pytest.fixture
def saved():
    return torch.load(DATA / "microsoft_dion.pt", weights_only=True)


def ours():
    model = made.model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = orthdion.Dion(made.groups(model), lr=0.1, rank_fraction=0.6, seed=5)
    return model, optimizer


def assert_it_goes_on(model, optimizer, saved):
    for k in range(made.STEPS, made.STEPS + made.MORE):
        made.step(model, optimizer, k)
    for name, x in model.state_dict().items():
        assert torch.allclose(x, saved["after"][name], atol=2e-6), name
    assert [g["step"] for g in optimizer.param_groups] == [made.STEPS + made.MORE] * 3
    assert all(float(optimizer.state[p]["step"]) == made.STEPS + made.MORE for p in (model[0].bias, model[1].bias))
    assert optimizer.param_groups[0]["lr"] == 0.05 and optimizer.param_groups[1]["weight_decay"] == 0.0


def test_by_torch_save(saved):
    model, optimizer = ours()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["torch.save"])
    assert_it_goes_on(model, optimizer, saved)


@pytest.mark.parametrize("stepped_before", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_by_torch_distributed_checkpoint(saved, tmp_path, stepped_before):
    dcp.save({"model": saved["model"], "optimizer": saved["optimizer"]}, checkpoint_id=tmp_path)
    model, optimizer = ours()
    if stepped_before:
        made.step(model, optimizer, 0)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states}
    dcp.load(state, checkpoint_id=tmp_path, planner=MicrosoftDionPlanner())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_it_goes_on(model, optimizer, saved)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_anything_else_that_is_missing_is_an_error(saved, tmp_path):
    del saved["optimizer"]["state"]["0.bias"]["variance"]
    dcp.save({"model": saved["model"], "optimizer": saved["optimizer"]}, checkpoint_id=tmp_path)
    model, optimizer = ours()
    weights, states = get_state_dict(model, optimizer)
    with pytest.raises(CheckpointException, match=r"has no optimizer\.state\.0\.bias\.variance"):
        state = {"model": weights, "optimizer": states}
        dcp.load(state, checkpoint_id=tmp_path, planner=MicrosoftDionPlanner())


@pytest.mark.parametrize(
    ("keyword", "says"),
    [
        ({"mixed_precision_config": None}, "momentum_dtype and q_dtype"),
        ({"power_iters": 1}, "leave it out"),
        ({"qr_method": "rcqr"}, "leave it out"),
        ({"cqr_warmup_steps": 150}, "leave it out"),
        ({"rcqr_oversample": 1.25}, "leave it out"),
    ],
)
def test_their_keywords_are_named_with_what_takes_their_place(keyword, says):
    with pytest.raises(TypeError, match=says):
        orthdion.Dion([torch.nn.Parameter(torch.ones(3, 2))], **keyword)


#: By name, what their options are called here. Their momentum of Muon is a sum, ours a mean: directions are the same.
RELATIVES = {
    "dion2": {"fraction": 0.25, "ef_decay": 0.9},
    "dion3": {"fraction": 0.25, "ef_decay": 0.9, "beta2": 0.95},
    "muon": {"mu": 0.9},
    "normuon": {"mu": 0.9, "row_variance": 0.95},
}


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_take_the_steps_of_their_classes(name, backend):
    recorded = torch.load(DATA / "microsoft_relatives.pt", weights_only=True)[name]
    params = relatives.weights()
    optimizer = orthdion.create(
        name, params, lr=relatives.LR, weight_decay=relatives.DECAY, backend=backend, **RELATIVES[name]
    )
    ours = relatives.trajectory(params, optimizer)
    assert ours.keys() == recorded.keys()
    for steps, theirs in recorded.items():
        assert (ours[steps] - theirs).norm() < 2e-6 * theirs.norm(), steps
