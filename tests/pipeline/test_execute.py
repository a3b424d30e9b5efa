"""Whole runs on the tiny model: delivered, reused, killed and resumed."""

from __future__ import annotations

import json
import random
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from tests.conftest import make_tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.load import load_base
from lorchestra.errors import RecipeError, UserError
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.prepare import prepare
from lorchestra.pipeline.training import context_of, stage_inputs
from lorchestra.recipe.recipe import Recipe
from lorchestra.train.stage import train_stage


def write_data(directory):
    chance = random.Random(0)
    words = ["fever", "cough", "pain", "rash", "nausea", "swelling", "fatigue", "headache", "dizzy", "cramps"]
    for name in ("general", "clinic"):
        with (directory / f"{name}.jsonl").open("w") as out:
            for i in range(60):
                ask = f"{name} {i}: {chance.choice(words)} {chance.choice(words)}?"
                out.write(json.dumps({"prompt": ask, "completion": f"{'Yes' if i % 2 else 'No'}, {name}."}) + "\n")
    with (directory / "pairs.jsonl").open("w") as out:
        for i in range(60):
            ask = f"pair {i}: {chance.choice(words)}?"
            out.write(json.dumps({"prompt": ask, "chosen": "Noted.", "rejected": "lol ok"}) + "\n")


def recipe_dict(tiny_dir, **changes):
    return {
        "name": "tiny",
        "base": str(tiny_dir),
        "max_length": 96,
        "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "lora": {"rank": 2, "alpha": 4},
        "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 5e-3, "checkpoint_every": 2},
        "stages": [
            {"name": "general", "data": "general.jsonl"},
            {"name": "clinic", "data": "clinic.jsonl", "context": {"general": 1.0}},
            {
                "name": "preference", "task": "dpo", "data": "pairs.jsonl",
                "context": {"general": {"weight": 1.0, "schedule": "cosine", "to": 0.5}, "clinic": 1.0},
            },
        ],
        "fusion": {"candidates": 8, "validation_limit": 4},
        "evaluate": {"test_limit": 6, "samples": 2, "sample_tokens": 4, "mixed_baseline": True},
    } | changes  # fmt: skip


@pytest.fixture
def recipe(tmp_path, tiny_dir):
    write_data(tmp_path)
    return Recipe.from_dict(recipe_dict(tiny_dir), tmp_path)


