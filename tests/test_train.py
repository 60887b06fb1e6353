"""The main job, as a user runs it: real processes, kills, damaged files, wrong arguments."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from orthdion.train import TrainConfig, compare, train
from orthdion.train import data as corpora
from orthdion.train.compare import best
from orthdion.train.config import PRESETS, learning_rate
from orthdion.train.gpt import GPT
from orthdion.train.recipes import RECIPES

TINY = TrainConfig(
    width=16, layers=1, heads=2, context=16, batch=4, steps=12, eval_every=4, eval_windows=8, checkpoint_every=4
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    return path


def orthdion_cli(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "orthdion.cli", *map(str, args)], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns(name, text):
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    result = train(TINY.with_(optimizer=name, steps=60, lr=0.01), path=text)
    assert result.validation_loss < 3.0 < np.log(256)
    assert len(result.history) == 15 and result.skipped == 0


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, text):
    shape = [
        "--width",
        16,
        "--layers",
        1,
        "--heads",
        2,
        "--context",
        16,
        "--batch",
        4,
        "--accumulate",
        2,
        "--device",
        "cpu",
    ]
    common = ["train", *shape, "--steps", 400, "--eval-every", 50, "--checkpoint-every", 10, "--data", text]
    done = orthdion_cli(*common, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", "orthdion.cli", *map(str, common), "--out", str(broken)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (broken / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    interrupted = torch.load(broken / "checkpoint.pt", weights_only=True)["step"]
    assert interrupted < 400
    again = orthdion_cli(*common, "--out", broken, "--resume")
    assert again.returncode == 0, again.stderr
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


def test_damaged_foreign_and_missing_checkpoints_are_refused(tmp_path, text):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no checkpoint"):
        train(TINY, path=text, out=out, resume=True)
    train(TINY, path=text, out=out)
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
    results = compare(TINY, ["adamw", "orth-dion"], [0.0, 0.01], path=text, out=tmp_path)
    assert [(r.config.optimizer, r.lr) for r in results] == [
        ("adamw", 0.0),
        ("adamw", 0.01),
        ("orth-dion", 0.0),
        ("orth-dion", 0.01),
    ]
    assert [r.lr for r in best(results)] == [0.01, 0.01]
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert [r["validation_loss"] for r in saved["runs"]] == [r.validation_loss for r in results]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="optimizers must be"):
        compare(TINY, ["adam"], path=text)


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


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--preset", "demmo"], "preset must be one of"),
        (["train", "--optimizer", "orthdion"], "did you mean 'orth-dion'"),
        (["train", "--data", "nowhere"], "does not exist"),
        (["train", "--width", "50"], "multiple of twice the heads"),
        (["train", "--steps", "0"], "steps must be"),
        (["train", "--lr", "nan"], "lr must be"),
        (["train", "--seed", "-1"], "seed must be"),
        (["train", "--rank-fraction", "7"], "rank_fraction must be"),
        (["train", "--device", "nonsense"], "cannot be used"),
        (["compare", "--optimizers", "sgd"], "optimizers must be"),
        (["compare", "--lrs", "a,b"], "numbers separated by commas"),
        (["train", "--resume", "--out", "nowhere"], "no checkpoint"),
    ],
)
def test_the_command_line_answers_mistakes_in_one_line(args, words, tmp_path):
    done = orthdion_cli(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_doctor_and_recipes_tell():
    done = orthdion_cli("doctor", "--quick")
    assert done.returncode == 0 and "instruction set" in done.stdout and "rust: CPU tensors" in done.stdout
    assert "muon" in orthdion_cli("recipes").stdout


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


def test_another_text_is_refused_and_a_fresh_start_clears_the_folder(tmp_path, text):
    out = tmp_path / "run"
    train(TINY, path=text, out=out)
    other = tmp_path / "other.txt"
    other.write_bytes(b"something else entirely, " * 200)
    with pytest.raises(ValueError, match="another text"):
        train(TINY, path=other, out=out, resume=True)
    train(TINY.with_(steps=2, eval_every=5, checkpoint_every=5, seed=3), path=text, out=out, progress=lambda *_: None)
    assert [r["step"] for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())] == [2]
    first = train(TINY, path=text, out=out)
    again = train(TINY, path=text, out=out, resume=True)
    assert again.history == first.history and again.validation_loss == first.validation_loss


def test_a_sweep_with_a_mistake_stops_before_the_first_run(tmp_path, text):
    with pytest.raises(ValueError, match="lr must be"):
        compare(TINY, ["adamw"], [0.01, float("nan")], path=text, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
