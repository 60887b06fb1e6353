"""A plan counts what a step does: requests, flops by hand, states, models, and what it refuses.

That it sends what real processes send, to the byte, is asserted where they run (tests/distributed/planned.py).
"""

import json
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from oracles import randn
from torch import nn

import orthdion
from orthdion.backends import get
from orthdion.optim import OPTIMIZERS
from orthdion.plan import Hardware, Model, Weight, count
from orthdion.plan.costs import COSTS, Cost, cost_of
from orthdion.plan.counting import traced
from orthdion.plan.layouts import GridGroups, Layout, Spread, spread
from orthdion.plan.models import PRESETS, model_of
from orthdion.requests import (
    ALONE,
    Average,
    AverageChanges,
    Blend,
    Columns,
    CompressedMean,
    Direction,
    Energies,
    Factor,
    Gather,
    Gram,
    LowRankUpdate,
    Map,
    MatMul,
    Matrix,
    NewtonSchulz,
    Norms,
    Pack,
    PackChange,
    Polar,
    Precision,
    Product,
    Reduce,
    Request,
    Residual,
    ResidualMatrix,
    ResidualSums,
    Settle,
    Sketch,
    Squares,
    Triangle,
    Unpack,
    Update,
    WarmStart,
    Whole,
)

NAMES = [name for name, kind in OPTIMIZERS.items() if kind.rule.name == name]


def alone(shapes, name, **options):
    return count(model_of(shapes), name, lambda w, g: Spread(None, ()), options=options)


# ---------------------------------------------------------------- the table of requests


def requests():
    """One of each class that a backend answers, on real numbers."""
    m, n, r = 24, 16, 6
    precision = Precision()
    x, g, momentum = (randn(m, n, seed=i) for i in range(3))
    q, v, p = (torch.linalg.qr(randn(k, r, seed=k))[0] for k in (n, n + 1, m))
    v = v[:n]
    w = Matrix(x, g, {"momentum": momentum, "Q": q}, (m, n), (m, n))
    b, null = Blend(w, "momentum", 1.0, 1.0), torch.zeros(r, dtype=torch.bool)
    t = randn(m, n, seed=9)
    packed = get("torch").answer([Pack(t, 4)])[0]
    gram = (p.double().T @ p.double()) + torch.eye(r)
    update = LowRankUpdate(b, p, v, v, v, q, 0.1, 0.1, 1.0, (1.0, 0.9), None, null)
    return [
        Average(packed[None], n, 4, torch.float32),
        AverageChanges(torch.stack([packed, packed]), t, t, 1, 4, 0.9),
        Columns(randn(n, r), torch.ones(r, dtype=torch.float64), 1e-6, 1e-8),
        CompressedMean(t, ALONE, 1, "residual"),
        CompressedMean(t, ALONE, 1, "residual", t, 0.9),
        Energies(b),
        Factor(randn(n, r), "polar", 1e-6, ALONE, "R"),
        Gram(p),
        Direction(update),
        Direction(replace(update, residual=Residual(alpha=torch.ones((), dtype=torch.float64)))),
        update,
        replace(update, direction=t),
        Map(torch.mul, (t, t)),
        MatMul(t, q, precision),
        NewtonSchulz(t, ((3.0, -4.0, 2.0),), precision),
        Norms(x, t),
        Pack(t, 1),
        PackChange(t, t, 1, 0.9),
        Polar(t, 1e-6),
        Product(b, p),
        ResidualMatrix(b, p, v),
        ResidualSums(b, p, v, torch.ones(n, dtype=torch.float64)),
        Settle(b, q, t @ q, torch.ones((), dtype=torch.float64)),
        Sketch(b, q),
        Squares(t),
        Squares(t, torch.ones(n, dtype=torch.float64)),
        Triangle(gram, 0.0),
        Unpack(packed, n, 4, torch.float32),
        Update(w, t, 0.1, 0.1, {"momentum": t}),
        WarmStart("qr", v, null, q),
    ]


def shapes_of(answer):
    if isinstance(answer, torch.Tensor):
        return tuple(answer.shape), answer.dtype
    return tuple(map(shapes_of, answer)) if type(answer) is tuple else None


def classes(base=Request):
    for kind in base.__subclasses__():
        if kind.__module__.startswith("orthdion.requests"):
            yield kind
            yield from classes(kind)


