"""``eval``: figures against log-probabilities computed densely in float64, paired differences, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.peft_format import SIDECAR
from lorchestra.data.example import Example, Message
from lorchestra.evaluate.ledger import Ledger, item_digest

QUESTIONS = [("fever?", "rest"), ("cough, 咳嗽?", "tea and honey"), ("rash?", "see a doctor"), ("pain?", "ice")]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def sft(tmp_path) -> Path:
    return write(tmp_path / "sft.jsonl", [{"prompt": q, "completion": a} for q, a in QUESTIONS])


@pytest.fixture
def oracle(tiny_dir):
    """``oracle(mixture, question, answer)``: Σ log p of the answer's tokens and its end of turn, and their number."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)

    @torch.no_grad()
    def logprob(mixture: dict[Path, float], question: str, answer: str) -> tuple[float, int]:
        model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64).eval()
        for directory, weight in mixture.items():
            for path, update in Adapter.load(directory).modules.items():
                model.get_submodule(path).weight += weight * update.dense(torch.float64)
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        ids = tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        return float(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(ids))), len(ids)

    return logprob


def figures(told, metric: str) -> dict[str, float]:
    return {row["model"]: row["estimate"] for row in json.loads(told.out)["rows"] if row["metric"] == metric}


def test_loss_per_token_of_base_and_mixture(lorchestra, tiny_dir, make_adapter, sft, oracle, tmp_path):
    members = {make_adapter(tmp_path / "a", 1): 0.5, make_adapter(tmp_path / "b", 2): -0.25}
    asked = ("eval", tiny_dir, "-a", "a=0.5", "-a", "b=-0.25", "--data", sft, "--dtype", "float32")
    told = lorchestra(*asked, "--json")
    assert told.code == 0, told.err
    expected = {}
    for name, mixture in (("base", {}), ("0.5·a + -0.25·b", members)):
        found = [oracle(mixture, q, a) for q, a in QUESTIONS]
        expected[name] = -sum(value for value, _ in found) / sum(count for _, count in found)
    assert figures(told, "nll") == pytest.approx(expected, rel=1e-4)
    (difference,) = json.loads(told.out)["differences"]
    assert difference["estimate"] == pytest.approx(expected["0.5·a + -0.25·b"] - expected["base"], rel=1e-3)
    assert difference["low"] < difference["estimate"] < difference["high"]
    shown = lorchestra(*asked)
    assert f"{expected['base']:.3f} [" in shown.out
    assert "nats a token" in shown.out


def test_multiple_choice(lorchestra, tiny_dir, make_adapter, oracle, tmp_path):
    options = ["rest", "tea", "ice and rest", "a doctor"]
    rows = [{"question": q, "options": options, "answer": options[i]} for i, (q, _) in enumerate(QUESTIONS)]
    make_adapter(tmp_path / "a", 3, size=0.3)
    told = lorchestra("eval", "a", "--data", write(tmp_path / "choice.jsonl", rows), "--dtype", "float32", "--json")
    for name, mixture in (("base", {}), ("1·a", {tmp_path / "a": 1.0})):
        scores = [[oracle(mixture, row["question"], option) for option in options] for row in rows]
        by_sum = [int(np.argmax([s for s, _ in each])) == i for i, each in enumerate(scores)]
        per_token = [int(np.argmax([s / n for s, n in each])) == i for i, each in enumerate(scores)]
        assert figures(told, "accuracy")[name] == np.mean(by_sum)
        assert figures(told, "accuracy_normalised")[name] == np.mean(per_token)


def test_preference_pairs_are_recognised_and_scored_both_ways(lorchestra, tiny_dir, make_adapter, oracle, tmp_path):
    pairs = [
        ("fever?", "rest", "go running in the cold"),
        ("cough?", "tea with a lot of honey", "no"),
        ("pain?", "ice", "fire"),
    ]
    rows = [{"prompt": q, "chosen": c, "rejected": r} for q, c, r in pairs]
    make_adapter(tmp_path / "a", 3, size=0.3)
    data = write(tmp_path / "pairs.jsonl", rows)
    told = lorchestra("eval", tiny_dir, "-a", "a", "--data", data, "--dtype", "float32", "--json")
    assert json.loads(told.out)["task"] == "dpo"
    for name, mixture in (("base", {}), ("1·a", {tmp_path / "a": 1.0})):
        scores = [(oracle(mixture, q, c), oracle(mixture, q, r)) for q, c, r in pairs]
        assert figures(told, "preference_accuracy")[name] == np.mean([c[0] > r[0] for c, r in scores])
        assert figures(told, "preference_accuracy_normalised")[name] == np.mean(
            [c[0] / c[1] > r[0] / r[1] for c, r in scores]
        )
    as_answers = lorchestra("eval", tiny_dir, "--data", data, "--task", "sft", "--json")
    assert {row["metric"] for row in json.loads(as_answers.out)["rows"]} == {"nll"}


def test_an_adapter_without_effect_is_the_same(lorchestra, tiny_dir, make_adapter, sft, tmp_path):
    make_adapter(tmp_path / "a", 1, size=0.0)
    told = lorchestra("eval", "a", "--data", sft)
    assert "0.000 [0.000, 0.000] the same" in told.out


def test_examples_that_an_adapter_was_trained_on(lorchestra, tiny_dir, make_adapter, sft, tmp_path):
    from lorchestra.data.load import DataSpec, load_examples

    digest = load_examples(DataSpec(str(sft)), "sft", relative_to=tmp_path).digest
    seen, unseen = make_adapter(tmp_path / "seen", 1, data={"sft": digest}), make_adapter(tmp_path / "unseen", 2)
    told = lorchestra("eval", tiny_dir, "-a", f"{seen}", "-a", f"{unseen}", "--data", sft)
    assert told.code == 0
    assert "warning: seen was trained on examples of this very source" in told.err
    assert "unseen was trained" not in told.err


