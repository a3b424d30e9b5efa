"""Scores of a domain against plain transformers: one unpadded forward pass a branch, full logits, float64."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.bank.test_mount import merged, random_adapter
from tests.conftest import make_tiny_model

from lorchestra.bank import Bank
from lorchestra.data.example import Example, Message
from lorchestra.data.render import Renderer
from lorchestra.evaluate import score as module
from lorchestra.evaluate.metrics import loss_draws
from lorchestra.evaluate.score import Domain, Scores, make_domain, score
from lorchestra.objective.logprobs import tree_is_exact

PAD = 3


def example(i: int, gold: str, **fields: Any) -> Example:
    question = f"question {i}, " + "and more of it " * (i % 4)
    return Example(
        (Message("user", question), Message("assistant", gold)), group=f"g{i // 2}", origin=f"f:{i}", **fields
    )


def domains(tokenizer: Any) -> dict[str, Domain]:
    renderer = Renderer(tokenizer, 128)
    options = ("no", "yes, at once", "发热", "perhaps")
    sft = [example(i, "an answer" * (i % 3 + 1)) for i in range(5)]
    mixed = [example(i, options[i % 4], choices=options[: 4 - i % 2] if i % 4 < 3 else options) for i in range(5)]
    pairs = [example(i, "good " * (i + 1), rejected="a worse answer") for i in range(4)]
    return {
        "answers": make_domain("answers", "sft", sft, renderer),
        "choices": make_domain("choices", "sft", [*mixed, *sft[:2]], renderer),
        "pairs": make_domain("pairs", "dpo", pairs, renderer),
    }


def plain(model: Any, domain: Domain) -> list[list[float]]:
    """Σ log p of every branch's supervised tokens."""
    out = []
    for item in domain.items:
        sums = []
        for branch in item.branches:
            ids = torch.tensor([item.prompt + branch.ids])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            places = range(len(item.prompt), ids.shape[1])
            sums.append(
                sum(
                    float(logprobs[place - 1, ids[0, place]])
                    for place, counts in zip(places, branch.supervised, strict=True)
                    if counts
                )
            )
        out.append(sums)
    return out


