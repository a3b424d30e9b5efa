"""The engine in front of a server that speaks as vLLM does: its answers are those of PEFT's merged models."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.serve.vllm_world import (
    LIKE,
    TOKENS,
    Like,
    base_target,
    chat,
    completion,
    greedy,
    mixed,
    mixture,
    one,
    peft_adapter,
    served,
)

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, LorchestraError, UserError
from lorchestra.serve.engine import RequestError, StoppingError
from lorchestra.serve.vllm import VllmEngine
from lorchestra.serve.vllm_process import Launch

WITHIN = 2e-3  # of a log-probability: sums in another order, float32


@pytest.fixture(scope="module")
def world(tiny_dir, tmp_path_factory):
    """Adapters by name, and the greedy answers of PEFT's merged models."""
    root = tmp_path_factory.mktemp("adapters")
    base, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    merged = {
        "plain": peft_adapter(base, root / "plain", 4, 1),
        "strong": peft_adapter(base, root / "strong", 4, 2, rslora=True, alpha=6),
        "small": peft_adapter(base, root / "small", 2, 3, alpha=4),
    }
    adapters = {name: served(name, root / name) for name in merged}
    a, b, c = adapters.values()
    targets = {
        "base": base_target(),
        **{name: one(adapter) for name, adapter in adapters.items()},
        "mixture": mixture((a, 0.6), (b, 0.5), (c, -0.4)),
        "half": mixture((b, 0.5)),
    }
    models = {
        "base": base,
        **merged,
        "mixture": mixed(base, merged.values(), (0.6, 0.5, -0.4)),
        "half": mixed(base, [merged["strong"]], [0.5]),
    }
    answers = {name: greedy(model, tokenizer) for name, model in models.items()}
    assert len({text for text, _ in answers.values()}) == len(answers), "answers that cannot be told apart"
    return adapters, targets, answers


@pytest.fixture(scope="module")
def like(tiny_dir):
    server = Like(tiny_dir, LIKE_TOKEN_SECONDS=0.01, LIKE_LOAD_SECONDS=0.1)
    yield server.wait()
    server.stop()


def engine(tiny_dir, tmp_path, *servers, slots=8, **more):
    launch = Launch(tiny_dir, max_loras=min(slots, 4), max_cpu_loras=slots, max_rank=16)
    return VllmEngine(launch, BaseId("tiny"), urls=[s.url for s in servers], root=tmp_path, **more)


def run(engine, work):
    """``work()`` with the engine up."""

    async def main():
        await engine.start()
        try:
            return await work()
        finally:
            await engine.stop(1.0)

    return asyncio.run(asyncio.wait_for(main(), 120))


class Told:
    """What the engine tells its observer."""

    def __init__(self):
        self.events = []

    def waited(self, members, seconds):
        assert seconds >= 0
        self.events.append("waited " + "+".join(served.name for served, _ in members))

    def loaded(self, adapter, seconds):
        assert seconds > 0
        self.events.append(f"loaded {adapter.name}")

    def evicted(self, adapter):
        self.events.append(f"evicted {adapter.name}")


async def rest(stream):
    return [part async for part in stream]


