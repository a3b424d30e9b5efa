"""The clients of the serving benchmark time what arrives, and refuse what was not asked for."""

from __future__ import annotations

import asyncio
import importlib
import json
import threading
from collections import Counter

import pytest


@pytest.fixture
def load(benchmarks, monkeypatch):
    monkeypatch.syspath_prepend(benchmarks)
    return importlib.import_module("serve_load")


@pytest.fixture
def serve(script, load):
    return script("serve")


def test_gaps_add_up_and_percentiles_are_members_of_the_sample(load):
    reply = load.Reply(10.0, [(11.0, 1), (11.5, 2), (12.5, 4)])
    assert (reply.first, reply.total, reply.gaps) == (1.0, 2.5, [0.5, 0.5, 0.5])
    found = load.percentiles([3.0, 1.0, 2.0, 4.0])
    assert (found["p50"], found["p99"]) == (2.0, 4.0)
    assert load.percentiles(list(range(1, 101)))["p95"] == 95


def test_calls_timed_in_their_own_process_are_counted_by_all_their_answers(load):
    rows = [{"seconds": 2.0, "tokens": [0.5, 1.0, 2.0]}, {"seconds": 4.0, "tokens": [1.0, 2.0, 4.0]}]
    found = load.summary_of_steps(rows, 3, 5)
    assert found["tokens"] == 2 * 3 * 5
    assert found["tokens_per_second"] == 2 * 3 * 5 / 6.0
    assert found["first_token"]["p99"] == 1.0


class Server:
    """Streams so many tokens as it is told to, and keeps what it was asked."""

    def __init__(self, tokens, status=b"200 OK"):
        self.tokens, self.status, self.asked, self.most, self.now = tokens, status, [], 0, 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self):
        self.thread.start()
        begun = asyncio.run_coroutine_threadsafe(asyncio.start_server(self.answer, "127.0.0.1", 0), self.loop)
        self.server = begun.result(10)
        return self.server.sockets[0].getsockname()[1]

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    async def answer(self, reader, writer):
        self.now += 1
        self.most = max(self.most, self.now)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length"))
        self.asked.append(json.loads(await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 " + self.status + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        events = [{"choices": [{}], "usage": {"completion_tokens": i + 1}} for i in range(self.tokens)]
        events.append({"choices": [], "usage": {"completion_tokens": self.tokens}})
        for event in (*map(json.dumps, events), "[DONE]"):
            await asyncio.sleep(0.001)
            line = f"data: {event}\n\n".encode()
            writer.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        writer.write(b"0\r\n\r\n")
        self.now -= 1
        writer.close()


def test_every_request_is_sent_once_and_no_more_than_the_clients_at_a_time(load):
    server = Server(4)
    requests = [load.Request(f"m{i}", [i, 7], 4) for i in range(9)]
    with server as port:
        found = load.crowd(port, requests, 3)
    assert Counter(body["model"] for body in server.asked) == Counter(f"m{i}" for i in range(9))
    assert all(body["prompt"] == [int(body["model"][1:]), 7] for body in server.asked)
    assert all(body["max_tokens"] == 4 and body["temperature"] == 0 for body in server.asked)
    assert server.most <= 3
    assert (found["requests"], found["tokens"]) == (9, 36)
    assert found["tokens_per_second"] == pytest.approx(36 / found["seconds"])


@pytest.mark.parametrize(("tokens", "status"), [(3, b"200 OK"), (4, b"429 Too Many Requests")])
def test_what_was_not_asked_for_is_no_figure(load, tokens, status):
    with Server(tokens, status) as port, pytest.raises(RuntimeError):
        load.crowd(port, [load.Request("m", [1], 4)], 1)


def test_prompts_are_new_in_every_round_and_the_same_every_time(serve):
    job = {"text": list(range(10_000)), "names": ["a", "b"]}
    first = serve.prompts(job, 20, (0, "x"))
    assert first == serve.prompts(job, 20, (0, "x"))
    assert first != serve.prompts(job, 20, (1, "x"))
    assert all(30 <= len(prompt) <= 60 for prompt in first)
    assert serve.models_of(job, "many", 2) == ["a", "b"]
    assert serve.models_of(job, "one", 2) == ["a", "a"]


def test_ratios_are_taken_within_a_round(serve):
    rounds = {"a": [{"tokens_per_second": 2.0}, {"tokens_per_second": 30.0}, {"tokens_per_second": 4.0}],
              "b": [{"tokens_per_second": 1.0}, {"tokens_per_second": 10.0}, {"tokens_per_second": 1.0}]}  # fmt: skip
    assert serve.ratio(rounds, "a", "b") == 3.0
    assert serve.ratio(rounds, "a", "c") is None
