"""Learning rates: what they are multiplied by, and which parameters go by which."""

import math

import pytest
import torch
from oracles import parameter, randn
from torch import nn

import orthdion

SHAPES = [(64, 64), (96, 24), (24, 96), (40, 33)]
MATCHING = [
    ("muon", {"polar": "exact"}),
    ("normuon", {"polar": "exact"}),
    ("rmnp", {}),
    ("sinkgd", {}),
    ("auon", {}),
    *(
        (name, {"rank_fraction": f})
        for name in ("orth-dion", "dion", "curvadion", "completed-dion", "numuon", "mofasgd", "cosmos")
        for f in (0.1, 0.5, 1.0)
    ),
    *(
        ("completed-dion", {"rank_fraction": 0.25, "residual": kind, "residual_scale": c})
        for kind in ("normalized", "linear")
        for c in (0.0, 0.5, 2.0)
    ),
]


def moved(name, shape, **options):
    """The step of a zero weight at rate 1."""
    p = parameter(torch.zeros(shape))
    o = orthdion.create(name, [p], **{"lr": 1.0, "weight_decay": 0.0, **options})
    p.grad = randn(*shape, seed=3)
    o.step()
    return p.detach()


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), MATCHING)
def test_updates_have_adamws_size_at_every_shape_rank_and_residual(name, options, shape, backend):
    step = moved(name, shape, adjust_lr="match_rms_adamw", backend=backend, **options)
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2, rel=0.01)


def test_a_loaded_state_of_another_rank_is_scaled_by_its_rank():
    small = orthdion.functional.init("orth-dion", torch.zeros(32, 32), rank_fraction=0.25)
    x = torch.zeros(32, 32)
    options = {"rank_fraction": 1.0, "adjust_lr": "match_rms_adamw", "lr": 1.0, "weight_decay": 0.0}
    orthdion.functional.step("orth-dion", x, randn(32, 32, seed=1), small, **options)
    assert float(x.square().mean().sqrt()) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["muon", "dion2", "rmnp", "orth-dion", "completed-dion"])
def test_the_other_scales_are_those_of_the_field(name, shape):
    m, n = shape
    plain = moved(name, shape, adjust_lr=None)
    for kind, factor in (("spectral", math.sqrt(m / n)), ("original", math.sqrt(max(1.0, m / n)))):
        assert torch.allclose(moved(name, shape, adjust_lr=kind), factor * plain, rtol=1e-5, atol=1e-7)
    assert torch.equal(moved(name, shape), moved(name, shape, adjust_lr="spectral"))


def test_a_misspelt_scale_is_refused():
    with pytest.raises(ValueError, match=r"adjust_lr must be one of .*did you mean 'match_rms_adamw'"):
        orthdion.OrthDion([parameter(randn(4, 4))], adjust_lr="match_rms_adam")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(30, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.lm_head = nn.Linear(8, 30)


def rates(optimizer):
    return {(g["algorithm"], g["lr"]) for g in optimizer.param_groups}


def test_embeddings_do_not_go_by_the_rate_of_matrices():
    assert rates(orthdion.create("orth-dion", Model(), lr=0.02)) == {("orth-dion", 0.02), ("adamw", 0.001)}
    assert rates(orthdion.create("orth-dion", Model(), lr=0.02, scalar_lr=0.01)) == {
        ("orth-dion", 0.02),
        ("adamw", 0.01),
    }
    made = orthdion.create("orth-dion", Model(), lr=0.02, scalar="lion")
    assert rates(made) == {("orth-dion", 0.02), ("lion", 0.0001), ("lion", 0.0001 / math.sqrt(8))}
    overridden = orthdion.create("orth-dion", Model(), lr=0.02, overrides={"body.0.weight": "adamw"})
    assert rates(overridden) == {("adamw", 0.001)}


def test_one_rate_serves_everything_where_it_is_adamws():
    matched = orthdion.create("completed-dion", Model(), lr=0.003, adjust_lr="match_rms_adamw")
    assert {lr for _, lr in rates(matched)} == {0.003}
    assert rates(orthdion.create("adamw", Model(), lr=0.003)) == {("adamw", 0.003)}
    assert rates(orthdion.create("adamw", Model())) == {("adamw", 0.001)}


def test_groups_written_by_hand_go_by_the_constructor_as_in_torch():
    p, q = parameter(randn(6, 4)), parameter(randn(4))
    optimizer = orthdion.OrthDion([{"params": [p]}, {"params": [q], "algorithm": "adamw"}], lr=0.05)
    assert rates(optimizer) == {("orth-dion", 0.05), ("adamw", 0.05)}


def test_the_share_of_every_rule_is_in_repr_and_in_the_log(caplog):
    with caplog.at_level("INFO", logger="orthdion"):
        optimizer = orthdion.create("orth-dion", Model())
    said = "adamw steps 89.3% of 598 elements (6 parameters), orth-dion steps 10.7% of 598 elements (1 parameters)"
    total = sum(p.numel() for p in Model().parameters())
    assert total == 598
    assert said in repr(optimizer)
    assert [r.getMessage() for r in caplog.records] == [f"OrthDion: {said}"]
