"""The parity law on merges that are right, and on merges that are not."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.bank.test_mount import merged, random_adapter

from lorchestra.bank import Bank
from lorchestra.evaluate.answer import Sampling, answers
from lorchestra.evaluate.parity import parity

PROMPTS = [[5, 6, 7, 8], [20, 21, 22]]


@pytest.fixture
def mounted(tiny_model):
    bank = Bank(tiny_model)
    bank.load("a", random_adapter(tiny_model, 2, 1))
    return bank


def test_a_right_merge_holds(mounted):
    model = merged(mounted.model, {"a": mounted.member("a")}, {"a": 0.5})
    found = parity(mounted, {"a": 0.5}, model, PROMPTS)
    assert found.holds
    assert found.ratio < 1e-4


@pytest.mark.parametrize("wrong", [0.0, 1.0, 0.5 * 2**0.5])
def test_a_wrong_scale_does_not(mounted, wrong):
    model = merged(mounted.model, {"a": mounted.member("a")}, {"a": wrong})
    assert not parity(mounted, {"a": 0.5}, model, PROMPTS).holds


def test_an_adapter_without_effect_proves_nothing(tiny_model):
    bank = Bank(tiny_model)
    bank.load("nothing", random_adapter(tiny_model, 2, 1) * 0.0)
    assert not parity(bank, {"nothing": 1.0}, copy.deepcopy(tiny_model), PROMPTS).holds


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
