"""timm's factory: names, routing, weight decay, layer decay under its own scheduler, fallbacks."""

import pytest
import torch

import orthdion

timm = pytest.importorskip("timm", reason="needs timm")

from timm.optim import create_optimizer_v2, list_optimizers  # noqa: E402
from timm.optim._optim_factory import OptimizerRegistry, default_registry  # noqa: E402

from orthdion.integrations.timm import register, routed  # noqa: E402


@pytest.fixture(autouse=True)
def registered():
    """timm's registry is as it was after the test."""
    before = dict(default_registry._optimizers), default_registry.__dict__.get("create_optimizer")
    names = register()
    yield names
    default_registry._optimizers, method = before
    if method is None:
        del default_registry.create_optimizer


def vit(seed=0):
    torch.manual_seed(seed)
    sizes = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 8, "patch_size": 4}
    return timm.models.vision_transformer.VisionTransformer(num_classes=5, **sizes)


def groups_by_name(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}


def test_names_that_timm_has_are_left_to_it(registered):
    assert registered["completed-dion"] == "completed-dion" and registered["orthdion-muon"] == "muon"
    assert "muon" not in registered and "adamw" not in registered
    assert set(registered) <= set(list_optimizers())
    model = vit()
    assert type(create_optimizer_v2(model, "muon", lr=0.02)).__module__.startswith("timm.")
    assert isinstance(create_optimizer_v2(model, "adamw", lr=0.02), torch.optim.AdamW)
    assert isinstance(create_optimizer_v2(model, "orthdion_muon", lr=0.02), orthdion.Muon)
    assert register() == registered  # a second time changes nothing
    assert default_registry.create_optimizer.__wrapped__.__self__ is default_registry


def test_a_registry_of_ones_own():
    own = OptimizerRegistry()
    names = register(own)
    assert names["muon"] == "muon" and isinstance(own.create_optimizer(vit(), "muon", lr=0.1), orthdion.Muon)