def test_every_class_of_requests_has_a_cost_or_is_the_runtimes_to_answer():
    assert set(classes()) == set(COSTS) | {Reduce, Gather, Whole}
    assert {type(q) for q in requests()} == set(COSTS)


@pytest.mark.parametrize("q", requests(), ids=lambda q: type(q).__name__)
def test_the_shapes_and_formats_of_planned_answers_are_those_of_real_ones(q):
    planned = cost_of(q)
    assert shapes_of(planned.answer) == shapes_of(get("torch").answer([q])[0])
    assert all(cost.flops >= 0 and cost.bytes >= 0 for cost in planned.costs)


def test_a_request_that_nobody_has_given_a_cost_is_an_error_that_says_where_to():
    class Unheard(Request):
        pass

    def body():
        yield Unheard()

    with pytest.raises(ValueError, match=r"Unheard.*plan/costs\.py"):
        traced(body(), fused=False)


def test_what_a_body_asks_of_a_tensor_without_numbers_is_what_an_ordinary_step_has():
    seen = []

    def body():
        t = torch.ones(3, device="meta")
        seen.append((bool((t > 1).any()), float(t.sum()), int(t.long().sum())))
        seen.append((t + t) @ t)
        yield Map(torch.sub, (t, t))

    trace = traced(body(), fused=False)
    assert seen[0] == (False, 1.0, 1)
    by_kind = Counter()
    for cost, n in trace.work.items():
        by_kind[cost.kind] += n * cost.flops
    assert by_kind["passes"] >= 6  # t + t, and t − t
    assert not trace.rounds[0][0].away


# ---------------------------------------------------------------- flops, states


@pytest.mark.parametrize(("m", "n"), [(64, 48), (48, 64), (40, 40)])
def test_flops_are_those_of_a_count_by_hand(m, n):
    r, d, long = min(m, n) // 4, min(m, n), max(m, n)
    low = {"rank_fraction": 0.25}
    found = alone([(m, n)], "dion", **low).flops_by_kind()
    assert found["product"] == 8 * m * n * r and found["qr"] == 4 * long * r**2
    found = alone([(m, n)], "completed-dion", **low).flops_by_kind()
    assert found["product"] == 12 * m * n * r
    assert found["qr"] == 4 * long * r**2 and found["polar"] == 4 * d * r**2
    assert alone([(m, n)], "completed-dion", residual="linear", **low).flops_by_kind()["product"] == 6 * m * n * r
    whole = count(
        model_of([(m, n)]), "completed-dion", lambda w, g: Spread(None, ()), options=low, fused=False
    ).flops_by_kind()
    assert whole["product"] == 14 * m * n * r  # T is formed for its sums, and again for the update
    found = alone([(m, n)], "muon").flops_by_kind()
    assert found["newton-schulz"] == 20 * d * d * long and found["newton-schulz square"] == 10 * d**3
    found = alone([(m, n)], "dion2", fraction=0.25).flops_by_kind()
    assert found["newton-schulz"] == 20 * r * r * long and found["newton-schulz square"] == 10 * r**3
    found = alone([(m, n)], "sinkgd", iterations=3).flops_by_kind()
    assert found["product"] == 3 * 2 * 2 * m * n


def test_a_fused_elementwise_step_moves_its_operands_once():
    (entry,) = [(c, n) for c, n in alone([(30, 20)], "adamw").work.items() if c.kind == "one pass"]
    # X, M and V read and written, G read, in single precision; the counter is a number.
    assert entry[1] == 1 and entry[0].bytes == 7 * 4 * 600 + 2 * 4


