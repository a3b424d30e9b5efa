"""The official client against a live server."""

from __future__ import annotations

import openai
import pytest

from lorchestra.serve.app import create_app

TURNS = [{"role": "user", "content": "Fever?"}]


@pytest.fixture
def client(gateway, live):
    with openai.OpenAI(base_url=f"{live(create_app(gateway))}/v1", api_key="one", max_retries=0) as client:
        yield client


def test_completions(client, tokens):
    asked = {"model": "base", "prompt": "Fever?", "max_tokens": 8, "temperature": 1, "seed": 3, "n": 2}
    whole = client.completions.create(**asked, logprobs=2, echo=True)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert all(choice.text.startswith("Fever?") for choice in whole.choices)
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    assert len(whole.choices[0].logprobs.top_logprobs[3]) >= 2
    assert whole.usage.completion_tokens <= 16
    again = client.completions.create(**asked, logprobs=2, echo=True)
    assert [choice.text for choice in again.choices] == [choice.text for choice in whole.choices]
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert ["Fever?" + text for text in texts] == [choice.text for choice in whole.choices]
    other = client.completions.create(**asked | {"seed": 30})
    assert [choice.text for choice in other.choices] != texts
    assert not tokens.running


def test_chats(client):
    asked = {"model": "clinic", "messages": TURNS, "max_tokens": 8}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    back = [*TURNS, whole.choices[0].message.model_dump(), {"role": "user", "content": "And now?"}]
    assert client.chat.completions.create(**asked | {"messages": back}).choices


def test_stop_strings(client):
    letters = {str(i): 60 for i in range(69, 77)}
    asked = {"model": "base", "prompt": "Fever?", "max_tokens": 20, "temperature": 0, "logit_bias": letters}
    free = client.completions.create(**asked).choices[0].text
    stopped = client.completions.create(**asked, stop=[free[5:8]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free[: free.index(free[5:8])], "stop")


def test_models(client):
    assert [model.id for model in client.models.list()] == ["base", "clinic"]
    assert client.models.retrieve("clinic").parents == {"general": 0.3, "medical": 0.5}


def test_refusals_are_the_clients_own_errors(client, gateway):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="base", prompt="a", max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model="base", messages=TURNS, response_format={"type": "json_object"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nobody").models.list()


def test_leaving_a_stream_frees_its_slot(client, tokens):
    tokens.pause = 0.01
    stream = client.completions.create(
        model="base", prompt="a", max_tokens=400, logit_bias={"69": 100}, extra_body={"ignore_eos": True}, stream=True
    )
    next(iter(stream))
    assert tokens.running
    stream.close()
    for _ in range(500):
        if not tokens.running:
            break
        client.models.list()
    assert not tokens.running
