"""Tab offers exactly what an option takes, and the recipes, adapters and models that lie about."""

from __future__ import annotations

import os
import subprocess
import sys
import typing

import pytest

from lorchestra.cli import options, training_flags
from lorchestra.cli.completion import adapters, among, listed_adapters, listed_among, models, recipes
from lorchestra.data.formats import FORMATS
from lorchestra.recipe.recipe import Recipe
from lorchestra.train.settings import LoraSettings, TrainSettings


def words(annotation: typing.Any) -> set[str]:
    """The texts of the ``Literal`` in a type."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return set(inner)
    return set().union(*(words(part) for part in inner if part is not Ellipsis))


def test_the_words_are_those_of_the_settings():
    assert set(training_flags.SCALINGS) == words(LoraSettings.model_fields["scaling"].annotation)
    assert set(training_flags.INITS) == words(LoraSettings.model_fields["init"].annotation)
    assert set(training_flags.SCHEDULES) == words(TrainSettings.model_fields["scheduler"].annotation)
    assert set(training_flags.TRACKERS) == words(TrainSettings.model_fields["report_to"].annotation)
    assert set(options.DTYPES) == words(Recipe.model_fields["dtype"].annotation)
    assert set(options.FORMATS) == {"auto", *FORMATS}


def test_words():
    assert among("lora", "rslora", "constant")("") == ["lora", "rslora", "constant"]
    assert among("lora", "rslora", "constant")("r") == ["rslora"]
    assert listed_among("q_proj", "v_proj")("q_proj,v") == ["q_proj,v_proj"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.yaml", "examples/medical/full.yaml", "examples/.hidden/no.yaml", "base/config.json",
                 "adapters/one/adapter_config.json", "adapters/two/adapter_config.json", "models/small.gguf",
                 "notes/thesis.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_paths(folder):
    assert recipes("") == ["examples/medical/full.yaml", "recipe.yaml"]
    assert recipes("examples/m") == ["examples/medical/full.yaml"]
    assert recipes("./rec") == ["./recipe.yaml"]
    assert recipes(f"{folder}/rec") == [f"{folder}/recipe.yaml"]
    assert adapters("") == ["adapters/one", "adapters/two"]
    assert adapters("adapters/t") == ["adapters/two"]
    assert models("") == ["adapters/one", "adapters/two", "base", "models/small.gguf"]
    assert listed_adapters("adapters/one,adapters/t") == ["adapters/one,adapters/two"]
    assert recipes("nowhere/") == recipes("notes/") == []


def test_a_shell_that_asks_is_answered(folder):
    def complete(line: str) -> set[str]:
        asked = {"_LORCHESTRA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        code = "from lorchestra.cli.app import app; app(prog_name='lorchestra')"
        ended = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | asked,
            capture_output=True,
            text=True,
            check=False,
        )
        return set(ended.stdout.split())

    assert complete("lorchestra ft --scaling ") == set(training_flags.SCALINGS)
    assert complete("lorchestra run ") == {"examples/medical/full.yaml", "recipe.yaml"}
    assert complete("lorchestra chat base -a adapters/o") == {"adapters/one"}
    assert complete("lorchestra eval base --task d") == {"dpo"}