def check(answer, reference):
    text, logprobs = reference
    assert answer.choices[0]["text"] == text
    assert answer.choices[0]["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=WITHIN)


def test_every_target_answers_as_its_merged_model_whoever_shares_the_server(tiny_dir, tmp_path, like, world):
    adapters, targets, answers = world
    it = engine(tiny_dir, tmp_path, like)

    async def work():
        names = [name for name in targets for _ in range(2)]
        got = await asyncio.gather(*(it.answer(completion(targets[name])) for name in names))
        for name, answer in zip(names, got, strict=True):
            check(answer, answers[name])
            assert (answer.usage.prompt, answer.usage.generated) == (15, TOKENS)
        return it.resident()

    resident = run(it, work)
    assert {adapter.key for adapter in adapters.values()} < set(resident)
    assert len([key for key in resident if key.startswith("mixture@")]) == 2
    assert not list(tmp_path.iterdir())  # what was written for vLLM is gone
    models = {body["model"] for body in like.get("/test/seen")}
    assert models == {"tiny", *resident}


def test_concurrent_first_requests_load_once_and_one_that_leaves_stops_nobody(tiny_dir, tmp_path, like, world):
    adapters, targets, answers = world
    it = engine(tiny_dir, tmp_path, like)
    before = len(like.log("load"))

    async def work():
        calls = [asyncio.create_task(it.answer(completion(targets["small"]))) for _ in range(8)]
        await asyncio.sleep(0.05)
        calls[0].cancel()
        got = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(got[0], asyncio.CancelledError)
        for answer in got[1:]:
            check(answer, answers["small"])
        await it.unload(adapters["small"])
        assert it.resident() == []

    run(it, work)
    # An earlier engine left it at the server, so its first load is refused there and it is loaded from our own copy.
    assert [entry["name"] for entry in like.log("load")[before:]] == [adapters["small"].key]


def test_the_least_recently_used_goes_and_one_in_use_stays(tiny_dir, tmp_path, like, world):
    adapters, targets, answers = world
    told = Told()
    it = engine(tiny_dir, tmp_path, like, slots=2, observer=told)

    async def work():
        plain, strong, small = adapters.values()
        await it.load(plain)
        await it.load(strong)
        long = asyncio.create_task(it.answer(completion(targets["plain"], max_tokens=60)))
        await asyncio.sleep(0.2)
        check(await it.answer(completion(targets["small"])), answers["small"])
        assert it.resident() == sorted([plain.key, small.key])
        got = await asyncio.gather(long, *(it.answer(completion(targets[n])) for n in ("strong", "small", "mixture")))
        for name, answer in zip(("strong", "small", "mixture"), got[1:], strict=True):
            check(answer, answers[name])
        assert got[0].choices[0]["text"].startswith(answers["plain"][0])
        assert len(it.resident()) == 2

    run(it, work)
    assert told.events[:4] == ["loaded plain", "loaded strong", "waited plain", "evicted strong"]
    assert told.events.count("waited plain+strong+small") == 1


def test_unload_waits_for_requests_and_takes_mixtures_along(tiny_dir, tmp_path, like, world):
    adapters, targets, answers = world
    it = engine(tiny_dir, tmp_path, like)

    async def work():
        await it.answer(completion(targets["mixture"]))
        long = asyncio.create_task(it.answer(completion(targets["plain"], max_tokens=40)))
        await asyncio.sleep(0.3)
        await it.unload(adapters["plain"])
        assert long.done()
        assert it.resident() == []
        check(await it.answer(completion(targets["half"])), answers["half"])

    run(it, work)
    assert not [name for name in (card["id"] for card in like.get("/v1/models")["data"]) if name.startswith("plain@")]


def test_what_cannot_be_used_exactly_never_reaches_the_server(tiny_dir, tmp_path, like, world):
    adapters, _, answers = world
    plain = Adapter.load(adapters["plain"].directory)
    first, update = next(iter(plain.modules.items()))
    foreign = Adapter({"transformer.h.0.attn": update})
    shaped = Adapter({first: LowRank(update.B[:-1], update.A)})
    elsewhere = Adapter(dict(plain.modules), BaseId("another", weights="sha256:1"))
    large = peft_adapter(make_tiny_model(), tmp_path / "large", 20, 5)
    assert large is not None
    cases = {"modules": (foreign, "does not have"), "shape": (shaped, "shape"), "base": (elsewhere, "another")}
    bad = [(served(name, a.save(tmp_path / name)), words) for name, (a, words) in cases.items()]
    bad.append((served("large", tmp_path / "large"), "rank 20"))
    changed = served("changed", plain.save(tmp_path / "changed"))
    (plain * 2.0).save(tmp_path / "changed")
    bad.append((changed, "other weights"))
    (tmp_path / "space").mkdir()
    launch = Launch(tiny_dir, max_rank=16)
    it = VllmEngine(launch, BaseId("tiny", weights="sha256:0"), urls=[like.url], root=tmp_path / "space")
    before = len(like.log("load"))

    async def work():
        for adapter, words in bad:
            for ask in (it.load(adapter), it.answer(completion(one(adapter)))):
                with pytest.raises(AdapterError, match=words):
                    await ask
        with pytest.raises(RequestError, match="zero"):
            await it.answer(completion(mixture((adapters["plain"], 0.5), (adapters["plain"], -0.5))))
        check(await it.answer(completion(base_target())), answers["base"])
        assert it.resident() == []

    run(it, work)
    assert len(like.log("load")) == before


def test_a_request_is_passed_on_whole_and_what_the_adapter_brings_is_added(tiny_dir, tmp_path, like, world):
    adapters, targets, _ = world
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    own = served("plain", adapters["plain"].directory, chat_template=template, system_prompt="Be brief.",
                 defaults={"max_tokens": 2, "top_p": 0.5, "temperature": 0.0})  # fmt: skip
    asked = {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"enable_thinking": True},
        "include_reasoning": True,
        "top_p": 0.9,
    }
    it = engine(tiny_dir, tmp_path, like)
    before = len(like.get("/test/seen"))

    async def work():
        whole = await it.answer(chat(targets["plain"], **asked))
        assert whole.choices[0]["message"]["tool_calls"][0]["function"]["name"] == "f"
        assert whole.choices[0]["message"]["reasoning"] == "because"
        await it.answer(chat(one(own), max_tokens=None, top_p=0.7, tenant="u"))
        await it.answer(chat(one(own), messages=[{"role": "system", "content": "Mine."}]))
        mixing = mixture((own, 0.5))
        await it.answer(chat(mixing, max_completion_tokens=2, max_tokens=None))

    run(it, work)
    whole, brought, mine, mixing = like.get("/test/seen")[before:]
    added = {"model": adapters["plain"].key, "stream": False, "cache_salt": whole["cache_salt"]}
    assert whole == {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **asked, **added}
    assert brought["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (brought["max_tokens"], brought["top_p"], brought["temperature"]) == (2, 0.7, 0.0)
    assert brought["chat_template"] == template
    assert mine["messages"] == [{"role": "system", "content": "Mine."}]
    assert mixing["max_completion_tokens"] == 2
    assert not {"chat_template", "top_p", "max_tokens"} & set(mixing)  # a mixture is nobody's own
    # A tenant's cached prefixes are its own.
    assert whole["cache_salt"] == mine["cache_salt"] != brought["cache_salt"]


def test_a_stream_says_what_the_whole_answer_says_and_counts(tiny_dir, tmp_path, like, world):
    _, targets, answers = world
    it = engine(tiny_dir, tmp_path, like)

    async def work():
        parts = [part async for part in it.stream(completion(targets["mixture"], stream=True))]
        assert "".join(choice["text"] for part in parts for choice in part.choices) == answers["mixture"][0]
        assert [part.usage.generated for part in parts[:TOKENS]] == list(range(1, TOKENS + 1))
        assert it.turns.queue.served("t") == 15 + 2 * TOKENS
        with pytest.raises(LorchestraError, match="it broke"):
            _ = [part async for part in it.stream(completion(targets["plain"], stream=True, user="fail"))]
        for ask in (it.answer(completion(targets["plain"], prompt="x" * 300)),
                    anext(it.stream(completion(targets["plain"], prompt="x" * 300, stream=True)))):  # fmt: skip
            with pytest.raises(RequestError, match="maximum context") as told:
                await ask
            assert told.value.param == "prompt"

    run(it, work)


def test_a_client_that_leaves_ends_the_request_at_the_server(tiny_dir, tmp_path, like, world):
    _, targets, _ = world
    it = engine(tiny_dir, tmp_path, like)
    before = len(like.log("cancelled"))

    async def work():
        stream = it.stream(completion(targets["plain"], stream=True, max_tokens=200))
        await anext(stream)
        await stream.aclose()
        whole = asyncio.create_task(it.answer(completion(targets["plain"], max_tokens=200)))
        await asyncio.sleep(0.3)
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole
        for _ in range(40):
            if len(like.log("cancelled")) == before + 2:
                break
            await asyncio.sleep(0.05)
        assert len(like.log("cancelled")) == before + 2
        assert it.turns.running == 0

    run(it, work)


def test_a_server_that_has_forgotten_an_adapter_is_told_again(tiny_dir, tmp_path, like, world):
    import httpx2

    adapters, targets, answers = world
    it = engine(tiny_dir, tmp_path, like)

    async def work():
        await it.answer(completion(targets["plain"]))
        url = like.url + "/v1/unload_lora_adapter"
        httpx2.post(url, json={"lora_name": adapters["plain"].key}, trust_env=False)
        got = await asyncio.gather(*(it.answer(completion(targets["plain"])) for _ in range(3)))
        for answer in got:
            check(answer, answers["plain"])

    run(it, work)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "alone"), [("0.23.1", True), ("0.32.0", False)])
