"""The measure of the house: rooms import downwards only, and no room below the rules knows one by name."""

import ast
import re
from pathlib import Path

import pytest

import orthdion
from orthdion.core.registry import rules
from orthdion.optim import OPTIMIZERS

PACKAGE = Path(orthdion.__file__).parent
#: Floors from the ground up; rooms on one floor do not know each other.
FLOORS = [
    {"_text", "_core"},
    {"numerics"},
    {"requests"},
    {"backends", "distributed"},
    {"linalg"},
    {"core"},
    {"optim"},
    {"captured", "checkpoints", "grouping", "functional", "diagnostics"},
    {"create"},
    {"doctor", "integrations", "plan", "selftest", "train"},
    {"cli", "__init__"},
]
FLOOR = {room: k for k, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports, also where it does so late or for types only."""
    here = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            full = [*base, *(node.module.split(".") if node.module else [])]
            found |= {full[0]} if full else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "orthdion":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
    return {name for name in found if name in FLOOR}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards_only(path):
    own = room_of(path)
    for other in imports(path) - {own}:
        assert FLOOR[other] < FLOOR[own], f"{own} imports {other}, which is not below it"


@pytest.mark.parametrize("room", ["requests", "numerics", "backends", "distributed", "core"])
def test_no_room_below_the_rules_knows_one_by_name(room):
    matrix_rules = [name for name, rule in rules().items() if not rule.elementwise] + ["curvadion"]
    pattern = re.compile("|".join(f'== "{re.escape(name)}"|"{re.escape(name)}" ==' for name in matrix_rules))
    for path in (PACKAGE / room).rglob("*.py"):
        assert not pattern.search(path.read_text()), path


def test_every_optimizer_is_one_file_of_at_most_250_lines_and_no_file_has_more_than_500():
    for path in (PACKAGE / "optim").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 250, path
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path


def test_every_optimizer_of_ours_has_a_rule_in_the_registry_and_says_what_it_is():
    for name, kind in OPTIMIZERS.items():
        assert kind.rule is not None and kind.rule.name in rules(), name
        for rule in (kind.rule,):
            assert rule.summary and rule.use and rule.paper and rule.flops and rule.sent, name
        assert "Args:" in (kind.__doc__ or "") or name == "curvadion", name
