"""What a run stands on: which sources the lock file pins."""

from __future__ import annotations

import json
import shutil

import pytest

from lorchestra.base.home import home
from lorchestra.errors import SourceError
from lorchestra.pipeline.prepare import prepare
from lorchestra.recipe.recipe import Recipe

COMMIT = "a" * 40


@pytest.fixture
def fetched(tiny_dir):
    """The snapshot of the hub repository org/name, as if it had been downloaded (the suite is offline)."""
    repository = home() / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_dir, repository / "snapshots" / COMMIT)
    return repository / "snapshots" / COMMIT


def written(tmp_path, base):
    rows = [json.dumps({"prompt": f"question {i}?", "completion": "Yes."}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"name: x\nbase: {base}\nstages:\n  - {{name: a, data: data.jsonl}}\n")
    return Recipe.load(file)


@pytest.mark.parametrize("base", ["hf:org/name", "org/name"])
def test_hub_sources_are_locked_however_they_are_written(base, fetched, tmp_path):
    prepare(written(tmp_path, base))
    lock = tmp_path / "recipe.lock.json"
    assert list(json.loads(lock.read_text())["sources"]) == [base], "and a file of the user's own is not"
    lock.write_text(lock.read_text().replace("sha256:", "sha256:0"))
    with pytest.raises(SourceError, match="has changed since"):
        prepare(written(tmp_path, base))


def test_a_base_by_its_path_is_not_locked(tiny_dir, tmp_path):
    prepare(written(tmp_path, tiny_dir))
    assert not (tmp_path / "recipe.lock.json").exists()
