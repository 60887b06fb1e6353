"""How the families of models in families.py are routed, as tables: docs/models.md.

``PYTHONPATH=tests python -m models --write`` makes the page anew; tests/test_models.py holds it to this.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family
from torch import nn

import orthdion

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"


def collapsed(name: str) -> str:
    """A parameter's name without the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$", "#", name)


def keys_of(settings: dict[str, Any]) -> str:
    """Group keys but for the algorithm, as text."""
    return ", ".join(f"{k}={v}".replace(" ", "") for k, v in settings.items() if k not in ("algorithm", "weight_decay"))


def expanded(name: str) -> Iterator[str]:
    """All names that one with braces stands for."""
    found = re.search(r"\{([^{}]*)\}", name)
    if found is None:
        yield name
        return
    for each in found[1].split(","):
        yield from expanded(name[: found.start()] + each + name[found.end() :])


def braced(names: list[str]) -> list[str]:
    """The other way round: names that differ in one component are brought together."""
    names = list(dict.fromkeys(names))
    for place in range(-1, -max(len(n.split(".")) for n in names) - 1, -1):
        together: dict[tuple[str, str, int], list[str]] = {}
        for n in names:
            parts = n.split(".")
            if len(parts) < -place or "{" in parts[place]:
                together[n, "", 0] = [n]
                continue
            at = len(parts) + place
            together.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :]), at), []).append(parts[at])
        names = []
        for (before, after, _), middle in together.items():
            one = middle[0] if len(middle) == 1 else "{" + ",".join(middle) + "}"
            names.append(one if one == before else ".".join(part for part in (before, one, after) if part))
    return names


def built(family: Family) -> nn.Module:
    """The family's model, without memory."""
    library = importlib.import_module(family.library)
    with torch.device("meta"):
        return family.build(library)


def is_vector(shape: tuple[int, ...], name: str) -> bool:
    """Vectors, whatever their axes, and biases: neither list of a family has them."""
    return len(shape) < 2 or math.prod(shape) == max(shape) or name.endswith("bias")


def section(family: Family) -> str:
    """A table of what goes where, and why."""
    decisions = orthdion.param_groups(built(family)).decisions
    total = sum(math.prod(d.shape) for d in decisions)
    rows: dict[tuple[str, str, str], list[orthdion.grouping.Decision]] = {}
    for d in decisions:
        why = re.sub(r"; overrides=.*", "", d.reason)
        what = (d.settings.get("algorithm", "frozen"), keys_of(d.settings), why)
        if d.settings and is_vector(d.shape, d.name):
            what = ("adamw", "", "norms, biases and other vectors")
        rows.setdefault(what, []).append(d)
    lines = [f"### {family.name}", "", "| parameters | algorithm | group keys | why | share |", "|---|---|---|---|---|"]
    for (algorithm, keys, why), found in sorted(rows.items(), key=lambda row: row[0][0] != "matrix"):
        share = 100.0 * sum(math.prod(d.shape) for d in found) / total
        names = "<br>".join(f"`{n}`" for n in braced([collapsed(d.name) for d in found]))
        if why == "norms, biases and other vectors":
            names, why = why, "no decay"
        shown = f"`{keys}`" if keys else ""
        lines.append(f"| {names} | {algorithm} | {shown} | {why} | {share:.1f} % |")
    return "\n".join(lines)


def page() -> str:
    """docs/models.md."""
    versions = " and ".join(f"{n} {importlib.import_module(n).__version__}" for n in ("transformers", "timm"))
    lines = [
        "# How models are routed",
        "",
        f"What `orthdion.param_groups(model)` decides for {len(FAMILIES)} families, with {versions}.",
        "The configs are tiny, so embeddings and norms have larger shares here than in real models, and group keys",
        "have small sizes. `PYTHONPATH=tests python -m models --write` makes this page; `tests/test_models.py` holds",
        "it, and the routing, to a list that was written against each model's code.",
        "",
        "`#` stands for the number of a layer, braces for each of what they hold. A head, a router and a transposed",
        "convolution keep weight decay; most of the rest that AdamW steps has none, and the reason says so.",
        "`print(orthdion.param_groups(model))` shows the same for a model of yours, and `overrides=` changes it.",
    ]
    for kind in dict.fromkeys(f.kind for f in FAMILIES):
        lines += ["", f"## {kind.capitalize()}"]
        for family in FAMILIES:
            if family.kind == kind:
                lines += ["", section(family)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page())
