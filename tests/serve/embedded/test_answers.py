"""The text side, against transformers' own generation, decoding and log-probabilities."""

from __future__ import annotations

import asyncio
import copy
import math
import threading
from dataclasses import replace

import pytest
import torch

from lorchestra.errors import AdapterError
from lorchestra.serve.embedded.prompts import Prompts
from lorchestra.serve.embedded.vocabulary import Vocabulary
from lorchestra.serve.engine import Call, RequestError, StoppingError, Target, TooLongError
from lorchestra.serve.wire import ChatRequest, CompletionRequest, parse


def call(adapter=None, **body) -> Call:
    kind = ChatRequest if "messages" in body else CompletionRequest
    target = Target("any", ((adapter, 1.0),) if adapter else ())
    return Call("r1", "first", target, parse(kind, {"model": "any", "temperature": 0, **body}))


def ask(engine, adapter=None, **body):
    return asyncio.run(engine.answer(call(adapter, **body)))


def parts(engine, adapter=None, **body):
    async def gather():
        return [chunk async for chunk in engine.stream(call(adapter, **body))]

    return asyncio.run(gather())


def user(text):
    return [{"role": "user", "content": text}]


def greedy(model, ids, count):
    ids = torch.tensor([ids])
    out = model.generate(ids, attention_mask=ids > 0, max_new_tokens=count, do_sample=False, pad_token_id=3)
    return out[0, ids.shape[1] :].tolist()


def logprobs_of(model, ids):
    return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


def test_a_completion_is_what_transformers_generates(engine, tiny_model, tiny_tokenizer):
    ids = tiny_tokenizer("Fever?")["input_ids"]
    for prompt in ("Fever?", ids):
        answer = ask(engine, prompt=prompt, max_tokens=12)
        made = greedy(tiny_model, ids, 12)
        whole = tiny_tokenizer.decode(made, skip_special_tokens=True)
        assert whole.rstrip("\ufffd") == answer.choices[0]["text"].rstrip("\ufffd")
        assert answer.usage.prompt == len(ids)
        assert answer.usage.generated == len([i for i in made if i != 2])


def test_sixteen_tokens_unless_it_says(engine):
    assert ask(engine, prompt="Fever?", logit_bias={"2": -100}).usage.generated == 16


def test_a_chat_is_rendered_by_the_template(engine, tokens, tiny_tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, *user("Fever?")]
    ask(engine, messages=turns, max_tokens=2)
    text = tiny_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokens.seen[-1].prompt == tuple(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
    assert tokens.seen[-1].sampling.stop_ids == {2}


def test_text_parts_and_developers(engine, tokens):
    parts = [{"type": "text", "text": "Fever?"}]
    ask(engine, messages=[{"role": "developer", "content": "Be brief."}, *user("Fever?")], max_tokens=1)
    ask(engine, messages=[{"role": "system", "content": "Be brief."}, *user(parts)], max_tokens=1)
    assert tokens.seen[0].prompt == tokens.seen[1].prompt


def test_an_adapters_template_system_prompt_and_defaults(engine, tokens, clinic, tiny_tokenizer):
    answer = asyncio.run(engine.answer(replace(
        call(clinic, messages=user("Fever?")),
        body=parse(ChatRequest, {"model": "clinic", "messages": user("Fever?"), "logit_bias": {"2": -100}}),
    )))  # fmt: skip
    text = "[system]You are a nurse.[user]Fever?[answer]"
    assert tokens.seen[-1].prompt == tuple(tiny_tokenizer(text)["input_ids"])
    assert tokens.seen[-1].sampling.temperature == 0
    assert answer.usage.generated == 5
    turns = [{"role": "system", "content": "Be brief."}, *user("a")]
    ask(engine, clinic, messages=turns, max_tokens=1, temperature=0.5)
    assert tokens.seen[-1].prompt == tuple(tiny_tokenizer("[system]Be brief.[user]a[answer]")["input_ids"])
    assert (tokens.seen[-1].sampling.temperature, tokens.seen[-1].sampling.max_tokens) == (0.5, 1)


def test_a_mixture_has_the_bases_template(engine, tokens, clinic, tiny_tokenizer):
    mixed = replace(call(clinic, messages=user("a"), max_tokens=1), target=Target("m", ((clinic, 0.5),)))
    asyncio.run(engine.answer(mixed))
    text = tiny_tokenizer.apply_chat_template(user("a"), tokenize=False, add_generation_prompt=True)
    assert tokens.seen[-1].prompt == tuple(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])


