from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "distributed")]
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")

_worlds: dict[int, Any] = {}


@pytest.fixture
def world():
    """Real gloo processes; new ones where a failed test has ended them."""

    from world import World

    def of(size):
        if size not in _worlds or not _worlds[size].alive:
            _worlds[size] = World(size)
        return _worlds[size]

    return of


def pytest_sessionfinish():
    for w in _worlds.values():
        w.close()
