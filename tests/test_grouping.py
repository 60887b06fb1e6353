"""Which layers are hidden and which are heads; overrides, wrappers, and how groups are told."""

import pytest
import torch
from routing import Classifier, Config, decisions, routed
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
        self.experts_bias = nn.Parameter(torch.zeros(4, 16))
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(16)
        self.gate = nn.Linear(16, 1)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.lm_head = nn.Linear(16, 40, bias=False)
        self.lm_head.weight = self.embed.weight


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
    assert d["qkv.weight"].settings["split_sizes"] == (16, 16, 16)
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
    d = decisions(m, scalar="lion", scalar_lr=0.01)
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


def test_weights_kept_as_in_by_out_are_said_to_be_transposed():
    class Conv1D(nn.Module):  # as transformers' GPT-2 has it
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 48))

    m = nn.Module()
    m.c_attn, m.up = Conv1D(), nn.ConvTranspose2d(8, 4, 2)
    m.grouped = nn.Conv2d(32, 64, 3, groups=4)
    d = decisions(m)
    assert d["c_attn.weight"].settings == {"algorithm": "matrix", "transposed": True, "split_sizes": (16, 16, 16)}
    assert d["up.weight"].settings["algorithm"] == "adamw" and "(in, out)" in d["up.weight"].reason
    assert d["grouped.weight"].settings["split_sizes"] == (16,) * 4 and "4 groups" in d["grouped.weight"].reason
    o = orthdion.OrthDion(orthdion.param_groups(m))
    assert o.state[m.grouped.weight]["Q"].shape == (4 * 16, 4)


def test_an_overridden_head_keeps_lions_rate_and_a_depthwise_kernel_its_form():
    m = nn.ModuleDict(
        {"body": nn.Linear(16, 16), "lm_head": nn.Linear(16, 30, bias=False), "conv": nn.Conv1d(8, 8, 5, groups=8)}
    )
    groups = orthdion.param_groups(
        m, scalar="lion", scalar_lr=0.01, overrides={"lm_head.weight": {"weight_decay": 0.1}, "conv.weight": "matrix"}
    )
    d = {x.name: x.settings for x in groups.decisions}
    assert d["lm_head.weight"] == {"algorithm": "lion", "weight_decay": 0.1, "lr": 0.0025}
    assert d["conv.weight"] == {"algorithm": "matrix", "flatten": True}


# ------------------------------------------------------------------ heads


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, nn.Sequential, nn.DataParallel, lambda m: Wrapper(m)])
def test_a_wrapper_does_not_change_the_routing(wrap):
    assert routed(wrap(Classifier()), "fc.weight") == ["adamw"]
    assert routed(wrap(Classifier()), "conv.weight") == ["matrix"]


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.loss_scale = model, nn.Parameter(torch.zeros(1))


def test_names_are_those_of_the_plain_model_and_overrides_match_either():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    compiled = torch.compile(Classifier())
    assert list(decisions(compiled)) == list(decisions(Classifier()))
    assert decisions(compiled, overrides={"_orig_mod.conv.weight": "lion"})["conv.weight"].settings == {
        "algorithm": "lion"
    }
    inner = Classifier()
    inner.conv = checkpoint_wrapper(torch.compile(inner.conv))
    assert list(decisions(inner)) == list(decisions(Classifier()))
    both = nn.ModuleDict({"a": nn.Linear(4, 4), "_orig_mod": nn.Linear(4, 4)})
    assert set(decisions(both))  # a strange name costs nobody a parameter


