"""What crosses between a server and its engine's process: errors with all they say, and progress as it was."""

from __future__ import annotations

import io
import math
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorchestra.errors import AdapterError, LorchestraError, SourceError, UserError
from lorchestra.serve.embedded.core import (
    Done,
    Ended,
    Evicted,
    Failure,
    Limits,
    Loaded,
    Resident,
    Result,
    Seen,
    Setup,
    Taken,
    Waited,
)
from lorchestra.serve.embedded.generation import Generation, Produced, Sampling, Token
from lorchestra.serve.embedded.messages import (
    Drop,
    Leave,
    Load,
    Push,
    Ready,
    Relayed,
    See,
    Stop,
    packed,
    receive,
    send,
    until_ready,
)
from lorchestra.serve.embedded.process import _plain
from lorchestra.serve.embedded.sampler import NotFiniteError
from lorchestra.serve.engine import OverloadedError, RequestError, Served, StoppingError, TooLongError


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (AdapterError("adapter 'a' has «NaN»"), {}),
        (RequestError("max_tokens: got 7", "max_tokens"), {"param": "max_tokens"}),
        (TooLongError("too long"), {"param": None}),
        (OverloadedError("3 wait", 2.5), {"retry_after": 2.5}),
        (StoppingError("stopping"), {}),
        (SourceError("no model"), {}),
        (NotFiniteError([1, 4]), {"rows": (1, 4)}),
        (MemoryError("short"), {}),
    ],
)
def test_an_error_crosses_with_its_type_its_message_and_its_fields(error, fields):
    pipe = io.BytesIO()
    send(pipe, packed([Failure(7, error)]))
    pipe.seek(0)
    (came,) = receive(pipe)
    assert came.number == 7
    assert type(came.error) is type(error)
    assert str(came.error) == str(error)
    assert came.error.args == error.args
    assert vars(came.error) == fields


def crossed(message):
    return receive(io.BytesIO(packed(message)))


def test_requests_and_results_cross_unchanged():
    served = Served("a", "sha256:" + "1" * 64, Path("some/where"))
    sampling = Sampling(
        max_tokens=3, temperature=0.1, seed=-(2**63), logit_bias={5: -math.inf, 7: 0.1}, logprobs=0,
        stop_ids=frozenset({2, 3}),
    )  # fmt: skip
    generation = Generation("id \ud800\n", "tenant", (1, 2), ((served, 0.1), (served, -1.0)), sampling)
    assert crossed(Push(2**40, generation)) == Push(2**40, generation)
    assert type(crossed(Push(1, generation)).generation.sampling.stop_ids) is frozenset
    events = [
        Result(1, Produced((Token(7, -math.inf, ((7, -0.1), (8, -math.pi))),), (Token(3),), "stop")),
        Taken(1), Done(1), Waited(((served, 0.3),), 0.1), Resident(("a", "b")), Loaded(served, 0.5), Evicted(served),
        Ended("so"), Seen(4, (0.1, -math.inf, 1e-45)),
    ]  # fmt: skip
    assert crossed(events) == crossed(tuple(events)) == events
    assert [type(event) for event in crossed(events)] == [type(event) for event in events]
    setup = Setup(Path("base"), limits=Limits(max_batch=3, adapter_memory=7))
    assert crossed(setup) == setup
    for order in (Leave(1), See(5, (1, 2), 3, True), Load(2, served), Drop(3, "a@1"), Stop()):
        assert crossed(order) == order


def test_an_error_of_a_class_that_is_not_known_here_is_the_nearest_that_is():
    local = type("LocalError", (OverloadedError,), {})
    came = crossed(Failure(1, local("3 wait", 2.5))).error
    assert (type(came), str(came), came.retry_after) in [(kind, "3 wait", 2.5) for kind in (local, OverloadedError)]
    told = packed(Failure(1, local("3 wait", 2.5))).replace(b"LocalError", b"ForeignError")
    came = receive(io.BytesIO(told)).error
    assert (type(came), str(came), came.retry_after) == (OverloadedError, "3 wait", 2.5)


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind":"Popen","value":{"args":"true"}}', b'{"kind":"Stop"}', b'{"kind":"Leave","value":{"number":"x"}}',
        b'{"kind":"builtins.eval","value":{}}', b"cos\nsystem\n(S'true'\ntR.", b'{"__class__":"Stop"}', b"1",
    ],
)  # fmt: skip
def test_what_is_none_of_ours_is_refused(line):
    with pytest.raises((ValueError, TypeError)):
        receive(io.BytesIO(line + b"\n"))


class Heard:
    """A reporter that remembers, as the command line's: a task that fails has no end of its own."""

    def __init__(self):
        self.lines = []

    @contextmanager
    def task(self, name, total=None, unit="it"):
        self.lines.append(("task", name, total, unit))
        own = self.lines

        class Task:
            def advance(self, amount=1.0, **figures):
                own.append(("advance", name, amount, figures))

        try:
            yield Task()
        except Exception as error:
            self.lines.append(("failed", name, str(error)))
            raise
        self.lines.append(("done", name))

    def event(self, kind, /, **fields):
        self.lines.append(("event", kind, fields))

    def say(self, text):
        self.lines.append(("say", text))


def work(reporter, error=None):
    reporter.say("begin")
    with reporter.task("read", 3.0, "B") as reading:
        reading.advance(2)
        with reporter.task("inside") as inside:
            inside.advance(loss=0.5)
        reading.advance(1, tokens_per_s=7)
        if error is not None:
            raise error
    reporter.event("loaded", bytes=3)


@contextmanager
def told(error=None):
    """What until_ready reads: a process that works, and is ready or fails."""
    inward, outward = os.pipe()

    def process(pipe):
        with pipe:
            try:
                work(Relayed(lambda message: send(pipe, packed(message))), error)
            except LorchestraError as failed:
                send(pipe, packed(Failure(0, failed)))
            else:
                send(pipe, packed(Ready(512, 260, (2,))))

    thread = threading.Thread(target=process, args=(os.fdopen(outward, "wb"),))
    thread.start()
    with os.fdopen(inward, "rb") as pipe:
        yield pipe
    thread.join()


def test_progress_is_told_as_if_it_were_made_here():
    here, relayed = Heard(), Heard()
    work(here)
    with told() as pipe:
        assert until_ready(pipe, relayed) == Ready(512, 260, (2,))
        with pytest.raises(EOFError):
            receive(pipe)
    assert relayed.lines == here.lines
    assert len(here.lines) == 9


def test_a_failure_is_raised_inside_the_task_that_it_ended():
    here, relayed = Heard(), Heard()
    with pytest.raises(UserError):
        work(here, UserError("no such dtype"))
    with told(UserError("no such dtype")) as pipe, pytest.raises(UserError, match="no such dtype"):
        until_ready(pipe, relayed)
    assert relayed.lines == here.lines
    assert here.lines[-1] == ("failed", "read", "no such dtype")


def test_half_a_message_is_no_message():
    whole = packed([Failure(1, StoppingError("x" * 2000))])
    for cut in range(len(whole)):
        with pytest.raises(EOFError):
            receive(io.BytesIO(whole[:cut]))


def test_what_an_adapter_says_to_people_stays_with_the_server():
    served = Served("a", "sha256:" + "1" * 64, Path("a"), {"b": 1.0}, "template" * 1000, "You are.", {"top_p": 1})
    plain = _plain(served)
    assert (plain.key, plain.name, plain.digest, plain.directory) == (
        served.key,
        served.name,
        served.digest,
        served.directory,
    )
    assert len(packed(Load(1, plain))) < 600
