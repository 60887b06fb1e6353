"""Tables, parametrizations, stacks and fused weights: what else than a Linear is a matrix, and how it is split."""

import time

import pytest
import torch
from routing import Classifier, Config, decisions
from torch import nn

import orthdion


def test_tables_tokens_and_gains_are_no_matrices():
    m = nn.Module()
    shapes = {
        "attention_biases": (8, 49),
        "rel_pos_h": (27, 64),
        "rel_pos_w": (27, 64),
        "relative_position_bias_table": (169, 3),
        "pos_embed": (1, 197, 16),
        "patch_pos": (1, 16, 16),
        "pixel_pos": (1, 8, 4, 4),
        "latents": (32, 16),
        "query": (1, 3, 16),
        "latent_tokens": (4, 16),
        "A_log": (16, 4),
        "head_gains": (8, 16),
        "something": (8, 16),
    }
    for name, shape in shapes.items():
        setattr(m, name, nn.Parameter(torch.zeros(shape)))
    d = decisions(m)
    for name in shapes:
        assert d[name].settings == {"algorithm": "adamw", "weight_decay": 0.0}, name
    assert "overrides={'something': 'matrix'}" in d["something"].reason


def test_a_parametrized_weight_is_what_the_plain_one_would_be():
    from torch.nn.utils import parametrizations, spectral_norm, weight_norm

    plain = decisions(nn.Conv1d(8, 16, 3))["weight"].settings
    new = decisions(parametrizations.weight_norm(nn.Conv1d(8, 16, 3)))
    assert new["parametrizations.weight.original1"].settings == plain == {"algorithm": "matrix", "flatten": True}
    assert new["parametrizations.weight.original0"].settings == {"algorithm": "adamw", "weight_decay": 0.0}
    with pytest.warns(FutureWarning):
        old = decisions(weight_norm(nn.Conv1d(8, 16, 3)))
    assert old["weight_v"].settings == plain and old["weight_g"].settings["algorithm"] == "adamw"
    assert decisions(spectral_norm(nn.Linear(8, 16)))["weight_orig"].settings == {"algorithm": "matrix"}
    orthogonal = decisions(parametrizations.orthogonal(nn.Linear(8, 8)))
    assert orthogonal["parametrizations.weight.original"].settings == {"algorithm": "matrix"}
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(1, 16, 7)), parametrizations.weight_norm(nn.Linear(4, 2))
    )
    o = orthdion.OrthDion(orthdion.param_groups(net))
    assert o.state[net[0].parametrizations.weight.original1]["Q"].shape[0] == 7  # one matrix 16×7


class Experts(nn.Module):
    """Stacked weights; ``config`` and other attributes as keywords."""

    def __init__(self, shapes, **said):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        for name, value in said.items():
            setattr(self, name, value)


UPRIGHT, TRANSPOSED = {}, {"transposed": True}


@pytest.mark.parametrize(
    ("shapes", "said", "expected"),
    [
        # What the module says counts, and gate and up are parts.
        ({"down_proj": (4, 8, 8)}, {"is_transposed": True}, {"down_proj": TRANSPOSED}),
        (
            {"gate_up_proj": (4, 8, 24)},
            {"is_transposed": True, "is_concatenated": False},
            {"gate_up_proj": {**TRANSPOSED, "split_sizes": (1, 1), "interleaved": 12}},
        ),
        (
            {"gate_up_proj": (4, 24, 8)},
            {"is_transposed": False, "is_concatenated": True},
            {"gate_up_proj": {"split_sizes": (12, 12)}},
        ),
        # A pair leaves one way, even where 2f = d.
        ({"gate_up_proj": (4, 8, 8), "down_proj": (4, 8, 4)}, {}, {"gate_up_proj": UPRIGHT, "down_proj": UPRIGHT}),
        (
            {"gate_up_proj": (4, 8, 8), "down_proj": (4, 4, 8)},
            {},
            {"gate_up_proj": TRANSPOSED, "down_proj": TRANSPOSED},
        ),
        # A bias, or the width of the model, tells.
        ({"mlp1_weight": (4, 24, 8), "mlp1_bias": (4, 24)}, {}, {"mlp1_weight": UPRIGHT}),
        ({"mlp1_weight": (4, 8, 24), "mlp1_bias": (4, 24)}, {}, {"mlp1_weight": TRANSPOSED}),
        (
            {"w1": (4, 24, 8), "w2": (4, 8, 24), "w3": (4, 24, 8)},
            {"dim": 8},
            {"w1": UPRIGHT, "w2": UPRIGHT, "w3": UPRIGHT},
        ),
        ({"w1": (4, 24, 8), "w2": (4, 8, 24)}, {"hidden_size": 24}, {"w1": TRANSPOSED, "w2": TRANSPOSED}),
        ({"weight": (4, 24, 8)}, {"input_size": 8, "output_size": 24}, {"weight": UPRIGHT}),
        # Not known, not guessed.
        ({"w1": (4, 24, 8), "w2": (4, 8, 24)}, {}, {"w1": None, "w2": None}),
        ({"experts": (4, 24, 8)}, {"hidden_size": 8}, {"experts": None}),
        ({"up_proj": (4, 8, 8)}, {}, {"up_proj": UPRIGHT}),
    ],
)
def test_stacks_are_oriented_by_what_is_known_and_never_guessed(shapes, said, expected):
    d = decisions(nn.ModuleDict({"experts": Experts(shapes, **said)}))
    for name, keys in expected.items():
        found = d[f"experts.{name}"]
        if keys is None:
            assert found.settings["algorithm"] == "adamw"
            assert f"overrides={{'experts.{name}': {{'algorithm': 'matrix', 'transposed': True}}}}" in found.reason
        else:
            assert found.settings == {"algorithm": "matrix", **keys}, name