def test_the_last_layer_of_a_plain_model_is_an_output_layer_and_says_how_to_override():
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3)))
    d = decisions(plain)
    assert d["0.weight"].settings["algorithm"] == d["2.0.weight"].settings["algorithm"] == "matrix"
    assert d["2.1.weight"].settings == {"algorithm": "adamw"} and "the last layer" in d["2.1.weight"].reason
    assert "overrides={'2.1.weight': 'matrix'}" in d["2.1.weight"].reason
    assert decisions(plain, overrides={"2.1.weight": "matrix"})["2.1.weight"].settings == {"algorithm": "matrix"}
    mlp = nn.Module()
    mlp.first, mlp.second, mlp.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
    assert routed(mlp, "second.weight") == ["matrix"] and routed(mlp, "third.weight") == ["adamw"]
    vit = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    vit.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 16)))
    assert routed(vit, "1.weight") == ["matrix"] and routed(vit, "2.weight") == ["adamw"]
    square = nn.ModuleDict(
        {"body": nn.Linear(16, 16), "classifier": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))}
    )
    assert routed(square, "classifier.0.weight") == ["matrix"] and routed(square, "classifier.1.weight") == ["adamw"]
    block = nn.TransformerEncoderLayer(16, 2, 32)  # a part of a model has no output layer
    assert routed(block, "linear2.weight") == ["matrix"]
    assert routed(nn.Linear(8, 8), "weight") == ["matrix"]


def stage(**heads):
    m = nn.Module()
    m.layers = nn.ModuleDict({"7": nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))})
    m.norm = nn.LayerNorm(16)
    for name, head in heads.items():
        setattr(m, name, head)
    return m


def test_an_output_of_a_pipeline_stage_is_found_without_an_embedding_before_or_behind_a_value_head():
    assert routed(stage(output=nn.Linear(16, 50)), "output.weight") == ["adamw"]
    assert routed(stage(output=nn.Linear(16, 50), value_head=nn.Linear(16, 2)), ".weight")[-2:] == ["adamw", "adamw"]
    assert routed(stage(), "0.weight") == routed(stage(), "1.weight") == ["matrix"]  # a stage in the middle
    first = nn.Module()
    first.output, first.emb = nn.Linear(16, 512), nn.Embedding(500, 16)  # registered first, and padded
    first.body = nn.Linear(16, 16)
    assert routed(first, "output.weight") == ["adamw"] and routed(first, "body.weight") == ["matrix"]


def test_every_layer_of_a_list_of_heads_is_a_head_and_of_a_chain_only_the_last():
    m = stage(head=nn.ModuleList([nn.Linear(16, 5), nn.Linear(16, 5)]), lm_heads=nn.ModuleList([nn.Linear(16, 9)] * 1))
    assert routed(m, "head.0.weight") == routed(m, "head.1.weight") == routed(m, "lm_heads.0.weight") == ["adamw"]
    box = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)])
    predictor = nn.Module()
    predictor.layers = box
    m = stage(class_labels_classifier=nn.Linear(16, 6), bbox_predictor=predictor)
    assert routed(m, "layers.2.weight") == routed(m, "class_labels_classifier.weight") == ["adamw"]
    assert routed(m, "predictor.layers.0.weight") == routed(m, "predictor.layers.1.weight") == ["matrix"]


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "head",
        "classifier",
        "score",
        "logits",
        "to_logits",
        "qa_outputs",
        "class_labels_classifier",
        "class_embed",
        "enc_score_head",
        "bbox_predictor",
        "head_dist",
        "dist_head",
        "aux_head",
        "last_linear",
        "classif",
        "final_layer",
        "fc_out",
        "output",
        "classification_head",
        "enc_out_bbox_embed",
        "aux_classifier",
        "unembed",
        "embed_out",
    ],
)
def test_heads_by_name(name):
    assert routed(stage(**{name: nn.Linear(16, 5)}), f"{name}.weight") == ["adamw"]
    conv = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 1))
    assert routed(stage(**{name: conv}), f"{name}.0.weight") == ["matrix"]
    assert routed(stage(**{name: conv}), f"{name}.2.weight") == ["adamw"]


