"""Requests: what the official client can send is understood, everything else is refused by name."""

from __future__ import annotations

import json
import typing

import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase

from lorchestra.errors import AdapterError
from lorchestra.serve.engine import RequestError
from lorchestra.serve.wire import (
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    check_defaults,
    parse,
    read,
    with_defaults,
)

COMPLETION = {"model": "base", "prompt": "Fever?"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Fever?"}]}


def refusal(kind, body) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


@pytest.mark.parametrize(
    ("kind", "official"),
    [(CompletionRequest, CompletionCreateParamsBase), (ChatRequest, chat_params.CompletionCreateParamsBase)],
)
def test_every_field_of_the_official_client_is_known(kind, official):
    sent = set(typing.get_type_hints(official)) | {"stream"}
    assert len(sent) > 15
    assert sent <= set(kind.model_fields)


@pytest.mark.parametrize("prompt", ["", "a", [1, 2], ["a", "b"], [[1], [2, 3]]])
def test_prompts(prompt):
    assert read(CompletionRequest, json.dumps(COMPLETION | {"prompt": prompt}).encode()).prompt == prompt


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], ["a", 1], [1, "a"], [1.5], [-1], [2**31], [[["a"]]], {"a": 1}, True]
)
def test_what_is_no_prompt(prompt):
    assert refusal(CompletionRequest, COMPLETION | {"prompt": prompt}).param.startswith("prompt")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "5"), ("max_tokens", 2**31), ("max_tokens", True),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True), ("top_p", -0.1),
        ("top_p", 1.1), ("n", 0), ("n", 129), ("n", 10**30), ("logprobs", 6), ("logprobs", -1), ("logprobs", True),
        ("echo", 1), ("stop", ""), ("stop", ["a"] * 5), ("stop", [1]), ("stop", "a" * 2000), ("seed", 2**63),
        ("seed", 1.0), ("logit_bias", {"5": 101}), ("logit_bias", {"5": "a"}), ("logit_bias", [5]),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("top_k", -2), ("min_p", 1.5), ("min_tokens", -1),
        ("ignore_eos", "yes"), ("stream", "yes"), ("model", ""), ("model", None), ("model", 5),
        ("stream_options", {"include_usage": True}), ("stop_token_ids", [-1]), ("best_of", 0),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused_by_field(field, value):
    error = refusal(CompletionRequest, COMPLETION | {field: value})
    assert error.param.split(".")[0] == field
    assert field in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []), ("messages", "hello"), ("messages", [{"role": "nurse", "content": "a"}]),
        ("messages", [{"role": "user", "content": 5}]), ("messages", [{"role": "user", "contents": "a"}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]), ("messages", [{"content": "a"}]),
        ("messages", [{"role": "user", "content": [{"text": "a"}]}]), ("top_logprobs", 21), ("top_logprobs", 1),
        ("logprobs", 1), ("max_completion_tokens", -1), ("tools", {}), ("response_format", "json"),
    ],
)  # fmt: skip
def test_chats_out_of_bounds_are_refused_by_field(field, value):
    assert refusal(ChatRequest, CHAT | {field: value}).param.split(".")[0] == field


def test_a_misspelt_field_is_told_its_nearest():
    error = refusal(CompletionRequest, {"model": "base", "promt": "a"})
    assert (error.param, str(error)) == ("promt", "promt: no such field; did you mean 'prompt'?")
    error = refusal(ChatRequest, CHAT | {"messages": [{"role": "user", "contents": "a"}]})
    assert (error.param, str(error)[-10:]) == ("messages.0.contents", "'content'?")
    error = refusal(ChatRequest, CHAT | {"stream": True, "stream_options": {"include_usge": True}})
    assert "'include_usage'" in str(error)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"5", b"null", b'"a"', b"\xff\xfe", b'{"model": "\\ud800", "prompt": "a"}', b"[" * 100_000,
        b'{"model": "a", "prompt": "a", "temperature": NaN}', b'{"model": "a", "prompt": "a", "temperature": Infinity}',
        b'{"model": "a", "prompt": "a", "seed": ' + b"9" * 10_000 + b"}", b'{"a": ' * 5000,
        b'{"model": "a", "prompt": "a", "temperature": 1e999}',
    ],
)  # fmt: skip
def test_what_is_no_request_at_all(content):
    assert str(refusal(CompletionRequest, content))


def test_null_is_unset():
    assert parse(CompletionRequest, {**COMPLETION, "max_tokens": None, "stop": None, "n": None}).choices == 1


def test_the_body_as_it_came_is_kept():
    body = {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"a": 1}}
    assert read(ChatRequest, json.dumps(body).encode()).sent == body


def test_the_newer_name_of_max_tokens():
    assert parse(ChatRequest, {**CHAT, "max_completion_tokens": 7}).most_tokens == 7
    assert refusal(ChatRequest, {**CHAT, "max_completion_tokens": 7, "max_tokens": 8}).param == "max_completion_tokens"


def test_defaults_fill_what_is_open_and_nothing_else():
    request = parse(ChatRequest, {**CHAT, "temperature": 0, "max_completion_tokens": 3})
    filled = with_defaults(request, {"temperature": 0.7, "top_p": 0.9, "max_tokens": 50}, "clinic")
    assert (filled.temperature, filled.top_p, filled.most_tokens) == (0, 0.9, 3)
    assert filled.sent == request.sent
    assert request.top_p is None


@pytest.mark.parametrize("defaults", [{"temprature": 1}, {"temperature": 3}, {"model": "other"}, {"stop": ["a"] * 9}])
def test_defaults_that_no_request_could_say(defaults):
    with pytest.raises(AdapterError, match="clinic"):
        check_defaults(defaults, "clinic")


def test_loading_in_place_is_refused():
    assert refusal(LoadRequest, {"lora_name": "a", "lora_path": "b", "load_inplace": True}).param == "load_inplace"
