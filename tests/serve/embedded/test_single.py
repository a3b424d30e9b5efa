"""One row alone through the compiled step, against transformers' forward pass of the merged model."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.serve.embedded.test_models import LLAMA3, adapter_on, tiny
from tests.serve.embedded.worlds import merged

from lorchestra.bank.rows import RowBank
from lorchestra.base.native import compiler
from lorchestra.serve.embedded.decoder import LlamaDecoder
from lorchestra.serve.embedded.single import Single, fits
from lorchestra.serve.embedded.slots import Slots

WIDE = {"head_dim": 16}
KINDS = {
    "Llama": WIDE,
    "Llama with llama3 rotations and a width of its own": {**WIDE, "rope_parameters": LLAMA3, "intermediate_size": 41},
    "Llama with biases": {**WIDE, "attention_bias": True, "mlp_bias": True},
    "Qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "Qwen3": {**WIDE, "num_key_value_heads": 4},
}
PROMPT, LENGTH = 7, 30


@pytest.fixture(autouse=True)
def _compiler():
    if compiler() is None:
        pytest.skip("no C++ compiler is here")


def counted(monkeypatch) -> list[bool]:
    """What the compiled step did when it was asked: whether it computed."""
    asked, through = [], Single.hidden_states

    def hidden_states(self, x, step, acting):
        found = through(self, x, step, acting)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(Single, "hidden_states", hidden_states)
    return asked


def answers(decoder, bank, ids, factors, others=()):
    """Logits ``[LENGTH, V]`` of ``ids [LENGTH]``, read and then decoded beside rows that leave one by one."""
    slots = Slots(decoder.shape, 1 << 30, 64, decoder.dtype, "cpu")
    rows = [0, *range(1, len(others) + 1)]
    for row in rows:
        slots.take(row, PROMPT, LENGTH)
    step = slots.reading(rows, [0] * len(rows), [PROMPT] * len(rows))
    hidden = decoder.hidden_states(
        ids[:PROMPT].expand(len(rows), -1), step, bank, bank.beside([factors, *others], decoder.dtype)
    )
    step.keep()
    found = [decoder.logits(hidden[0])]
    for row, held in zip(rows, (factors, *others), strict=True):
        slots.begin(row)
        bank.put(row, held)
    for at in range(PROMPT, LENGTH):
        if len(rows) > 1 and at > PROMPT + 4:
            gone = rows.pop()
            slots.release(gone)
            bank.clear(gone)
        order = slots.order()
        states = decoder.hidden_states(ids[at].expand(len(order), 1), slots.decoding(), bank, bank.acting(order))
        found.append(decoder.logits(states[order.index(0)]))
    bank.clear(0)
    return torch.cat(found)


@pytest.mark.parametrize("rank", [0, 3, 12])
@pytest.mark.parametrize("name", KINDS)
def test_a_row_alone_answers_as_its_merged_model(monkeypatch, name, rank):
    model = tiny(name, KINDS[name]).model
    decoder, asked = LlamaDecoder(copy.deepcopy(model), 64, kernel=True), counted(monkeypatch)
    bank = RowBank(decoder.groups)
    ids = torch.randint(0, 90, (LENGTH,), generator=torch.Generator().manual_seed(2))
    factors = bank.mixed("base", [])
    if rank:
        adapter = adapter_on(decoder, model, 5, rank)
        factors, model = bank.factors("a", adapter), merged(model, (adapter, 1.0))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    found = answers(decoder, bank, ids, factors)
    assert asked == [True] * (LENGTH - PROMPT)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_it_is_the_same_sequence_whoever_left(monkeypatch):
    """Two rows beside it leave one after the other: what it kept among them is what it goes on from."""
    model = tiny("Llama", WIDE).model
    decoder, asked = LlamaDecoder(copy.deepcopy(model), 64, kernel=True), counted(monkeypatch)
    bank = RowBank(decoder.groups)
    adapters = [adapter_on(decoder, model, seed, 4) for seed in range(3)]
    ids = torch.randint(0, 90, (LENGTH,), generator=torch.Generator().manual_seed(3))
    first, *others = [bank.factors("a", adapter) for adapter in adapters]
    with torch.inference_mode():
        expected = merged(model, (adapters[0], 1.0))(ids[None]).logits[0]
    found = answers(decoder, bank, ids, first, others)
    assert asked[-1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_half_precision_is_as_near_as_the_other_pass():
    model = tiny("Llama", WIDE).model
    ids = torch.randint(0, 90, (LENGTH,), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        exact = model(ids[None]).logits[0]
    half = model.to(torch.bfloat16)
    errors = []
    for kernel in (False, True):
        decoder = LlamaDecoder(copy.deepcopy(half), 64, kernel=kernel)
        bank = RowBank(decoder.groups, dtype=torch.bfloat16)
        errors.append((answers(decoder, bank, ids, bank.mixed("base", [])).float() - exact).norm() / exact.norm())
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_factors_of_another_dtype_and_narrow_heads_are_left_to_the_other_pass(monkeypatch):
    model = tiny("Llama", WIDE).model.to(torch.bfloat16)
    decoder, asked = LlamaDecoder(model, 64, kernel=True), counted(monkeypatch)
    bank = RowBank(decoder.groups)  # float32
    answers(decoder, bank, torch.arange(LENGTH), bank.factors("a", adapter_on(decoder, model, 1, 4)))
    assert asked == [False] * (LENGTH - PROMPT)
    assert LlamaDecoder(tiny("Llama", {}).model, 64, kernel=True)._single is None


def test_a_second_copy_only_where_there_is_ample_memory():
    weights = [torch.empty(10, 10), torch.empty(5, dtype=torch.bfloat16)]
    assert fits(weights, 8 * 410)
    assert not fits(weights, 8 * 410 - 1)
