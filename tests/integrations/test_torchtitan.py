"""torchtitan's container, with its own model, its schedulers, its checkpoints by name, stages and frozen weights."""

import pytest
import stages
import torch
from stages import Part
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import orthdion

pytest.importorskip("torchtitan.components.optimizer", reason="needs torchtitan")

from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

from orthdion.integrations.torchtitan import OptimizersContainer, config


def train(parts, container, schedulers, count, start=0):
    losses = []
    for k in range(start, start + count):
        x = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(k))
        y = x
        for part in parts:
            y = part(y)
        loss = nn.functional.cross_entropy(y.flatten(0, 1), (3 * x + 1).flatten() % 11)
        losses.append(float(loss.detach()))
        container.zero_grad()
        loss.backward()
        container.step()
        schedulers.step()
    return losses


def built(parts, **options):
    options = {"scalar_lr": 0.01, "weight_decay": 0.1, "rank_fraction": 0.5} | options
    container = config("completed-dion", lr=0.02, **options).build(model_parts=parts)
    schedule = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=container, training_steps=40)
    return container, schedule


def named_groups(container):
    return {name: g for o in container for g in o.param_groups for name in g["param_names"]}


def test_one_pattern_divides_a_model_and_keeps_torchtitans_keys():
    model = Part([0, 1])
    container, schedule = built([model], momentum_dtype=torch.bfloat16)
    (optimizer,) = container.optimizers
    assert isinstance(optimizer, orthdion.CompletedDion)
    found = named_groups(container)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["layers.0.w1.weight"]["algorithm"] == "completed-dion"
    assert found["layers.0.qkv.weight"]["split_sizes"] == (8, 8, 8)
    for name in ("tok_embeddings.weight", "output.weight", "layers.1.attention_norm.weight"):
        assert found[name]["algorithm"] == "adamw"
    assert all(g["fused"] is False and g["foreach"] is False for g in found.values())
    assert found["output.weight"]["weight_decay"] == 0.1 and found["norm.weight"]["weight_decay"] == 0.0
    assert found["layers.0.w1.weight"]["rank_fraction"] == 0.5
    assert optimizer.state[model.layers["0"].wo.weight]["momentum"].dtype == torch.bfloat16
    assert found["layers.0.w1.weight"]["lr"] == 0.01 and found["norm.weight"]["lr"] == 0.005  # half way up
    losses = train([model], container, schedule, 40)
    assert losses[-1] < 0.5 * losses[0]
    assert schedule.get_metrics().keys() >= {"lr/CompletedDion/0", "lr/CompletedDion/1"}


def test_patterns_of_torchtitans_may_stand_beside_ours_and_fused_stays_what_they_say():
    model = Part([0, 1])
    mine = ParamGroupConfig(pattern=r"^layers\.0", optimizer_name="muon", optimizer_kwargs={"lr": 0.03})
    other = ParamGroupConfig(
        pattern=r"^layers", optimizer_name="muon", optimizer_kwargs={"lr": 0.04, "betas": (0.8, 0.9), "mu": 0.5}
    )
    theirs = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.001, "fused": False})
    container = OptimizersContainer.Config(param_groups=[mine, other, theirs], implementation="foreach").build(
        model_parts=[model]
    )
    kinds = [type(o) for o in container]
    assert kinds == [orthdion.Muon, torch.optim.AdamW]
    found = named_groups(container)
    assert (found["layers.0.wo.weight"]["lr"], found["layers.1.wo.weight"]["lr"]) == (0.03, 0.04)
    assert (found["layers.0.wo.weight"]["mu"], found["layers.1.wo.weight"]["mu"]) == (0.95, 0.5)
    norm = found["layers.1.attention_norm.weight"]
    assert (norm["algorithm"], norm["beta1"], norm["beta2"]) == ("adamw", 0.8, 0.9)
    assert found["layers.0.wo.weight"]["foreach"] is True
    train([model], container, LRSchedulersContainer.Config().build(optimizers=container, training_steps=5), 2)


