"""Departments have prototypes of their own prompts, so that a server's ``auto`` tells them apart."""

from __future__ import annotations

import json

import torch
from tests.conftest import make_tiny_model
from tests.serve.gates_world import ids_of, texts_of
from tests.sweep.test_matrix import hospital, load, steps  # noqa: F401

from lorchestra.adapter.adapter import Adapter
from lorchestra.gate import prototypes
from lorchestra.gate.background import PROMPTS, Background
from lorchestra.gate.features import features
from lorchestra.gate.router import Router
from lorchestra.pipeline.prepare import prepare
from lorchestra.registry.registry import Registry
from lorchestra.sweep.matrix.execute import run_matrix

NAMES = ("a", "b")


def read(directory):
    """Verified against the adapter beside it."""
    return prototypes.load(directory, Adapter.load(directory).digest)


def table_of_kinds(hospital, tmp_path):  # noqa: F811
    """Two departments whose prompts have hardly a letter in common, on a stage that has seen both."""
    table = hospital(0, "name,data", *(f"{name},rows/{name}.jsonl" for name in NAMES))
    for name in NAMES:
        (tmp_path / "rows").mkdir(exist_ok=True)
        lines = [json.dumps({"prompt": text, "completion": f"Yes, {name}."}) for text in set(texts_of(name, 80))]
        (tmp_path / "rows" / f"{name}.jsonl").write_text("\n".join(lines))
    return table


def test_they_are_of_its_own_training_prompts_and_a_router_tells_departments_apart(hospital, tmp_path):  # noqa: F811
    matrix = load(table_of_kinds(hospital, tmp_path))
    result = run_matrix(matrix, directory=tmp_path / "run")
    model = make_tiny_model()
    found = {name: read(tmp_path / "run" / "departments" / name / "adapter") for name in NAMES}
    for department, outcome in zip(matrix.departments, result.outcomes, strict=True):
        items = prepare(matrix.recipe_of(department)).data["clinic"].rendered["train"]
        x = features(model, [item.prompt for item in items], prototypes.FEATURES)
        own = found[department.name]
        assert own.prompts == outcome.examples["train"] == len(items)
        torch.testing.assert_close(own.centroids, x.mean(dim=0, keepdim=True), rtol=0, atol=1e-5)
    plain = features(model, [ids_of(text) for text in PROMPTS], prototypes.FEATURES)
    router = Router(found, Background(plain, torch.ones(plain.shape[1])))
    asked = [(name, text) for name in NAMES for text in texts_of(name, 10, seed=5)]
    routed = [router.route(x, 1) for x in features(model, [ids_of(text) for _, text in asked], prototypes.FEATURES)]
    assert [[name for name, _ in one] for one in routed] == [[name] for name, _ in asked]
    # The sum itself, as a run of the recipe finds it in the cache, has those of the shared stage too.
    shared = read(tmp_path / "run" / "adapters" / "general").prompts
    sums = [read(step.parent / "adapter").prompts for step in steps(tmp_path / "home", "fuse")]
    assert sorted(sums) == sorted(shared + own.prompts for own in found.values())


def test_they_are_there_after_a_sum_of_fewer_ranks_and_in_a_registry(hospital, tmp_path):  # noqa: F811
    table = hospital(1)
    with Registry.open(str(tmp_path / "registry"), create=True) as registry:
        publish = "deliver={merged: false, publish: {registry: registry}}"
        result = run_matrix(load(table, "fusion.rank=3", publish), directory=tmp_path / "run")
        assert result.unpublished == {}
        registry.pull("Ward-0.x", tmp_path / "pulled")
    assert read(tmp_path / "pulled").prompts == result.outcomes[0].examples["train"]


def test_one_that_takes_its_own_stage_away_is_not_for_its_prompts(hospital, tmp_path):  # noqa: F811
    result = run_matrix(load(hospital(1), "fusion.weights={general: 1, clinic: -0.5}"), directory=tmp_path / "run")
    assert result.outcomes[0].weights == {"general": 1.0, "clinic": -0.5}
    assert (tmp_path / "run" / "departments" / "Ward-0.x" / "adapter" / "lorchestra.json").is_file()
    assert not list((tmp_path / "run" / "departments").rglob(prototypes.FILE))