def test_template_variables_of_the_request(engine, tokens, clinic, tiny_tokenizer):
    mood = replace(clinic, chat_template="{{ mood }}:{{ messages[-1]['content'] }}", system_prompt=None)
    ask(engine, mood, messages=user("a"), chat_template_kwargs={"mood": "calm"}, max_tokens=1)
    assert tokens.seen[-1].prompt == tuple(tiny_tokenizer("calm:a")["input_ids"])
    with pytest.raises(RequestError, match="'tokenize'") as caught:
        ask(engine, mood, messages=user("a"), chat_template_kwargs={"tokenize": True})
    assert caught.value.param == "chat_template_kwargs"


def test_a_template_that_refuses_is_the_requests_mistake_and_one_that_fails_the_adapters(engine, clinic):
    picky = replace(clinic, chat_template="{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}x")
    with pytest.raises(RequestError, match="one turn"):
        ask(engine, picky, messages=user("a"))
    with pytest.raises(AdapterError, match="clinic"):
        asyncio.run(engine.load(replace(clinic, chat_template="{% for %}")))
    with pytest.raises(AdapterError, match="clinic"):
        asyncio.run(engine.load(replace(clinic, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")))
    with pytest.raises(AdapterError, match="temprature"):
        asyncio.run(engine.load(replace(clinic, defaults={"temprature": 1})))
    assert not engine.resident()


def test_a_base_without_a_template_gets_plain_text(tokens, tiny_tokenizer):
    bare = copy.copy(tiny_tokenizer)
    bare.chat_template = None
    prompts = Prompts(bare, Vocabulary(bare), 260, 512)
    prompt = prompts.chat(parse(ChatRequest, {"model": "a", "messages": user("Fever?")}), None)
    assert prompt.text == "Fever?"
    assert prompts.ends(None) == {2}


def test_of_named_templates_the_default_one_holds(tiny_tokenizer):
    named = copy.copy(tiny_tokenizer)
    named.chat_template = {"tool_use": "tools", "default": "{{ messages[0]['content'] }}!<|im_end|>"}
    prompts = Prompts(named, Vocabulary(named), 260, 512)
    asked = parse(ChatRequest, {"model": "a", "messages": user("Fever?")})
    assert prompts.chat(asked, None).text == "Fever?!<|im_end|>"
    assert isinstance(prompts.ends(None), frozenset)


@pytest.mark.parametrize(
    "body",
    [
        {"suffix": "x"}, {"best_of": 2}, {"repetition_penalty": 1.1}, {"structured_outputs": {"json": {}}},
        {"messages": user("a"), "tools": [{"type": "function"}]}, {"messages": user("a"), "tool_choice": "required"},
        {"messages": user("a"), "response_format": {"type": "json_object"}},
        {"messages": user("a"), "n": 2, "echo": True},
        {"messages": user([{"type": "image_url", "image_url": {"url": "a"}}])}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "a"}]}, {"messages": user("a"), "reasoning_effort": "high"},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        {"prompt": [260]}, {"prompt": [[1], [999]]}, {"prompt": ""}, {"prompt": ["a", ""]},
        {"logit_bias": {"260": 1}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"a": 1}}, {"logit_bias": {"²": 1}},
        {"min_tokens": 17}, {"prompt": ["a"] * 1000, "n": 3},
    ],
)  # fmt: skip
def test_what_this_engine_cannot_do_is_refused_by_field(engine, tokens, body):
    with pytest.raises(RequestError) as caught:
        ask(engine, **({} if "messages" in body else {"prompt": "a"}) | body)
    assert caught.value.param.split(".")[0] in body
    assert not tokens.seen


