"""``orthdion.capture``: when steps are replayed, what is followed, what is noticed. CUDA's graphs are stood in for:
what was recorded runs again on the shim, with numbers frozen and every address as it was, as a graph would have it.
"""

import pytest
import torch
from oracles import parameter, randn

import orthdion
from orthdion import captured
from orthdion.core import capture as device_memory


class Recorded:
    """Runs a step again as a graph would: host numbers are those of the recording, tensors lie where they lay."""

    made = 0
    owner = None

    def __init__(self, step):
        type(self).made += 1
        self.step, self.groups = step, self.owner.param_groups
        for group in self.groups:
            group["step"] += 1  # what capturing does on the host
        self.lrs = [group["lr"] for group in self.groups]
        self.lay = self.addresses()

    def addresses(self):
        return [(p.data_ptr(), p.grad.data_ptr()) for g in self.groups for p in g["params"]]

    def replay(self):
        assert self.addresses() == self.lay, "a graph reads where things lay"
        now, steps = [g["lr"] for g in self.groups], [g["step"] for g in self.groups]
        for group, lr in zip(self.groups, self.lrs, strict=True):
            group["lr"] = lr
        try:
            self.step()
        finally:
            for group, lr, k in zip(self.groups, now, steps, strict=True):
                group["lr"], group["step"] = lr, k


@pytest.fixture
def graphs(shim, monkeypatch):
    """On the processor, numbers are followed by ``refresh_rates`` alone while a recording runs."""
    real, running = Recorded.replay, []

    def replay(self):
        running.append(1)
        try:
            real(self)
        finally:
            running.pop()

    monkeypatch.setattr(Recorded, "replay", replay)
    monkeypatch.setattr(Recorded, "made", 0)
    monkeypatch.setattr(device_memory, "is_capturing", lambda device: bool(running))
    monkeypatch.setattr(captured, "_Graph", Recorded)
    return Recorded


def made():
    params = [parameter(randn(20, 12)), parameter(randn(7, seed=1))]
    groups = [{"params": params[:1], "lr": 0.02}, {"params": params[1:], "algorithm": "adamw", "lr": 0.01}]
    for p in params:
        p.grad = torch.zeros_like(p)
    Recorded.owner = orthdion.OrthDion(groups, rank_fraction=0.5, backend="cupy")
    return Recorded.owner, params


def fill(params, k):
    for i, p in enumerate(params):
        p.grad.copy_(randn(*p.shape, seed=10 * k + i))


def test_replayed_steps_are_the_optimizers_with_a_scheduler(graphs):
    ends = []
    for wrapped in (True, False):
        o, params = made()
        steps = orthdion.capture(o) if wrapped else o
        scheduler = torch.optim.lr_scheduler.ExponentialLR(o, 0.5)
        for k in range(6):
            fill(params, k)
            steps.step()
            scheduler.step()
        ends.append([*params, *(o.state[p][key] for p in params for key in o.state[p])])
        assert [g["step"] for g in o.param_groups] == [6, 6]
        if wrapped:
            assert graphs.made == 1 and steps.replays
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_lies_elsewhere_or_was_edited_is_captured_anew(graphs):
    o, params = made()
    steps = orthdion.capture(o)

    def run(count):
        for k in range(count):
            fill(params, k)
            steps.step()
        return graphs.made

    assert run(3) == 1
    o.load_state_dict(o.state_dict())
    assert run(2) == 1 and not steps.replays
    assert run(1) == 2 and steps.replays
    o.param_groups[0]["mu"] = 0.9
    assert run(3) == 3
    params[0].grad = torch.zeros_like(params[0])
    assert run(3) == 4
    o.add_param_group({"params": [parameter(randn(5, 4), torch.zeros(5, 4))]})
    params.append(o.param_groups[2]["params"][0])
    assert run(3) == 5
    o.param_groups[0]["lr"] = 0.5
    o.param_groups[0]["weight_decay"] = 0.1
    assert run(2) == 5


def test_gradients_that_move_in_every_step_are_told_of_once(graphs):
    o, params = made()
    steps, kept = orthdion.capture(o), []
    with pytest.warns(UserWarning, match="set_to_none=False") as told:
        for _ in range(30):
            for p in params:
                kept.append(p.grad)  # so that no address comes back
                p.grad = torch.ones_like(p)
            steps.step()
    assert len(told) == 1 and graphs.made == 0


def test_closures_and_skipped_steps(graphs):
    o, params = made()
    steps = orthdion.capture(o)
    for k in range(4):
        fill(params, k)
        assert steps.step(lambda k=k: float(k)) == k
    before = params[0].detach().clone()
    params[0].grad[0, 0] = float("nan")
    steps.step()
    assert torch.equal(before, params[0].detach()) and sum(o.skipped_steps.values()) == 1


def test_what_cannot_be_captured_is_refused(graphs, monkeypatch):
    with pytest.raises(TypeError, match=r"one of orthdion's, not a SGD"):
        orthdion.capture(torch.optim.SGD([parameter(randn(3))], lr=0.1))
    with pytest.raises(ValueError, match="stepped by the backend torch"):
        orthdion.capture(orthdion.OrthDion([parameter(randn(4, 3))], backend="torch"))
    with pytest.raises(ValueError, match="diagnostics=True waits"):
        orthdion.capture(orthdion.OrthDion([parameter(randn(4, 3))], backend="cupy", diagnostics=True))
    o, params = made()
    steps = orthdion.capture(o)
    hook = o.register_step_pre_hook(lambda *a: None)
    with pytest.raises(ValueError, match="hooks of step"):
        steps.step()
    hook.remove()

    def refuses(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "_Graph", refuses)
    for k in range(2):
        fill(params, k)
        steps.step()
    with pytest.raises(RuntimeError, match=r"cannot be captured .*waits for the device"):
        steps.step()