@pytest.mark.parametrize("through", ["memory", "files"])
def test_a_checkpoint_by_name_goes_on_with_the_same_bits(tmp_path, through):
    first, second = Part([0, 1]), Part([0, 1], seed=4)
    a, b = built([first]), built([second])
    train([first], *a, 5)
    saved = a[0].state_dict()
    assert {"state.layers.0.wo.weight.Q", "param_groups.layers.0.wo.weight.rank_fraction"} <= saved.keys()
    if through == "files":
        dcp_save({"optimizer": saved}, checkpoint_id=str(tmp_path / "saved"), no_dist=True)
        saved = b[0].state_dict()  # eager states: torchtitan's zero step has nothing to make
        dcp_load({"optimizer": saved}, checkpoint_id=str(tmp_path / "saved"), no_dist=True)
    second.load_state_dict(first.state_dict())
    b[0].load_state_dict(saved)
    b[1].load_state_dict(a[1].state_dict())
    assert train([first], *a, 4, 5) == train([second], *b, 4, 5)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_the_zero_step_of_torchtitan_changes_nothing():
    from torchtitan.components.optimizer.utils import init_optim_state

    model = Part([0])
    (optimizer,) = built([model])[0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    states = {p: {k: t.clone() for k, t in s.items()} for p, s in optimizer.state.items()}
    init_optim_state(optimizer)
    assert states and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(torch.equal(optimizer.state[p][k], t) for p, s in states.items() for k, t in s.items())


def test_pipeline_stages_step_as_the_whole_and_one_has_no_matrices():
    whole = Part([0, 1])
    stages = [Part([0, 1], last=False), Part([], first=False)]
    for stage in stages:
        stage.load_state_dict({k: v for k, v in whole.state_dict().items() if k in stage.state_dict()})
    a, b = built([whole]), built(stages)
    assert [{g["algorithm"] for g in o.param_groups} for o in b[0]] == [{"completed-dion", "adamw"}, {"adamw"}]
    assert len(b[0].optimizers) == 2
    losses = train([whole], *a, 6), train(stages, *b, 6)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # random starts differ: they are numbered in a part
    saved = b[0].state_dict()
    for name, _ in whole.named_parameters():
        assert any(key.startswith(f"state.{name}.") for key in saved), name
    again = [Part([0, 1], last=False, seed=5), Part([], first=False, seed=6)]
    for old, new in zip(stages, again, strict=True):
        new.load_state_dict(old.state_dict())
    c = built(again)
    c[0].load_state_dict(saved)
    c[1].load_state_dict(b[1].state_dict())
    assert train(stages, *b, 3, 6) == train(again, *c, 3, 6)


def test_frozen_weights_are_left_out_and_left_alone():
    model = Part([0, 1])
    for p in (model.tok_embeddings.weight, model.layers["0"].w1.weight):
        p.requires_grad_(False)
    before = model.layers["0"].w1.weight.detach().clone()
    container, schedule = built([model])
    assert "layers.0.w1.weight" not in named_groups(container)
    train([model], container, schedule, 3)
    assert torch.equal(model.layers["0"].w1.weight, before)
    other = built([model])[0]
    other.load_state_dict(container.state_dict())
    assert not any("layers.0.w1" in key for key in container.state_dict())


@pytest.mark.parametrize("flat", [True, False])
def test_torchs_own_state_dicts_of_one_optimizer(flat):
    model = Part([0, 1])
    model.layers["1"].w2.weight.requires_grad_(False)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    (optimizer,) = built([model])[0]
    other = Part([0, 1], seed=8)
    other.layers["1"].w2.weight.requires_grad_(False)
    (copy,) = built([other])[0]
    schedule = LRSchedulersContainer.Config().build(optimizers=[optimizer], training_steps=9)
    train([model], optimizer, schedule, 3)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if flat:
        assert "state.layers.0.wo.weight.Q" in saved
    set_optimizer_state_dict(other, copy, saved, options=options)
    mine, its = optimizer.state_dict(), copy.state_dict()
    assert mine["param_groups"] == its["param_groups"]
    for i, state in mine["state"].items():
        assert all(torch.equal(t, its["state"][i][k]) for k, t in state.items())


def test_its_own_fused_qkv_is_split_as_it_splits_itself():
    from torchtitan.models.llama3 import model_registry

    with torch.device("meta"):
        model = model_registry("debugmodel").model.build()
    found = {d.name: d.settings for d in orthdion.param_groups(model).decisions}
    for name, module in model.named_modules():
        if type(module).__name__ != "FusedQKVLinear":
            continue
        rows = torch.arange(module.wqkv.weight.shape[0], dtype=torch.float64)[:, None]
        split = {"wqkv.weight": rows.clone()}
        module._split_qkv_on_save(module, split, "", {})
        keys = found[f"{name}.wqkv.weight"]
        sizes, rounds = keys["split_sizes"], keys.get("interleaved", 1)
        parts = [p.flatten(0, 1) for p in rows.view(rounds, sum(sizes), 1).split(sizes, dim=1)]
        for part, key in zip(parts, ("wq", "wk", "wv"), strict=True):
            assert torch.equal(part, split[f"{key}.weight"]), (name, key)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda m: config("completed-dino", lr=0.1), "did you mean 'completed-dion'"),
        (lambda m: config("muon", lr=0.1, nesterv=True), "did you mean 'nesterov'"),
        (lambda m: config("muon", lr=0.1, fused=True), "leave it out"),
        (lambda m: config("muon", lr=0.1, overrides={"x*": {"seed": 1}, "w": "muon"}).build(model_parts=[m]), None),
        (
            lambda m: OptimizersContainer.Config(
                param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="muon", optimizer_kwargs={"seed": 1})]
            ).build(model_parts=[m]),
            "optimizer_factory_kwargs_by_name",
        ),
        (
            lambda m: OptimizersContainer.Config(
                param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="muon", optimizer_kwargs={"lr": 0.1})],
                implementation="fused_opt_states_bf16",
            ).build(model_parts=[m]),
            "momentum_dtype",
        ),
        (lambda m: orthdion.Muon(m.layers["0"].wo.parameters(), fused=False, foreach=False), "leave it out"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(attempt, message, caplog):
    if message is None:  # patterns that a stage has nothing for
        attempt(Part([0]))
        assert "no parameter of this model part matches 'x*', 'w'" in caplog.text
        return
    with pytest.raises((TypeError, ValueError), match=message):
        attempt(Part([0]))


def test_sharded_on_two_processes_it_steps_as_one_and_goes_on_with_one(world, tmp_path):
    for errors in world(2).run(stages.sharded, str(tmp_path)):
        assert errors["two"] < 1e-10 and errors["one"] < 1e-10, errors
        assert errors["uneven"] and "state.layers.0.wo.weight.Q" in errors["keys"]


def test_its_own_stacks_of_experts_are_upright_and_gates_alternate_as_it_reads_them():
    from torchtitan.models.gpt_oss import model_registry as oss
    from torchtitan.models.gpt_oss import moe
    from torchtitan.models.qwen3 import model_registry as qwen

    with torch.device("meta"):
        models = [qwen("debugmodel_moe").model.build(), oss("debugmodel").model.build()]
    for model in models:
        found = {d.name: d.settings for d in orthdion.param_groups(model).decisions}
        stacks = {name: p for name, p in model.named_parameters() if p.ndim == 3}
        assert stacks
        width = model.tok_embeddings.weight.shape[1]
        for name, p in stacks.items():
            keys = found[name]
            assert keys["algorithm"] == "matrix" and not keys.get("transposed"), name
            assert (p.shape[1] == width) == ("EDF" in name), name  # what comes out of the last is as wide as the model
            assert ("split_sizes" in keys) == ("EGD" in name), name
    (name,) = [n for n in stacks if n.startswith("layers.0.") and n.endswith("_EGD")]
    keys, rows = found[name], torch.zeros(stacks[name].shape[1], dtype=torch.float64)
    first, second = rows.view(keys["interleaved"], 2).unbind(1)  # views: as the step divides the rows
    first += 1.0
    gated = moe.swiglu(rows, limit=9.0)  # gate 1, linear part 0
    second += 2.0
    assert torch.equal(moe.swiglu(rows, limit=9.0), 3.0 * gated) and (gated > 0.7).all()


def test_its_own_latent_attention_is_split_as_it_splits_itself():
    from torchtitan.models.deepseek_v3 import model_registry

    with torch.device("meta"):
        model = model_registry("debugmodel").model.build()
    found = {d.name: d.settings for d in orthdion.param_groups(model).decisions}
    attention = model.layers["0"].attention
    latent, keys, values = attention.kv_lora_rank, attention.qk_nope_head_dim, attention.v_head_dim
    first, second = (found[f"layers.0.attention.{name}.weight"] for name in ("wkv_a", "wkv_b"))
    assert first["split_sizes"] == (latent, attention.qk_rope_head_dim)  # torch.split of its forward pass
    assert second["split_sizes"] == (keys, values) and second["interleaved"] == attention.n_heads