def test_the_models_own_word_on_its_head_counts_first():
    class Timm(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.conv_head, self.z = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 5, 1)

        def get_classifier(self):
            return self.z

    assert routed(Timm(), "z.weight") == ["adamw"] and routed(Timm(), "conv_head.weight") == ["matrix"]

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.readout = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

        def get_output_embeddings(self):
            return self.readout

    outer = nn.ModuleDict({"policy": Inner(), "other": nn.Linear(8, 4), "norm": nn.LayerNorm(4)})
    assert routed(outer, "policy.readout.weight") == ["adamw"] and routed(outer, "policy.body.weight") == ["matrix"]

    class Broken(Inner):
        def get_output_embeddings(self):
            raise NotImplementedError

    assert routed(Broken(), "body.weight") == ["matrix"]


def test_the_output_of_a_head_that_reads_what_it_makes_is_its_last_layer():
    final = nn.ModuleDict({"modulation": nn.Linear(16, 32), "proj": nn.Linear(16, 4)})
    blocks = nn.ModuleList(nn.ModuleDict({"ada": nn.Linear(16, 48), "fc": nn.Linear(16, 16)}) for _ in range(2))
    head = nn.Module()
    head.noise, head.layers, head.final_layer = nn.Linear(4, 16), blocks, final
    m = stage(flow_head=head)
    assert routed(m, "final_layer.proj.weight") == ["adamw"]
    assert routed(m, "modulation.weight") == routed(m, "noise.weight") == ["matrix"]
    assert set(routed(m, "ada.weight")) == {"matrix"}
    pyramid = nn.Module()  # a head of segmentation, whose last layer comes before its classifier
    pyramid.lateral, pyramid.classifier = nn.ModuleList([nn.Conv2d(8, 16, 1)]), nn.Conv2d(16, 5, 1)
    pyramid.bottleneck = nn.Conv2d(32, 8, 3)
    assert routed(stage(decode_head=pyramid), "bottleneck.weight") == ["matrix"]
    assert routed(stage(decode_head=pyramid), "classifier.weight") == ["adamw"]


def test_a_model_without_a_base_has_its_classes_in_its_last_layer():
    class NetForImageClassification(nn.Module):
        base_model_prefix = "net"

        def __init__(self):
            super().__init__()
            self.config = Config(num_labels=2)
            self.first, self.pairs, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(8, 2)

    assert routed(NetForImageClassification(), "fc.weight") == ["adamw"]
    assert routed(NetForImageClassification(), "pairs.weight") == ["matrix"]


def test_a_model_without_a_hidden_matrix_is_refused_unless_that_is_meant():
    model = nn.ModuleDict({"embedding": nn.Embedding(30, 8), "norm": nn.LayerNorm(8), "lm_head": nn.Linear(8, 30)})
    with pytest.raises(ValueError, match=r"ModuleDict has no hidden matrix.*lm_head\.weight.*require_matrices=False"):
        orthdion.param_groups(model)
    with pytest.raises(ValueError, match="no hidden matrix"):
        orthdion.create("muon", model)
    assert {g["algorithm"] for g in orthdion.param_groups(model, require_matrices=False)} == {"adamw"}
    asked = orthdion.param_groups(model, overrides={"lm_head.weight": "matrix"})
    assert {g["algorithm"] for g in asked} == {"adamw", "matrix"}
    assert len(orthdion.create("adamw", model).param_groups) == 2
    body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert all(g["algorithm"] == "adamw" for g in orthdion.param_groups(body, overrides={"*": "adamw"}))


@pytest.mark.parametrize("kind", ["fsdp1", "zero3"])
def test_what_wrappers_have_flattened_is_refused_by_the_optimizer_too(kind):
    if kind == "fsdp1":
        flat = pytest.importorskip("torch.distributed.fsdp._flat_param", reason="this torch has no FSDP1")
        p = flat.FlatParameter(torch.zeros(80))
    else:
        p = nn.Parameter(torch.zeros(0))
        p.ds_shape = torch.Size((8, 10))
    with pytest.raises(ValueError, match=r"group 0, parameter 0 .*ZeRO-3 or FSDP1.*fully_shard"):
        orthdion.OrthDion([p])