def test_a_whole_run(recipe, tmp_path):
    result = run(recipe, directory=tmp_path / "run")
    assert result.verdict.startswith("The delivered model ")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["evaluation"]["models"]) == {
        "base", "mixed", "general", "clinic", "preference", "stack", "uniform", "delivered"
    }  # fmt: skip
    assert report["merge"]["parity"] < 0.05
    assert [stage["name"] for stage in report["stages"]] == ["general", "clinic", "preference"]
    mixed = report["mixed"]
    assert mixed["digest"] == result.digests["mixed"]
    assert mixed["lora"]["rank"] == 6
    assert len(mixed["history"]) == mixed["train"]["max_steps"]
    assert mixed["validation"]
    assert [row["reads"] for row in report["evaluation"]["ledger"]] == [1, 1, 1]
    assert len(report["samples"]) == 2
    fused = Adapter.load(result.adapter)
    assert {p.name for p in fused.lineage.parents} <= {"general", "clinic", "preference"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(result.merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.merged)
    assert tokenizer.chat_template
    import peft

    base = AutoModelForCausalLM.from_pretrained(recipe.base)
    plain = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    ids = torch.tensor([tokenizer("fever?").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_a_second_run_reuses_every_step(recipe, tmp_path):
    first = run(recipe, directory=tmp_path / "one")
    second = run(recipe, directory=tmp_path / "two")
    steps = json.loads((tmp_path / "two" / "plan.json").read_text())["steps"]
    assert [step["cached"] for step in steps if step["kind"] != "data"] == [True] * 8
    assert second.digests == first.digests
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [row["reads"] for row in report["evaluation"]["ledger"]] == [1, 1, 1], "a reused verdict reads nothing anew"


@pytest.fixture
def loads(monkeypatch):
    """Directories of the models that a run loads, and a weak reference to each, the real function still at work."""
    found = []

    def counted(directory, **options):
        alive = [where for where, model in found if model() is not None]
        assert not alive, f"{alive} is still in memory beside {directory}"
        base = load_base(directory, **options)
        found.append((directory, weakref.ref(base.model)))
        return base

    monkeypatch.setattr("lorchestra.pipeline.lazy.load_base", counted)
    monkeypatch.setattr("lorchestra.pipeline.judging.load_base", counted)
    return found


def test_models_are_loaded_once_and_never_beside_one_another(recipe, tmp_path, tiny_dir, loads):
    first = run(recipe, directory=tmp_path / "one")
    assert [directory.name for directory, _ in loads] == [tiny_dir.name, "model"]
    loads.clear()
    second = run(recipe, directory=tmp_path / "two")
    assert loads == [], "everything is cached, so no model is needed"
    assert second.verdict == first.verdict


def test_without_a_merged_model_the_base_with_the_adapter_is_judged(tmp_path, tiny_dir, loads):
    write_data(tmp_path)
    values = recipe_dict(tiny_dir, deliver={"merged": False})
    result = run(Recipe.from_dict(values, tmp_path), directory=tmp_path / "run")
    assert [directory.name for directory, _ in loads] == [tiny_dir.name]
    assert result.merged is None
    assert not (tmp_path / "run" / "final" / "model").exists()
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["evaluation"]["rows"]
    found = {(row["model"], row["domain"], row["metric"]): row["estimate"] for row in rows}
    losses = [(name, metric) for model, name, metric in found if model == "delivered" and metric == "nll"]
    assert losses
    assert any(found["delivered", *key] != found["base", *key] for key in losses)


def test_a_sealed_item_is_counted_whatever_test_it_stands_in(recipe, tmp_path, tiny_dir):
    first = run(recipe, directory=tmp_path / "run")
    assert first.readings == {"general": 1, "clinic": 1, "preference": 1}
    evaluate = {"test_limit": 3, "samples": 0, "domains": {"extra": "general.jsonl"}}
    shorter = Recipe.from_dict(recipe_dict(tiny_dir, max_length=80, evaluate=evaluate), tmp_path)
    second = run(shorter, directory=tmp_path / "run")
    # `extra` holds the very items of `general`, and its reading is the same verdict's.
    assert second.readings == {"general": 2, "clinic": 2, "preference": 2, "extra": 2}


def test_a_fourth_stage_retrains_none_of_the_three(recipe, tmp_path, tiny_dir):
    run(recipe, directory=tmp_path / "run")
    values = recipe_dict(tiny_dir)
    values["stages"] = [*values["stages"], {"name": "extra", "data": "general.jsonl", "context": {"clinic": 0.5}}]
    run(Recipe.from_dict(values, tmp_path), directory=tmp_path / "run")
    steps = json.loads((tmp_path / "run" / "plan.json").read_text())["steps"]
    cached = {step["name"]: step["cached"] for step in steps}
    assert cached["general"]
    assert cached["clinic"]
    assert cached["preference"]
    assert not cached["extra"]


def test_a_search_needs_a_validation_part(tmp_path, tiny_dir):
    split = {"train": 0.8, "validation": 0, "test": 0.2}
    with pytest.raises(RecipeError, match=r"split\.validation: is 0, but fusion\.weights: search"):
        Recipe.from_dict(recipe_dict(tiny_dir, split=split), tmp_path)
    assert Recipe.from_dict(recipe_dict(tiny_dir, split=split, fusion={"weights": "later"}), tmp_path)


def test_an_absent_tracker_of_a_later_stage_is_told_before_anything_is_trained(tmp_path, tiny_dir, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    write_data(tmp_path)
    values = recipe_dict(tiny_dir)
    values["stages"][2]["train"] = {"report_to": ["wandb"]}
    with pytest.raises(UserError, match="report_to: wandb is not installed here"):
        run(Recipe.from_dict(values, tmp_path), directory=tmp_path / "run")
    assert "train_step" not in (tmp_path / "run" / "events.jsonl").read_text()


def test_a_base_with_fewer_positions_than_asked_for(tmp_path):
    """GPT-2 looks places up in a table: beyond it there is nothing, neither in training nor in sample answers."""
    config = GPT2Config(
        vocab_size=260, n_positions=40, n_embd=32, n_layer=2, n_head=4, eos_token_id=2, pad_token_id=3, bos_token_id=1
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    make_tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    write_data(tmp_path)
    values = recipe_dict(tmp_path / "gpt2", fusion={"weights": "equal"})
    values["evaluate"] |= {"mixed_baseline": False}
    result = run(Recipe.from_dict(values, tmp_path), directory=tmp_path / "run")
    told = json.loads((tmp_path / "run" / "report.json").read_text())
    stages = told["data"]
    assert stages["general"]["lengths"]["max"] == 40
    assert stages["general"]["truncated"] > 0
    assert len(told["samples"]) == 2
    assert result.verdict


def foreign_adapter(tiny_dir, directory):
    """An adapter as PEFT itself makes and saves it: rsLoRA, no lorchestra.json."""
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_dir), config)
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return model


def with_foreign(tiny_dir, source, **changes):
    """Brought in: context of an sft stage, reference of a dpo stage, member of the fusion."""
    return recipe_dict(
        tiny_dir,
        adapters={"old": source},
        stages=[
            {"name": "general", "data": "general.jsonl", "context": {"old": 0.5}},
            {"name": "preference", "task": "dpo", "data": "pairs.jsonl", "context": {"old": 1.0}},
        ],
        fusion={"members": ["old", "preference"], "weights": {"old": 0.75, "preference": -0.5}},
        evaluate={"test_limit": 4, "samples": 0},
        **changes,
    )


def test_an_adapter_brought_in_is_context_reference_and_member(tmp_path, tiny_dir):
    write_data(tmp_path)
    foreign = foreign_adapter(tiny_dir, tmp_path / "old")
    result = run(Recipe.from_dict(with_foreign(tiny_dir, "old"), tmp_path), directory=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["evaluation"]["models"]) == {
        "base", "general", "preference", "old", "stack", "uniform", "delivered"
    }  # fmt: skip
    said = (tmp_path / "run" / "events.jsonl").read_text()
    assert "old does not say which weights it was trained on" in said

    delivered = Adapter.load(result.adapter)
    assert [(p.name, p.coefficient) for p in delivered.lineage.parents] == [("old", 0.75), ("preference", -0.5)]
    digest = result.digests["preference"]
    step = next(
        path for path in (tmp_path / "home" / "steps").glob("stage-*/adapter") if Adapter.load(path).digest == digest
    )
    preference = Adapter.load(step)
    assert [(p.name, p.coefficient) for p in preference.lineage.context] == [("old", 1.0)]

    def dense(path):  # PEFT's own opinion of what it made, in float64
        layer = foreign.base_model.model.get_submodule(path)
        found = getattr(layer, "lora_A", None)
        if found is None:
            return 0.0
        return layer.scaling["default"] * layer.lora_B["default"].weight.double() @ found["default"].weight.double()

    for path, update in delivered.modules.items():
        expected = 0.75 * dense(path) - 0.5 * preference.modules[path].dense().double()
        torch.testing.assert_close(update.dense().double(), expected, rtol=1e-5, atol=1e-7)


def test_the_reference_of_a_preference_stage_is_the_base_with_the_adapter_brought_in(tmp_path, tiny_dir):
    """Oracle: the same stage on a base into which PEFT has merged the adapter learns the same update."""
    write_data(tmp_path)
    merged = foreign_adapter(tiny_dir, tmp_path / "old").merge_and_unload()
    shutil.copytree(tiny_dir, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    values = with_foreign(tiny_dir, "old", dtype="float32")
    learned = []
    for base in (tiny_dir, tmp_path / "merged"):
        values["base"] = str(base)
        if base != tiny_dir:
            del values["adapters"], values["fusion"], values["stages"][0], values["stages"][0]["context"]
        recipe = Recipe.from_dict(values, tmp_path)
        prepared, stage = prepare(recipe), recipe.stage("preference")
        context = context_of(recipe, stage, prepared.adapters)
        inputs = replace(stage_inputs(prepared, stage, context), salt="the same start")
        model = load_base(base, dtype="float32").model
        learned.append(train_stage(model, prepared.base, 3, inputs, tmp_path / "work" / base.name).adapter)
    for path, update in learned[0].modules.items():
        assert update.norm() > 1e-3
        torch.testing.assert_close(update.dense(), learned[1].modules[path].dense(), rtol=5e-3, atol=1e-6)


def rewrite_answers(directory, prepared, part):
    """Other answers for every item that the split puts into ``part``; the questions, and so the split, stay."""
    origins = {example.origin for data in prepared.data.values() for example in dict(data.splits.parts())[part]}
    assert origins
    for name in ("general", "pairs"):
        file = directory / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for i, row in enumerate(rows, start=1):
            if f"{name}.jsonl:{i}" in origins:
                row |= {key: f"poison, {value[::-1]}" for key, value in row.items() if key != "prompt"}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, tiny_dir):
    """``outcome(part)``: a whole run after all answers in ``part`` were changed, each in a cache of its own."""

    def carry_out(part):
        where = tmp_path_factory.mktemp("poisoned")
        write_data(where)
        values = recipe_dict(
            tiny_dir,
            train={"epochs": 2, "batch_size": 4, "learning_rate": 5e-2, "eval_every": 1, "patience": 1},
            stages=[
                {"name": "general", "data": "general.jsonl"},
                {"name": "preference", "task": "dpo", "data": "pairs.jsonl", "context": {"general": 1.0}},
            ],
            fusion={"candidates": 8, "validation_limit": None},
            evaluate={"samples": 0, "test_limit": None, "mixed_baseline": True},
            deliver={"merged": False},
        )
        recipe = Recipe.from_dict(values, where)
        if part:
            rewrite_answers(where, prepare(recipe), part)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LORCHESTRA_HOME", str(where / "home"))
            result = run(recipe, directory=where / "run")
        return result, json.loads((where / "run" / "report.json").read_text())

    return carry_out


def test_training_early_stopping_and_search_never_see_the_sealed_test(outcome):
    """Poison: with every sealed answer changed, nothing but the verdict changes. With λ-validation, much does."""
    (plain, before), (sealed, after), (_, other) = outcome(None), outcome("test"), outcome("validation")
    assert sealed.digests == plain.digests
    assert sealed.weights == plain.weights
    assert after["search"] == before["search"]
    assert [s["validation"] for s in after["stages"]] == [s["validation"] for s in before["stages"]]
    assert after["evaluation"]["rows"] != before["evaluation"]["rows"], "the poison must be there, or this says nothing"
    assert [s["validation"] for s in other["stages"]] != [s["validation"] for s in before["stages"]]
    assert other["search"]["candidates"] != before["search"]["candidates"]
