"""The embedded engine on the event loop: requests go to a core, which steps the model, and its results come back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from itertools import count

from lorchestra.base.allocator import large_blocks_go_back
from lorchestra.serve.embedded.core import (
    Core,
    Done,
    Ended,
    Event,
    Evicted,
    Failure,
    Loaded,
    Resident,
    Result,
    Seen,
    Taken,
    Waited,
)
from lorchestra.serve.embedded.generation import Generation, Produced
from lorchestra.serve.engine import Observer, RequestError, Served, StoppingError, TooLongError
from lorchestra.serve.fair import FairQueue

log = logging.getLogger(__name__)


class Room(FairQueue[int]):
    """How many may wait. Whose turn it is, is told."""

    def taken(self, number: int) -> None:
        """``number`` had its turn, if it did not leave before."""
        if self.remove(number):
            self._times.append(self._clock())


class ContinuousEngine:
    """Generates for many sequences at once, each with its own adapters, in batches that change between steps.

    A request's result does not depend on what shares its batch, but for rounding.

    Args:
        core: steps.
        room: for those that wait.
        observer: hears of waits, loads and evictions, on the event loop.
    """

    def __init__(self, core: Core, room: Room | None = None, observer: Observer | None = None) -> None:
        self._core, self._room, self._observer = core, room if room is not None else Room(), observer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = self._ended = False
        self._numbers = count()
        self._results: dict[int, asyncio.Queue[Produced | BaseException]] = {}  # of the sequences that did not end
        self._asked: dict[int, asyncio.Future[tuple[float, ...]]] = {}  # what is no sequence: loads, drops, features
        self._users: Counter[str] = Counter()
        self._free: dict[str, asyncio.Event] = {}  # set when nobody uses the adapter any more
        self._resident: tuple[str, ...] = ()

    @property
    def max_length(self) -> int:
        """Positions of a sequence."""
        return self._core.max_length

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._loop is not None and not self._draining and not self._ended

    async def start(self) -> None:
        """Begin; to be called on the event loop that asks."""
        large_blocks_go_back()
        self._loop = asyncio.get_running_loop()
        self._core.start(self._hear)

    async def stop(self, grace: float) -> None:
        """Finish what is there within ``grace`` seconds; what is left then ends with ``StoppingError``."""
        self._draining = True
        until = time.monotonic() + grace
        while self._users.total() and time.monotonic() < until and not self._ended:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._core.stop)

    async def load(self, adapter: Served) -> None:
        """Make it resident."""
        if not self.ready:
            raise StoppingError("the server is stopping; no adapter is loaded any more")
        await self._settled(lambda number: self._core.load(number, adapter))

    async def unload(self, adapter: Served) -> None:
        """Forget it, once what uses it has ended."""
        while self._users[adapter.key]:
            await self._free.setdefault(adapter.key, asyncio.Event()).wait()
        if not self._ended:
            with suppress(StoppingError):  # then nothing is in memory any more
                await self._settled(lambda number: self._core.drop(number, adapter.key))

    def resident(self) -> Sequence[str]:
        """Keys of the adapters in memory."""
        return self._resident

    async def features(self, prompt: tuple[int, ...], layers: int, last: bool) -> tuple[float, ...]:
        """What a gate sees of a prompt; arguments as of :class:`~lorchestra.serve.embedded.seeing.Sight`.

        Raises:
            RequestError: it is longer than a sequence may be, or has no token.
            StoppingError: the engine starts, stops or has failed.
        """
        if not self.ready:
            raise StoppingError("the engine is starting or stopping; try again in a while")
        if not prompt:
            raise RequestError("prompt: got no token, expected at least one", "prompt")
        if len(prompt) > self.max_length:
            raise TooLongError(f"{len(prompt)} tokens are more than the {self.max_length} of this model", "prompt")
        return await self._settled(lambda number: self._core.see(number, prompt, layers, last))

    async def generate(self, generation: Generation) -> AsyncGenerator[Produced, None]:
        """As :class:`~lorchestra.serve.embedded.generation.TokenEngine` has it."""
        if not self.ready:
            raise StoppingError("the engine is starting or stopping; try again in a while")
        self._check(generation)
        number = next(self._numbers)
        self._room.push(generation.tenant, number)
        results = self._results[number] = asyncio.Queue()
        keys = {"", *(served.key for served, _ in generation.members)}
        self._users.update(keys)
        try:
            self._core.push(number, generation)
            ended = False
            while not ended:
                result = await results.get()
                if isinstance(result, BaseException):
                    raise result
                ended = result.finish is not None
                yield result
        finally:
            self._users.subtract(keys)
            for key in keys:
                if not self._users[key]:
                    del self._users[key]
                    if key in self._free:
                        self._free.pop(key).set()
            if self._results.pop(number, None) is not None:
                self._room.remove(number)
                self._core.leave(number)

    def _check(self, generation: Generation) -> None:
        length = len(generation.prompt) + generation.sampling.max_tokens
        if not generation.prompt:
            raise RequestError("prompt: got no token, expected at least one", "prompt")
        if length > self.max_length:
            raise RequestError(f"{length} tokens are more than the {self.max_length} of this model", "max_tokens")

    async def _settled(self, ask: Callable[[int], None]) -> tuple[float, ...]:
        """Ask the core for something, and wait until it is done; what was seen, if that was asked."""
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            ask(number)
            return await self._asked[number]
        finally:
            del self._asked[number]

    def _hear(self, events: Sequence[Event]) -> None:
        """On the core's threads: hand what happened to the event loop, in one call."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._heard, events)
        except RuntimeError:
            log.debug("the event loop has ended; %d events are lost", len(events))

    def _heard(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Result(number, produced):
                    self._put(number, produced, ends=produced.finish is not None)
                case Failure(number, error):
                    self._put(number, error, ends=True)
                    self._settle(number, error)
                case Seen(number, features):
                    self._settle(number, features=features)
                case Taken(number):
                    self._room.taken(number)
                case Done(number):
                    self._settle(number)
                case Resident(keys):
                    self._resident = keys
                case Ended(said):
                    self._end(said)
                case _:
                    self._observe(event)

    def _put(self, number: int, result: Produced | BaseException, ends: bool) -> None:
        results = self._results.pop(number, None) if ends else self._results.get(number)
        if results is not None:  # else its client has gone
            results.put_nowait(result)

    def _settle(self, number: int, error: BaseException | None = None, features: tuple[float, ...] = ()) -> None:
        asked = self._asked.get(number)
        if asked is None or asked.done():  # by then it was cancelled
            return
        if error is None:
            asked.set_result(features)
        else:
            asked.set_exception(error)

    def _end(self, said: str) -> None:
        self._ended = True
        self._resident = ()
        for number in list(self._results):
            self._room.remove(number)
            self._put(number, StoppingError(said), ends=True)
        for number in list(self._asked):
            self._settle(number, StoppingError(said))

    def _observe(self, event: Waited | Loaded | Evicted) -> None:
        if self._observer is None:
            return
        try:
            match event:
                case Waited(members, seconds):
                    self._observer.waited(members, seconds)
                case Loaded(adapter, seconds):
                    self._observer.loaded(adapter, seconds)
                case Evicted(adapter):
                    self._observer.evicted(adapter)
        except Exception:  # what else happened in this step is not lost for it
            log.exception("an observer failed")