def test_a_router_beside_the_experts_tells_the_width():
    block = nn.ModuleDict(
        {"router": nn.Linear(8, 4, bias=False), "experts": Experts({"w1": (4, 8, 24), "w2": (4, 24, 8)})}
    )
    d = decisions(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    assert (
        d["layers.0.experts.w1"].settings == d["layers.0.experts.w2"].settings == {"algorithm": "matrix", **TRANSPOSED}
    )
    assert d["layers.0.router.weight"].settings == {"algorithm": "adamw"}


def test_xlnets_axes_of_heads_are_one_matrix():
    class XLNetRelativeAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.o = nn.Parameter(torch.zeros(16, 2, 8)), nn.Parameter(torch.zeros(16, 2, 8))
            self.r_w_bias = nn.Parameter(torch.zeros(2, 8))

    d = decisions(XLNetRelativeAttention())
    assert d["q"].settings == d["o"].settings == {"algorithm": "matrix", "flatten": True}
    assert d["r_w_bias"].settings["algorithm"] == "adamw"


def test_recurrent_weights_are_a_matrix_a_gate():
    d = decisions(nn.ModuleDict({"lstm": nn.LSTM(6, 8, proj_size=4), "gru": nn.GRU(6, 8), "rnn": nn.RNN(6, 8)}))
    assert d["lstm.weight_ih_l0"].settings["split_sizes"] == (8,) * 4
    assert d["lstm.weight_hr_l0"].settings == {"algorithm": "matrix"} == d["rnn.weight_hh_l0"].settings
    assert d["gru.weight_hh_l0"].settings["split_sizes"] == (8,) * 3


# ------------------------------------------------------------------ fused weights


def attention(kind, name, rows, cols=16, **said):
    """A module of a class of this name with one projection, in a model with a config."""
    module = type(kind, (nn.Module,), {})()
    setattr(module, name, nn.Linear(cols, rows))
    for key, value in said.items():
        setattr(module, key, value)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": module})])})


@pytest.mark.parametrize(
    ("kind", "name", "rows", "said", "keys"),
    [
        ("GPTNeoXAttention", "query_key_value", 48, {"config": Config(num_attention_heads=2)}, ((8, 8, 8), 2)),
        ("BloomAttention", "query_key_value", 48, {"num_heads": 4}, ((4, 4, 4), 4)),
        (
            "FalconAttention",
            "query_key_value",
            32,
            {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "new_decoder_architecture": True},
            ((8, 4, 4), 2),
        ),
        (
            "FalconAttention",
            "query_key_value",
            24,
            {"num_heads": 4, "head_dim": 4, "multi_query": True},
            ((16, 4, 4), 1),
        ),
        ("FalconAttention", "query_key_value", 48, {"num_heads": 4, "head_dim": 4}, ((4, 4, 4), 4)),
        ("SelfAttention", "query_key_value", 48, {"num_heads": 4}, None),
        (
            "Phi3Attention",
            "qkv_proj",
            32,
            {"config": Config(num_attention_heads=4, num_key_value_heads=2)},
            ((16, 8, 8), 1),
        ),
        ("GPTBigCodeAttention", "c_attn", 24, {"num_heads": 4, "multi_query": True, "kv_dim": 4}, ((16, 4, 4), 1)),
        ("CodeGenAttention", "qkv_proj", 48, {}, ((4, 4, 4), 4)),
        ("MaskUnitAttention", "qkv", 96, {"heads": 2}, ((32, 32, 32), 1)),  # 3·dim_out
        ("Attention", "qkv", 64, {"num_heads": 2, "key_dim": 8, "val_dim": 16}, ((8, 8, 16), 2)),  # LeViT
        ("Attention", "qkv", 50, {}, None),
        ("Attention", "Wqkv", 48, {}, ((16, 16, 16), 1)),
        ("Attention", "kv", 32, {}, ((16, 16), 1)),
        ("MLA", "kv_b_proj", 40, {"qk_nope_head_dim": 4, "v_head_dim": 6}, ((4, 6), 4)),
        ("MLA", "kv_a_proj_with_mqa", 12, {"config": Config(qk_rope_head_dim=4)}, ((8, 4), 1)),
        ("MambaMixer", "in_proj", 64, {"intermediate_size": 32, "ssm_state_size": 4}, ((32, 32), 1)),
        ("MambaMixer", "x_proj", 9, {"time_step_rank": 1, "ssm_state_size": 4}, ((1, 4, 4), 1)),
        (
            "Mamba2Mixer",
            "in_proj",
            76,
            {"intermediate_size": 32, "ssm_state_size": 4, "n_groups": 1, "num_heads": 4},
            ((32, 32, 4, 4, 4), 1),
        ),
        ("MLP", "gate_up_proj", 64, {}, ((32, 32), 1)),
    ],
)
def test_fused_weights_are_split_as_their_family_has_them(kind, name, rows, said, keys):
    (d,) = [d for n, d in decisions(attention(kind, name, rows, **said)).items() if n.endswith("weight")]
    if keys is None:
        assert d.settings == {"algorithm": "matrix"} and "layout not known" in d.reason
        return
    sizes, rounds = keys
    expected = {"split_sizes": sizes, **({"interleaved": rounds} if rounds > 1 else {})}
    assert d.settings == {"algorithm": "matrix", **expected}, d.reason
    assert sum(sizes) * rounds == rows


def test_a_gate_is_known_by_what_reads_half_of_it():
    mlp = nn.ModuleDict({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(16, 8)})
    plain = nn.ModuleDict({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)})
    d = decisions(nn.ModuleDict({"blocks": nn.ModuleList([mlp, plain])}))
    assert d["blocks.0.fc1.weight"].settings["split_sizes"] == (16, 16)
    assert d["blocks.1.fc1.weight"].settings == {"algorithm": "matrix"}


