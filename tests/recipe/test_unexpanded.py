"""What the environment fills into a recipe's sources is said and written nowhere."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys

import pytest

from lorchestra.errors import LorchestraError
from lorchestra.events import Silent
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.plan import plan
from lorchestra.pipeline.prepare import prepare
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sources import masking
from lorchestra.recipe.unexpanded import Unexpanded, as_written, masked

SECRET = "s3cr3t-t0ken-1f9"


def test_values_give_way_to_their_names(monkeypatch):
    monkeypatch.setenv("LORCHESTRA_A", "abc-def")
    monkeypatch.setenv("LORCHESTRA_AB", "abc-def-ghi")
    monkeypatch.setenv("USER", "al")
    monkeypatch.setenv("LORCHESTRA_UNUSED", "zebra")
    mask = masking(["${LORCHESTRA_A}/x", "y/${LORCHESTRA_AB}.${USER}", "${LORCHESTRA_UNSET}"])
    assert mask("/abc-def-ghi/abc-defs") == "/${LORCHESTRA_AB}/${LORCHESTRA_A}s", "the longer first, inside words too"
    assert mask("al: all is normal, al") == "${USER}: all is normal, ${USER}", "short values are words of their own"
    assert mask("zebra") == "zebra", "only what the recipe names"
    assert masking(["plain.jsonl"])("abc-def") == "abc-def"
    assert masked(mask, {"abc-def": ["abc-def", 1, None, ("al",)]}) == {
        "${LORCHESTRA_A}": ["${LORCHESTRA_A}", 1, None, ["${USER}"]]
    }


def test_a_directory_is_known_by_what_it_resolves_to(monkeypatch, tmp_path):
    (tmp_path / "real-place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real-place")
    monkeypatch.setenv("LORCHESTRA_D", f"{tmp_path}/link/")
    mask = masking(["${LORCHESTRA_D}x.jsonl"])
    for path in (tmp_path / "link", tmp_path / "real-place"):
        assert mask(f"there is no {path}/x.jsonl").startswith("there is no ${LORCHESTRA_D}")
    monkeypatch.setenv("LORCHESTRA_D", "/")
    assert masking(["${LORCHESTRA_D}"])("a/b") == "a/b", "the root is no secret"


def test_a_reporter_hears_names(monkeypatch):
    monkeypatch.setenv("LORCHESTRA_A", SECRET)
    heard = []

    class Hears(Silent):
        def task(self, name, total=None, unit="it"):
            heard.append(name)
            return super().task(name, total, unit)

        def event(self, kind, /, **fields):
            heard.append(fields)

        def say(self, text):
            heard.append(text)

    reporter = Unexpanded(Hears(), masking(["${LORCHESTRA_A}"]))
    with reporter.task(f"fetch {SECRET}"):
        reporter.event("data", source=f"{SECRET}/x", rows=[{"a": SECRET}])
        reporter.say(f"read {SECRET}")
    assert SECRET not in str(heard)
    assert str(heard).count("${LORCHESTRA_A}") == 4


def test_an_error_keeps_its_class_and_loses_the_value(monkeypatch):
    monkeypatch.setenv("LORCHESTRA_A", SECRET)
    recipe = Recipe.from_dict({"name": "r", "base": "b", "stages": [{"name": "s", "data": "${LORCHESTRA_A}/x.jsonl"}]})

    class OwnError(LorchestraError):
        def __init__(self, message, part):
            super().__init__(message)
            self.part = part

    @as_written
    def fails(recipe, reporter=None):
        raise OwnError(f"{SECRET}/x.jsonl is damaged", 7)

    with pytest.raises(OwnError, match=r"^\$\{LORCHESTRA_A\}/x\.jsonl is damaged$") as caught:
        fails(recipe)
    assert caught.value.part == 7


@pytest.fixture
def place(tmp_path, tiny_dir, monkeypatch):
    """Base, adapter and data below a directory whose name is the secret; a file is called by it, too."""
    where = tmp_path / SECRET
    shutil.copytree(tiny_dir, where / "tiny")
    rows = [{"prompt": f"question {i}?", "completion": f"Answer {i}."} for i in range(40)]
    (where / f"{SECRET}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("LORCHESTRA_PLACE", str(where))
    monkeypatch.setenv("LORCHESTRA_FILE", SECRET)
    return where


def values(**changes):
    return {
        "name": "hidden",
        "base": "${LORCHESTRA_PLACE}/tiny",
        "max_length": 96,
        "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "lora": {"rank": 2},
        "train": {"max_steps": 2, "batch_size": 4},
        "stages": [{"name": "one", "data": "${LORCHESTRA_PLACE}/${LORCHESTRA_FILE}.jsonl"}],
        "fusion": {"candidates": 2, "validation_limit": 2},
        "evaluate": {"test_limit": 2, "samples": 1, "sample_tokens": 2},
    } | changes


class Prints(Silent):
    def event(self, kind, /, **fields):
        print(kind, fields)

    def say(self, text):
        print(text)


def told(directory):
    """Every file of ours that has the secret in it."""
    files = [p for p in directory.rglob("*") if p.is_file()]
    return [p.relative_to(directory) for p in files if SECRET.encode() in p.read_bytes()]


def test_a_whole_run_keeps_it_to_itself(place, tmp_path, capsys):
    recipe = Recipe.from_dict(values(), tmp_path / "recipes")
    result = run(recipe, directory=tmp_path / "run", reporter=Prints())
    plan(recipe)
    out = capsys.readouterr()
    assert SECRET not in out.out + out.err
    assert "${LORCHESTRA_PLACE}" in out.out, "it was said under its name"
    assert told(tmp_path / "run") == []
    assert told(tmp_path / "home") == []
    note = json.loads((result.adapter / "lorchestra.json").read_text())
    assert note["base"]["name"] == "${LORCHESTRA_PLACE}/tiny"
    assert "${LORCHESTRA_PLACE}" in (tmp_path / "run" / "report.html").read_text()


BROKEN = {
    "no such base": lambda place: shutil.rmtree(place / "tiny"),
    "a damaged base": lambda place: (place / "tiny" / "model.safetensors").write_bytes(b"x"),
    "a damaged configuration": lambda place: (place / "tiny" / "config.json").write_text("{"),
    "no tokenizer": lambda place: (place / "tiny" / "tokenizer.json").unlink(),
    "no data": lambda place: (place / f"{SECRET}.jsonl").unlink(),
    "empty data": lambda place: (place / f"{SECRET}.jsonl").write_text(""),
    "damaged data": lambda place: (place / f"{SECRET}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{'),
    "strange data": lambda place: (place / f"{SECRET}.jsonl").write_text('{"a": 1}\n'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_message_tells_it(place, tmp_path, name, capsys):
    recipe = Recipe.from_dict(values(), tmp_path / "recipes")
    BROKEN[name](place)
    for act in (lambda: prepare(recipe, Prints()), lambda: run(recipe, directory=tmp_path / "run", reporter=Prints())):
        with pytest.raises(LorchestraError) as caught:
            act()
        assert SECRET not in str(caught.value)
    with contextlib.suppress(LorchestraError):
        plan(recipe)
    out = capsys.readouterr()
    assert SECRET not in out.out + out.err
    assert told(tmp_path / "run") == []


def test_the_command_line_does_not_tell_it_either(place, tmp_path):
    (place / f"{SECRET}.jsonl").unlink()
    (tmp_path / "recipe.yaml").write_text(json.dumps(values()))
    for verb in ("check", "plan", "run"):
        made = subprocess.run(
            [sys.executable, "-c", "from lorchestra.cli import main; main()", verb, "recipe.yaml"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 2
        assert SECRET not in made.stdout + made.stderr
        assert "there is no ${LORCHESTRA_PLACE}/${LORCHESTRA_FILE}.jsonl" in made.stderr
