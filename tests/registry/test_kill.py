"""kill -9 at any point of push, promote, rollback and gc: the registry is whole, always.

Twelve times here; ``pytest -m slow`` does it ``LORCHESTRA_KILLS`` times (100).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from lorchestra.registry.mistakes import NoRegistryError
from lorchestra.registry.registry import Registry

KILLS = int(os.environ.get("LORCHESTRA_KILLS", "100"))


def test_a_killed_process_leaves_the_registry_whole(registry_url, make, zygote, tmp_path):
    _kill(6, registry_url, make, zygote, tmp_path)


@pytest.mark.slow
def test_a_hundred_killed_processes_leave_the_registry_whole(registry_url, make, zygote, tmp_path):
    _kill(KILLS, registry_url, make, zygote, tmp_path)


def _kill(times, url, make, zygote, tmp_path):
    directories = [str(make(seed)) for seed in range(5)]
    worker = zygote(Path(__file__).with_name("workers.py"), sys.executable)
    chance, grown, rounds = random.Random(times), 0, tmp_path / "rounds"
    told = {"what": "forever", "url": url, "directories": directories, "rounds": str(rounds)}
    for turn in range(times):
        rounds.write_bytes(b"")
        child = worker.child(json.dumps({**told, "seed": turn}))
        whole = 0 if turn == 0 else chance.randrange(3)  # rounds of work that it may finish, then a part of one
        began = time.monotonic()
        while rounds.stat().st_size < whole:
            assert time.monotonic() - began < 120, "it does nothing"
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(worker.ended()), "it was not ended by anything else before"
        generation = _check(url, tmp_path / f"pulled-{turn}")
        assert generation >= grown + whole, "what was committed is kept"
        grown = generation
    assert grown > 0


def _check(url, place):
    try:
        registry = Registry.open(url)
    except NoRegistryError:  # killed before it was made
        return 0
    with registry:
        assert registry.verify() == []
        for blob in Path(registry.blobs.shown).glob("sha256/*/*"):
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name, "half a blob under a final name"
        for state in registry.aliases():
            registry.pull(f"{state.name}@{state.alias}", place / state.name / state.alias)
        return registry.generation()
