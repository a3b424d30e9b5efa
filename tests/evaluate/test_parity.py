"""The parity law on merges that are right, and on merges that are not."""

from __future__ import annotations

import pytest
import torch
from tests.bank.test_mount import merged, random_adapter

from lorchestra.bank import Bank
from lorchestra.evaluate.answer import Sampling, answers
from lorchestra.evaluate.parity import merged_parity

PROMPTS = [[5, 6, 7, 8], [20, 21, 22]]


@pytest.fixture
def mounted(tiny_model):
    bank = Bank(tiny_model)
    bank.load("a", random_adapter(tiny_model, 2, 1))
    return bank


@pytest.fixture
def saved(tiny_model, tiny_tokenizer, tmp_path):
    """Writes ``base + weight·a`` as a directory."""

    def save(name, adapter, weight):
        merged(tiny_model, {"a": adapter}, {"a": weight}).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_a_right_merge_holds(tiny_dir, tiny_model, saved):
    a = random_adapter(tiny_model, 2, 1)
    found = merged_parity(tiny_dir, saved("right", a, 0.5), {"a": a}, {"a": 0.5}, PROMPTS, "cpu")
    assert found.holds
    assert found.ratio < 1e-4


@pytest.mark.parametrize("wrong", [0.0, 1.0, 0.5 * 2**0.5])
def test_a_wrong_scale_does_not(wrong, tiny_dir, tiny_model, saved):
    a = random_adapter(tiny_model, 2, 1)
    assert not merged_parity(tiny_dir, saved("wrong", a, wrong), {"a": a}, {"a": 0.5}, PROMPTS, "cpu").holds


def test_an_adapter_without_effect_proves_nothing(tiny_dir, tiny_model, saved):
    nothing = random_adapter(tiny_model, 2, 1) * 0.0
    found = merged_parity(tiny_dir, saved("same", nothing, 1.0), {"a": nothing}, {"a": 1.0}, PROMPTS, "cpu")
    assert (found.difference, found.effect) == (0.0, 0.0)
    assert not found.holds


def test_answers_in_a_batch_are_those_of_each_alone(mounted, tiny_tokenizer):
    prompts = [tiny_tokenizer("Hello there").input_ids, tiny_tokenizer("医学").input_ids]
    with mounted.using({"a": 1.0}):
        together = answers(mounted.model, tiny_tokenizer, prompts, Sampling(max_new_tokens=6))
        alone = [answers(mounted.model, tiny_tokenizer, [p], Sampling(max_new_tokens=6))[0] for p in prompts]
    with mounted.using({}):
        base = answers(mounted.model, tiny_tokenizer, prompts, Sampling(max_new_tokens=6))
    assert together == alone
    assert together != base


def test_pieces_add_up_to_the_answer(mounted, tiny_tokenizer):
    pieces: list[str] = []
    ids = tiny_tokenizer("Hello").input_ids
    whole = answers(mounted.model, tiny_tokenizer, [ids], Sampling(max_new_tokens=8), on_text=pieces.append)[0]
    assert "".join(pieces).strip() == whole
    assert torch.is_grad_enabled()
