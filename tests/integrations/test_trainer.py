"""transformers' Trainer, TRL's and a call as axolotl makes it."""

import pytest
import torch
import trained
from tiny import language_model, sentences, weights

import orthdion
from orthdion.integrations import Factory

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

OPTIONS = {"lr": 0.02, "scalar_lr": 0.01, "rank_fraction": 0.5}


def arguments(folder, **options):
    known = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1, "warmup_steps": 2}
    known |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "cosine", "seed": 3}
    return transformers.TrainingArguments(output_dir=str(folder), **(known | options))


def trainer(folder, model=None, hook=None, **options):
    model = model if model is not None else language_model()
    hook = {"optimizer_cls_and_kwargs": (Factory, {"optimizer": "completed-dion", **OPTIONS})} if hook is None else hook
    return transformers.Trainer(model, arguments(folder, **options), train_dataset=sentences(), **hook)


def losses(t):
    return [row["loss"] for row in t.state.log_history if "loss" in row]


def plain(optimizer):
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def test_the_factory_routes_trains_and_follows_the_schedule(tmp_path):
    t = trainer(tmp_path, max_steps=20, save_steps=100)
    t.train()
    optimizer, model = plain(t.optimizer), t.model
    assert isinstance(optimizer, orthdion.CompletedDion)
    named = {name: g for g in optimizer.param_groups for name in g["param_names"]}
    assert named["model.layers.0.self_attn.q_proj.weight"]["algorithm"] == "completed-dion"
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert named[name]["algorithm"] == "adamw"
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    first, *_, last = losses(t)
    assert last < 0.7 * first
    rates = [row["learning_rate"] for row in t.state.log_history if "learning_rate" in row]
    assert rates[0] == 0.0 and max(rates) == pytest.approx(0.01) and rates[-1] < 0.001  # the first group's
    groups = {g["algorithm"]: g for g in optimizer.param_groups}
    assert groups["adamw"]["lr"] * 2 == pytest.approx(groups["completed-dion"]["lr"])  # the ratio is kept


@pytest.mark.parametrize("how", ["factory", "instance", "optimizers"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, how):
    def hook(model):
        if how == "factory":
            return {"optimizer_cls_and_kwargs": (Factory, {"optimizer": "completed-dion", **OPTIONS})}
        if how == "instance":
            return {"optimizer_cls_and_kwargs": (Factory("completed-dion", **OPTIONS), {})}
        optimizer = orthdion.create("completed-dion", model, **OPTIONS)
        return {"optimizers": (optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6))}

    first, second = language_model(), language_model(seed=9)  # the checkpoint brings the weights
    whole = trainer(tmp_path, first, hook(first))
    whole.train()
    again = trainer(tmp_path, second, hook(second))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(whole) and len(losses(whole)) == 6
    for name, p in weights(whole.model).items():
        assert torch.equal(p, dict(again.model.named_parameters())[name]), name
    states, others = (plain(t.optimizer).state_dict()["state"] for t in (whole, again))
    assert all(torch.equal(x, others[i][key]) for i, state in states.items() for key, x in state.items())


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path):
    models = []
    for name, options in (("a", {"per_device_train_batch_size": 8}), ("b", {"gradient_accumulation_steps": 2})):
        t = trainer(tmp_path / name, max_steps=3, save_steps=100, **options)
        t.train()
        assert {g["step"] for g in plain(t.optimizer).param_groups} == {3}
        models.append(weights(t.model))
    for name, p in models[0].items():
        assert torch.allclose(p, models[1][name], atol=1e-4), name


def test_gradients_are_clipped_before_the_step(tmp_path):
    norms = []

    class Watching(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))

    t = trainer(tmp_path, max_grad_norm=0.01, max_steps=3, save_steps=100)
    t.add_callback(Watching())
    t.train()
    assert len(norms) == 3 and max(norms) <= 0.0101


def test_a_class_in_place_of_the_factory_is_refused_by_the_factorys_name(tmp_path):
    t = trainer(tmp_path, hook={"optimizer_cls_and_kwargs": (orthdion.OrthDion, {"lr": 0.02})})
    with pytest.raises(ValueError, match=r"orthdion\.integrations\.Factory"):
        t.train()


def test_a_learning_rate_that_would_have_no_effect_is_refused(tmp_path):
    t = trainer(tmp_path, hook={"optimizer_cls_and_kwargs": (Factory, {"optimizer": "muon"})}, learning_rate=0.02)
    with pytest.raises(TypeError, match="learning_rate would have no effect"):
        t.train()
    args = arguments(tmp_path, learning_rate=0.015, adam_beta2=0.9, weight_decay=0.25)
    hook = (Factory("muon", training_args=args), {})
    t = transformers.Trainer(language_model(), args, train_dataset=sentences(), optimizer_cls_and_kwargs=hook)
    groups = {g["algorithm"]: g for g in t.create_optimizer().param_groups}
    assert groups["muon"]["lr"] == 0.015 and groups["muon"]["weight_decay"] == 0.25
    assert groups["adamw"]["beta2"] == 0.9


def test_as_axolotl_calls_it(tmp_path):
    """Its mixin calls ``factory()(model, training arguments, **keywords)``, with strings out of ``optim_args``."""
    args = arguments(tmp_path)
    optimizer = Factory()(
        language_model(), args, lr=0.02, weight_decay=0.0, optimizer="orth-dion", rank_fraction="0.25", eps=1e-7
    )
    groups = {g["algorithm"]: g for g in optimizer.param_groups}
    assert groups["orth-dion"]["rank_fraction"] == 0.25 and groups["adamw"]["epsilon"] == 1e-7
    assert groups["adamw"]["beta1"] == args.adam_beta1


def test_two_processes_under_ddp_train_as_one_does(world, tmp_path):
    first, second = world(2).run(trained.run, str(tmp_path / "two"), 4)
    alone = trained.run(str(tmp_path / "one"), 8)
    for name, p in alone.items():
        assert (first[name] == second[name]).all(), name
        assert abs(first[name] - p).max() < 1e-9, name
