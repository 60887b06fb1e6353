"""Real model families are routed as their code says, and docs/models.md is what the script prints."""

import importlib
import importlib.util
import math
import re

import models
import pytest
from families import FAMILIES

import orthdion

#: The least part of the hidden layers' weights that is stepped as matrices.
SHARES = {"DBRX": 0.65, "EnCodec": 0.85, "DAC": 0.85}  # (in, out) below each other; transposed convolutions


def need(*libraries):
    for name in libraries:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_weight_of_a_family_goes_where_its_code_says(family):
    need(family.library)
    found, expected = set(), set()
    hidden = stepped = 0
    for d in orthdion.param_groups(models.built(family)).decisions:
        algorithm = d.settings.get("algorithm")
        if algorithm is None:
            continue
        if models.is_vector(d.shape, d.name):
            assert algorithm == "adamw", d
            continue
        matrix = algorithm == "matrix"
        found.add((models.collapsed(d.name), "matrix" if matrix else "rest", models.keys_of(d.settings)))
        assert not matrix or not d.reason.startswith(("head", "embedding", "table", "norm", "router")), d
        if not d.reason.startswith(("head", "embedding", "table")):
            hidden += math.prod(d.shape)
            stepped += matrix * math.prod(d.shape)
    for names, alternatives in family.matrix.items():
        keys = [k for each in alternatives.split(" | ") for k in models.expanded(each)]
        expected |= {(n, "matrix", k) for n in models.expanded(names) for k in keys}
    expected |= {(n, "rest", "") for names in family.rest for n in models.expanded(names)}
    assert found == expected
    assert stepped >= SHARES.get(family.name, 0.94) * hidden, stepped / hidden


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_familys_groups_make_an_optimizer(family):
    need(family.library)
    orthdion.Muon(orthdion.param_groups(models.built(family).to_empty(device="cpu"), per_head=True))


def test_the_page_is_what_the_script_prints():
    need("transformers", "timm")
    text = models.PAGE.read_text()
    for name, version in re.findall(r"(transformers|timm) (\d[\w.]*\w)", text)[:2]:
        if importlib.import_module(name).__version__ != version:
            pytest.skip(f"the page was made with {name} {version}")
    assert text == models.page(), "PYTHONPATH=tests python -m models --write"


def test_names_are_brought_together_and_taken_apart():
    names = ["a.#.q.weight", "a.#.k.weight", "b.q", "c"]
    together = models.braced(names)
    assert together == ["a.#.{q,k}.weight", "b.q", "c"]
    assert sorted(n for each in together for n in models.expanded(each)) == sorted(names)