def sliding_model() -> Any:
    """Attention over the last eight positions only: branches cannot share their prompt."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.15,
    )  # fmt: skip
    return MistralForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("budget", [1, 150, 4096])
@pytest.mark.parametrize("name", ["answers", "choices", "pairs"])
def test_scores_are_those_of_a_plain_forward_pass(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str, budget: int
) -> None:
    domain = domains(tiny_tokenizer)[name]
    assert tree_is_exact(tiny_model), "choices and pairs share their prompt here"
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", budget)
    done: list[int] = []
    found = score(tiny_model, domain, PAD, done.append)
    assert sum(done) == len(found) == len(domain.items)
    assert len(done) == 1 or budget < 4096
    assert (found.kind, found.gold, found.groups) == (domain.kind, domain.gold, domain.groups)
    for sums, tokens, expected, item in zip(
        found.sums, found.tokens, plain(tiny_model, domain), domain.items, strict=True
    ):
        assert sums == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert tokens == tuple(sum(branch.supervised) for branch in item.branches)


def test_a_model_whose_branches_cannot_share_a_prompt_is_scored_the_same_way(tiny_tokenizer: Any) -> None:
    model = sliding_model()
    assert not tree_is_exact(model)
    for domain in domains(tiny_tokenizer).values():
        for sums, expected in zip(score(model, domain, PAD).sums, plain(model, domain), strict=True):
            assert sums == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_a_banks_selection_is_what_is_scored(tiny_model: Any, tiny_tokenizer: Any) -> None:
    bank = Bank(tiny_model)
    bank.load("a", random_adapter(tiny_model, 2, 1))
    domain = domains(tiny_tokenizer)["choices"]
    base = score(tiny_model, domain, PAD)
    with bank.using({"a": 0.7}):
        found = score(tiny_model, domain, PAD)
    assert score(tiny_model, domain, PAD) == base
    expected = plain(merged(make_tiny_model(), {"a": bank.member("a")}, {"a": 0.7}), domain)
    assert np.concatenate(found.sums) == pytest.approx(np.concatenate(expected), rel=1e-5, abs=1e-4)
    assert np.abs(np.concatenate(found.sums) - np.concatenate(base.sums)).max() > 0.1


def test_what_a_domain_scores(tiny_tokenizer: Any) -> None:
    renderer = Renderer(tiny_tokenizer, 128)
    item = example(1, "b", choices=("a", "b", "c"), rejected="r")
    with_choices = make_domain("d", "sft", [item], renderer)
    assert (with_choices.items, with_choices.gold) == ((renderer.choice(item),), (1,))
    gold_alone = make_domain("d", "sft", [item], renderer, choices=False)
    assert (gold_alone.items, gold_alone.gold) == ((renderer.sft(item),), (0,))
    assert gold_alone.items[0].branches[0] == with_choices.items[0].branches[1]
    pair = make_domain("d", "dpo", [item], renderer)
    assert (pair.items, pair.gold, pair.groups) == ((renderer.preference(item),), (0,), ("g0",))


def test_the_digest_is_of_everything_that_is_scored_and_not_of_the_name(tiny_tokenizer: Any) -> None:
    domain = domains(tiny_tokenizer)["choices"]
    assert replace(domain, name="other").digest == domain.digest
    first, *rest = domain.items
    branch = replace(first.branches[0], ids=(9, *first.branches[0].ids[1:]))
    changed = [
        replace(domain, kind="dpo"),
        replace(domain, gold=(domain.gold[0] ^ 1, *domain.gold[1:])),
        replace(domain, groups=("other", *domain.groups[1:])),
        replace(domain, items=(replace(first, prompt=(*first.prompt, 9)), *rest)),
        replace(domain, items=(replace(first, branches=(branch, *first.branches[1:])), *rest)),
        domain.first(3),
    ]
    assert len({domain.digest, *(other.digest for other in changed)}) == len(changed) + 1


def test_first(tiny_tokenizer: Any) -> None:
    domain = domains(tiny_tokenizer)["choices"]
    assert domain.first(None) is domain
    assert domain.first(len(domain.items)) is domain
    some = domain.first(2)
    assert (some.items, some.gold, some.groups) == (domain.items[:2], domain.gold[:2], domain.groups[:2])


def scores(*items: tuple[list[float], list[int], int], kind: Any = "sft") -> Scores:
    return Scores(
        kind,
        tuple(tuple(s) for s, _, _ in items),
        tuple(tuple(t) for _, t, _ in items),
        tuple(g for _, _, g in items),
        tuple(f"g{i}" for i in range(len(items))),
    )


def test_correct_is_the_likeliest_branch_in_sum_or_per_token() -> None:
    found = scores(([-4.0, -3.0], [4, 1], 1), ([-4.0, -3.0], [4, 1], 0))
    assert found.correct()[0].tolist() == [1, 0]
    assert found.correct(normalised=True)[0].tolist() == [0, 1]


def test_ties_share_and_items_without_choices_are_left_out() -> None:
    found = scores(
        ([-2.0], [1], 0),
        ([-2.0, -2.0], [1, 2], 0),
        ([-2.0, -2.0, -2.0, -5.0], [1, 1, 1, 1], 2),
        ([-2.0, -2.0, -9.0], [1, 1, 1], 2),
    )
    values, groups = found.correct()
    assert values.tolist() == [1 / 2, 1 / 3, 0]
    assert groups == ["g1", "g2", "g3"]
    assert found.correct(normalised=True)[0].tolist() == [0, 1 / 3, 0], "−2 over two tokens is likelier than over one"
    assert scores(([-2.0], [1], 0)).correct()[0].size == 0


@given(st.lists(st.lists(st.integers(-5, 0), min_size=2, max_size=4), min_size=1, max_size=6))
def test_guessing_among_ties_is_worth_what_chance_gives(sums: list[list[int]]) -> None:
    """Over all choices of the gold branch the points of an item add up to 1."""
    for item in sums:
        points = [scores((list(map(float, item)), [1] * len(item), gold)).correct()[0][0] for gold in range(len(item))]
        assert sum(points) == pytest.approx(1)


def test_nll_and_tokens_are_of_the_gold_branch() -> None:
    found = scores(([-4.0, -3.0], [4, 1], 1), ([-7.5], [2], 0))
    assert found.nll.tolist() == [3.0, 7.5]
    assert found.gold_tokens.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["answers", "choices", "pairs"])
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_the_base_has_loss_one_exactly(tiny_model: Any, tiny_tokenizer: Any, name: str, beta: float) -> None:
    base = score(tiny_model, domains(tiny_tokenizer)[name], PAD)
    top, bottom = base.loss(base, beta)
    assert top.tolist() == bottom.tolist()
    assert (loss_draws({name: base}, {name: base}, {name: beta}, resamples=5) == 1.0).all()


NATS = st.floats(-40, 0)


@given(st.lists(st.tuples(NATS, NATS, NATS, NATS), min_size=1, max_size=5), st.floats(0.01, 1))
def test_the_preference_loss_is_minus_log_sigmoid_over_its_value_at_the_base(pairs: Any, beta: float) -> None:
    ours = scores(*(([a, b], [1, 1], 0) for a, b, _, _ in pairs), kind="dpo")
    base = scores(*(([c, d], [1, 1], 0) for _, _, c, d in pairs), kind="dpo")
    top, bottom = ours.loss(base, beta)
    for (a, b, c, d), loss, unit in zip(pairs, top, bottom, strict=True):
        h = beta * ((a - b) - (c - d))
        assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-h))), rel=1e-9, abs=1e-12)
        assert unit == math.log(2)


def test_the_loss_of_answers_is_per_token_over_the_bases() -> None:
    ours, base = scores(([-2.0], [4], 0), ([-4.0], [2], 0)), scores(([-8.0], [4], 0), ([-4.0], [2], 0))
    top, bottom = ours.loss(base, 0.1)
    assert top.sum() / bottom.sum() == 6 / 12


def test_scores_survive_json(tiny_model: Any, tiny_tokenizer: Any) -> None:
    found = score(tiny_model, domains(tiny_tokenizer)["choices"], PAD)
    assert Scores.from_dict(json.loads(json.dumps(asdict(found)))) == found


def test_of_a_conversation_the_turns_count_that_training_supervises(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Counted by hand: the tokenizer makes a token of every byte, and of each of its special tokens."""
    turns = (("system", "S"), ("user", "hi"), ("assistant", "yes"), ("user", "more?"), ("assistant", "no, 发"))
    item = Example(tuple(Message(role, text) for role, text in turns), group="g", origin="f:1")
    ids: list[int] = []
    spans: list[list[int]] = []  # of each answer with the token that ends it
    for role, text in turns:
        ids += [1, *bytes_of(tiny_tokenizer, f"{role}\n")]
        answer = [*bytes_of(tiny_tokenizer, text), 2]
        if role == "assistant":
            spans.append([*range(len(ids), len(ids) + len(answer))])
        ids += [*answer, *bytes_of(tiny_tokenizer, "\n")]
    assert [len(span) for span in spans] == [3 + 1, 4 + 3 + 1]
    logprobs = tiny_model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    for supervise, counted in (("assistant", spans), ("last", spans[1:])):
        renderer = Renderer(tiny_tokenizer, 128, supervise)  # type: ignore[arg-type]
        domain = make_domain("d", "sft", [item], renderer)
        found = score(tiny_model, domain, PAD)
        expected = -sum(float(logprobs[place - 1, ids[place]]) for span in counted for place in span)
        assert found.gold_tokens.tolist() == [sum(map(len, counted))]
        assert found.nll.tolist() == pytest.approx([expected], rel=1e-5)
        assert domain.items == (renderer.sft(item),), "what a stage trains on"
        # Where answers are compared, everything before them is shared: the last turn alone can tell them apart.
        pair = make_domain("d", "dpo", [replace(item, rejected="nope")], renderer)
        assert score(tiny_model, pair, PAD).tokens == ((4 + 3 + 1, 4 + 1),)


def bytes_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    return ids
