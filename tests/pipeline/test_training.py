"""What a training step depends on, and the mixed baseline: equal parameters, equal tokens, a fair validation."""

from __future__ import annotations

import json
import shutil

import pytest
from tests.conftest import make_tiny_model
from tests.pipeline.test_execute import recipe_dict, write_data
from tests.pipeline.test_prepare import adapter_of

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.home import home
from lorchestra.base.load import choose_device, choose_dtype
from lorchestra.errors import UserError
from lorchestra.pipeline.cache import StepCache
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.prepare import prepare
from lorchestra.pipeline.training import context_of, load_trained, mixed_inputs, stage_digest, stage_inputs
from lorchestra.recipe.recipe import Recipe

DTYPE = str(choose_dtype(choose_device("auto"), "auto"))


@pytest.fixture
def data(tmp_path):
    write_data(tmp_path)
    return tmp_path


def test_the_mixed_baseline_has_the_stages_parameters_and_tokens(data, tiny_dir):
    train = {"max_steps": None, "epochs": 2, "batch_size": 7, "eval_limit": 3, "patience": 1, "learning_rate": 1e-3}
    recipe = Recipe.from_dict(recipe_dict(tiny_dir, train=train), data)
    run(recipe, directory=data / "run")
    note = next(
        line for line in json.loads((data / "run" / "report.json").read_text())["verdict"]["notes"] if "mixed:" in line
    )
    mixed, stages = (
        [int(part.split()[0].replace(",", "")) for part in side.split(": ")[1].split(", ")]
        for side in note.split("(")[1].split("; ")[:2]
    )
    assert mixed[1] == stages[1], "parameters"
    assert mixed[0] == pytest.approx(stages[0], rel=0.03), "tokens, up to half a step"


def test_the_mixed_baseline_is_validated_on_every_stage(data, tiny_dir):
    recipe = Recipe.from_dict(recipe_dict(tiny_dir, train={"max_steps": 4, "eval_limit": 3, "patience": 1}), data)
    prepared = prepare(recipe)
    inputs = mixed_inputs(prepared, 1000)
    firsts = [prepared.data[s.name].rendered["validation"][:3] for s in recipe.stages]
    assert [item.prompt for item in inputs.validation] == [item.prompt for part in firsts for item in part]
    assert inputs.train.eval_limit is None
    assert inputs.train.patience is None
    assert all(len(item.branches) == 1 for item in inputs.items), "of a pair, the chosen answer"


def test_stages_of_different_modules_have_no_mixed_baseline(data, tiny_dir):
    values = recipe_dict(tiny_dir)
    values["stages"][0]["lora"] = {"target_modules": ["q_proj"]}
    with pytest.raises(UserError, match="target_modules"):
        run(Recipe.from_dict(values, data), directory=data / "run")
    assert not (data / "home" / "steps").exists(), "told before anything is trained"


def test_a_base_that_computes_otherwise_is_another_step(data, tiny_dir):
    other = data / "other"
    shutil.copytree(tiny_dir, other)
    config = json.loads((other / "config.json").read_text())
    digests = []
    for change in ({}, {"transformers_version": "0.0"}, {"rms_norm_eps": 0.5}):
        (other / "config.json").write_text(json.dumps(config | change))
        prepared = prepare(Recipe.from_dict(recipe_dict(other), data))
        inputs = stage_inputs(prepared, prepared.recipe.stages[0], {})
        digests.append(stage_digest(prepared, inputs, "cpu", "torch.float32"))
    assert digests[0] == digests[1] != digests[2]


def test_a_stage_of_another_name_in_another_recipe_is_the_same_step(data, tiny_dir):
    """Nothing is trained again, and the lineage says what the recipe at hand says."""
    values = recipe_dict(tiny_dir, evaluate={"samples": 0}, deliver={"merged": True})
    first = run(Recipe.from_dict(values, data), directory=data / "first")
    (data / "clinic.jsonl").rename(data / "notes.jsonl")
    names = {"general": "terms", "clinic": "notes", "preference": "style"}
    values["name"] = "renamed"
    values["stages"][1]["data"] = "notes.jsonl"
    for stage in values["stages"]:
        stage["name"] = names[stage["name"]]
        stage["context"] = {names[name]: member for name, member in stage.get("context", {}).items()}
    values["stages"][0]["lora"] = {"sigma": 0.5}
    shutil.copytree(data / "first" / "adapters" / "general", data / "second" / "adapters" / "gone")
    second = run(Recipe.from_dict(values, data), directory=data / "second")
    steps = {step["name"]: step for step in json.loads((data / "second" / "plan.json").read_text())["steps"]}
    assert all(steps[name]["cached"] for name in names.values())
    assert [second.digests[new] for new in names.values()] == [first.digests[old] for old in names]

    recipe = Recipe.from_dict(values, data)
    prepared = prepare(recipe)
    adapters = {}
    for stage in recipe.stages:
        inputs = stage_inputs(prepared, stage, context_of(recipe, stage, adapters))
        step = StepCache(home() / "steps").lookup("stage", stage_digest(prepared, inputs, "cpu", DTYPE))
        found = load_trained(step, inputs, prepared.base)
        adapters[stage.name] = found.adapter
    lineage = adapters["style"].lineage
    assert lineage.name == "style"
    assert [(p.name, p.coefficient) for p in lineage.context] == [("terms", 0.5), ("notes", 1.0)]
    assert [p.digest for p in lineage.context] == [adapters["terms"].digest, adapters["notes"].digest]
    assert list(adapters["notes"].lineage.data) == ["notes.jsonl"]
    assert set(found.training["history"][0]["context"]) == {"terms", "notes"}
    assert adapters["terms"].lineage.settings["lora"]["sigma"] == 0.5
    own = {path.name: Adapter.load(path) for path in (data / "second" / "adapters").iterdir()}
    assert {name: adapter.digest for name, adapter in own.items()} == {name: second.digests[name] for name in own}
    assert own.keys() == {*names.values()}, "and none of a stage that the recipe does not have"
    assert own["style"].lineage == lineage
    for delivered in (second.adapter, second.merged):
        told = json.loads((delivered / "lorchestra.json").read_text())["lineage"]
        assert {parent["name"] for parent in told["parents"]} <= set(names.values()), delivered
        assert told["name"] == "renamed"


def test_stages_start_apart(data, tiny_dir):
    """The same data after another stage's adapter, or other data, is another start; order and names are not."""
    values = recipe_dict(tiny_dir)
    values["stages"] = [
        {"name": "a", "data": "general.jsonl"},
        {"name": "b", "data": "clinic.jsonl"},
        {"name": "c", "data": "general.jsonl", "context": {"old": 1.0}},
    ]
    adapter_of(make_tiny_model()).save(data / "old")
    values["adapters"] = {"old": "old"}

    def salts(values):
        recipe = Recipe.from_dict(values, data)
        prepared = prepare(recipe)
        found = [stage_inputs(prepared, s, context_of(recipe, s, prepared.adapters)) for s in recipe.stages]
        return {inputs.name: inputs.salt for inputs in found}

    first = salts(values)
    assert len(set(first.values())) == 3
    values["stages"].reverse()
    assert salts(values) == first
