import pytest
import torch
from torch import nn

import orthdion


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.pos_emb = nn.Parameter(torch.zeros(1, 32, 16))
        self.qkv = nn.Linear(16, 48)
        self.attention = nn.MultiheadAttention(16, 2)
        self.experts = nn.Parameter(torch.zeros(4, 16, 24))
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(16)
        self.gate = nn.Linear(16, 1)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.lm_head = nn.Linear(16, 40, bias=False)
        self.lm_head.weight = self.embed.weight


def decisions(model, **options):
    return {d.name: d for d in orthdion.param_groups(model, **options).decisions}


def test_every_kind_goes_where_it_belongs_with_a_reason():
    d = decisions(Tied())
    expected = {
        "embed.weight": ("adamw", "tied"),
        "pos_emb": ("adamw", "embedding"),
        "qkv.weight": ("matrix", "three"),
        "qkv.bias": ("adamw", "bias"),
        "attention.in_proj_weight": ("matrix", "three"),
        "attention.out_proj.weight": ("matrix", "hidden"),
        "experts": ("matrix", "stack of 4"),
        "conv.weight": ("matrix", "convolution"),
        "depthwise.weight": ("adamw", "depthwise"),
        "norm.weight": ("adamw", "norm"),
        "gate.weight": ("adamw", "vector in the shape"),
        "frozen.weight": (None, "frozen"),
    }
    for name, (algorithm, reason) in expected.items():
        assert d[name].settings.get("algorithm") == algorithm, name
        assert reason in d[name].reason, name
    assert d["qkv.weight"].settings["split_sizes"] == (8, 8, 8)
    assert d["norm.weight"].settings["weight_decay"] == 0.0 == d["embed.weight"].settings["weight_decay"]
    assert "lm_head.weight" not in d  # the same tensor as the embedding, listed once


def test_an_untied_head_is_found_by_name_and_by_vocabulary():
    named = nn.ModuleDict({"body": nn.Linear(8, 8), "lm_head": nn.Linear(8, 30)})
    assert "head" in decisions(named)["lm_head.weight"].reason
    sized = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30))
    d = decisions(sized)
    assert d["2.weight"].settings == {"algorithm": "adamw"} and d["1.weight"].settings["algorithm"] == "matrix"


def test_overrides_by_pattern_and_typos_are_refused():
    d = decisions(Tied(), overrides={"experts": "adamw", "attention.*": {"rank_fraction": 0.5}, "qkv.weight": "adamw"})
    assert d["experts"].settings == {"algorithm": "adamw"}
    assert d["qkv.weight"].settings == {"algorithm": "adamw"}
    assert d["attention.in_proj_weight"].settings["rank_fraction"] == 0.5
    assert "overridden by 'experts'" in d["experts"].reason
    with pytest.raises(ValueError, match=r"no parameter matches 'expert\.\*'"):
        decisions(Tied(), overrides={"expert.*": "adamw"})
    with pytest.raises(ValueError, match=r"vector norm\.weight"):
        decisions(Tied(), overrides={"norm.weight": "matrix"})


def test_lions_head_gets_its_own_rate():
    m = nn.ModuleDict({"body": nn.Linear(16, 16), "lm_head": nn.Linear(16, 30, bias=False)})
    with pytest.raises(ValueError, match="lr"):
        orthdion.param_groups(m, scalar="lion")
    d = decisions(m, scalar="lion", lr=0.01)
    assert d["lm_head.weight"].settings == {"algorithm": "lion", "lr": 0.0025}
    assert decisions(m, scalar_lr=0.3)["lm_head.weight"].settings == {"algorithm": "adamw", "lr": 0.3}


def test_the_groups_step_the_whole_model_and_print_as_a_table():
    m = Tied()
    groups = orthdion.param_groups(m)
    o = orthdion.OrthDion(groups, lr=0.1)
    for p in m.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    o.step()
    moved = {n for n, p in m.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n, p in m.named_parameters() if p.requires_grad}
    text = str(groups)
    assert "experts" in text and "stack of 4 hidden matrices" in text and "% of" in text


@pytest.mark.parametrize(
    "call", [lambda: orthdion.param_groups([nn.Parameter(torch.zeros(2))]), lambda: orthdion.param_groups(None)]
)
def test_what_is_no_model_is_refused(call):
    with pytest.raises(TypeError, match="pass the model"):
        call()


def reasons(model):
    return {d.name: (d.settings.get("algorithm"), d.reason) for d in orthdion.param_groups(model).decisions}


def test_only_the_last_layer_of_a_head_is_one():
    vgg = nn.ModuleDict(
        {"features": nn.Conv2d(3, 8, 3), "classifier": nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10))}
    )
    r = reasons(vgg)
    assert r["classifier.0.weight"][0] == "matrix" and r["classifier.2.weight"][0] == "adamw"
    resnet = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 10)})
    assert reasons(resnet)["fc.weight"][0] == "adamw"


def test_names_do_not_make_embeddings_of_layers_but_of_bare_tables():
    m = nn.Module()
    m.time_emb_proj, m.patch_embed = nn.Linear(8, 8), nn.Conv2d(3, 8, 4)
    m.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))
    m.cls_token, m.register_tokens = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 4, 8))
    m.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 16))
    m.router, m.A_log = nn.Linear(8, 4, bias=False), nn.Parameter(torch.zeros(16, 4))
    r = reasons(m)
    assert r["time_emb_proj.weight"][0] == r["patch_embed.weight"][0] == "matrix"
    others = (
        "relative_position_bias_table",
        "cls_token",
        "register_tokens",
        "gate_up_proj_bias",
        "router.weight",
        "A_log",
    )
    assert all(r[name][0] == "adamw" for name in others), r


def test_layouts_that_are_not_out_by_in_are_not_stepped_as_such():
    class Conv1D(nn.Module):  # as transformers' GPT-2 has it
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 48))

    m = nn.Module()
    m.c_attn, m.up = Conv1D(), nn.ConvTranspose2d(8, 4, 2)
    m.grouped = nn.Conv2d(32, 64, 3, groups=4)
    r = reasons(m)
    assert r["c_attn.weight"][0] == r["up.weight"][0] == "adamw" and "Conv1D" in r["c_attn.weight"][1]
    assert r["grouped.weight"][0] == "matrix" and "4 groups" in r["grouped.weight"][1]
    o = orthdion.OrthDion(orthdion.param_groups(m))
    assert o.state[m.grouped.weight]["Q"].shape == (4, 16, 4)


def test_an_overridden_head_keeps_lions_rate_and_a_depthwise_kernel_its_form():
    m = nn.ModuleDict(
        {"body": nn.Linear(16, 16), "lm_head": nn.Linear(16, 30, bias=False), "conv": nn.Conv1d(8, 8, 5, groups=8)}
    )
    groups = orthdion.param_groups(
        m, scalar="lion", lr=0.01, overrides={"lm_head.weight": {"weight_decay": 0.1}, "conv.weight": "matrix"}
    )
    d = {x.name: x.settings for x in groups.decisions}
    assert d["lm_head.weight"] == {"algorithm": "lion", "weight_decay": 0.1, "lr": 0.0025}
    assert d["conv.weight"] == {"algorithm": "matrix", "flatten": True}
