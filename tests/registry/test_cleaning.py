"""The cache of copies stays within its bound: the least recently used go, and nothing that a living process holds."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from lorchestra.registry.store.cleaning import Copies

SIZE = 1000
NAMES = [f"{k:064x}" for k in range(5)]
HOLDER = """
import sys, time
from pathlib import Path
from lorchestra.registry.store.cleaning import Copies
copies = Copies(Path(sys.argv[1]), None)
copies.hold(sys.argv[2])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def cache(tmp_path):
    """Five copies of 1,000 bytes; the first was used longest ago."""
    for k, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(bytes(SIZE))
        (tmp_path / f"{name}.verified").write_text("{}")
        os.utime(tmp_path / f"{name}.verified", (1000 + k, 1000 + k))
    (tmp_path / "registries").mkdir()
    return tmp_path


def left(cache) -> list[int]:
    found = [k for k, name in enumerate(NAMES) if (cache / name).exists()]
    assert found == [k for k, name in enumerate(NAMES) if (cache / f"{name}.verified").exists()]
    return found


def test_the_least_recently_used_go_until_the_rest_is_within_the_bound(cache):
    copies = Copies(cache, 3 * SIZE)
    assert copies.over() == 2 * SIZE
    assert [copy.name for copy in copies.clean()] == NAMES[:2]
    assert (left(cache), copies.over(), copies.clean()) == ([2, 3, 4], 0, [])
    assert (cache / "registries").is_dir(), "what is no copy stays"
    unbounded = Copies(cache, None)
    assert (unbounded.over(), unbounded.clean()) == (0, [])


def test_what_is_held_stays_and_counts_as_used_when_it_is_let_go(cache):
    copies = Copies(cache, 2 * SIZE)
    for name in (NAMES[0], NAMES[0], NAMES[1]):
        copies.hold(name)
    copies.let_go(NAMES[0])
    copies.clean()
    assert left(cache) == [0, 1], "held twice, let go once"
    copies.let_go(NAMES[0])
    copies.let_go(NAMES[1], used=500.0)
    Copies(cache, SIZE).clean()
    assert left(cache) == [0], "it was used just now"
    Copies(cache, 0).clean()
    assert left(cache) == []


def test_what_is_held_may_be_more_than_the_bound(cache):
    copies = Copies(cache, SIZE)
    for name in NAMES:
        copies.hold(name)
    assert (copies.clean(), copies.over()) == ([], 4 * SIZE)
    copies.close()
    assert len(copies.clean()) == 4


def test_what_another_process_holds_stays_until_it_is_killed(cache):
    words = [sys.executable, "-c", HOLDER, str(cache), NAMES[0]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        os.utime(cache / f"{NAMES[0]}.verified", (1000, 1000))
        Copies(cache, 2 * SIZE).clean()
        assert left(cache) == [0, 4]
        holder.kill()
    Copies(cache, SIZE).clean()
    assert left(cache) == [4]
    assert list((cache / "holders").glob("*.json")) == [], "nothing of the dead is left"


def test_what_another_makes_just_now_stays(cache):
    with FileLock(cache / f"{NAMES[0]}.lock"):
        Copies(cache, 0).clean()
        assert left(cache) == [0]


def test_a_cache_that_is_not_there_is_within_every_bound(tmp_path):
    copies = Copies(tmp_path / "none", 0)
    assert (copies.over(), copies.clean()) == (0, [])


def test_a_copy_without_its_mark_was_used_when_it_was_made(cache):
    (cache / f"{NAMES[0]}.verified").unlink()
    assert cache.joinpath(NAMES[0]).stat().st_mtime > time.time() - 600
    Copies(cache, SIZE).clean()
    assert (cache / NAMES[0]).exists()
