"""The core in this process: a thread that steps."""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lorchestra.bank.factors import RowFactors
from lorchestra.bank.kernel import Kernel
from lorchestra.bank.rows import RowBank
from lorchestra.base.allocator import large_blocks_go_back
from lorchestra.base.load import Base, load_base
from lorchestra.errors import LorchestraError, UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.serve.embedded.attention import Attention
from lorchestra.serve.embedded.core import (
    Core,
    Done,
    Ended,
    Event,
    Evicted,
    Failure,
    Hear,
    Limits,
    Loaded,
    Resident,
    Result,
    Seen,
    Setup,
    Taken,
    Waited,
)
from lorchestra.serve.embedded.generation import Generation, Produced
from lorchestra.serve.embedded.models import decoder_for, free_memory, longest
from lorchestra.serve.embedded.residents import Residents, read_verified
from lorchestra.serve.embedded.scheduler import ALONE, Running, Scheduler
from lorchestra.serve.embedded.seeing import Sight
from lorchestra.serve.embedded.slots import Slots
from lorchestra.serve.engine import Served, StoppingError
from lorchestra.serve.fair import FairQueue

log = logging.getLogger(__name__)

# Shares of the memory that is free once the base is there.
CACHE_SHARE, ADAPTER_SHARE = 0.4, 0.2
FAILURES = 3  # steps that fail one after the other, before the core gives up