def test_a_version_that_mixes_up_loads_only_while_nothing_runs(tiny_dir, tmp_path, world, version, alone):
    _, targets, answers = world
    server = Like(tiny_dir, LIKE_VERSION=version, LIKE_TOKEN_SECONDS=0.02, LIKE_LOAD_SECONDS=0.1).wait()
    it = engine(tiny_dir, tmp_path, server)

    async def work():
        first = asyncio.create_task(it.answer(completion(targets["base"], max_tokens=40)))
        await asyncio.sleep(0.2)
        names = ["plain", "strong", "base", "small"]
        got = await asyncio.gather(*(it.answer(completion(targets[name])) for name in names))
        for name, answer in zip(names, got, strict=True):
            check(answer, answers[name])
        await first

    try:
        run(it, work)
        running = [entry["running"] for entry in server.log("load")]
        assert len(running) == 3
        assert all(count == 0 for count in running) if alone else any(running)
    finally:
        server.stop()


@pytest.mark.slow
def test_a_vllm_that_is_killed_comes_back_with_its_adapters_before_it_is_ready(tiny_dir, tmp_path, world, caplog):
    adapters, targets, answers = world
    caplog.set_level(logging.DEBUG, "lorchestra.serve")
    variables = {"PYTHONPATH": str(LIKE), "LIKE_TOKEN_SECONDS": "0.02", "LIKE_LOAD_SECONDS": "0.2"}
    it = VllmEngine(Launch(tiny_dir, max_length=256, environment=variables), BaseId("tiny"), root=tmp_path)

    async def work():
        child = it.servers[0].child
        names = ("plain", "strong", "mixture")
        for name in names:
            check(await it.answer(completion(targets[name])), answers[name])
        resident, pid = it.resident(), child.pid
        running = asyncio.create_task(it.answer(completion(targets["plain"], max_tokens=200)))
        stream = it.stream(completion(targets["strong"], max_tokens=200, stream=True))
        await anext(stream)
        os.kill(pid, signal.SIGKILL)
        for ask in (running, rest(stream)):
            with pytest.raises(StoppingError):
                await ask
        while it.ready:
            await asyncio.sleep(0.02)
        with pytest.raises(StoppingError):
            await it.answer(completion(targets["base"]))
        while not it.ready:
            await asyncio.sleep(0.02)
        assert child.pid != pid
        assert it.resident() == resident
        loads = len([r for r in caplog.records if "vLLM loaded" in r.message])
        got = await asyncio.gather(*(it.answer(completion(targets[name])) for name in (*names, "small", "base")))
        for name, answer in zip((*names, "small", "base"), got, strict=True):
            check(answer, answers[name])
        # Those that it had were loaded before it was ready: only the new one is loaded since.
        assert len([r for r in caplog.records if "vLLM loaded" in r.message]) == loads + 1
        return child.pid

    pid = run(it, work)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert adapters["plain"].directory.is_dir()


def test_a_vllm_that_does_not_start_says_why(tiny_dir, tmp_path):
    variables = {"PYTHONPATH": str(LIKE), "LIKE_START_CODE": "7"}
    it = VllmEngine(Launch(tiny_dir, environment=variables), BaseId("tiny"), root=tmp_path)
    with pytest.raises(LorchestraError, match=r"code 7.*\n.*no memory for the base"):
        asyncio.run(it.start())
    missing = VllmEngine(Launch(tiny_dir, python=str(tmp_path / "python")), BaseId("tiny"), root=tmp_path)
    with pytest.raises(UserError, match="cannot be started"):
        asyncio.run(missing.start())
    assert not list(tmp_path.iterdir())


def test_what_is_no_vllm_is_refused_at_the_start(tiny_dir, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "health").write_text("ok")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(tmp_path / "web")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        port = process.stdout.readline().split("port ")[1].split()[0]
        it = VllmEngine(Launch(tiny_dir), BaseId("tiny"), urls=[f"http://127.0.0.1:{port}"], root=tmp_path)
        started = time.monotonic()
        with pytest.raises(UserError, match="expected a vLLM server"):
            asyncio.run(it.start())
        assert time.monotonic() - started < 20
        process.kill()
