"""The refit: the same training on more examples, stopped where the best checkpoint was, judged beside the first."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.digest import adapter_digest
from lorchestra.base.load import load_base
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.plan import plan
from lorchestra.pipeline.prepare import prepare
from lorchestra.pipeline.refitting import acting, refit_inputs
from lorchestra.recipe.recipe import Recipe
from lorchestra.train.stage import train_stage


def write_data(directory):
    chance = random.Random(0)
    words = ["fever", "cough", "pain", "rash", "nausea", "swelling", "fatigue", "headache", "dizzy", "cramps"]
    for name in ("general", "clinic", "law"):
        with (directory / f"{name}.jsonl").open("w") as out:
            for i in range(40):
                ask = f"{name} {i}: {chance.choice(words)} {chance.choice(words)}?"
                out.write(json.dumps({"prompt": ask, "completion": f"{'Yes' if i % 2 else 'No'}, {name}."}) + "\n")


def values(tiny_dir, **changes):
    return {
        "name": "tiny",
        "base": str(tiny_dir),
        "dtype": "float32",
        "device": "cpu",
        "max_length": 96,
        "split": {"train": 0.5, "validation": 0.25, "test": 0.25},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 0.05, "eval_every": 2},
        "stages": [
            {"name": "general", "data": "general.jsonl"},
            {"name": "law", "data": "law.jsonl", "epochs": 1.5},
            {
                "name": "clinic",
                "data": "clinic.jsonl",
                "context": {"general": {"weight": 1.0, "schedule": "linear", "to": 0.5}},
            },
        ],
        "fusion": {"weights": {"clinic": 0.7}, "refit": True},
        "evaluate": {"test_limit": 6, "samples": 0},
        "deliver": {"merged": False},
    } | changes


@pytest.fixture(scope="module")
def refitted(tmp_path_factory, tiny_dir):
    """A recipe with a refit, what was planned before, and its run."""
    where = tmp_path_factory.mktemp("refit")
    write_data(where)
    recipe = Recipe.from_dict(values(tiny_dir), where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORCHESTRA_HOME", str(where / "home"))
        before = plan(recipe)
        result = run(recipe, directory=where / "run")
    report = json.loads((where / "run" / "report.json").read_text())
    return where, recipe, before, result, report


@pytest.fixture
def same_home(refitted, monkeypatch):
    monkeypatch.setenv("LORCHESTRA_HOME", str(refitted[0] / "home"))


def trained(refitted):
    """Adapters and training notes of the first training, from the cache."""
    where, recipe = refitted[0], refitted[1]
    steps = {row["name"]: row for row in json.loads((where / "run" / "plan.json").read_text())["steps"]}
    found = {}
    for stage in recipe.stages:
        directory = where / "home" / "steps" / f"stage-{steps[stage.name]['digest'][:24]}"
        training = json.loads((directory / "training.json").read_text())
        found[stage.name] = (Adapter.load(directory / "adapter"), training)
    return found


def test_which_stages_act(refitted):
    recipe = refitted[1]
    assert [s.name for s in acting(recipe, {"clinic": 0.7})] == ["general", "clinic"]
    assert [s.name for s in acting(recipe, {"clinic": 0.0, "law": -1.0})] == ["law"]


def test_the_run_trains_those_again_and_delivers_them_at_the_chosen_weights(refitted):
    _, recipe, _, result, report = refitted
    assert [step["name"] for step in report["steps"]][4:6] == ["refit:general", "refit:clinic"]
    told = {row["name"]: row for row in report["fusion"]["refit"]}
    assert list(told) == ["general", "clinic"]
    delivered = Adapter.load(result.adapter)
    (parent,) = delivered.lineage.parents
    assert (parent.name, parent.coefficient, parent.digest) == ("clinic", 0.7, told["clinic"]["digest"])
    assert told["clinic"]["digest"] != result.digests["clinic"]
    examples = prepare(recipe).data["clinic"].splits
    assert told["clinic"]["examples"]["train"] == len(examples.train) + len(examples.validation)
    assert told["clinic"]["validation"] == []


def test_the_verdict_compares_the_refit_with_what_was_there(refitted):
    report = refitted[4]
    evaluation = report["evaluation"]
    assert {"chosen", "delivered", "clinic"} <= set(evaluation["models"])
    pair = [d for d in evaluation["differences"] if (d["a"], d["b"], d["metric"]) == ("delivered", "chosen", "nll")]
    assert len(pair) == 3
    assert any(d["estimate"] != 0 for d in pair)
    assert sum(note.startswith("The refit on training and λ-validation") for note in report["verdict"]["notes"]) == 1


def test_the_inputs(refitted, same_home):
    _, recipe, _, _, _ = refitted
    prepared, first = prepare(recipe), trained(refitted)
    adapters = {name: adapter for name, (adapter, _) in first.items()}
    for stage in recipe.stages:
        other = {"general": adapters["law"]}
        inputs = refit_inputs(prepared, stage, first[stage.name][1], adapters, other)
        data = prepared.data[stage.name]
        assert inputs.items == [*data.rendered["train"], *data.rendered["validation"]]
        assert list(inputs.validation) == []
        sealed = [prepared.renderer.sft(example).prompt for example in data.splits.test]
        assert sealed
        assert not any(item.prompt in sealed for item in inputs.items)
        training = first[stage.name][1]
        share = len(inputs.items) / len(data.rendered["train"])
        assert inputs.stop == pytest.approx(training["best_step"] * share, abs=1.01)
        for name, (adapter, _) in inputs.context.items():
            assert adapter.digest == other[name].digest
    without = refit_inputs(prepared, recipe.stages[0], {"best_step": None}, adapters, {})
    assert without.stop is None


def test_on_the_same_examples_it_is_the_best_checkpoint_bit_for_bit(refitted, same_home, tmp_path):
    """So nothing but the data sets a refit apart: start, order, schedules and dropout are those of the first time."""
    _, recipe, _, _, _ = refitted
    prepared, first = prepare(recipe), trained(refitted)
    base = load_base(prepared.directory, name=prepared.base.name, device="cpu", dtype="float32")
    adapters = {name: adapter for name, (adapter, _) in first.items()}
    torch.manual_seed(99)
    for stage in recipe.stages:
        adapter, training = first[stage.name]
        inputs = refit_inputs(prepared, stage, training, adapters, {})
        again = replace(
            inputs,
            items=prepared.data[stage.name].rendered["train"],
            train=recipe.train_of(stage),
            stop=training["best_step"],
        )
        found = train_stage(base.model, prepared.base, base.pad_id, again, tmp_path / stage.name)
        assert found.steps == training["best_step"]
        assert adapter_digest(found.adapter.modules) == adapter_digest(adapter.modules)
        assert found.adapter.lineage.settings["stop"] == training["best_step"]


def test_the_plan_knows_the_refit(refitted, same_home):
    _, recipe, before, _, report = refitted
    assert before.step("refit:clinic").state == "to do"
    assert before.step("refit:clinic").needs == ("data", "clinic", "refit:general")
    assert "refit:clinic" in before.step("fuse").needs
    after = plan(recipe)
    digests = {step["name"]: step["digest"] for step in report["steps"] if step["digest"]}
    assert {step.name: step.digest for step in after.steps if step.digest} == digests
    assert all(step.finished for step in after.steps)


def test_a_second_run_refits_nothing_anew(refitted, same_home, tmp_path):
    _, recipe, _, result, _ = refitted
    again = run(recipe, directory=tmp_path / "again")
    steps = json.loads((tmp_path / "again" / "plan.json").read_text())["steps"]
    assert all(step["cached"] for step in steps if step["kind"] != "data")
    assert again.digests == result.digests
