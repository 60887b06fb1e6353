"""Docs are true where a machine can tell: links lead somewhere, code runs, lines are short."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

import orthdion

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benches/results/README.md"])


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_lines_are_short_links_lead_somewhere_and_code_parses(page):
    text = page.read_text()
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long, long[:2]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for block in blocks(page):
        ast.parse(block)


def test_the_rule_in_the_docs_trains():
    (block,) = [b for b in blocks(ROOT / "docs/architecture.md") if "SignedMomentum" in b]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    names = {"model": model}
    exec(block, names)
    x = torch.randn(64, 8)
    y = x[:, :4].sign()
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        losses.append(float(loss.detach()))
        names["optimizer"].zero_grad()
        loss.backward()
        names["optimizer"].step()
    assert losses[-1] < 0.5 * losses[0]
    assert "signed-momentum" in {i.name for i in orthdion.list_optimizers()}


def test_the_readmes_six_lines_train():
    (block,) = [b for b in blocks(ROOT / "README.md") if 'create("completed-dion"' in b]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

        def loss(self, x):
            value = (self.head(self.body(x).tanh()) - x[:, :4].sign()).square().mean()
            losses.append(float(value.detach()))
            return value

    torch.manual_seed(0)
    losses, batch = [], torch.randn(64, 8)
    exec(block, {"model": Model(), "data": [batch] * 30})
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]


def test_the_readmes_table_has_every_optimizer_and_its_state():
    text = (ROOT / "README.md").read_text().partition("## The whole family")[2]
    for info in orthdion.list_optimizers():
        if info.name in orthdion.optim.OPTIMIZERS:
            row = next((line for line in text.splitlines() if line.startswith("|") and f"`{info.name}`" in line), "")
            assert info.state in row, (info.name, info.state)


def test_the_table_of_relatives_is_what_was_measured():
    losses = json.loads((ROOT / "benches/results/demo-family.json").read_text())["losses"]
    text = (ROOT / "docs/algorithms.md").read_text().partition("## 9d.")[2]
    for name, found in losses.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        best = min(found, key=found.get)
        assert row.split("|")[2:4] == [f" {found[best]:.3f} ", f" {best} "]
        for rate, loss in found.items():
            assert rate == best or f"{loss:.3f} at {rate}" in row
        assert found[best] < 1.686  # AdamW's, as the text says
