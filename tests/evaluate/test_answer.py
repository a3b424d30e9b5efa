"""Generation against greedy decoding written out: full forward passes of one unpadded sequence, argmax by argmax."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tests.bank.test_mount import random_adapter
from tests.conftest import make_tiny_model

from lorchestra.bank import Bank
from lorchestra.errors import UserError
from lorchestra.evaluate.answer import Sampling, answers, stop_ids

QUESTIONS = ["What lowers a fever?", "医学", "x", "A much longer question than all of the others, to pad them."]


def greedy(model: Any, prompt: list[int], stops: Iterable[int], tokens: int, penalty: float = 1.0) -> list[int]:
    """Ids of the answer with its stop. ``penalty`` as in CTRL (arXiv 1909.05858), on the answer's own tokens."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        seen = torch.tensor(sorted(set(ids[len(prompt) :])), dtype=torch.int64)
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        ids.append(int(logits.argmax()))
        if ids[-1] in set(stops):
            break
    return ids[len(prompt) :]


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd").strip())


@pytest.fixture
def prompts(tiny_tokenizer: Any) -> list[list[int]]:
    return [tiny_tokenizer(question)["input_ids"] for question in QUESTIONS]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("pad", ["<|pad|>", None])
def test_a_padded_batch_is_greedy_decoding_of_each_alone(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]], penalty: float, pad: str | None
) -> None:
    """Also where the tokenizer pads with its end of sequence, which a repetition penalty must not count as seen."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = pad
    expected = [text(tokenizer, greedy(tiny_model, prompt, [2], 12, penalty)) for prompt in prompts]
    found = answers(tiny_model, tokenizer, prompts, Sampling(max_new_tokens=12, repetition_penalty=penalty))
    assert found == expected
    assert len(set(found)) == len(found), "answers that depend on the question"


def test_no_answer_goes_on_beyond_the_last_position(tiny_tokenizer: Any) -> None:
    model, prompt = make_tiny_model(max_position_embeddings=40), tiny_tokenizer("x" * 30)["input_ids"]
    assert len(prompt) == 30
    expected = text(tiny_tokenizer, greedy(model, prompt, [2], 10))
    assert answers(model, tiny_tokenizer, [prompt], Sampling(max_new_tokens=64)) == [expected]
    with pytest.raises(UserError, match="the prompt has 40 tokens, and the model has 40 positions"):
        answers(model, tiny_tokenizer, [[*prompt, *prompt[:10]]], Sampling(max_new_tokens=64))


def test_every_row_stops_at_its_own_end_of_turn(tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]) -> None:
    free = [greedy(tiny_model, prompt, [2], 12, 1.5) for prompt in prompts]
    place = next(i for i in range(3, 12) if free[0].index(free[0][i]) == i)
    stop = free[0][place]  # the first answer comes to it there; others may earlier, later or not at all
    expected = [greedy(tiny_model, prompt, [2, stop], 12, 1.5) for prompt in prompts]
    assert expected[0] == free[0][: place + 1]
    assert len({len(ids) for ids in expected}) > 1, "not all rows end at once"
    sampling = Sampling(max_new_tokens=12, repetition_penalty=1.5)
    found = answers(tiny_model, tiny_tokenizer, prompts, sampling, stop=stop)
    assert found == [text(tiny_tokenizer, ids) for ids in expected]


@pytest.mark.parametrize("configured", [None, 7, [7, 9], 2])
def test_an_answer_ends_at_whatever_the_run_the_tokenizer_or_the_model_names(
    tiny_model: Any, tiny_tokenizer: Any, configured: Any
) -> None:
    tiny_model.generation_config.eos_token_id = configured
    own = set(configured if isinstance(configured, list) else [configured]) - {None}
    assert stop_ids(tiny_model, tiny_tokenizer, stop=5) == sorted({5, tiny_tokenizer.eos_token_id} | own)
    assert stop_ids(tiny_model, tiny_tokenizer) == sorted({tiny_tokenizer.eos_token_id} | own)


def test_a_models_own_taste_in_sampling_does_not_touch_a_greedy_answer(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    """Many models come with do_sample, a temperature and a repetition penalty in their generation_config.json."""
    expected = [text(tiny_tokenizer, greedy(tiny_model, prompt, [2], 8)) for prompt in prompts]
    tiny_model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=1.9, max_new_tokens=2
    )
    assert answers(tiny_model, tiny_tokenizer, prompts, Sampling(max_new_tokens=8)) == expected


def test_sampling_follows_its_seed_and_narrows_to_greedy(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    def sampled(seed: int, **settings: float) -> list[str]:
        torch.manual_seed(seed)
        return answers(tiny_model, tiny_tokenizer, prompts, Sampling(max_new_tokens=8, **settings))  # type: ignore[arg-type]

    expected = [text(tiny_tokenizer, greedy(tiny_model, prompt, [2], 8)) for prompt in prompts]
    assert sampled(0, temperature=1e-3) == expected
    assert sampled(0, temperature=1.0, top_p=1e-6) == expected
    assert sampled(0, temperature=2.0) == sampled(0, temperature=2.0)
    assert sampled(0, temperature=2.0) != sampled(1, temperature=2.0)
    assert sampled(0, temperature=2.0) != expected


@pytest.mark.parametrize("question", QUESTIONS)
def test_pieces_join_to_the_answer_and_say_nothing_of_the_prompt(
    tiny_model: Any, tiny_tokenizer: Any, question: str
) -> None:
    """A byte a token: characters of several bytes arrive in pieces of their own, or not until they are whole."""
    pieces: list[str] = []
    prompt = tiny_tokenizer(question)["input_ids"]
    whole = answers(tiny_model, tiny_tokenizer, [prompt], Sampling(max_new_tokens=30), on_text=pieces.append)[0]
    assert "".join(pieces).strip() == whole == text(tiny_tokenizer, greedy(tiny_model, prompt, [2], 30))


def test_each_row_answers_with_the_adapters_selected_for_it(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    bank = Bank(tiny_model)
    for seed, name in enumerate("ab", start=1):
        bank.load(name, random_adapter(tiny_model, 2, seed))
    rows = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.5, "b": -0.5}]
    expected = []
    for prompt, row in zip(prompts, rows, strict=True):
        with bank.using(row):
            expected.append(text(tiny_tokenizer, greedy(tiny_model, prompt, [2], 8)))
    with bank.using_rows(rows):
        assert answers(tiny_model, tiny_tokenizer, prompts, Sampling(max_new_tokens=8)) == expected
    assert answers(tiny_model, tiny_tokenizer, prompts, Sampling(max_new_tokens=8)) != expected


def test_an_answer_that_is_cut_off_ends_with_a_whole_character(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """A byte a token: three make 热. The tiny model is made to say 发热发热…, and is stopped at every length."""
    said = tiny_tokenizer("发热")["input_ids"]
    following = dict(zip(said, [*said[1:], said[0]], strict=True))
    assert len(following) == 6, "every byte says which one comes next"

    class Speaks(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*hidden.shape[:2], 260)
            for row in range(hidden.shape[1]):
                logits[:, row, following.get(self.last, said[0])] = 1.0
            self.last = int(logits[0, -1].argmax())
            return logits

        last = -1

    for tokens in range(1, 8):
        tiny_model.lm_head = Speaks()
        pieces: list[str] = []
        sampling = Sampling(max_new_tokens=tokens)
        (answer,) = answers(tiny_model, tiny_tokenizer, [[1, 50, 60]], sampling, on_text=pieces.append)
        assert answer == "".join(pieces) == "发热发热"[: tokens // 3]
