"""One server for all tests of a file that change nothing others look at."""

from __future__ import annotations

import pytest
from tests.console.world import World


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server whose registry is only read."""
    world = World(tmp_path_factory.mktemp("console"))
    yield world
    world.stop()


@pytest.fixture
def world(tmp_path):
    """A server of one's own."""
    world = World(tmp_path)
    yield world
    world.stop()


@pytest.fixture
def keyless(tmp_path):
    """A server without keys."""
    world = World(tmp_path, keyed=False)
    yield world
    world.stop()
