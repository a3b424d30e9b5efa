"""What a server and its engine's process say to each other: a line of JSON a message, of a closed set of kinds.

Nothing that is read names code to be run: a message is of a kind listed here, or it is refused.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import IO, TYPE_CHECKING, Any

from lorchestra.errors import LorchestraError
from lorchestra.events import Reporter, Task
from lorchestra.serve.embedded import core
from lorchestra.serve.embedded.core import Failure
from lorchestra.serve.embedded.generation import Generation
from lorchestra.serve.engine import Served

if TYPE_CHECKING:
    from pydantic import TypeAdapter


# What the engine's process hears, after a Setup: see the methods of the core.


@dataclass(frozen=True)
class Push:
    """Let a sequence wait."""

    number: int
    generation: Generation


@dataclass(frozen=True)
class Leave:
    """Nobody waits for it any more."""

    number: int


@dataclass(frozen=True)
class See:
    """Say what a gate sees of a prompt."""

    number: int
    prompt: tuple[int, ...]
    layers: int
    last: bool


@dataclass(frozen=True)
class Load:
    """Make an adapter resident."""

    number: int
    adapter: Served


@dataclass(frozen=True)
class Drop:
    """Put it out of memory."""

    number: int
    key: str


@dataclass(frozen=True)
class Stop:
    """Let go of everything."""


Order = Push | Leave | See | Load | Drop | Stop


@dataclass(frozen=True)
class Ready:
    """The base is loaded; from here on the core's events come. See :class:`~lorchestra.serve.embedded.core.Core`."""

    max_length: int
    rows: int
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class Opened:
    """A task of loading has begun."""

    number: int
    name: str
    total: float | None
    unit: str


@dataclass(frozen=True)
class Advanced:
    """It went on."""

    number: int
    amount: float
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Closed:
    """It is done."""

    number: int


@dataclass(frozen=True)
class Said:
    """A line for the person who is watching."""

    text: str


@dataclass(frozen=True)
class Noted:
    """A fact."""

    kind: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class _Failed:
    """A :class:`Failure`: names of the error's class and of those it is made of, what it was made with, its fields."""

    number: int
    kinds: tuple[str, ...]
    arguments: tuple[Any, ...]
    fields: Mapping[str, Any]


_KINDS: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (
        core.Setup, Push, Leave, See, Load, Drop, Stop, Ready, Opened, Advanced, Closed, Said, Noted, _Failed,
        core.Result, core.Seen, core.Taken, core.Done, core.Waited, core.Loaded, core.Evicted, core.Resident,
        core.Ended,
    )
}  # fmt: skip


def packed(message: Any) -> bytes:
    """``message``, or a list or tuple of them, as one line."""
    told = [_written(one) for one in message] if isinstance(message, list | tuple) else _written(message)
    return json.dumps(told, separators=(",", ":")).encode() + b"\n"


def send(pipe: IO[bytes], data: bytes) -> None:
    """Write what was packed, whole.

    Raises:
        OSError: nobody reads any more.
    """
    pipe.write(data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """The next message, or sequence of them.

    Raises:
        EOFError: nobody writes any more, be it in the middle of a message.
        ValueError: it is none of ours.
    """
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the other process has ended")
    told = json.loads(line)
    return [_read(**one) for one in told] if isinstance(told, list) else _read(**told)


@cache
def _form(kind: str) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(_KINDS[kind])


def _written(message: Any) -> dict[str, Any]:
    if isinstance(message, Failure):
        kinds = tuple(kind.__name__ for kind in type(message.error).__mro__)
        message = _Failed(message.number, kinds, message.error.args, vars(message.error))
    kind = type(message).__name__
    return {"kind": kind, "value": _form(kind).dump_python(message, mode="json")}


def _read(kind: str, value: Any) -> Any:
    if kind not in _KINDS:
        raise ValueError(f"{kind!r} is no message between a server and its engine")
    message = _form(kind).validate_python(value)
    return _failure(message) if isinstance(message, _Failed) else message


def _failure(told: _Failed) -> Failure:
    """An error of ours is its message and its fields; what its class makes them of is not needed again.

    A class that is not known here is the nearest that is.
    """
    known = {kind.__name__: kind for kind in _errors()}
    kind = next(known[name] for name in told.kinds if name in known)
    error = kind.__new__(kind)
    error.args = _frozen(told.arguments)
    vars(error).update({name: _frozen(value) for name, value in told.fields.items()})
    return Failure(told.number, error)


def _errors(kind: type[BaseException] = LorchestraError) -> Iterator[type[BaseException]]:
    """Ours, as far as they are imported, and Python's own."""
    yield kind
    for below in kind.__subclasses__():
        yield from _errors(below)
    if kind is LorchestraError:
        yield from (own for own in vars(builtins).values() if isinstance(own, type) and issubclass(own, BaseException))


def _frozen(value: Any) -> Any:
    """JSON has lists alone; what errors are made of are tuples."""
    return tuple(_frozen(one) for one in value) if isinstance(value, list | tuple) else value


class Relayed:
    """A :class:`~lorchestra.events.Reporter` whose words another process says.

    Args:
        tell: sends them there.
    """

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self._tell = tell
        self._numbers = count()

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        """One long step; where it fails the error is told, and nothing of the task."""
        number = next(self._numbers)
        self._tell(Opened(number, name, total, unit))
        yield _RelayedTask(self._tell, number)
        self._tell(Closed(number))

    def event(self, kind: str, /, **fields: Any) -> None:
        """One fact."""
        self._tell(Noted(kind, fields))

    def say(self, text: str) -> None:
        """One line."""
        self._tell(Said(text))


@dataclass(frozen=True)
class _RelayedTask:
    tell: Callable[[Any], None]
    number: int

    def advance(self, amount: float = 1.0, **figures: Any) -> None:
        self.tell(Advanced(self.number, amount, figures))


def until_ready(pipe: IO[bytes], reporter: Reporter) -> Ready:
    """Say what another process says while it loads, until it has.

    Raises:
        EOFError: it has ended.
        LorchestraError: what it failed by.
    """
    tasks: dict[int, tuple[ExitStack, Task]] = {}
    with ExitStack() as begun:
        while True:
            match receive(pipe):
                case Opened(number, name, total, unit):
                    own = begun.enter_context(ExitStack())
                    tasks[number] = own, own.enter_context(reporter.task(name, total, unit))
                case Advanced(number, amount, figures):
                    tasks[number][1].advance(amount, **figures)
                case Closed(number):
                    tasks.pop(number)[0].close()
                case Said(text):
                    reporter.say(text)
                case Noted(kind, fields):
                    reporter.event(kind, **fields)
                case Failure(_, error):
                    raise error
                case Ready() as ready:
                    return ready
