"""The ledger of sealed tests: items are counted, a reader once; a crash costs nothing, two processes lose nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorchestra.data.example import Example, Message
from lorchestra.evaluate.ledger import Ledger, item_digest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there yet" / "sealed.jsonl"


def test_readings_are_counted_by_item_and_reader(path: Path) -> None:
    assert Ledger(path).count(["i", "j"]) == 0
    assert [Ledger(path).enter(["i", "j"], "clinic", reader) for reader in ("one", "two", "one", "three", "two")] == [
        1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert Ledger(path).enter(["k"], "clinic", "one") == 1
    assert [Ledger(path).count(items) for items in (["i", "j"], ["k"], ["none"], [])] == [3, 1, 0, 0]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["items"], line["domain"], line["reader"]) for line in lines] == [
        (["i", "j"], "clinic", "one"),
        (["i", "j"], "clinic", "two"),
        (["i", "j"], "clinic", "three"),
        (["k"], "clinic", "one"),
    ]
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_the_item_read_most_counts(path: Path) -> None:
    """Another limit, another split: what was read before is brought along."""
    Ledger(path).enter(["a", "b"], "small", "one")
    Ledger(path).enter(["b", "c", "d"], "shifted", "two")
    assert Ledger(path).enter(["a", "b", "c", "d", "e"], "large", "three") == 3
    assert [Ledger(path).count([item]) for item in "abcde"] == [2, 3, 2, 2, 1]
    assert Ledger(path).enter(["e", "f"], "new", "three") == 1, "the same reader, an item more"
    assert Ledger(path).sealed(["x", "a", "f", "y"]) == ["a", "f"]


def test_entries_of_old_count_by_their_test(path: Path) -> None:
    """They knew the digest of the whole test alone; its items are learned when it is read again."""
    path.parent.mkdir(parents=True)
    old = [{"digest": "sha256:t", "domain": "clinic", "reader": reader, "time": "…"} for reader in ("one", "two")]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in old))
    assert Ledger(path).count(["a", "b"]) == 0
    assert Ledger(path).count(["a", "b"], "sha256:t") == 2
    assert Ledger(path).enter(["a", "b"], "clinic", "two", "sha256:t") == 2
    assert Ledger(path).enter(["a", "b"], "clinic", "three", "sha256:t") == 3
    assert Ledger(path).count(["b", "c"], "sha256:other") == 3


TURNS = (Message("user", "Does  fever matter?"), Message("assistant", "Yes."))


@pytest.mark.parametrize(
    "same",
    [
        Example(TURNS, group="patient 3", origin="x.jsonl:3"),
        Example((Message("system", "Be brief."), *TURNS)),
        Example((Message("user", "does fever MATTER?"), TURNS[1])),
        Example(TURNS, choices=("Yes.", "No.")),
    ],
)
def test_an_item_is_its_text(same: Example) -> None:
    assert item_digest(same) == item_digest(Example(TURNS))


@pytest.mark.parametrize(
    "other",
    [
        Example((Message("user", "Does cough matter?"), TURNS[1])),
        Example((TURNS[0], Message("assistant", "No."))),
        Example(TURNS, rejected="No."),
        Example((Message("assistant", TURNS[0].content), TURNS[1])),
    ],
)
def test_another_text_is_another_item(other: Example) -> None:
    assert item_digest(other) != item_digest(Example(TURNS))


def test_counting_writes_nothing(path: Path) -> None:
    Ledger(path).count(["test"])
    assert not path.parent.exists()


def test_what_is_there_is_only_added_to(path: Path) -> None:
    Ledger(path).enter(["test"], "clinic", "one")
    before = path.read_bytes()
    Ledger(path).enter(["test"], "clinic", "one")
    assert path.read_bytes() == before
    Ledger(path).enter(["test"], "医学\u2028\n", "two")
    assert path.read_bytes().startswith(before)
    assert Ledger(path).count(["test"]) == 2


def test_a_line_torn_anywhere_costs_no_other(path: Path) -> None:
    """A crash leaves any beginning of the last line; the lines before it count, and the next ones are whole."""
    Ledger(path).enter(["test"], "clinic", "one")
    whole = path.read_bytes()
    Ledger(path).enter(["test"], "clinic", "two")
    second = path.read_bytes()[len(whole) :]
    for kept in range(len(second)):
        path.write_bytes(whole + second[:kept])
        complete = kept == len(second) - 1  # all but its line break
        assert Ledger(path).count(["test"]) == 1 + complete
        assert Ledger(path).enter(["test"], "clinic", "three") == 2 + complete
        assert Ledger(path).enter(["test"], "clinic", "two") == 3
        assert Ledger(path).count(["test"]) == 3


def test_zeros_that_a_power_cut_leaves_are_skipped(path: Path) -> None:
    Ledger(path).enter(["test"], "clinic", "one")
    with path.open("ab") as stream:
        stream.write(b"\0" * 50)
    assert Ledger(path).enter(["test"], "clinic", "two") == 2


PROCESS = """
import sys
from pathlib import Path
from lorchestra.evaluate.ledger import Ledger
sys.stdin.readline()
for i in range(25):
    Ledger(Path(sys.argv[1])).enter(["test"], "clinic", f"{sys.argv[2]} {i}")
    Ledger(Path(sys.argv[1])).enter(["test"], "clinic", f"both {i}")
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
    assert len(readers) == len(set(readers)) == Ledger(path).count(["test"])
    assert set(readers) == {f"{name} {i}" for name in ("a", "b", "c", "both") for i in range(25)}
