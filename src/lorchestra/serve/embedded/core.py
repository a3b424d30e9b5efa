"""What steps the model, in this process or in one of its own: sequences go in, and what happened comes out by steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lorchestra.serve.embedded.generation import Generation, Produced
from lorchestra.serve.engine import Served

MOST = 64  # sequences at a time


@dataclass(frozen=True)
class Limits:
    """Of a core.

    Args:
        max_batch: sequences at a time.
        max_length: positions of one; the model's own limit unless given.
        adapter_memory: bytes for adapters that no sequence uses just now.
        cache_memory: bytes of key-value cache.
        max_rank: of a mixture.
        kernel: compile :class:`~lorchestra.bank.kernel.Kernel`,
            :class:`~lorchestra.serve.embedded.attention.Attention` and
            :class:`~lorchestra.serve.embedded.pieces.Compiled` and use them: factors are then held in the model's
            dtype.
    """

    max_batch: int = MOST
    max_length: int | None = None
    adapter_memory: int | None = None
    cache_memory: int | None = None
    max_rank: int = 256
    kernel: bool = False


@dataclass(frozen=True)
class Setup:
    """What a core loads; see :func:`~lorchestra.base.load.load_base`.

    Args:
        directory: of the base.
        name: what it is called.
        device: to load it on.
        dtype: to load it in.
        limits: of the core.
    """

    directory: Path
    name: str = ""
    device: str = "auto"
    dtype: str = "auto"
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Result:
    """A step made something of sequence ``number``."""

    number: int
    produced: Produced


@dataclass(frozen=True)
class Failure:
    """Sequence ``number`` has ended by ``error``, or what was asked under that number is not done."""

    number: int
    error: BaseException


@dataclass(frozen=True)
class Seen:
    """What a gate sees of the prompt that was asked about under ``number``: ``[n]`` float32."""

    number: int
    features: tuple[float, ...]


@dataclass(frozen=True)
class Taken:
    """Sequence ``number`` waits no more."""

    number: int


@dataclass(frozen=True)
class Done:
    """What was asked under ``number`` is done."""

    number: int


@dataclass(frozen=True)
class Waited:
    """A prompt was taken up; see :class:`~lorchestra.serve.engine.Observer`."""

    members: tuple[tuple[Served, float], ...]
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """An adapter was read into memory."""

    adapter: Served
    seconds: float


@dataclass(frozen=True)
class Evicted:
    """An adapter was put out of memory."""

    adapter: Served


@dataclass(frozen=True)
class Resident:
    """What is in memory now."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """The core runs no more, and nothing comes after this; whoever waits is told ``said``."""

    said: str


Event = Result | Failure | Seen | Taken | Done | Waited | Loaded | Evicted | Resident | Ended
Hear = Callable[[Sequence[Event]], None]


class Core(Protocol):
    """Steps a model. None of its methods waits for a step, but for :meth:`stop`.

    Numbers are the caller's; each is used once.
    """

    @property
    def max_length(self) -> int:
        """Positions of a sequence."""
        ...

    @property
    def rows(self) -> int:
        """Of the model's output: token ids are below it."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, of the model's generation config."""
        ...

    def start(self, hear: Hear) -> None:
        """Begin; ``hear`` is called once a step, on threads of the core, with all that happened in it."""
        ...

    def push(self, number: int, generation: Generation) -> None:
        """Let a sequence wait; there are results until one has a ``finish``, or a failure."""
        ...

    def leave(self, number: int) -> None:
        """Nobody waits for this sequence any more: its slot is free before the next step."""
        ...

    def see(self, number: int, prompt: tuple[int, ...], layers: int, last: bool) -> None:
        """What a gate sees of ``prompt``: seen, or a failure; arguments as of
        :class:`~lorchestra.serve.embedded.seeing.Sight`.
        """
        ...

    def load(self, number: int, adapter: Served) -> None:
        """Make it resident: done, or a failure."""
        ...

    def drop(self, number: int, key: str) -> None:
        """Put an adapter out of memory; done in any case."""
        ...

    def stop(self) -> None:
        """Let go of everything, what runs too; returns when that has happened and was heard of."""
        ...
