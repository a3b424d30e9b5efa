"""One stage on its own: its adapter is put where it was asked for, or told at once why it cannot be."""

from __future__ import annotations

import json
import os

import pytest

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import StorageError, UserError
from lorchestra.pipeline.single import check_place, tune
from lorchestra.recipe.recipe import Recipe


def recipe_of(tiny_dir, directory, rows=60, **stage):
    data = [{"prompt": f"question {i}?", "completion": "Yes." if i % 2 else "No."} for i in range(rows)]
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    values = {
        "name": "notes",
        "base": str(tiny_dir),
        "max_length": 96,
        "split": {"train": 0.8, "validation": 0.2, "test": 0},
        "lora": {"rank": 2},
        "train": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2},
        "stages": [{"name": "notes", "data": "data.jsonl"} | stage],
        "fusion": {"weights": "last"},
    }
    return Recipe.from_dict(values, directory)


def test_the_adapter_is_put_in_its_place_and_comes_from_the_cache_again(tiny_dir, tmp_path):
    tuned = tune(recipe_of(tiny_dir, tmp_path), tmp_path / "out", logs=tmp_path / "logs")
    assert not tuned.cached
    assert tuned.after < tuned.before
    assert tuned.examples["train"] + tuned.examples["validation"] == 60
    written = Adapter.load(tmp_path / "out")
    assert written.digest == tuned.adapter.digest
    assert (written.lineage.name, written.lineage.made_by) == ("notes", "stage")

    again = tune(recipe_of(tiny_dir, tmp_path, name="other"), tmp_path / "out", logs=tmp_path / "logs")
    assert again.cached
    assert again.adapter.digest == tuned.adapter.digest
    assert Adapter.load(tmp_path / "out").lineage.name == "other", "what was there is replaced"
    assert again.training["validation"] == tuned.training["validation"]


def test_too_few_examples_to_hold_some_back(tiny_dir, tmp_path):
    recipe = recipe_of(tiny_dir, tmp_path, rows=2)
    with pytest.raises(UserError, match="validation part is empty"):
        tune(recipe, tmp_path / "out", logs=tmp_path / "logs")
    tuned = tune(recipe, tmp_path / "out", logs=tmp_path / "logs", validation_optional=True)
    assert (tuned.before, tuned.after) == (None, None)
    assert tuned.examples == {"train": 2, "validation": 0, "test": 0}


def test_a_place_that_is_taken_is_told_before_anything_else(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        check_place(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    with pytest.raises(UserError, match="holds no adapter"):
        check_place(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    check_place(tmp_path / "empty")
    check_place(tmp_path / "new" / "deep")
    assert not (tmp_path / "new" / "deep").exists()


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(StorageError, match="no permission"):
        check_place(tmp_path / "out")
