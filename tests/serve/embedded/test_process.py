"""The core in a process of its own: the same answers, and what becomes of each side when the other ends."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace

import httpx2
import psutil
import pytest
from tests.serve.embedded.worlds import GREEDY, World, collected
from tests.serve.real_server import make_adapter, make_base, serving

from lorchestra.errors import LorchestraError
from lorchestra.events import SILENT
from lorchestra.serve.embedded.core import Limits, Setup
from lorchestra.serve.embedded.generation import Sampling
from lorchestra.serve.embedded.local import loaded as loaded_here
from lorchestra.serve.embedded.process import ProcessCore
from lorchestra.serve.embedded.process import loaded as loaded_apart
from lorchestra.serve.engine import StoppingError

pytestmark = pytest.mark.slow
PLAIN = {"device": "cpu", "dtype": "float32"}


def gone(pid: int, within: float = 15.0) -> bool:
    """Whether a process has ended, or does so in time."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(params=[False, True], ids=["here", "apart"])
def world(request, tiny_dir, tmp_path):
    world = World(tiny_dir, tmp_path, request.param, max_batch=2)
    yield world
    world.close()


def test_answers_are_those_of_the_core_in_this_process_token_by_token(tiny_dir, tmp_path):
    worlds = [World(tiny_dir, tmp_path / name, apart) for name, apart in (("here", False), ("apart", True))]
    wanted = [
        ({}, GREEDY), ({"a1": 1.0}, replace(GREEDY, logprobs=3)),
        ({"a0": 0.5, "a3": -0.3}, replace(GREEDY, logprobs=0)),
        ({"a3": 1.0}, Sampling(24, temperature=1.2, top_p=0.9, seed=11, logprobs=2, logit_bias={7: 2.0})),
        ({"a2": 1.0}, Sampling(24, seed=-3, top_k=20, frequency_penalty=0.3, stop_ids=frozenset({5, 9}), min_tokens=4)),
        ({"a1": 1.0}, Sampling(0, prompt_logprobs=2)),
    ]  # fmt: skip

    def answers(world):
        async def work():
            out = []
            for members, how in wanted:
                out.append(await collected(world.engine, world.generation(members, range(4, 40), how)))
            return out

        return world.run(work)

    here, apart = map(answers, worlds)
    for world in worlds:
        assert (world.core.rows, world.core.end_ids, world.engine.max_length) == (260, (2,), 512)
        world.close()
    for (tokens, prompt, finish), (their_tokens, their_prompt, their_finish) in zip(apart, here, strict=True):
        assert finish == their_finish
        assert [token.id for token in tokens] == [token.id for token in their_tokens]
        for mine, theirs in zip((*tokens, *prompt), (*their_tokens, *their_prompt), strict=True):
            assert mine.id == theirs.id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-6)
            assert [i for i, _ in mine.top] == [i for i, _ in theirs.top]
            assert [p for _, p in mine.top] == pytest.approx([p for _, p in theirs.top], abs=1e-6)
    assert any(tokens for tokens, _, _ in here)
    assert any(prompt for _, prompt, _ in here)
    assert {event[0] for event in worlds[0].heard} == {"waited", "loaded"}
    assert worlds[1].heard == worlds[0].heard


def test_a_client_that_leaves_has_no_more_steps(world):
    """With two places and one that stays, those who come after the one that leaves would wait for its 480 tokens."""
    long = replace(GREEDY, max_tokens=480)
    steps_of: dict[int, int] = {}

    async def work():
        hear = world.engine._heard

        def counted(events):
            for event in events:
                if hasattr(event, "produced"):
                    steps_of[event.number] = steps_of.get(event.number, 0) + 1
            hear(events)

        world.engine._heard = counted
        stays = world.engine.generate(world.generation({"a1": 1.0}, range(4, 9), long))
        await anext(stays)
        for _ in range(5):
            async with aclosing(world.engine.generate(world.generation({"a0": 1.0}, range(4, 9), long))) as leaves:
                await anext(leaves)
        await collected(world.engine, world.generation({}, range(4, 9)))
        await stays.aclose()

    world.run(work)
    stays, *leavers, last = (steps_of[number] for number in sorted(steps_of))
    assert len(leavers) == 5
    assert last == GREEDY.max_tokens
    assert max(leavers) < 120
    assert stays < 480
    assert world.holds_nothing()


