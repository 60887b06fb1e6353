"""The commands that train nothing, and what the command line answers to mistakes."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import orthdion


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
        (["train", "--optimizer", "completed-dion:rank_frac=0.1"], "did you mean 'rank_fraction'"),
        (["train", "--optimizer", "torch.optim:AdamW:betta=1"], "did you mean 'betas'"),
        (["train", "--optimizer", "torch.optim:AdamX"], "did you mean 'Adam'"),
        (["train", "--optimizer", "torch.optim:Muon"], "matrices_only=true"),
        (["train", "--optimizer", "torch.optim:lr_scheduler"], "neither a torch.optim.Optimizer nor"),
        (["train", "--optimizer", "nowhere:Rule"], "nowhere cannot be imported"),
        (["train", "--optimizer", "dion:lr"], "write dion:key=value"),
        (["train", "--optimizer", "dion:lr=(1"], "neither a Python literal nor a word"),
        (["train", "--optimizer", "dion:lr=1,lr=2"], "gives lr twice"),
        (["train", "--optimizer", "dion:lr=1", "--lr", "2"], "lr is given twice"),
        (["compare", "--optimizers", "sgd"], "optimizer must be one of"),
        (["compare", "--optimizers", "orth-dion,muon"], "separate several by spaces"),
        (["compare", "--lrs", "a,b"], "numbers separated by commas"),
        (["plan", "--ranks", "many"], "whole numbers separated by commas"),
        (["plan", "--model", "lama"], "llama-3-8b"),
        (["plan", "--optimizers", "muonn"], "did you mean 'muon'"),
        (["train", "--resume", "--out", "nowhere"], "no checkpoint"),
    ],
)
def test_the_command_line_answers_mistakes_in_one_line(args, words, tmp_path, orthdion_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = orthdion_cli(*args)
    assert done.code == 2
    assert words in " ".join(done.err.split()) and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_doctor_and_list_tell(orthdion_cli):
    done = orthdion_cli("doctor", "--quick")
    assert done.code == 0 and "instruction set" in done.out and "rust: CPU tensors" in done.out
    listed = orthdion_cli("list").out
    assert all(name in listed for name in ("completed-dion", "orth-dion", "dion", "curvadion", "muon", "adamw", "lion"))
    assert "2605.16341" in listed and "12mnr" in listed


def test_plan_prints_a_table_and_a_choice_or_json(orthdion_cli, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"up_proj": [64, 16], "down_proj": [16, 64], "norm": [16]}))
    common = ["plan", "--model", path, "--ranks", "2,4", "--optimizers", "orth-dion:rank_fraction=0.5 muon"]
    done = orthdion_cli(*common)
    assert done.code == 0, done.err
    assert done.out.count("orth-dion:rank_fraction=0.5") >= 2 and "4 ranks: muon" in " ".join(done.out.split())
    rows = json.loads(orthdion_cli(*common, "--json").out)["rows"]
    assert [(r["rule"], r["ranks"]) for r in rows] == [(name, n) for name in ("orth-dion", "muon") for n in (2, 4)]
    assert all(r["sent_by_content"]["flags"] == 3 * 8 for r in rows)  # a number of each parameter


def test_list_shows_equations_and_counted_figures(orthdion_cli):
    assert "2512.13728" in orthdion_cli("list").out
    counted = orthdion_cli("list", "--counted").out
    row = next(line for line in counted.splitlines() if "curvadion" in line)
    assert row.split()[-1] == "varies"


@pytest.fixture
def rule_on_the_cpu():
    """A registered rule that makes its tensors on the CPU, whatever the device of the matrix."""
    from orthdion.core import registry

    @orthdion.register
    @dataclass(frozen=True)
    class OnTheCPU(orthdion.Rule):
        name: ClassVar[str] = "on-the-cpu"

        def step(self, w):
            ones = torch.ones(w.gradient.shape)
            return (yield orthdion.requests.Update(w, w.gradient * ones, self.lr, self.weight_decay, {}))

    yield OnTheCPU.name
    registry._RULES.pop(OnTheCPU.name)


def test_a_rule_that_cannot_be_counted_is_told_and_the_others_are_counted(orthdion_cli, rule_on_the_cpu):
    done = orthdion_cli("list", "--counted")
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert f"not counted: {rule_on_the_cpu}: its step cannot be counted" in said and "device=w.gradient.device" in said
    assert any(line.split()[:1] == ["muon"] for line in done.out.splitlines())
    planned = orthdion.plan([(8, 8)], [rule_on_the_cpu, "muon"])
    assert list(planned.refused) == [rule_on_the_cpu] and {r.rule for r in planned.rows} == {"muon"}


def test_train_and_compare_take_the_same_options_of_a_run(orthdion_cli):
    for command in ("train", "compare"):
        shown = orthdion_cli(command, "--help").out
        assert all(
            f"--{name}" in shown for name in ("preset", "steps", "schedule", "rank-fraction", "checkpoint-every")
        )
