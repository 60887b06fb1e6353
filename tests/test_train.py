"""The main job, as a user runs it: specs, kills, damaged files, wrong arguments."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import orthdion
from orthdion import cli
from orthdion.optim import OPTIMIZERS
from orthdion.train import OptimizerSpec, TrainConfig, compare, train
from orthdion.train import data as corpora
from orthdion.train.compare import best
from orthdion.train.config import PRESETS, learning_rate
from orthdion.train.gpt import GPT
from orthdion.train.loop import Result
from orthdion.train.specs import averages_factors, build, split_specs

TINY = TrainConfig(
    width=16, layers=1, heads=2, context=16, batch=4, steps=12, eval_every=4, eval_windows=8, checkpoint_every=4
)
SHAPE = ["--width", 16, "--layers", 1, "--heads", 2, "--context", 16, "--batch", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """The folder of a run, and its result; tests that write to it copy it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, train(TINY, path=text, out=out)


# ---------------------------------------------------------------- what is learnt

LEARN = TrainConfig(width=32, layers=1, heads=2, context=24, batch=8, steps=100, eval_every=100, eval_windows=64)
#: Where the demo's learning rate is none for a hundred steps.
LEARN_LRS = {
    "dion": 0.04,
    "dion2": 0.08,
    "dion3": 0.08,
    "trasmuon": 0.08,
    "numuon": 0.02,
    "dct-dion": 0.2,
    "mofasgd": 0.05,
    "cosmos": 0.02,
    "frugal": 0.005,
    "demo": 0.005,
    "auon": 0.02,
    "curvadion": 0.04,
    "adamw": 0.01,
    "lion": 0.01,
    "torch.optim:AdamW": 0.01,
}
#: What orthogonalises nothing, or in directions that it does not look for, takes longer.
LEARN_STEPS = {"rmnp": 300, "sinkgd": 300, "auon": 300, "dct-dion": 300}
#: Nats a byte that an optimizer must end below a run whose hidden matrices stay as they were drawn.
MARGIN = 0.05


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A text whose next byte takes several of those before it, and the loss of embeddings, norms and head alone."""
    draw = random.Random(0)
    words = ["".join(draw.choice("ab") for _ in range(8)) for _ in range(8)]
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(" ".join(draw.choice(words) for _ in range(3000)))
    config = LEARN.with_(optimizer="dion", lr=0.0)
    return path, cache(lambda steps: train(config.with_(steps=steps, eval_every=steps), path=path).validation_loss)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "torch.optim:AdamW"])
def test_every_optimizer_ends_below_a_run_with_frozen_hidden_matrices(name, frozen):
    path, loss = frozen
    steps = LEARN_STEPS.get(name, LEARN.steps)
    config = LEARN.with_(optimizer=name, lr=LEARN_LRS.get(name), steps=steps, eval_every=steps)
    result = train(config, path=path)
    assert result.validation_loss < loss(steps) - MARGIN
    assert result.skipped == 0


def test_a_learning_rate_of_zero_freezes_the_hidden_matrices_and_nothing_else(text):
    model = GPT(16, 1, 2, 16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    (optimizer,) = build(model, TINY.with_(optimizer="dion", lr=0.0))
    model(torch.randint(0, 256, (2, 16))).square().sum().backward()
    optimizer.step()
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {n for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2}


def test_a_users_own_rule_is_trained_by_the_command_line(tmp_path, text):
    spec = "my_rules:SignedMomentum:lr=0.003"
    command = [sys.executable, "-m", "orthdion.cli", "train", "--optimizer", spec, "--steps", 30, *SHAPE]
    done = subprocess.run(
        [*map(str, command), "--data", str(text), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,  # where my_rules.py lies
    )
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["config"]["optimizer"] == spec
    assert saved["optimizers"][0]["param_groups"][-1]["algorithm"] in ("signed-momentum-of-tests", "adamw")
    assert "signed-momentum-of-tests" in {g["algorithm"] for g in saved["optimizers"][0]["param_groups"]}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation"] < 3.0 < np.log(256)


# ---------------------------------------------------------------- specs


def test_specs_have_names_classes_literals_and_words():
    spec = OptimizerSpec.parse("orth-dion: feedback=(1, 0.7), right_factor=polar,maximize=false,replicate_mesh=None")
    assert spec.name == "orth-dion" and spec.label == (
        "orth-dion:feedback=(1,0.7),right_factor=polar,maximize=false,replicate_mesh=None"
    )
    assert spec.options == {
        "feedback": (1, 0.7),
        "right_factor": "polar",
        "maximize": False,
        "replicate_mesh": None,
    }
    spec = OptimizerSpec.parse("torch.optim:Muon:matrices_only=true,lr=3e-2")
    assert (spec.name, spec.options) == ("torch.optim:Muon", {"matrices_only": True, "lr": 0.03})
    assert spec.folder == "torch.optim-Muon-matrices_only=true-lr=3e-2"
    assert OptimizerSpec.parse("muon:momentum_dtype=torch.bfloat16").options == {"momentum_dtype": torch.bfloat16}
    assert split_specs(" dion  orth-dion:feedback=(1, 0.7)\nadamw ") == ["dion", "orth-dion:feedback=(1, 0.7)", "adamw"]


@pytest.mark.parametrize(
    ("text", "lr"),
    [
        ("completed-dion", 0.03),
        ("completed-dion:rank_fraction=0.125", 0.03),
        ("completed-dion:rank_fraction=0.125,residual=linear", 0.02),
        ("completed-dion:lr=0.5", 0.5),
        ("orth-dion:feedback=(1.0,0.7)", 0.04),
        ("orth-dion:feedback=pure", 0.045),
        ("torch.optim:Muon:matrices_only=true,nesterov=false", 0.03),
        ("torch.optim:SGD", None),
        ("lion", None),
    ],
)
def test_a_spec_without_a_learning_rate_has_that_of_the_nearest_swept_one(text, lr):
    assert OptimizerSpec.parse(text).lr(None) == lr
    assert OptimizerSpec.parse(text).lr(lr) == lr


def test_two_learning_rates_are_refused():
    with pytest.raises(ValueError, match=r"lr is given twice: 0.1 in optimizer 'dion:lr=0.1', and 0.2"):
        OptimizerSpec.parse("dion:lr=0.1").lr(0.2)


def test_options_of_the_run_are_passed_on_where_the_spec_is_silent():
    config = TINY.with_(rank_fraction=0.5, weight_decay=0.07, seed=3)
    (own,) = build(GPT(16, 1, 2, 16), config.with_(optimizer="orth-dion:weight_decay=0.02"))
    assert own.defaults["rank_fraction"] == 0.5 and own.defaults["weight_decay"] == 0.02
    assert {g["lr"] for g in own.param_groups} == {0.045, config.scalar_lr}
    (muon,) = build(GPT(16, 1, 2, 16), config.with_(optimizer="muon"))
    assert muon.defaults["weight_decay"] == 0.07 and "rank_fraction" not in muon.defaults
    (adamw,) = build(GPT(16, 1, 2, 16), config.with_(optimizer="adamw"))
    assert {g["lr"] for g in adamw.param_groups} == {0.0025}


def test_other_peoples_classes_get_all_parameters_or_the_hidden_matrices():
    model = GPT(16, 1, 2, 16)
    (adamw,) = build(model, TINY.with_(optimizer="torch.optim:AdamW"))
    assert {id(p) for g in adamw.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert all(g["weight_decay"] == 0.0 for g in adamw.param_groups for p in g["params"] if p.ndim == 1)
    sgd, rest = build(model, TINY.with_(optimizer="torch.optim:SGD:matrices_only=true,momentum=0.9"))
    assert {p.shape for g in sgd.param_groups for p in g["params"]} == {(16, 16), (64, 16), (16, 64)}
    assert isinstance(rest, torch.optim.AdamW) and {g["lr"] for g in rest.param_groups} == {TINY.scalar_lr}
    together = [p for o in (sgd, rest) for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in together} == {id(p) for p in model.parameters()}
    (same,) = build(model, TINY.with_(optimizer="orthdion:OrthDion"))
    assert type(same) is orthdion.OrthDion


def test_replicas_keep_their_gradients_where_the_rule_averages_factors():
    kinds = (orthdion.OrthDion, orthdion.Dion, orthdion.CurvaDion, orthdion.CompletedDion, orthdion.Muon)
    assert [averages_factors(kind.rule, {}) for kind in kinds] == [True, True, True, False, False]
    assert averages_factors(orthdion.CompletedDion.rule, {"residual_bits": 1, "lr": 0.01})


# ---------------------------------------------------------------- checkpoints


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, text, orthdion_cli):
    common = ["train", *SHAPE, "--accumulate", 2, "--steps", 120, "--eval-every", 10, "--checkpoint-every", 5]
    common += ["--data", text, "--optimizer", "completed-dion:rank_fraction=0.5"]
    done = orthdion_cli(*common, "--out", tmp_path / "whole")
    assert done.code == 0, done.err
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", "orthdion.cli", *map(str, common), "--out", str(broken)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "2"},  # as here
    )
    deadline = time.monotonic() + 120
    while not (broken / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    interrupted = torch.load(broken / "checkpoint.pt", weights_only=True)["step"]
    assert interrupted < 120
    again = orthdion_cli(*common, "--out", broken, "--resume")
    assert again.code == 0, again.err
    states = [torch.load(tmp_path / d / "checkpoint.pt", weights_only=True) for d in ("whole", "broken")]
    assert all(torch.equal(states[0]["model"][k], states[1]["model"][k]) for k in states[0]["model"])
    rows = [
        [json.loads(line) for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
        for d in ("whole", "broken")
    ]
    assert [(r["step"], r["loss"], r["validation"]) for r in rows[0]] == [
        (r["step"], r["loss"], r["validation"]) for r in rows[1]
    ]
    assert (broken / "loss.png").stat().st_size > 10_000


def test_damaged_foreign_and_missing_checkpoints_are_refused(tmp_path, text, finished):
    with pytest.raises(ValueError, match="no checkpoint"):
        train(TINY, path=text, out=tmp_path / "nothing", resume=True)
    out = shutil.copytree(finished[0], tmp_path / "run")
    whole = (out / "checkpoint.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"not a checkpoint"):
        (out / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="no intact checkpoint"):
            train(TINY, path=text, out=out, resume=True)
        assert (out / "checkpoint.pt").read_bytes() == damaged
    torch.save({"step": 3}, out / "checkpoint.pt")
    with pytest.raises(ValueError, match="not written by orthdion"):
        train(TINY, path=text, out=out, resume=True)
    (out / "checkpoint.pt").write_bytes(whole)
    with pytest.raises(ValueError, match=r"another run, with width=16 \(now 32\)"):
        train(TINY.with_(width=32), path=text, out=out, resume=True)
    with pytest.raises(ValueError, match=r"optimizer='completed-dion' \(now 'dion'\)"):
        train(TINY.with_(optimizer="dion"), path=text, out=out, resume=True)


def test_an_earlier_run_is_kept_unless_it_may_be_overwritten(tmp_path, text, finished, orthdion_cli):
    out = shutil.copytree(finished[0], tmp_path / "run")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    refused = orthdion_cli("train", *SHAPE, "--data", text, "--out", out)
    said = " ".join(refused.err.split())
    assert refused.code == 2 and "holds an earlier run" in said
    assert all(remedy in said for remedy in ("--resume", "another --out", "--overwrite"))
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    (out / "checkpoint.pt").rename(out / "latest.json")  # as of several processes
    assert orthdion_cli("train", *SHAPE, "--data", text, "--out", out).code == 2
    again = orthdion_cli("train", *SHAPE, "--data", text, "--out", out, "--overwrite", "--steps", 2, "--seed", 3)
    assert again.code == 0, again.err
    assert [r["step"] for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())] == [2]
    assert not (out / "latest.json").exists()


def test_another_text_is_refused_and_a_finished_run_resumes_to_its_result(tmp_path, text, finished):
    out, first = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    other = tmp_path / "other.txt"
    other.write_bytes(b"something else entirely, " * 200)
    with pytest.raises(ValueError, match="another text"):
        train(TINY, path=other, out=out, resume=True)
    again = train(TINY, path=text, out=out, resume=True)
    assert again.history == first.history and again.validation_loss == first.validation_loss


# ---------------------------------------------------------------- texts, schedule, model


@pytest.mark.parametrize("make", ["missing", "empty file", "empty folder", "too short", "one file"])
def test_unusable_text_is_refused(tmp_path, make):
    path = tmp_path / "data"
    if make == "empty file":
        path.touch()
    elif make == "empty folder":
        path.mkdir()
    elif make == "too short":
        path.write_text("short")
    elif make == "one file":
        path.mkdir()
        (path / "a.txt").write_text("x" * 1000)
    with pytest.raises(ValueError, match=r"^data: "):
        corpora.load(path, 16)


def test_folders_are_split_by_file_and_binaries_left_out(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i % 26]) * 50 + str(i).encode())
    (tmp_path / "binary").write_bytes(b"\0" * 500)
    c = corpora.load(tmp_path, 16)
    assert len(c.train) > len(c.validation) > 0 and 0 not in c.train and 0 not in c.validation
    a, b = c.batch(4, 16, 1, 2, 0), c.batch(4, 16, 1, 2, 0)
    assert torch.equal(a[0], b[0]) and torch.equal(a[0][:, 1:], a[1][:, :-1])
    assert not torch.equal(a[0], c.batch(4, 16, 1, 3, 0)[0])


def test_the_standard_library_is_always_there():
    c = corpora.load(None, 96)
    assert len(c.train) > 3_000_000 and len(c.validation) > 100_000


def test_compare_starts_alike_writes_figures_and_picks_the_best_rate(tmp_path, text):
    specs = ["adamw", "orth-dion:feedback=(1,0.7)"]
    results = compare(TINY, specs, [0.0, 0.01], path=text, out=tmp_path)
    assert [(r.config.optimizer, r.lr) for r in results] == [(spec, lr) for spec in specs for lr in (0.0, 0.01)]
    assert [r.lr for r in best(results)] == [0.01, 0.01]
    assert {f.name for f in tmp_path.iterdir() if f.is_dir()} == {
        *("adamw-0", "adamw-0.01", "orth-dion-feedback=-1-0.7-0", "orth-dion-feedback=-1-0.7-0.01")
    }
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert [r["validation_loss"] for r in saved["runs"]] == [r.validation_loss for r in results]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        compare(TINY, ["adam"], path=text)
    with pytest.raises(ValueError, match="optimizers must name"):
        compare(TINY, [], path=text)


def test_the_schedule_warms_up_and_ends_near_zero():
    c = TINY.with_(steps=100, warmup=0.1)
    rates = [learning_rate(c, k) for k in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[10] == 1.0 and rates[-1] < 0.001
    assert learning_rate(c.with_(schedule="linear"), 55) == 0.5
    assert learning_rate(c.with_(schedule="constant"), 99) == 1.0


def test_the_model_is_causal_and_its_start_depends_on_the_seed_alone():
    a = GPT(16, 2, 2, 16, seed=1)
    torch.manual_seed(5)
    b = GPT(16, 2, 2, 16, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    x = torch.randint(0, 256, (2, 16))
    y = x.clone()
    y[:, 10:] = 0
    assert torch.allclose(a(x)[:, :10], a(y)[:, :10], atol=1e-6)


def test_compare_on_the_command_line_takes_specs_separated_by_spaces(tmp_path, text, orthdion_cli):
    common = ["--steps", 3, *SHAPE, "--data", text, "--out", tmp_path]
    done = orthdion_cli("compare", "--optimizers", "torch.optim:AdamW  orth-dion:feedback=(1, 0.7)", *common)
    assert done.code == 0, done.err
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert [(r["config"]["optimizer"], r["lr"]) for r in runs] == [
        ("torch.optim:AdamW", 0.0025),
        ("orth-dion:feedback=(1, 0.7)", 0.04),
    ]


def test_presets_have_the_sizes_they_name():
    sizes = {name: (p.width, p.layers, p.rank_fraction) for name, p in PRESETS.items()}
    assert sizes == {"demo": (96, 3, 0.25), "small": (256, 6, 0.25), "base": (768, 12, 0.25)}


def test_a_diverged_run_is_told_and_loses_to_every_other(tmp_path, text):
    results = compare(TINY, ["adamw"], [1e30, 0.01], path=text, out=tmp_path)
    assert not np.isfinite(results[0].validation_loss) and best(results)[0].lr == 0.01
    saved = json.loads(
        (tmp_path / "comparison.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON")
    )
    assert saved["runs"][0]["validation_loss"] is None
    only = compare(TINY, ["adamw"], [1e30], path=text, out=tmp_path / "only")
    assert (tmp_path / "only" / "comparison.png").exists() and len(only) == 1


def test_a_sweep_with_a_mistake_stops_before_the_first_run(tmp_path, text):
    with pytest.raises(ValueError, match="lr must be"):
        compare(TINY, ["adamw"], [0.01, float("nan")], path=text, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_table_of_a_comparison_has_every_figure_whole_in_a_narrow_terminal(monkeypatch):
    from rich.console import Console

    narrow = Console(width=80, record=True, file=io.StringIO())
    monkeypatch.setattr(cli, "console", narrow)
    spec = "torch.optim:Muon:matrices_only=true"
    result = Result(TINY.with_(optimizer=spec), 0.0025, 1.5, 1.41234, 19442.0, 240.401, 1.73, 0, [], [])
    cli._print([result])
    text = narrow.export_text()
    assert all(figure in text for figure in ("0.0025", "1.4123", "19,442", "240.40", "1.73")), text