@pytest.mark.parametrize("opt", ["completed_dion", "completed-dion", "orthdion-completed_dion"])
def test_a_model_is_divided_as_param_groups_says(opt):
    model = vit()
    optimizer = create_optimizer_v2(model, opt, lr=0.02, weight_decay=0.1, scalar_lr=0.003, rank_fraction=0.5)
    assert isinstance(optimizer, orthdion.CompletedDion)
    found, decided = groups_by_name(model, optimizer), orthdion.param_groups(model).decisions
    assert {d.name for d in decided} == set(found)
    for d in decided:
        matrix = d.settings["algorithm"] == "matrix"
        group = found[d.name]
        assert group["algorithm"] == ("completed-dion" if matrix else "adamw"), d.name
        assert group["lr"] == (0.02 if matrix else 0.003)
        assert group["split_sizes"] == d.settings.get("split_sizes")
    assert found["blocks.0.attn.qkv.weight"]["split_sizes"] == (16, 16, 16)
    assert found["blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1 and found["head.weight"]["weight_decay"] == 0.1
    assert found["pos_embed"]["weight_decay"] == 0.0 and found["norm.weight"]["weight_decay"] == 0.0


def test_layer_decay_reaches_the_rates_by_timms_scheduler():
    from timm.scheduler import CosineLRScheduler

    model = vit()
    optimizer = create_optimizer_v2(model, "orth-dion", lr=0.02, scalar_lr=0.01, layer_decay=0.5, weight_decay=0.1)
    scheduler = CosineLRScheduler(optimizer, t_initial=10, lr_min=0.0)
    scheduler.step(5)
    found = groups_by_name(model, optimizer)
    for block, scale in ((0, 0.125), (1, 0.25), (2, 0.5)):
        for name, base in (("mlp.fc1.weight", 0.02), ("norm1.weight", 0.01)):
            group = found[f"blocks.{block}.{name}"]
            assert group["lr_scale"] == scale, name
            assert group["lr"] == pytest.approx(base * scale * 0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randn(16, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    moved = {n: float((p.detach() - before[n]).norm()) for n, p in model.named_parameters()}
    assert 1.8 < moved["blocks.2.mlp.fc1.weight"] / moved["blocks.1.mlp.fc1.weight"] < 2.2


def test_layers_below_the_least_scale_are_frozen_and_left_out():
    model = vit()
    options = {"layer_decay": 0.5, "layer_decay_min_scale": 0.0, "layer_decay_no_opt_scale": 0.2}
    optimizer = create_optimizer_v2(model, "completed-dion", lr=0.02, **options)
    found = groups_by_name(model, optimizer)
    assert "blocks.0.mlp.fc1.weight" not in found and "blocks.2.mlp.fc1.weight" in found
    assert not model.blocks[0].mlp.fc1.weight.requires_grad


def test_fallbacks_go_to_adamw():
    model = vit()
    optimizer = create_optimizer_v2(model, "completed-dion", lr=0.02, scalar_lr=0.01, fallback_list=["blocks.0.*"])
    found = groups_by_name(model, optimizer)
    assert found["blocks.0.mlp.fc1.weight"]["algorithm"] == "adamw" and found["blocks.0.mlp.fc1.weight"]["lr"] == 0.01
    assert found["blocks.1.mlp.fc1.weight"]["algorithm"] == "completed-dion"
    w, v = (torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2))
    optimizer = create_optimizer_v2([{"params": [w], "use_fallback": True}, {"params": [v]}], "completed-dion", lr=0.1)
    assert [g["algorithm"] for g in optimizer.param_groups] == ["adamw", "completed-dion"]


def test_groups_of_ones_own_are_taken_as_they_are():
    model = vit()
    optimizer = create_optimizer_v2(model, "completed-dion", lr=0.02, param_group_fn=orthdion.param_groups, eps=1e-6)
    assert groups_by_name(model, optimizer)["head.weight"]["epsilon"] == 1e-6
    with pytest.raises(TypeError, match="scalar_lr is for a model that is divided here"):
        create_optimizer_v2(model, "completed-dion", lr=0.02, param_group_fn=orthdion.param_groups, scalar_lr=0.1)
    with pytest.raises(ValueError, match="is no matrix"):
        create_optimizer_v2(list(model.parameters()), "completed-dion", lr=0.02)
    with pytest.raises(TypeError, match="leave it out"):
        create_optimizer_v2(model, "completed-dion", lr=0.02, foreach=True)
    with pytest.raises(TypeError, match=r"pass mu=0\.8"):
        create_optimizer_v2(model, "completed-dion", lr=0.02, momentum=0.8)
    optimizer = create_optimizer_v2(model, "completed-dion", lr=0.02, mu=0.8)
    assert groups_by_name(model, optimizer)["blocks.0.mlp.fc1.weight"]["mu"] == 0.8


def test_under_lookahead_it_trains_and_its_checkpoint_goes_on_with_the_same_bits():
    x, y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5

    def steps(model, optimizer, count):
        values = []
        for _ in range(count):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            values.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return values

    for opt in ("lookahead_completed_dion", "completed_dion"):
        model = vit()
        optimizer = create_optimizer_v2(model, opt, lr=0.02, scalar_lr=0.01)
        values = steps(model, optimizer, 12)
        assert values[-1] < 0.6 * values[0], values
    again = vit(seed=5)
    again.load_state_dict(model.state_dict())
    other = create_optimizer_v2(again, opt, lr=0.02, scalar_lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    assert steps(model, optimizer, 3) == steps(again, other, 3)


def test_routed_says_what_timm_and_param_groups_say():
    model = vit()
    with pytest.raises(ValueError, match="no parameter matches"):
        routed(model, overrides={"nothing": "adamw"})
    groups = routed(model, weight_decay=0.1, overrides={"head.weight": "matrix"})
    (head,) = [g for g in groups if "head.weight" in g["param_names"]]
    assert head["algorithm"] == "matrix" and head["weight_decay"] == 0.1