def test_a_process_that_is_killed_fails_those_who_wait_and_is_not_ready(tiny_dir, tmp_path, caplog):
    world = World(tiny_dir, tmp_path, True, max_batch=2)
    long = replace(GREEDY, max_tokens=480)

    async def work():
        many = [world.generation({"a1": 1.0}, range(4, 9), long) for _ in range(4)]  # two of them wait
        tasks = [asyncio.create_task(collected(world.engine, one)) for one in many]
        await collected(world.engine, world.generation({}, range(4, 9), replace(GREEDY, max_tokens=1), tenant="other"))
        os.kill(world.core.pid, signal.SIGKILL)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [StoppingError] * 4
        assert all("restarted" in str(end) for end in ends)
        assert not world.engine.ready
        assert world.engine.resident() == ()
        with pytest.raises(StoppingError):
            await collected(world.engine, world.generation({}, range(4, 9)))
        with pytest.raises(StoppingError):
            await world.engine.load(world.served["a0"])
        await world.engine.unload(world.served["a1"])
        await world.engine.stop(5)

    with caplog.at_level(logging.INFO):
        world.run(work)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lorchestra")]
    assert len(lines) == 1
    assert "was killed by SIGKILL" in lines[0]
    assert gone(world.core.pid)
    assert world.holds_nothing()
    assert not [thread.name for thread in threading.enumerate() if "engine" in thread.name]


def test_a_process_that_dies_while_an_adapter_loads_says_so(tiny_dir, tmp_path):
    world = World(tiny_dir, tmp_path, True)

    async def work():
        os.kill(world.core.pid, signal.SIGSTOP)
        loading = asyncio.create_task(world.engine.load(world.served["a0"]))
        leaving = asyncio.create_task(world.engine.unload(world.served["a1"]))
        await asyncio.sleep(0.2)
        assert not loading.done()
        assert world.engine.ready  # a process that does not answer never holds up the event loop
        os.kill(world.core.pid, signal.SIGKILL)
        with pytest.raises(StoppingError):
            await loading
        await leaving

    world.run(work)
    assert world.holds_nothing()
    world.close()


def test_stopping_answers_what_runs_and_ends_the_process(tiny_dir, tmp_path):
    for grace in (0, 60):
        world = World(tiny_dir, tmp_path / str(grace), True)

        async def work(world=world, grace=grace):
            one = world.generation({}, range(4, 9), replace(GREEDY, max_tokens=300))
            task = asyncio.create_task(collected(world.engine, one))
            await collected(world.engine, world.generation({}, range(4, 9), replace(GREEDY, max_tokens=1)))
            await world.engine.stop(grace)
            assert not psutil.pid_exists(world.core.pid)
            with pytest.raises(StoppingError):
                await collected(world.engine, one)
            return await task

        if grace:
            tokens, _, finish = world.run(work)
            assert (len(tokens), finish) == (300, "length")
        else:
            with pytest.raises(StoppingError, match="stopped before"):
                world.run(work)
        assert world.holds_nothing()
        world.close()


