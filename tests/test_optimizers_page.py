"""The table of all optimizers is what its generator makes, and says of each what it is."""

import importlib.util
import json
from pathlib import Path

import pytest

import orthdion
from orthdion.optim import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("optimizers_page", ROOT / "tools" / "optimizers_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_generator_makes(generator):
    made = generator.page()
    assert (ROOT / "docs" / "optimizers.md").read_text() == made, "run python tools/optimizers_page.py"
    rows = [line for line in made.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(OPTIMIZERS)
    assert len({row.count("|") for row in rows}) == 1


def test_the_predictions_in_the_docs_are_those_that_were_measured():
    rows = json.loads((ROOT / "benches" / "results" / "cpu-predicted.json").read_text())["rows"]
    text = (ROOT / "docs" / "plan.md").read_text()
    for row in rows:
        figures = f"{row['measured_ms']:.0f} | {row['predicted_ms']:.0f} | {row['ratio']:.2f}"
        assert f"| `{row['optimizer']}` | {figures} |" in text
        assert row["ratio"] == pytest.approx(row["predicted_ms"] / row["measured_ms"], rel=1e-9)
        assert row["good"] == (abs(row["ratio"] - 1) <= 0.25)
        assert sum(row["predicted_ms_by_kind"].values()) == pytest.approx(row["predicted_ms"], rel=1e-6)


def test_figures_are_the_algebras(generator):
    rows = {row.info.name: row for row in generator.catalogue()}
    assert rows["muon"].state == 1.0 and rows["lion"].state == 1.0 and rows["lion"].sharded < 1e-4
    r, numbers = 96, sum(m * n for m, n in [(768, 768)] * 4 + [(3072, 768), (768, 3072)])
    thin = 6 * 768 * r  # Q of each matrix, along its shorter side
    assert rows["orth-dion"].state == pytest.approx(1 + thin / numbers, rel=1e-12)
    factors = (4 * 1536 + 2 * 3840) * r / numbers
    assert factors < rows["orth-dion"].replicas < factors * 1.01
    assert rows["muon"].replicas == pytest.approx(1.0, rel=1e-5) and rows["completed-dion"].replicas == 1.0
    assert rows["curvadion"].sharded is None and rows["curvadion"].state == rows["dion"].state


def test_an_optimizer_that_does_more_than_its_rule_says_so_itself():
    known = {info.name: info for info in orthdion.list_optimizers()}
    curvadion, dion = known["curvadion"], known["dion"]
    assert curvadion.paper == "arXiv 2512.13728" != dion.paper
    assert curvadion.use != dion.use and curvadion.summary != dion.summary and curvadion.sent != dion.sent
    assert curvadion.state == dion.state and dion.paper == "arXiv 2504.05295"
