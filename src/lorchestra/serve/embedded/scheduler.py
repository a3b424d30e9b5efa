"""Which sequences run, and one step of all of them: prompts in chunks, then a token for everyone who decodes.

Everything here happens on the engine's one thread; only the queue and the residents are shared with others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from lorchestra.bank.factors import Group, RowFactors
from lorchestra.bank.rows import Acting, RowBank
from lorchestra.errors import AdapterError, LorchestraError
from lorchestra.fusion.groups import matches
from lorchestra.serve.embedded.cache import CacheShape
from lorchestra.serve.embedded.generation import Finish, Generation, Produced, Token
from lorchestra.serve.embedded.residents import Residents
from lorchestra.serve.embedded.sampler import Draws, NotFiniteError, choose, score
from lorchestra.serve.embedded.slots import Decoding, Reading, Slots
from lorchestra.serve.engine import Observer
from lorchestra.serve.fair import FairQueue

# Prompt tokens of one step: few while more sequences decode than wait to be read, so that they go on at an even pace.
CHUNK, ALONE = 256, 512
SHAPE = 8  # a pass's length is a multiple of it


class Decoder(Protocol):
    """A model that runs batches of sequences in slots, each row with its own adapter.

    Attributes:
        groups: modules that adapters may change.
        shape: of its cache.
        depth: layers that the model has.
        tokens: V, of its output.
        dtype: of its weights and cache.
        device: it is on.
    """

    groups: tuple[Group, ...]
    shape: CacheShape
    depth: int
    tokens: int
    dtype: torch.dtype
    device: torch.device

    def hidden_states(self, ids: Tensor, step: Reading | Decoding, bank: RowBank, acting: Acting) -> Tensor:
        """``[b, L, n]`` from ids ``[b, L]``."""
        ...

    def embedded(self, ids: Tensor) -> Tensor:
        """Input embeddings ``[b, L, n]`` of ids ``[b, L]``."""
        ...

    def early_states(self, ids: Tensor, step: Reading, bank: RowBank, layers: int) -> Tensor:
        """The base's own states ``[b, L, n]`` after the first ``layers``, at least one; after all of them normalised,
        as the head sees them. No adapter acts, and no layer after them is computed.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """``[…, V]`` from ``[…, n]``."""
        ...


@dataclass(eq=False)
class Running:
    """A sequence from when it came to when it ended.

    Args:
        generation: what was asked.
        emit: takes what a step produced, or why it failed; called on the engine's thread.
        came: ``time.monotonic()`` then.

    Attributes:
        draws: its sampler.
        factors: of its adapters; ``None`` while they are loaded.
        loading: its adapters, as they come.
        read: prompt tokens that are in the cache.
        scored: prompt tokens with log-probabilities, as far as read.
        last: the newest token, which is not in the cache yet.
    """

    generation: Generation
    emit: Callable[[Produced | BaseException], None]
    came: float = field(default_factory=time.monotonic)
    row: int = -1
    draws: Draws | None = None
    factors: RowFactors | None = None
    loading: list[Future[RowFactors]] = field(default_factory=list)
    read: int = 0
    scored: list[Token] = field(default_factory=list)
    last: int = 0

    @property
    def length(self) -> int:
        """Positions it may come to."""
        return len(self.generation.prompt) + max(self.generation.sampling.max_tokens - 1, 0)

    @property
    def unread(self) -> int:
        """Prompt tokens to read."""
        return len(self.generation.prompt) - self.read