class Small(nn.Module):
    """Matrices of all kinds, and what is none."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.conv = nn.Conv2d(3, 6, 3)
        self.experts = nn.Parameter(torch.randn(4, 6, 10))
        self.head = nn.Linear(8, 11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("formats", [{}, {"momentum_dtype": torch.bfloat16, "q_dtype": torch.bfloat16}], ids=str)
def test_the_memory_of_states_is_that_of_real_ones(name, formats):
    model = Small()
    groups = [dict(g) for g in orthdion.param_groups(model, overrides={"experts": "matrix"})]
    if OPTIMIZERS[name].rule.elementwise:
        groups = [{"params": g["params"], "algorithm": "matrix"} for g in groups]
    real = orthdion.create(name, groups, **formats)
    kept = sum(t.numel() * t.element_size() for s in real.state.values() for t in s.values())
    weights = []
    for g in groups:
        keys = {k: v for k, v in g.items() if k not in ("params", "param_names", "lr")}
        weights += [Weight("", tuple(p.shape), keys) for p in g["params"]]
    planned = count(Model("", tuple(weights)), name, lambda w, g: Spread(None, ()), options=formats)
    assert planned.state_bytes == kept
    assert planned.weight_bytes == sum(4 * p.numel() for p in model.parameters())


# ---------------------------------------------------------------- models, layouts, machines


def test_presets_have_the_published_numbers_of_parameters():
    sizes = {name: make().numel for name, make in PRESETS.items()}
    assert sizes["gpt2"] == 124_439_808
    assert sizes["llama-3-8b"] == 8_030_261_248 and sizes["llama-3-70b"] == 70_553_706_496
    assert round(sizes["moe-256"] / 1e9) == 671


def test_a_transformers_config_and_its_preset_are_the_same_weights():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    read = model_of(config)

    def kinds(model):
        return Counter((w.shape, w.keys["algorithm"], w.tensor if len(w.shape) > 1 else None) for w in model.weights)

    assert kinds(read) == kinds(model_of("llama-3-8b"))
    gpt2 = model_of(transformers.GPT2Config())
    assert kinds(gpt2) - kinds(model_of("gpt2")) == Counter({((1024, 768), "adamw", 0): 1})  # positions stay whole


def test_shapes_and_files_are_models(tmp_path):
    shapes = {"block.up_proj": (12, 4), "block.down_proj": (4, 12), "embed": (9, 4), "norm": (4,)}
    model = model_of(shapes)
    assert [w.keys["algorithm"] for w in model.weights] == ["matrix", "matrix", "adamw", "adamw"]
    assert [w.tensor for w in model.weights] == [0, 1, 0, None]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(shapes))
    assert model_of(str(path)).weights == model.weights and model_of(str(path)).name == "mine"


def test_llama_70b_on_1024_ranks_takes_less_than_ten_seconds():
    orthdion.plan([(8, 8)], ["muon"])  # what torch imports for its first tensor on "meta"
    began = time.process_time()
    plan = orthdion.plan("llama-3-70b", ["completed-dion", "orth-dion", "muon"], ranks=1024, layout="hsdp+tp")
    assert time.process_time() - began < 10.0
    assert len(plan.rows) == 3 and plan.choices[0].optimizer == "completed-dion"


def test_a_layout_lies_as_its_name_says():
    groups = GridGroups()
    weight = Weight("w", (64, 64), tensor=1)
    lies = {name: spread(Layout(name, 64, 4, 2).check(), weight, 5, groups) for name in ("ddp", "hsdp+tp", "tp")}
    assert lies["ddp"].replicas.size == 64 and lies["ddp"].grid is None
    assert lies["hsdp+tp"].grid.sizes == (8, 4, 2) and lies["hsdp+tp"].grid.get_coordinate() == [0, 2, 1]
    assert [getattr(p, "dim", None) for p in lies["hsdp+tp"].placements] == [None, 0, 1]
    assert lies["tp"].grid.sizes == (64,)
    a, b = groups.of(lies["hsdp+tp"].grid, [0]), groups.of(lies["hsdp+tp"].grid, [2])
    assert b.ranks == (4, 5) and a.ranks == tuple(range(5, 64, 8))
    assert groups.product(a, b).ranks == tuple(sorted(r + s for r in range(4, 64, 8) for s in (0, 1)))


def test_more_ranks_keep_less_and_muon_owners_compute_less():
    rows = orthdion.plan("gpt2", ["muon", "completed-dion"], ranks=(1, 8, 32)).rows
    muon = [r for r in rows if r.rule == "muon"]
    assert muon[0].state_bytes > 4 * muon[1].state_bytes > 4 * muon[2].state_bytes
    assert muon[0].bytes_sent == 0 and muon[0].wire == 0.0
    assert muon[0].flops > 4 * muon[1].flops > 4 * muon[2].flops > 0


def test_times_are_a_roofline():
    machine = Hardware(
        "mine", {"product float32": 10.0, "product float64": 5.0}, {"": 4.0, "one pass float32": 8.0}, "a test"
    )
    assert machine.seconds({Cost("product", "float32", 100, 8): 3}) == 30.0
    assert machine.seconds({Cost("product", "float32", 10, 8): 1}) == 2.0
    assert machine.seconds({Cost("polar", "float32", 10, 0): 1}) == 2.0
    assert machine.seconds({Cost("passes", "float32", 10**9, 8): 1, Cost("one pass", "float32", 1, 8): 2}) == 4.0
    with pytest.raises(ValueError, match="link="):
        orthdion.plan([(16, 16)], ["muon"], ranks=2, hardware=machine)
    row = orthdion.plan([(16, 16)], ["muon"], ranks=2, hardware=machine, link=8e-8).rows[0]
    assert row.wire == pytest.approx(row.bytes_sent / 10.0)  # 2·(2 − 1)/2 of them at 10 bytes a second


def test_ddp_counts_the_gradients_of_rules_that_cannot_take_them_apart():
    shapes = [(64, 64)] * 2
    options = {"rank_fraction": 0.125}
    plan = orthdion.plan(shapes, ["completed-dion", "orth-dion", "adamw"], ranks=8, layout="ddp", options=options)
    completed, orth, adamw = plan.rows
    assert completed.backward == 4 * 2 * 64 * 64 and completed.bytes_sent == 0
    assert orth.backward == 0 and orth.sent_by_content["P"] == orth.sent_by_content["R"] == 4 * 2 * 64 * 8
    assert adamw.sent_by_content["gradient"] == 4 * 2 * 64 * 64
    assert completed.wire > orth.wire and "*" in str(plan)


def test_few_bits_are_counted():
    options = {"rank_fraction": 0.125, "residual_bits": 4}
    (row,) = orthdion.plan([(64, 64)], ["completed-dion"], ranks=4, layout="ddp", options=options).rows
    assert row.backward == 0 and 0 < row.sent_by_content["residual"] < 4 * 64 * 64 / 4


def test_a_slow_wire_makes_it_choose_factors():
    shapes = [(512, 512)] * 4
    options = {"rank_fraction": 1 / 16}
    for link, chosen in ((1e-3, "orth-dion"), (1e6, "completed-dion")):
        plan = orthdion.plan(shapes, None, ranks=64, layout="ddp", link=link, options=options)
        assert plan.choices[0].optimizer == chosen, plan
        assert plan.choices[0].why in str(plan)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "lama"}, ValueError, "llama-3-8b"),
        ({"model": 3}, TypeError, "preset"),
        ({"model": {"up": "wide"}}, TypeError, "the shape of up"),
        ({"optimizers": ["muonn"]}, ValueError, "did you mean 'muon'"),
        ({"optimizers": {"a": ("muon", {"moo": 1})}}, TypeError, "moo"),
        ({"layout": "zero"}, ValueError, "layout must be one of"),
        ({"layout": "tp+fsdp"}, ValueError, "layout must be one of"),
        ({"layout": "hsdp+tp", "ranks": 100}, ValueError, "no multiple of 8: give tensor="),
        ({"ranks": 0}, ValueError, "ranks must be a whole number"),
        ({"rank": 8, "ranks": 8}, ValueError, "rank must be one of the 8 ranks"),
        ({"hardware": "h1000"}, ValueError, "h100"),
        ({"link": -1.0}, ValueError, "link must be a positive"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_an_error_that_says_so(arguments, error, words):
    given = {"model": [(8, 8)], "optimizers": ["muon"], "ranks": 8, **arguments}
    with pytest.raises(error, match=words):
        orthdion.plan(**given)


def test_curvadion_decides_as_it_goes_and_is_refused_with_the_reason():
    plan = orthdion.plan([(8, 8)], ["curvadion", "dion"], ranks=2)
    assert "decides in each step" in plan.refused["curvadion"] and [r.rule for r in plan.rows] == ["dion"]
    assert "decides in each step" in str(plan)


def test_a_plan_is_printed_and_is_json():
    plan = orthdion.plan("gpt2", ["orth-dion", "lion"], ranks=8)
    found = json.loads(plan.to_json())
    assert found["rows"][0]["optimizer"] == "orth-dion" and found["rows"][0]["bytes_sent"] > 0
    assert found["rows"][0]["sent_by_content"]["R"] > 0
    text = str(plan)
    assert "data sheet" in text and "gpt2" in text and text.count("orth-dion") >= 2
