"""A matrix that publishes: each row under its own name, and one that cannot be does not stop the others."""

from __future__ import annotations

import json

import pytest
from tests.cli.conftest import lorchestra  # noqa: F401  (the fixture of the command line)
from tests.sweep.test_matrix import hospital, load  # noqa: F401

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import RecipeError
from lorchestra.pipeline.prepare import prepare
from lorchestra.pipeline.rebuilding import check_data, check_sealed, recipe_of
from lorchestra.registry.registry import Registry
from lorchestra.sweep.matrix.execute import run_matrix


@pytest.fixture
def publishing(hospital, tmp_path):  # noqa: F811
    """``publishing(publish, n)``: the table of a recipe that publishes into an empty registry."""

    def write(publish: str, count: int = 2, *rows: str):
        table = hospital(count, "name,data", *rows)
        with (tmp_path / "recipe.yaml").open("a") as out:
            out.write(f"deliver: {{merged: false, publish: {publish}}}\n")
        Registry.open(str(tmp_path / "registry"), create=True).close()
        return table

    return write


@pytest.fixture
def registry(tmp_path):
    Registry.open(str(tmp_path / "registry"), create=True).close()
    with Registry.open(str(tmp_path / "registry")) as opened:
        yield opened


def test_each_row_goes_by_its_own_name(publishing, registry, tmp_path, tiny_dir):
    table = publishing("{registry: registry, alias: staging, gates: ['loss<=9'], tags: [ward], stages: true}")
    result = run_matrix(load(table), directory=tmp_path / "run")
    assert result.unpublished == {}
    assert {name: found.reference for name, found in result.published.items()} == {
        "Ward-0.x": "Ward-0.x@v1", "Ward-1.x": "Ward-1.x@v1",
    }  # fmt: skip
    assert registry.names() == ["Ward-0.x", "Ward-1.x", "hospital-general"]
    told = json.loads((tmp_path / "run" / "departments.json").read_text())["departments"]
    for name in result.published:
        version = registry.resolve(f"{name}@staging")
        manifest = version.manifest
        assert told[name]["published"]["alias"] == f"{name}@staging"
        assert manifest.digest == told[name]["digest"]
        figures = told[name]["tests"][0]["delivered"]
        assert manifest.metrics["loss"].value == figures["estimate"]
        assert manifest.metrics["loss"] == manifest.metrics["clinic.loss"]
        assert manifest.metrics["loss"].sealed == told[name]["sealed"] != ""
        assert manifest.tools["torch"]
        # What is on record makes the very same department, by its data and its sealed test.
        recipe = recipe_of(version, "", tmp_path)
        assert recipe.fusion.weights == {"general": 0.5, "clinic": 1.0}
        prepared = prepare(recipe)
        check_data(version, prepared, tmp_path)
        assert check_sealed(version, prepared) == ["clinic"]
    shared = registry.resolve("hospital-general").manifest.digest
    assert shared in {parent.digest for parent in registry.resolve("Ward-0.x").manifest.parents}
    log = len(registry.history())
    again = run_matrix(load(table), directory=tmp_path / "run")
    assert again.published == result.published
    assert len(registry.history()) == log
    assert Adapter.load(tmp_path / "run" / "departments" / "Ward-0.x" / "adapter").lineage.metrics["loss"]


@pytest.mark.slow
def test_a_row_that_a_gate_refuses_does_not_stop_the_others(lorchestra, publishing, registry):  # noqa: F811
    publishing("{registry: registry, name: med, alias: production, gates: ['not-worse:loss']}")
    args = ("run", "recipe.yaml", "--matrix", "departments.csv", "--run-dir", "run")
    assert lorchestra(*args).code == 0
    assert registry.names() == ["med-Ward-0.x", "med-Ward-1.x"]
    # Now one production version was judged on another test: the gate cannot compare, and refuses.
    other = (
        registry.resolve("med-Ward-0.x").manifest.metrics["loss"].model_copy(update={"sealed": "sha256:" + "0" * 64})
    )
    registry.push("run/departments/Ward-1.x/adapter", "med-Ward-0.x", metrics={"loss": other})
    registry.promote("med-Ward-0.x@v2")
    told = lorchestra(*args, "--set", "stages.clinic.train={max_steps: 3}")
    assert told.code == 1, told.out + told.err
    assert "2 of 2 departments delivered" in told.out
    assert "1 of 2 departments published" in told.out
    assert "med-Ward-0.x@v3 is published. med-Ward-0.x@v3 is not moved" in told.out
    assert registry.resolve("med-Ward-0.x@production").reference == "med-Ward-0.x@v2"


def test_what_cannot_be_published_is_told_before_anything_is_trained(publishing, tmp_path):
    table = publishing("{registry: registry}", 2, "a..b,rows/d0.jsonl", "fine,rows/d1.jsonl")
    with pytest.raises(RecipeError, match=r"'a\.\.b' is no name for an adapter"):
        run_matrix(load(table), directory=tmp_path / "run")
    fine = table.with_name("fine.csv")
    fine.write_text("name,data\nfine,rows/d1.jsonl\n")
    gone = load(fine, "deliver.publish.registry=nowhere")
    with pytest.raises(RecipeError, match=r"deliver\.publish\.registry"):
        run_matrix(gone, directory=tmp_path / "run")
    assert not (tmp_path / "home" / "steps").exists()
