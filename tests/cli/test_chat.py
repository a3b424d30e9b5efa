"""``chat``: answers are those of a merged model; a pipe, the mixture changed on the way, a stopped answer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorchestra.adapter.adapter import Adapter


@pytest.fixture
def two(make_adapter, tmp_path) -> dict[str, Path]:
    return {name: make_adapter(tmp_path / name, seed, size=0.3) for seed, name in enumerate(("a", "b"))}


@pytest.fixture
def oracle(tiny_dir):
    """``oracle(mixture, turns)``: the greedy answer of transformers on densely merged weights."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)

    def answer(mixture: dict[Path, float], *turns: str, system: str = "", count: int = 8) -> str:
        model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).requires_grad_(False).eval()
        for directory, weight in mixture.items():
            for path, update in Adapter.load(directory).modules.items():
                model.get_submodule(path).weight += weight * update.dense()
        roles = ["user", "assistant"]
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        ids = tokenizer(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
            return_tensors="pt",
        )
        out = model.generate(**ids, max_new_tokens=count, do_sample=False, repetition_penalty=1.1, pad_token_id=3)
        text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        return text.rstrip("\ufffd").strip()  # a cut answer ends with a whole character

    return answer


def say(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


FEW = ("--max_new_tokens", 8, "--dtype", "float32")


def test_one_answer_of_a_mixture(lorchestra, tiny_dir, two, oracle):
    asked = ("chat", tiny_dir, "-a", "a=0.5", "-a", "b", "--prompt", "发热?", "--system", "Be brief.", *FEW)
    told = lorchestra(*asked)
    assert told.code == 0, told.err
    expected = oracle({two["a"]: 0.5, two["b"]: 1.0}, "发热?", system="Be brief.")
    assert told.out.strip() == expected
    assert expected != oracle({}, "发热?", system="Be brief.")


def test_an_adapter_directory_brings_its_base(lorchestra, two, oracle):
    told = lorchestra("chat", "a", "-a", "b=0.5", "-p", "fever?", *FEW)
    assert told.out.strip() == oracle({two["a"]: 1.0, two["b"]: 0.5}, "fever?")


def test_a_pipe_with_commands(lorchestra, tiny_dir, two, oracle, monkeypatch):
    say(monkeypatch, "fever?", "", "cough?", "/weights a=0 b=1", "/reset", "fever?", "/weights c=1", "/weights a",
        "/weights a=x", "/help", "/weights", "/exit", "not reached")  # fmt: skip
    told = lorchestra("chat", tiny_dir, "-a", "a", "-a", "b=0", *FEW)
    assert told.code == 0, told.err
    a, b = {two["a"]: 1.0}, {two["b"]: 1.0}
    first = oracle(a, "fever?")
    second = oracle(a, "fever?", first, "cough?")
    assert told.out.split() == " ".join([first, second, oracle(b, "fever?")]).split()
    assert "no adapter 'c' is mounted; mounted: a, b" in told.err
    assert "write /weights NAME=WEIGHT" in told.err
    assert "'x' is not a finite number" in told.err
    assert "/exit leaves" in told.err
    assert told.err.count("0·a + 1·b") == 2


def test_standard_input_as_the_prompt(lorchestra, tiny_dir, oracle, monkeypatch):
    say(monkeypatch, "fever?")
    assert lorchestra("chat", tiny_dir, "-p", "-", *FEW).out.strip() == oracle({}, "fever?\n")


def test_an_interrupted_answer_does_not_end_the_conversation(lorchestra, tiny_dir, oracle, monkeypatch):
    from lorchestra.evaluate import answer

    whole, calls = answer.answers, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(answer, "answers", interrupted)
    say(monkeypatch, "cough?", "fever?")
    told = lorchestra("chat", tiny_dir, *FEW)
    assert told.code == 0
    assert told.out.split() == ["…", *oracle({}, "fever?").split()]


def test_a_base_from_a_gguf_is_found_again(lorchestra, two, tiny_dir, oracle, monkeypatch, tmp_path):
    """The adapter's base was a source that is fetched and converted: the adapter names the source, not the cache."""
    from lorchestra.base import load
    from lorchestra.base.home import home

    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF of the tiny base")
    converted = []

    def convert(source, out, digest):
        converted.append(source)
        AutoModelForCausalLM.from_pretrained(tiny_dir).save_pretrained(out)
        AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(out)
        (out / "lorchestra.json").write_text(json.dumps({"schema": 1, "made_by": "gguf", "name": source.name}))

    monkeypatch.setattr(load, "_convert", convert)
    rows = [{"prompt": f"q{i}?", "completion": f"a{i % 2}"} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = lorchestra("ft", "--model_name_or_path", "tiny.gguf", "--dataset", "data.jsonl", "--output_dir", "tuned",
                         "--max_steps", 4, "--learning_rate", 0.02)  # fmt: skip
    assert trained.code == 0, trained.err
    assert Adapter.load("tuned").base.name == str(gguf)
    import shutil

    shutil.rmtree(home() / "bases")
    told = lorchestra("chat", "tuned", "-p", "q1?", *FEW)
    assert told.code == 0, told.err
    assert told.out.strip() == oracle({Path("tuned"): 1.0}, "q1?")
    assert len(converted) == 2


def test_wrong_input(lorchestra, tiny_dir, two, tmp_path):
    (tmp_path / "empty").mkdir()
    lorchestra("chat", "nothere", "-p", "hi").refused("'nothere'")
    lorchestra("chat", "empty", "-p", "hi").refused("no config.json")
    lorchestra("chat", tiny_dir, "-a", "nothere", "-p", "hi").refused("'nothere'")
    lorchestra("chat", tiny_dir, "-a", tiny_dir, "-p", "hi").refused("a whole model, not an adapter")
    lorchestra("chat", tiny_dir, "-a", "a=1=2x", "-p", "hi").refused("'2x' is not a finite number")
    lorchestra("chat", tiny_dir, "-a", "a", "-a", "a", "-p", "hi").refused("given twice")
    lorchestra("chat", tiny_dir, "-p", "hi", "--dtype", "int3").refused("'int3'")
    lorchestra("chat").refused("BASE")