@pytest.mark.parametrize("phase", ["loading", "stepping"])
def test_a_server_that_is_killed_leaves_no_process(tiny_dir, phase):
    script = f"""
import sys, time
from pathlib import Path
from lorchestra.serve.embedded.core import Setup
from lorchestra.serve.embedded.generation import Generation, Sampling
from lorchestra.serve.embedded.process import ProcessCore
core = ProcessCore(Setup(Path({str(tiny_dir)!r}), device="cpu", dtype="float32"))
if {phase!r} != "loading":
    core.wait()
    core.start(lambda events: None)
if {phase!r} == "stepping":
    for number in range(50):
        core.push(number, Generation(str(number), "t", (5, 6), (), Sampling(500)))
print(core.pid, flush=True)
time.sleep(100)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert gone(child)


class Tasks:
    """Remembers the names of tasks."""

    def __init__(self):
        self.names = []

    def task(self, name, total=None, unit="it"):
        self.names.append(name)
        return SILENT.task(name, total, unit)

    def event(self, kind, /, **fields):
        return None

    def say(self, text):
        return None


@pytest.mark.parametrize("wrong", [{"limits": Limits(max_length=513)}, {"dtype": "float7"}, {"directory": "empty"}])
def test_what_cannot_be_loaded_is_said_as_by_the_core_in_this_process(tiny_dir, tmp_path, monkeypatch, wrong):
    if "directory" in wrong:
        wrong = {"directory": tmp_path}
    setup = replace(Setup(tiny_dir, **PLAIN), **wrong)
    said, tasks = [], []
    for loaded in (loaded_here, loaded_apart):
        monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / loaded.__module__))  # fingerprints are kept there
        reporter = Tasks()
        with pytest.raises(LorchestraError) as failed:
            loaded(setup, reporter)
        said.append((type(failed.value), str(failed.value), failed.value.exit_code))
        tasks.append(reporter.names)
    assert said[0] == said[1]
    assert said[0][2] == 2
    assert tasks[0] == tasks[1]


def test_progress_is_told_once_and_a_process_that_dies_while_it_loads_says_how(tiny_dir, tmp_path, monkeypatch):
    here, apart = Tasks(), Tasks()
    loaded_here(Setup(tiny_dir, **PLAIN), here)
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "apart"))  # fingerprints are kept there
    core, _ = loaded_apart(Setup(tiny_dir, **PLAIN), apart)
    assert apart.names == here.names
    assert here.names
    core.stop()  # though it was never started
    assert gone(core.pid)
    core = ProcessCore(Setup(tiny_dir, **PLAIN))
    os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(LorchestraError, match="was killed by SIGKILL while it loaded"):
        core.wait()


# ---- the server


def ask(server, tokens, **more):
    body = {"model": "base", "prompt": "abc", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
    return httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60)


class Streaming(threading.Thread):
    """A streamed request; ``began`` is set at its first part."""

    def __init__(self, server, tokens):
        super().__init__()
        self.began, self.parts, self.ended, self.failed = threading.Event(), 0, "", None
        self.server, self.tokens = server, tokens
        self.start()

    def run(self):
        body = {"model": "clinic", "prompt": "ab", "max_tokens": self.tokens, "stream": True, "ignore_eos": True}
        try:
            with httpx2.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    self.began.set()
                    self.parts += line.startswith("data: {")
                    self.ended = line or self.ended
                    if line.startswith("data: {") and "error" in (event := json.loads(line[6:])):
                        self.failed = event["error"]["message"]
        except httpx2.HTTPError as error:
            self.failed = error


@pytest.fixture
def place(tmp_path):
    make_base(tmp_path / "model")
    make_adapter(1, 4).save(tmp_path / "clinic")
    return tmp_path


@contextmanager
def run_server(place, *more):
    """A server that may have ended when the block does."""
    up = serving(place / "model", place, "--name", "base", f"--adapter=clinic={place / 'clinic'}", *more)
    server = up.__enter__()
    try:
        yield server
    finally:
        with suppress(psutil.NoSuchProcess):
            up.__exit__(None, None, None)


def the_child(server):
    (child,) = server.process.children()
    return child


def test_a_server_whose_engine_is_killed_is_healthy_and_not_ready(place):
    with run_server(place) as server:
        assert ask(server, 3).status_code == 200
        before = server.process.num_threads()
        streaming = Streaming(server, 480)
        assert streaming.began.wait(30)
        the_child(server).kill()
        streaming.join(30)
        assert "restarted" in str(streaming.failed)
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        refused = ask(server, 3)
        assert refused.status_code == 503
        assert "error" in refused.json()
        assert server.process.num_threads() <= before
        told = server.stderr.read_text()
        assert told.count("was killed by SIGKILL") == 1
        assert "Traceback" not in told
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_every_process_of_the_server_lets_it_finish_what_runs(place, number, code):
    with run_server(place) as server:
        child = the_child(server)
        streaming = Streaming(server, 400)
        assert streaming.began.wait(30)
        child.send_signal(number)
        server.process.send_signal(number)
        streaming.join(60)
        assert streaming.failed is None
        assert streaming.ended == "data: [DONE]"
        assert server.process.wait(30) == code
        assert gone(child.pid)
        assert "Traceback" not in server.stderr.read_text()


def test_a_server_that_is_killed_while_it_answers_leaves_no_process(place):
    with run_server(place) as server:
        child = the_child(server)
        streaming = Streaming(server, 480)
        assert streaming.began.wait(30)
        server.process.kill()
        streaming.join(30)
        assert gone(child.pid)


def test_one_process_does_it_where_that_is_asked_for(place):
    (place / "serve.yaml").write_text("engine_process: false\n")
    with run_server(place, "--config", str(place / "serve.yaml")) as server:
        assert server.process.children() == []
        alone = ask(server, 8, logprobs=2).json()["choices"]
    with run_server(place) as server:
        assert ask(server, 8, logprobs=2).json()["choices"] == alone