class Scheduler:
    """Continuous batching (Yu et al. 2022, Orca): sequences come and go between steps.

    Args:
        decoder: the model.
        bank: of the rows' adapters.
        slots: of its cache.
        residents: the adapters.
        queue: who is next.
        most: sequences at a time.
        observer: hears of waiting times.
        wake: called, on any thread, when an adapter has come.
    """

    def __init__(
        self,
        decoder: Decoder,
        bank: RowBank,
        slots: Slots,
        residents: Residents[RowFactors],
        queue: FairQueue[Running],
        most: int,
        observer: Observer | None,
        wake: Callable[[], None],
    ) -> None:
        self._decoder, self._bank, self._slots = decoder, bank, slots
        self._residents, self._queue, self._most = residents, queue, most
        self._observer, self._wake = observer, wake
        self._rows = count()
        self._next: Running | None = None  # left the queue, but no slot was large enough
        self._loading: list[Running] = []
        self._reading: list[Running] = []
        self._decoding: dict[int, Running] = {}  # by row
        self._parts: dict[tuple[str, ...], dict[str, int]] = {}  # by the groups of layers that gates have
        self._acting: tuple[list[Running], Acting] | None = None  # of the decoding rows, until they change

    @property
    def running(self) -> list[Running]:
        """All that left the queue and did not end."""
        held = [] if self._next is None else [self._next]
        return [*held, *self._loading, *self._reading, *self._decoding.values()]

    @property
    def busy(self) -> bool:
        """Whether a step would do something now."""
        waits = len(self._loading) + len(self._reading) + len(self._decoding) < self._most and len(self._queue) > 0
        ready = any(all(future.done() for future in one.loading) for one in self._loading)
        return waits or ready or bool(self._reading or self._decoding or self._next)

    def step(self) -> None:
        """Take up who waits, read a chunk of prompts, add a token to everyone who decodes."""
        self._admit()
        self._mount()
        if self._reading:
            self._read()
        if self._decoding:
            self._decode()

    def end(self, one: Running) -> None:
        """Free what ``one`` holds, wherever it is."""
        if self._next is one:
            self._next = None
        for held in (self._loading, self._reading):
            if one in held:
                held.remove(one)
        if self._decoding.pop(one.row, None) is not None:
            self._bank.clear(one.row)
            self._acting = None
        self._slots.release(one.row)

    def fail(self, one: Running, error: BaseException) -> None:
        """End it, and say why."""
        self.end(one)
        one.emit(error)

    def _admit(self) -> None:
        while len(self._loading) + len(self._reading) + len(self._decoding) < self._most:
            one = self._next if self._next is not None else self._queue.pop()
            if one is None:
                return
            if not self._slots.fits(one.length):
                self._next = one
                return
            self._next = None
            self._queue.charge(one.generation.tenant, prompt_tokens=len(one.generation.prompt))
            one.row = next(self._rows)
            one.draws = Draws(one.generation.sampling, self._decoder.tokens)
            self._slots.take(one.row, len(one.generation.prompt), one.length)
            one.loading = [self._residents.start(served) for served, _ in one.generation.members]
            for future in one.loading:
                if not future.done():
                    future.add_done_callback(lambda _: self._wake())
            self._loading.append(one)

    def _mount(self) -> None:
        """Those whose adapters have come are read next."""
        for one in [one for one in self._loading if all(future.done() for future in one.loading)]:
            members = one.generation.members
            try:
                one.factors = self._mixed(one.generation, [future.result() for future in one.loading])
            except LorchestraError as error:
                self.fail(one, error)
                continue
            one.loading = []
            self._loading.remove(one)
            self._reading.append(one)
            if self._observer is not None:
                self._observer.waited(members, time.monotonic() - one.came)

    def _mixed(self, generation: Generation, factors: Sequence[RowFactors]) -> RowFactors:
        """The sum that answers."""
        name = "+".join(served.name for served, _ in generation.members)
        if not generation.layers:
            return self._bank.mixed(name, [(own, c) for own, (_, c) in zip(factors, generation.members, strict=True)])
        parts = self._parts_of(tuple(generation.layers))
        by_part = zip(factors, zip(*generation.layers.values(), strict=True), strict=True)
        return self._bank.mixed_by_layers(name, list(by_part), parts)

    def _parts_of(self, patterns: tuple[str, ...]) -> dict[str, int]:
        """Module path → index of its group of layers; found once for each gate."""
        if patterns not in self._parts:
            paths = [path for group in self._decoder.groups for path in group.paths]
            found = {path: next((i for i, one in enumerate(patterns) if matches(one, path)), None) for path in paths}
            self._parts[patterns] = {path: i for path, i in found.items() if i is not None}
        return self._parts[patterns]

    def _read(self) -> None:
        chosen, longest = self._chunk()
        # Not every length is a shape of its own: for each, a CPU's libraries spend milliseconds on code, and keep it.
        L = -(-longest // SHAPE) * SHAPE
        starts, counts = [one.read for one in chosen], [min(one.unread, longest) for one in chosen]
        ids = torch.zeros(len(chosen), L, dtype=torch.int64)
        for i, (one, start, n) in enumerate(zip(chosen, starts, counts, strict=True)):
            ids[i, :n] = torch.tensor(one.generation.prompt[start : start + n])
        step = self._slots.reading([one.row for one in chosen], starts, counts, L)
        factors = [one.factors for one in chosen if one.factors is not None]
        acting = self._bank.beside(factors, self._decoder.dtype)
        hidden = self._decoder.hidden_states(ids, step, self._bank, acting)
        step.keep()
        for i, (one, n) in enumerate(zip(chosen, counts, strict=True)):
            try:
                if one.generation.sampling.prompt_logprobs is not None:
                    self._score(one, hidden[i, :n])
            except NotFiniteError as error:
                self._not_finite(one, error)
                continue
            one.read += n
        ready = [(i, one) for i, one in enumerate(chosen) if not one.unread]
        ends = [hidden[i, counts[i] - 1] for i, _ in ready]
        begun = []
        for _, one in ready:
            if one.scored:
                one.emit(Produced(prompt=tuple(one.scored)))
            if one.generation.sampling.max_tokens == 0:
                self._finish(one, (), "length")
                begun.append(False)
                continue
            self._begin(one)
            self._acting = None
            begun.append(True)
        left = [one for (_, one), goes in zip(ready, begun, strict=True) if goes]
        if left:
            chosen_ends = [end for end, goes in zip(ends, begun, strict=True) if goes]
            self._choose(left, self._decoder.logits(torch.stack(chosen_ends)))

    def _begin(self, one: Running) -> None:
        """Its prompt is read: it decodes from now on, or, for want of memory, it still reads and holds what it held."""
        if one.factors is not None:
            self._bank.put(one.row, one.factors)
        try:
            self._slots.begin(one.row)
        except BaseException:
            self._bank.clear(one.row)
            raise
        one.factors = None
        self._reading.remove(one)
        self._decoding[one.row] = one

    def _chunk(self) -> tuple[list[Running], int]:
        """Prompts for one pass, and L: the oldest, and with it those of about its length, so that little is padding."""
        budget = CHUNK if len(self._decoding) > len(self._reading) else ALONE
        first = self._reading[0]
        chosen, L, least = [first], min(first.unread, budget), min(first.unread, budget)
        for one in sorted(self._reading[1:], key=lambda one: abs(one.unread - first.unread)):
            longest, shortest = max(L, one.unread), min(least, one.unread)
            if (len(chosen) + 1) * longest > budget or longest > 2 * shortest:
                break
            chosen.append(one)
            L, least = longest, shortest
        return chosen, L

    def _score(self, one: Running, hidden: Tensor) -> None:
        """Log-probabilities of prompt tokens after those of ``hidden [n, …]``."""
        prompt = one.generation.prompt
        if not one.scored:
            one.scored.append(Token(prompt[0]))
        following = prompt[one.read + 1 : one.read + 1 + len(hidden)]
        if following:
            logits = self._decoder.logits(hidden[: len(following)])
            one.scored += score(logits, following, one.generation.sampling)

    def _decode(self) -> None:
        if self._acting is None:
            order = self._slots.order()
            self._acting = [self._decoding[row] for row in order], self._bank.acting(order)
        batch, acting = self._acting
        ids = torch.tensor([[one.last] for one in batch])
        hidden = self._decoder.hidden_states(ids, self._slots.decoding(), self._bank, acting)
        self._choose(batch, self._decoder.logits(hidden[:, 0]))

    def _choose(self, batch: Sequence[Running], logits: Tensor) -> None:
        """The next token of each of ``batch``; those that end leave."""
        try:
            tokens = choose(logits, [one.draws for one in batch if one.draws is not None])
        except NotFiniteError as error:
            bad = set(error.rows)
            for i in bad:
                self._not_finite(batch[i], error)
            left = [i for i in range(len(batch)) if i not in bad]
            if left:
                self._choose([batch[i] for i in left], logits[left])
            return
        tenants: dict[str, int] = {}
        for one, token in zip(batch, tokens, strict=True):
            one.last = token.id
            how, tenant = one.generation.sampling, one.generation.tenant
            tenants[tenant] = tenants.get(tenant, 0) + 1
            if token.id in how.stop_ids:
                self._finish(one, (), "stop")
            elif one.draws is not None and one.draws.generated >= how.max_tokens:
                self._finish(one, (token,), "length")
            else:
                one.emit(Produced((token,)))
        for tenant, generated in tenants.items():
            self._queue.charge(tenant, generated_tokens=generated)

    def _not_finite(self, one: Running, error: NotFiniteError) -> None:
        names = "+".join(served.name for served, _ in one.generation.members)
        self.fail(one, AdapterError(f"adapter {names!r}: {error}") if names else error)

    def _finish(self, one: Running, tokens: tuple[Token, ...], finish: Finish) -> None:
        self.end(one)
        one.emit(Produced(tokens, finish=finish))