@pytest.mark.parametrize(("trained", "scored"), [(2, None), (None, 1), (2, 1), (1, 2)])
def test_and_those_under_a_limit(lorchestra, tiny_dir, make_adapter, sft, tmp_path, trained, scored):
    from lorchestra.data.load import DataSpec, load_examples

    digest = load_examples(DataSpec(str(sft), limit=trained), "sft", relative_to=tmp_path).digest
    make_adapter(tmp_path / "seen", 1, data={"sft": digest})
    told = lorchestra("eval", "seen", "--data", sft, *(["--limit", scored] if scored else []))
    assert told.code == 0
    assert "warning: seen was trained on examples of this very source" in told.err


def test_beyond_the_limit_a_source_may_hold_anything(lorchestra, make_adapter, tmp_path):
    make_adapter(tmp_path / "a", 1)
    many = write(tmp_path / "many.jsonl", [{"prompt": f"{i}?", "completion": "rest"} for i in range(60)])
    many.write_text(many.read_text() + "{not JSON\n")
    told = lorchestra("eval", "a", "--data", many, "--limit", 2)
    assert told.code == 0, told.err


def test_limit_truncation_and_several_files(lorchestra, tiny_dir, sft, tmp_path):
    told = json.loads(lorchestra("eval", tiny_dir, "--data", sft, "--limit", 2, "--json").out)
    assert told["examples"] == 2
    other = write(tmp_path / "more.jsonl", [{"prompt": "x" * 200, "completion": "y"}])
    both = lorchestra("eval", tiny_dir, "--data", f"{sft},{other}", "--max_length", 64, "--json")
    assert json.loads(both.out)["examples"] == 5
    assert json.loads(both.out)["truncated"] == 1
    assert "1 of 5 examples cut to --max_length 64" in both.err


def test_examples_longer_than_the_model_has_positions(lorchestra, tmp_path):
    base = tmp_path / "short"
    make_tiny_model(max_position_embeddings=40).save_pretrained(base)
    make_tiny_tokenizer().save_pretrained(base)
    data = write(tmp_path / "long.jsonl", [{"prompt": "x" * 80, "completion": "y"}, {"prompt": "x", "completion": "y"}])
    told = lorchestra("eval", base, "--data", data, "--json")
    assert json.loads(told.out)["truncated"] == 1
    assert "1 of 2 examples cut to the 40 positions of the model" in told.err


def test_wrong_input(lorchestra, tiny_dir, other_base, make_adapter, sft, tmp_path):
    make_adapter(tmp_path / "foreign", 1, base=other_base)
    lorchestra("eval", tiny_dir, "-a", "foreign", "--data", sft).refused("'foreign'", "weights differ")
    lorchestra("eval", tiny_dir, "--data", "nothere.jsonl").refused("nothere.jsonl")
    lorchestra("eval", "nothere", "--data", sft).refused("'nothere'")
    lorchestra("eval", tiny_dir, "--data", sft, "--task", "rank").refused("--task 'rank'", "auto, sft, dpo")
    lorchestra("eval", tiny_dir, "--data", sft, "--task", "dpo").refused("no rejected answer")
    lorchestra("eval", tiny_dir, "-a", "foreign=x", "--data", sft).refused("'x' is not a finite number")
    lorchestra("eval", tiny_dir).refused("--data")
    mixed = write(
        tmp_path / "mixed.jsonl",
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
    )
    lorchestra("eval", tiny_dir, "--data", f"{sft},{mixed}").refused("mixes preference pairs")


def test_an_adapter_whose_base_is_gone(lorchestra, tiny_dir, make_adapter, sft, tmp_path):
    sidecar = make_adapter(tmp_path / "a", 1) / SIDECAR
    note = json.loads(sidecar.read_text())
    note["base"]["name"] = str(tmp_path / "moved")
    sidecar.write_text(json.dumps(note))
    lorchestra("eval", "a", "--data", sft).refused("a is an adapter, and its base cannot be had", "BASE --adapter a")
    sidecar.unlink()
    config = tmp_path / "a" / "adapter_config.json"
    value = json.loads(config.read_text())
    value["base_model_name_or_path"] = None
    config.write_text(json.dumps(value))
    lorchestra("eval", "a", "--data", sft).refused("does not name its base")
    found = lorchestra("eval", tiny_dir, "-a", "a", "--data", sft)
    assert found.code == 0


def test_examples_of_a_sealed_test_are_a_reading(lorchestra, tiny_dir, make_adapter, sft, tmp_path):
    make_adapter(tmp_path / "a", 1)

    def asked(weight, *more):
        return lorchestra("eval", tiny_dir, "-a", f"a={weight}", "--data", sft, *more)

    assert json.loads(asked(1, "--json").out)["sealed_test"] is None
    assert not Ledger.here().path.exists(), "data of one's own enters nothing"
    turns = [(Message("user", question), Message("assistant", answer)) for question, answer in QUESTIONS]
    Ledger.here().enter([item_digest(Example(messages)) for messages in turns[:3]], "general", "a run")
    told = [json.loads(asked(weight, "--json").out)["sealed_test"] for weight in (1, 1, 0.5)]
    assert told == [{"items": 3, "reads": 2}, {"items": 3, "reads": 2}, {"items": 3, "reads": 3}]
    assert "3 of these examples belong to a sealed test, which has been read 3×, this time included." in asked(1).out
