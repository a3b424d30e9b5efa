"""Eight processes at once over one registry: nothing is lost, nothing is there twice, and one history tells it all."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

from lorchestra.registry.registry import Registry

PROCESSES, EACH = 8, 2


def test_eight_processes_push_and_promote_while_a_ninth_collects(registry_url, make, zygote):
    same = make(999)
    directories = [[make(10 * k + turn) for turn in range(EACH)] for k in range(PROCESSES)]
    child = zygote(Path(__file__).with_name("workers.py"), sys.executable)
    told = {"what": "together", "url": registry_url, "same": str(same)}
    child.child(json.dumps({**told, "directories": [[str(path) for path in mine] for mine in directories]}))
    assert child.ended() == 0
    with Registry.open(registry_url) as registry:
        found = registry.versions("clinic")
        assert sorted(version.manifest.number for version in found) == list(range(1, PROCESSES * EACH + 1))
        pushed = {_digest(path) for mine in directories for path in mine}
        assert {version.manifest.digest for version in found} == pushed
        (one,) = registry.versions("same")
        assert one.manifest.digest == _digest(same)

        history = registry.history()[::-1]
        assert [entry.id for entry in history] == list(range(1, len(history) + 1))
        assert [entry.action for entry in history].count("push") == PROCESSES * EACH + 1
        moves = [entry for entry in history if entry.action == "promote"]
        assert len(moves) == PROCESSES * EACH
        assert sorted(entry.after for entry in moves) == sorted(version.reference for version in found)
        for before, after in pairwise(moves):
            assert after.before == before.after, "each saw the one before"
        assert {entry.actor for entry in moves} == {f"worker-{k}" for k in range(PROCESSES)}
        assert registry.resolve("clinic").reference == moves[-1].after
        assert registry.verify() == []


def _digest(directory):
    return json.loads((directory / "lorchestra.json").read_text())["digest"]