class LocalCore:
    """Implements :class:`~lorchestra.serve.embedded.core.Core`.

    Args:
        base: the model is taken over; keep no other reference to it where memory matters.
        limits: of what it takes.

    Raises:
        UserError: a limit that is none, a model that cannot be served so, or a kernel that cannot be compiled.
    """

    def __init__(self, base: Base, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        if limits.max_batch < 1:
            raise UserError(f"max_batch: got {limits.max_batch}, expected at least 1")
        self.max_length = longest(base.model, limits.max_length)
        self.rows = int(base.model.get_output_embeddings().weight.shape[0])
        self.end_ids = _end_ids(base)
        decoder = decoder_for(base, self.max_length, limits.kernel)
        free = free_memory(decoder.device)
        compiled = Kernel() if limits.kernel else None
        dtype = decoder.dtype if limits.kernel else torch.float32
        self._bank = RowBank(decoder.groups, dtype, decoder.device, limits.max_rank, compiled)
        cache = limits.cache_memory or int(CACHE_SHARE * free)
        attention = Attention() if limits.kernel else None
        slots = Slots(decoder.shape, cache, self.max_length, decoder.dtype, decoder.device, attention)
        self._base = base.id
        self._residents = Residents(self._lay_out, limits.adapter_memory or int(ADAPTER_SHARE * free), self)
        self._queue = _Queue(self._taken)
        self._condition = threading.Condition()
        self._scheduler = Scheduler(
            decoder, self._bank, slots, self._residents, self._queue, limits.max_batch, self, self._wake
        )
        self._sequences: dict[int, _Numbered] = {}  # that did not end
        self._left: set[Running] = set()  # that nobody waits for
        self._sight = Sight(decoder, self._bank)
        self._looks: deque[tuple[int, tuple[int, ...], int, bool]] = deque()  # prompts that a gate asks about
        self._ending = False
        self._happened: list[Event] = []  # in this step
        self._telling = threading.Lock()
        self._hear: Hear = _unheard
        self._thread: threading.Thread | None = None

    def start(self, hear: Hear) -> None:
        """Begin."""
        large_blocks_go_back()
        self._hear = hear
        self._thread = threading.Thread(target=self._run, name="lorchestra-engine", daemon=True)
        self._thread.start()

    def push(self, number: int, generation: Generation) -> None:
        """Let a sequence wait."""
        one = _Numbered(generation, partial(self._emit, number), number=number)
        self._sequences[number] = one
        self._queue.push(generation.tenant, one)
        self._wake()

    def leave(self, number: int) -> None:
        """Nobody waits for it any more."""
        one = self._sequences.pop(number, None)
        if one is not None and not self._queue.remove(one):
            with self._condition:
                self._left.add(one)
                self._condition.notify()

    def see(self, number: int, prompt: tuple[int, ...], layers: int, last: bool) -> None:
        """What a gate sees of it."""
        with self._condition:
            self._looks.append((number, prompt, layers, last))
            self._condition.notify()

    def load(self, number: int, adapter: Served) -> None:
        """Make it resident."""
        self._residents.start(adapter).add_done_callback(partial(self._settled, number))

    def drop(self, number: int, key: str) -> None:
        """Put it out of memory."""
        self._residents.drop(key)
        self._tell((Done(number),))

    def stop(self) -> None:
        """Let go of everything."""
        with self._condition:
            self._ending = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._residents.close()

    # What the scheduler and the residents report (serve/engine.py: Observer).

    def waited(self, members: Sequence[tuple[Served, float]], seconds: float) -> None:
        """On the thread that steps."""
        self._happened.append(Waited(tuple(members), seconds))

    def loaded(self, adapter: Served, seconds: float) -> None:
        """On any thread."""
        self._changed(Loaded(adapter, seconds))

    def evicted(self, adapter: Served) -> None:
        """On any thread."""
        self._changed(Evicted(adapter))

    def _changed(self, event: Event) -> None:
        with self._telling:  # the keys told last are those that were there last
            self._hear((event, Resident(self._residents.keys())))

    def _settled(self, number: int, loading: Future[RowFactors]) -> None:
        error = loading.exception()
        self._tell((Done(number) if error is None else Failure(number, error),))

    def _tell(self, events: Sequence[Event]) -> None:
        with self._telling:
            self._hear(events)

    def _lay_out(self, served: Served) -> RowFactors:
        adapter = read_verified(served, self._base, largest=2 * self._residents.budget)
        return self._bank.factors(served.name, adapter)

    def _emit(self, number: int, result: Produced | BaseException) -> None:
        if isinstance(result, BaseException):
            self._happened.append(Failure(number, result))
        else:
            self._happened.append(Result(number, result))
        if isinstance(result, BaseException) or result.finish is not None:
            self._sequences.pop(number, None)

    def _taken(self, one: Running) -> None:
        assert isinstance(one, _Numbered)
        self._happened.append(Taken(one.number))

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    def _run(self) -> None:
        """The thread."""
        said = "the engine failed; try again"
        try:
            said = self._steps()
        except BaseException:
            log.exception("the engine failed")
        finally:
            self._happened.append(Ended(said))
            self._flush()

    def _steps(self) -> str:
        """Step while there is something to do, until the end; what those hear that are still there then."""
        failures = 0
        while True:
            with self._condition:
                while not (self._ending or self._left or self._looks or self._scheduler.busy):
                    self._condition.wait()
                left, self._left = self._left, set()
                ending = self._ending
            for one in left:
                self._scheduler.end(one)
            if ending:
                self._abandon()
                return "the server stopped before the answer was complete"
            self._look()
            try:
                self._scheduler.step()
                failures = 0
            except Exception as error:  # out of memory, or a fault of ours: those in the batch are told, others go on
                log.exception("a step of the engine failed")
                failures += 1
                said = f"the engine failed ({type(error).__name__}); try again"
                if failures == FAILURES:
                    self._abandon()
                    return said
                for one in self._scheduler.running:
                    self._scheduler.fail(one, StoppingError(said))
            self._flush()

    def _look(self) -> None:
        """See prompts for gates: no more at a time than a step reads of prompts, so that others go on."""
        tokens = 0
        while self._looks and tokens < ALONE:
            number, prompt, layers, last = self._looks.popleft()
            tokens += len(prompt)
            try:
                features = self._sight.of(prompt, layers, last)
                self._happened.append(Seen(number, tuple(features.tolist())))
            except LorchestraError as error:
                self._happened.append(Failure(number, error))
            except Exception as error:  # out of memory, or a fault of ours: who asked is told, others go on
                log.exception("the features of a prompt failed")
                said = f"the engine failed ({type(error).__name__}); try again"
                self._happened.append(Failure(number, StoppingError(said)))

    def _flush(self) -> None:
        """Tell what the last step did, all at once."""
        happened, self._happened = self._happened, []
        if happened:
            self._tell(happened)

    def _abandon(self) -> None:
        """Free what all hold."""
        for one in self._scheduler.running:
            self._scheduler.end(one)
        while self._queue.pop() is not None:
            pass
        self._sequences.clear()


def loaded(setup: Setup, reporter: Reporter = SILENT) -> tuple[Core, Any]:
    """A core on the base that ``setup`` names, and the base's tokenizer.

    Raises:
        UserError: as of :func:`~lorchestra.base.load.load_base` and :class:`LocalCore`.
    """
    base = load_base(setup.directory, name=setup.name, device=setup.device, dtype=setup.dtype, reporter=reporter)
    return LocalCore(base, setup.limits), base.tokenizer


@dataclass(eq=False)
class _Numbered(Running):
    number: int = 0


class _Queue(FairQueue[Running]):
    """Whose turn it is; how many may wait is for those to say who push.

    Args:
        taken: hears of everyone that has its turn.
    """

    def __init__(self, taken: Callable[[Running], None]) -> None:
        super().__init__(per_tenant=sys.maxsize, total=sys.maxsize)
        self._taken = taken

    def pop(self) -> Running | None:
        one = super().pop()
        if one is not None:
            self._taken(one)
        return one


def _unheard(events: Sequence[Event]) -> None:
    """Before the start."""


def _end_ids(base: Base) -> tuple[int, ...]:
    ends = getattr(base.model.generation_config, "eos_token_id", None)
    return (ends,) if isinstance(ends, int) else tuple(ends or ())