@pytest.mark.parametrize(
    "body",
    [
        {"suffix": ""}, {"best_of": 1}, {"repetition_penalty": 1.0}, {"user": "u"}, {"best_of": 2, "n": 2},
        {"messages": user("a"), "tools": []}, {"messages": user("a"), "response_format": {"type": "text"}},
        {"messages": user("a"), "tool_choice": "none", "metadata": {}, "store": False, "modalities": ["text"]},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_no_reason_to_refuse(engine, body):
    assert ask(engine, **({} if "messages" in body else {"prompt": "a"}) | {"max_tokens": 1} | body).choices


def test_what_does_not_fit_is_told_and_a_default_is_cut_down(engine, tokens, clinic):
    for body in ({"prompt": [9] * 512}, {"prompt": [9] * 500, "max_tokens": 13}, {"prompt": [9] * 513, "max_tokens": 0},
                 {"messages": user("a" * 600)}):  # fmt: skip
        with pytest.raises(TooLongError, match="512"):
            ask(engine, **body)
    assert not tokens.seen
    ask(engine, prompt=[9] * 510, logit_bias={"2": -100})
    ask(engine, replace(clinic, defaults={"max_tokens": 400}), prompt=[9] * 511)
    assert [g.sampling.max_tokens for g in tokens.seen] == [2, 1]
    ask(engine, prompt=[9] * 512, max_tokens=0, echo=True, logprobs=1)


def test_a_text_that_cannot_fit_whatever_its_tokens_is_not_tokenised(engine, tiny_tokenizer, monkeypatch):
    tokenised, plain = [], type(tiny_tokenizer).__call__

    def noting(self, text, **how):
        tokenised.append(text)
        return plain(self, text, **how)

    monkeypatch.setattr(type(tiny_tokenizer), "__call__", noting)
    for body in ({"prompt": "a" * 10**7}, {"prompt": ["b", "a" * 10**7]}, {"messages": user("a" * 10**7)}):
        with pytest.raises(TooLongError, match="512"):
            ask(engine, **body)
    assert tokenised == ["b"]
    # What its longest token writes, as often as there is room: this fits.
    assert ask(engine, prompt="<|endoftext|>" * 512, max_tokens=0).usage.prompt == 512


def test_one_requests_many_prompts_do_not_keep_another_waiting(engine, monkeypatch):
    order, asked, plain = [], threading.Event(), engine._prompts.completion

    def noting(item, place):
        order.append(item)
        if len(order) == 3:
            asked.wait(30)
        return plain(item, place)

    monkeypatch.setattr(engine._prompts, "completion", noting)

    async def both():
        many = asyncio.create_task(engine.answer(call(prompt=["a"] * 50, max_tokens=0)))
        while len(order) < 3:
            await asyncio.sleep(0.001)
        other = asyncio.create_task(engine.answer(call(prompt="b", max_tokens=0)))
        while not engine._thread._work_queue.qsize():
            await asyncio.sleep(0.001)
        asked.set()
        await other
        await many

    asyncio.run(both())
    assert order.index("b") == 3


def test_a_stop_string_is_cut_and_never_shown(engine, tokens, tiny_tokenizer):
    free = ask(engine, prompt="Fever?", max_tokens=30, logit_bias=letters(tiny_tokenizer)).choices[0]["text"]
    assert len(free) == 30
    for length in (1, 2, 3):
        stop = free[10 : 10 + length]
        expected = free[: free.index(stop)]
        asked = {"prompt": "Fever?", "max_tokens": 30, "stop": ["zzzz", stop], "logit_bias": letters(tiny_tokenizer)}
        choice = ask(engine, **asked).choices[0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
        chunks = parts(engine, **asked)
        assert "".join(chunk.choices[0]["text"] for chunk in chunks) == expected
        assert chunks[-1].choices[0]["finish_reason"] == "stop"
    assert len(tokens.ended) == len(tokens.seen)
    assert not tokens.running


def letters(tokenizer, value=60):
    return {str(i): value for i in tokenizer("abcdefgh")["input_ids"]}


def test_the_end_of_the_turn_and_going_past_it(engine):
    force = {"2": 100}
    answer = ask(engine, prompt="a", max_tokens=4, logit_bias=force)
    assert (answer.choices[0]["text"], answer.choices[0]["finish_reason"], answer.usage.generated) == ("", "stop", 0)
    answer = ask(engine, prompt="a", max_tokens=4, logit_bias=force, ignore_eos=True)
    assert (answer.choices[0]["text"], answer.choices[0]["finish_reason"], answer.usage.generated) == ("", "length", 4)
    assert ask(engine, prompt="a", max_tokens=4, logit_bias={"100": 100}, stop_token_ids=[100]).usage.generated == 0
    assert ask(engine, prompt="a", max_tokens=4, logit_bias=force, min_tokens=3).usage.generated == 3


def test_choices_of_several_prompts_are_each_what_it_would_be_alone(engine, tokens):
    body = {"max_tokens": 6, "temperature": 1.0, "seed": 5}
    together = ask(engine, prompt=["Fever?", "Cough?"], n=3, **body)
    assert [choice["index"] for choice in together.choices] == list(range(6))
    for p, prompt in enumerate(["Fever?", "Cough?"]):
        for i in range(3):
            alone = ask(engine, prompt=prompt, **body | {"seed": 5 + i})
            assert alone.choices[0]["text"] == together.choices[3 * p + i]["text"]
    assert len({choice["text"] for choice in together.choices}) == 6
    assert together.usage.prompt == 12
    assert ask(engine, prompt="a", n=2, max_tokens=1, seed=2**63 - 1).choices


def test_no_seed_is_no_seed(engine, tokens):
    ask(engine, prompt="a", n=2, max_tokens=1)
    assert [generation.sampling.seed for generation in tokens.seen] == [None, None]


def test_top_p_zero_is_the_likeliest(engine):
    greedy_text = ask(engine, prompt="a", max_tokens=5).choices[0]["text"]
    assert ask(engine, prompt="a", max_tokens=5, temperature=2, top_p=0).choices[0]["text"] == greedy_text


def test_legacy_logprobs_with_echo_are_the_models(engine, tiny_model, tiny_tokenizer):
    ids = tiny_tokenizer("Fever?")["input_ids"]
    choice = ask(engine, prompt="Fever?", max_tokens=4, logprobs=3, echo=True, ignore_eos=True).choices[0]
    told = choice["logprobs"]
    whole = [*ids, *ask_ids(engine, tiny_model, ids, 4)]
    wanted = logprobs_of(tiny_model, whole)
    assert len(told["tokens"]) == len(whole) == len(told["token_logprobs"]) == len(told["top_logprobs"])
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    for i in range(1, len(whole)):
        assert told["token_logprobs"][i] == pytest.approx(float(wanted[i - 1, whole[i]]), abs=1e-4)
        top = told["top_logprobs"][i]
        assert 3 <= len(top) <= 4
        assert told["token_logprobs"][i] in top.values()
        assert max(top.values()) == pytest.approx(float(wanted[i - 1].max()), abs=1e-4)
    assert told["text_offset"][:7] == [0, 1, 2, 3, 4, 5, 6]
    assert "".join(told["tokens"][:6]) == "Fever?"
    assert choice["text"].startswith("Fever?")


def ask_ids(engine, model, ids, count):
    made = list(ids)
    for _ in range(count):
        made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
    return made[len(ids) :]


def test_scoring_a_prompt_generates_nothing(engine):
    for prompt in ("Fever?", [[9, 10, 11], [12, 13]]):
        answer = ask(engine, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        for choice, length in zip(answer.choices, (6,) if prompt == "Fever?" else (3, 2), strict=True):
            assert len(choice["logprobs"]["tokens"]) == length
            assert choice["finish_reason"] == "length"
        assert answer.usage.generated == 0


def test_minus_infinity_is_a_number(engine, tokens, monkeypatch):
    from lorchestra.serve.embedded.generation import Produced, Token

    async def impossible(generation):
        yield Produced((Token(100, -math.inf, ((101, -math.inf),)),), finish="length")

    monkeypatch.setattr(tokens, "generate", impossible)
    told = ask(engine, prompt="a", logprobs=1).choices[0]["logprobs"]
    assert told["token_logprobs"] == [-9999.0]


def test_chat_logprobs_have_bytes_that_are_the_text(engine, tiny_tokenizer):
    choice = ask(
        engine, messages=user("Fever?"), max_tokens=6, logprobs=True, top_logprobs=2, logit_bias=letters(tiny_tokenizer)
    ).choices[0]
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == choice["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] >= entry["logprob"]
        assert entry["logprob"] <= 0


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Fever?", "logprobs": 2, "echo": True, "n": 2, "seed": 1, "temperature": 1},
        {"prompt": ["Fever?", "Cough?"], "stop": ["a", "e"]},
        {
            "messages": user("Fever?"),
            "max_tokens": 20,
            "logprobs": True,
            "top_logprobs": 1,
            "n": 2,
            "seed": 1,
            "temperature": 1,
        },
        {"prompt": "发烧", "max_tokens": 40, "logprobs": 0},
    ],
)
def test_a_stream_is_the_answer_in_parts(engine, body):
    whole, chunks = ask(engine, **body), parts(engine, **body)
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c["index"] == choice["index"]]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        if "message" in choice:
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
            told = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert told == choice["logprobs"]["content"]
        else:
            assert "".join(c["text"] for c in own) == choice["text"]
            if choice["logprobs"]:
                for key, values in choice["logprobs"].items():
                    assert [value for c in own for value in c["logprobs"][key]] == values


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_frees_every_slot(engine, tokens, n):
    async def leave_stream():
        stream = engine.stream(call(prompt="a", max_tokens=400, n=n, logit_bias={"2": -100}))
        await anext(stream)
        assert len(tokens.running) == n
        await stream.aclose()
        assert not tokens.running

    async def cancel_answer():
        task = asyncio.create_task(engine.answer(call(prompt="a", max_tokens=400, n=n, logit_bias={"2": -100})))
        while not tokens.running:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not tokens.running

    asyncio.run(leave_stream())
    asyncio.run(cancel_answer())


def test_an_engine_that_stopped_says_so(engine):
    asyncio.run(engine.stop(0))
    for refused in (ask, parts):
        with pytest.raises(StoppingError):
            refused(engine, prompt="a")


def test_one_sequences_failure_ends_its_siblings(engine, tokens, monkeypatch):
    plain = tokens.generate

    async def failing(generation):
        if generation.sampling.seed == 1:
            raise RequestError("no room")
        async for produced in plain(generation):
            yield produced

    monkeypatch.setattr(tokens, "generate", failing)
    with pytest.raises(RequestError, match="no room"):
        ask(engine, prompt="a", n=2, seed=0, max_tokens=400)
    assert not tokens.running