def test_heads_are_stepped_alone_where_asked_for():
    said = {"config": Config(num_attention_heads=4, num_key_value_heads=2, head_dim=4)}
    module = type("Attention", (nn.Module,), {})()
    for name, rows in {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16}.items():
        setattr(module, name, nn.Linear(16, rows))
    module.config = said["config"]
    m = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": module})])})
    d = decisions(m, per_head=True)
    heads = {n.split(".")[-2]: d[n].settings.get("num_heads") for n in d if n.endswith("weight")}
    assert heads == {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": None}
    fused = decisions(attention("Phi3Attention", "qkv_proj", 32, **said), per_head=True)
    assert fused["layers.0.attn.qkv_proj.weight"].settings == {"algorithm": "matrix", "num_heads": 8}
    assert decisions(m)["layers.0.self_attn.q_proj.weight"].settings == {"algorithm": "matrix"}
    short = decisions(attention("Attention", "wk", 8, **said), per_head=True)
    assert short["layers.0.attn.wk.weight"].settings == {"algorithm": "matrix", "num_heads": 2}
    orthdion.Muon(orthdion.param_groups(m, per_head=True))


def test_torchs_attention_is_split_whatever_its_widths():
    d = decisions(nn.ModuleDict({"a": nn.MultiheadAttention(16, 2), "b": nn.MultiheadAttention(16, 2, kdim=8, vdim=4)}))
    assert d["a.in_proj_weight"].settings["split_sizes"] == (16, 16, 16)
    assert d["b.q_proj_weight"].settings == d["b.k_proj_weight"].settings == {"algorithm": "matrix"}


def test_thousands_of_experts_are_routed_in_no_time():
    def expert():
        return nn.ModuleDict({n: nn.Linear(4, 4, bias=False, device="meta") for n in ("w1", "w2", "w3")})

    layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(expert() for _ in range(100))}) for _ in range(60))
    m = nn.ModuleDict({"embed": nn.Embedding(8, 4), "layers": layers, "output": nn.Linear(4, 8)})
    start = time.process_time()
    groups = orthdion.param_groups(m)
    assert time.process_time() - start < 5.0  # some 1.5 s on a busy core; a scan of all for each takes minutes
    assert len(groups.decisions) == 18_003


def test_weights_without_their_shape_are_refused_and_not_taken_for_vectors():
    flattened = Classifier()
    flattened.fc.weight = nn.Parameter(torch.zeros(80))  # as FSDP1 leaves it
    with pytest.raises(ValueError, match=r"fc\.weight has the shape \(80,\).*fully_shard"):
        orthdion.param_groups(flattened)
    with pytest.raises(ValueError, match="lazy"):
        orthdion.param_groups(nn.Sequential(nn.LazyLinear(4)))


def test_create_takes_per_head():
    m = attention(
        "Phi3Attention", "qkv_proj", 32, config=Config(num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    )
    heads = {g["num_heads"] for g in orthdion.create("muon", m, per_head=True).param_groups if g["algorithm"] == "muon"}
    assert heads == {8}


def test_fully_sharded_modules_are_known_by_the_class_that_they_had():
    m = attention("GPTNeoXAttention", "query_key_value", 48, num_attention_heads=2)
    module = m["layers"][0]["attn"]
    module.__class__ = type("FSDPGPTNeoXAttention", (type("FSDPModule", (), {}), type(module)), {})
    d = decisions(m)["layers.0.attn.query_key_value.weight"]
    assert d.settings == {"algorithm": "matrix", "split_sizes": (8, 8, 8), "interleaved": 2}
