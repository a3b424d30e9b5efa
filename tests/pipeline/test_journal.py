"""``events.jsonl``: every line whole, whatever happened to the run before."""

from __future__ import annotations

import json

import pytest

from lorchestra.events import SILENT, Silent
from lorchestra.pipeline.journal import Journal


class Heard(Silent):
    def __init__(self):
        self.events, self.said = [], []

    def event(self, kind, /, **fields):
        self.events.append((kind, fields))

    def say(self, text):
        self.said.append(text)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_everything_is_written_and_passed_on(tmp_path):
    heard = Heard()
    journal = Journal(heard, tmp_path / "events.jsonl")
    journal.event("run", recipe="医学")
    with journal.task("train general", 20, "step") as task:
        task.advance(2, loss=1.5)
    journal.say("two\nlines")
    journal.close()
    found = lines(tmp_path / "events.jsonl")
    assert [line["event"] for line in found] == ["run", "begin", "end", "say"]
    assert found[0]["recipe"] == "医学"
    assert (found[1]["name"], found[1]["total"], found[1]["unit"]) == ("train general", 20, "step")
    assert found[2]["seconds"] >= 0
    assert [line["time"] for line in found] == sorted(line["time"] for line in found)
    assert [kind for kind, _ in heard.events] == ["run", "begin", "end", "say"]
    assert heard.said == ["two\nlines"]


def test_each_line_is_there_at_once(tmp_path):
    journal = Journal(SILENT, tmp_path / "events.jsonl")
    journal.event("run")
    assert [line["event"] for line in lines(tmp_path / "events.jsonl")] == ["run"], "before it is closed"
    journal.close()


def test_a_run_goes_on_below_the_one_before(tmp_path):
    for _ in range(2):
        journal = Journal(SILENT, tmp_path / "events.jsonl")
        journal.event("run")
        journal.close()
    assert len(lines(tmp_path / "events.jsonl")) == 2


@pytest.mark.parametrize("torn", ['{"time": 1, "ev', '{"event": "say", "text": "\u2026'])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "run"}\n' + torn.encode()[:-1])
    journal = Journal(SILENT, path)
    journal.event("run")
    journal.close()
    assert [line["event"] for line in lines(path)] == ["run", "run"]


def test_a_task_that_fails_has_begun_and_not_ended(tmp_path):
    journal = Journal(SILENT, tmp_path / "events.jsonl")
    with pytest.raises(ValueError, match="x"), journal.task("train"):
        raise ValueError("x")
    journal.close()
    assert [line["event"] for line in lines(tmp_path / "events.jsonl")] == ["begin"]
