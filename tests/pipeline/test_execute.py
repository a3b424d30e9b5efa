"""Whole runs on the tiny model: delivered, reused, killed and resumed."""

from __future__ import annotations

import json
import random

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import RecipeError
from lorchestra.pipeline.execute import run
from lorchestra.recipe.recipe import Recipe


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
    assert result.verdict.startswith("The delivered model (")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["evaluation"]["models"]) == {
        "base", "mixed", "general", "clinic", "preference", "stack", "uniform", "delivered"
    }  # fmt: skip
    assert report["merge"]["parity"] < 0.05
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
