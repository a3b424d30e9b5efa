"""The ledger of sealed tests: a reader counts once, a crash costs nothing, two processes lose nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorchestra.evaluate.ledger import Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there yet" / "sealed.jsonl"


def test_readings_are_counted_by_test_and_reader(path: Path) -> None:
    assert Ledger(path).count("test") == 0
    assert [Ledger(path).enter("test", "clinic", reader) for reader in ("one", "two", "one", "three", "two")] == [
        1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert Ledger(path).enter("another test", "clinic", "one") == 1
    assert [Ledger(path).count(digest) for digest in ("test", "another test", "none")] == [3, 1, 0]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["digest"], line["domain"], line["reader"]) for line in lines] == [
        ("test", "clinic", "one"),
        ("test", "clinic", "two"),
        ("test", "clinic", "three"),
        ("another test", "clinic", "one"),
    ]
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_counting_writes_nothing(path: Path) -> None:
    Ledger(path).count("test")
    assert not path.parent.exists()


def test_what_is_there_is_only_added_to(path: Path) -> None:
    Ledger(path).enter("test", "clinic", "one")
    before = path.read_bytes()
    Ledger(path).enter("test", "clinic", "one")
    assert path.read_bytes() == before
    Ledger(path).enter("test", "医学\u2028\n", "two")
    assert path.read_bytes().startswith(before)
    assert Ledger(path).count("test") == 2


def test_a_line_torn_anywhere_costs_no_other(path: Path) -> None:
    """A crash leaves any beginning of the last line; the lines before it count, and the next ones are whole."""
    Ledger(path).enter("test", "clinic", "one")
    whole = path.read_bytes()
    Ledger(path).enter("test", "clinic", "two")
    second = path.read_bytes()[len(whole) :]
    for kept in range(len(second)):
        path.write_bytes(whole + second[:kept])
        complete = kept == len(second) - 1  # all but its line break
        assert Ledger(path).count("test") == 1 + complete
        assert Ledger(path).enter("test", "clinic", "three") == 2 + complete
        assert Ledger(path).enter("test", "clinic", "two") == 3
        assert Ledger(path).count("test") == 3


def test_zeros_that_a_power_cut_leaves_are_skipped(path: Path) -> None:
    Ledger(path).enter("test", "clinic", "one")
    with path.open("ab") as stream:
        stream.write(b"\0" * 50)
    assert Ledger(path).enter("test", "clinic", "two") == 2


PROCESS = """
import sys
from pathlib import Path
from lorchestra.evaluate.ledger import Ledger
sys.stdin.readline()
for i in range(25):
    Ledger(Path(sys.argv[1])).enter("test", "clinic", f"{sys.argv[2]} {i}")
    Ledger(Path(sys.argv[1])).enter("test", "clinic", f"both {i}")
"""


def test_processes_at_once_lose_nothing_and_count_nothing_twice(path: Path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", PROCESS, str(path), name], stdin=subprocess.PIPE, text=True)

    processes = [start(name) for name in ("a", "b", "c")]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, 0, 0]
    readers = [json.loads(line)["reader"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(readers) == len(set(readers)) == Ledger(path).count("test")
    assert set(readers) == {f"{name} {i}" for name in ("a", "b", "c", "both") for i in range(25)}
