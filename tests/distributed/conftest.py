import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from world import World

_worlds: dict[int, World] = {}


def get_world(size: int) -> World:
    """The session's world of this size; a new one where a failed test has ended it."""
    if size not in _worlds or not _worlds[size].alive:
        _worlds[size] = World(size)
    return _worlds[size]


@pytest.fixture
def world():
    return get_world


def pytest_sessionfinish():
    for w in _worlds.values():
        w.close()
