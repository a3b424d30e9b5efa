"""From a request to its answer: who asks, whom, within which limits; and what became of it, in metrics and log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from lorchestra.errors import AdapterError, UserError
from lorchestra.registry.access import OPEN, Key
from lorchestra.serve.account import Account
from lorchestra.serve.engine import (
    Answer,
    Call,
    Chunk,
    Engine,
    OverloadedError,
    RequestError,
    StoppingError,
    UnprocessableError,
)
from lorchestra.serve.flights import Flights
from lorchestra.serve.limits import Limits
from lorchestra.serve.metrics import Metrics
from lorchestra.serve.ports import (
    Caller,
    Card,
    ForbiddenError,
    UnauthenticatedError,
    UnknownModelError,
    UnknownRequestError,
    WithdrawnError,
)
from lorchestra.serve.request_log import RequestLog, members_of
from lorchestra.serve.routing import Router
from lorchestra.serve.versions import ColdError

if TYPE_CHECKING:
    from lorchestra.serve.choosing import Choosing
    from lorchestra.serve.engine import Target
    from lorchestra.serve.following import Follower
    from lorchestra.serve.outcomes import Outcomes
    from lorchestra.serve.wire import ChatRequest, CompletionRequest, FeedbackRequest

GONE = 499  # nginx's word for a client that left
_REASONS = {400: "request", 401: "key", 403: "key", 404: "unknown", 409: "revoked", 422: "request", 429: "limit",
            503: "stopping"}  # fmt: skip


class KeyRing(Protocol):
    """Knows keys."""

    def find(self, secret: str) -> Key | None:
        """The key that ``secret`` is."""
        ...


@dataclass(frozen=True)
class KnownCaller(Caller):
    """A caller with what its key allows."""

    key: Key = OPEN


class TenantGateway:
    """Implements :class:`lorchestra.serve.ports.Gateway` on any engine. It belongs to one event loop.

    Args:
        engine: answers.
        router: names.
        keys: who may ask; ``None``: everybody, as an operator.
        metrics: counts.
        log: a line a request.
        limits: of keys.
        may_load: whether operators may load and unload adapters.
        clock: seconds.
        choosing: gates and ``auto``; ``None`` where there are none.
        follower: of the registry that names come from; ``None`` where there is none.
        outcomes: tells the registry what became of answers.
    """

    def __init__(
        self,
        engine: Engine,
        router: Router,
        keys: KeyRing | None,
        metrics: Metrics,
        log: RequestLog,
        *,
        limits: Limits | None = None,
        may_load: bool = False,
        clock: Callable[[], float] = time.monotonic,
        choosing: Choosing | None = None,
        follower: Follower | None = None,
        outcomes: Outcomes | None = None,
    ) -> None:
        self._follower, self._outcomes, self._choosing = follower, outcomes, choosing
        self._flights = follower.flights if follower else Flights()
        self._engine, self._router, self._keys, self._metrics, self._log = engine, router, keys, metrics, log
        self._limits, self._may_load, self._clock = limits or Limits(), may_load, clock
        self._loading = asyncio.Lock()
        self._stopping = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.watch(lambda: self.ready)

    @property
    def ready(self) -> bool:
        """Whether it takes requests now."""
        return not self._stopping and self._engine.ready and (self._follower is None or self._follower.ready)

    @property
    def registry_stale(self) -> float | None:
        """Seconds since the registry was last seen; ``None`` where there is none, or nothing is wrong with it."""
        return self._follower.versions.stale if self._follower and self._follower.down else None

    @property
    def running(self) -> int:
        """Requests that have no whole answer yet."""
        return self._running

    async def drain(self, grace: float) -> bool:
        """Take nothing new, and wait for what runs. Returns whether all of it ended within ``grace`` seconds."""
        self._stopping = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            return False
        return True

    def authenticate(self, authorization: str | None) -> KnownCaller:
        """Who sends this header; ``Bearer KEY`` where there are keys."""
        if self._keys is None:
            return KnownCaller(OPEN.name, OPEN)
        scheme, _, secret = (authorization or "").strip().partition(" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            self._metrics.rejected.labels(_REASONS[401]).inc()
            raise UnauthenticatedError("no valid API key: send 'Authorization: Bearer KEY' with a key of this server")
        return KnownCaller(key.name, key)

    def models(self, caller: Caller) -> Sequence[Card]:
        """What the caller's key may use."""
        key = _key(caller)
        return [*self._router.cards(key), *(self._choosing.cards(key) if self._choosing else ())]

    async def answer(self, caller: Caller, request_id: str, body: CompletionRequest | ChatRequest) -> Answer:
        """The whole answer."""
        with self._accounted(caller, request_id, body) as account, self._admitted(caller):
            call = await self._call(caller, request_id, body, account)
            with self._flights.of(call.target) as flight, flight.guarded():
                answer = await self._engine.answer(call)
            account.usage = answer.usage
            if self._log.prompts:
                account.choices = answer.choices
            return replace(answer, by=call.target)

    async def stream(
        self, caller: Caller, request_id: str, body: CompletionRequest | ChatRequest
    ) -> AsyncIterator[Chunk]:
        """The answer in parts."""
        with self._accounted(caller, request_id, body) as account, self._admitted(caller):
            call = await self._call(caller, request_id, body, account)
            # Engines stream by generators, whose closing frees what they hold; the interface says iterator.
            with self._flights.of(call.target) as flight:
                async with aclosing(cast(Any, self._engine.stream(call))) as chunks:
                    by: Target | None = call.target
                    while True:
                        with flight.guarded():
                            chunk = await anext(chunks, None)
                        if chunk is None:
                            return
                        account.received(chunk, self._log.prompts)
                        yield replace(chunk, by=by) if by else chunk
                        by = None

    async def load(self, caller: Caller, name: str, path: str) -> None:
        """Serve a directory under the roots as ``name``; the same weights again are as good as once."""
        self._check_operator(caller)
        async with self._loading:
            try:
                self._router.check_free(name, anew=True)
                adapter = await asyncio.to_thread(self._router.read, name, path)
                there = next((other for other in self._router.adapters if other.name == name), adapter)
                if there.digest == adapter.digest:
                    await self._engine.load(adapter)
                self._router.add(adapter)
            except (RequestError, AdapterError):
                raise
            except UserError as error:
                raise RequestError(str(error), "lora_name") from None

    async def unload(self, caller: Caller, name: str) -> None:
        """Serve ``name`` no longer; what runs on it ends first, and is not disturbed."""
        self._check_operator(caller)
        await self._engine.unload(self._router.remove(_key(caller), name))

    def metrics(self, caller: Caller) -> bytes:
        """Prometheus' text format, for operators."""
        if not _key(caller).operates:
            raise ForbiddenError("the metrics are for keys with the role 'operator'")
        return self._metrics.page()

    async def feedback(self, caller: Caller, request_id: str, said: FeedbackRequest) -> None:
        """Keep what the caller says of an answer that it was given."""
        began, status = self._clock(), 200
        try:
            with self._admitted(caller):
                assert self._outcomes is not None  # the route is there with it
                await self._outcomes.feedback(caller.tenant, said)
        except BaseException as error:
            status = status_of(error)
            raise
        finally:
            self.told("feedback", request_id, caller.tenant, status, of=said.request_id, seconds=self._clock() - began)

    def registry(self, caller: Caller) -> dict[str, Any]:
        """What is followed, and how that goes, for operators."""
        if not _key(caller).operates:
            raise ForbiddenError("the registry's state is for keys with the role 'operator'")
        assert self._follower is not None  # the route is there with it
        return self._follower.report()

    def told(self, kind: str, request_id: str, tenant: str | None, status: int, **more: Any) -> None:
        """A line of the request log for what is no question to a model."""
        if status in _REASONS and status != 401:  # those were counted
            self._metrics.rejected.labels(_REASONS[status]).inc()
        if "seconds" in more:
            more["seconds"] = round(more["seconds"], 6)
        self._log.write({"id": request_id, "tenant": tenant, "kind": kind, "status": status, **more})

    def _check_operator(self, caller: Caller) -> None:
        if not _key(caller).operates:
            raise ForbiddenError("adapters are loaded and unloaded with a key of the role 'operator'")
        if not self._may_load:
            raise ForbiddenError(
                "adapters cannot be loaded while this server runs; it was started without --enable-load"
            )
        if self._stopping:
            raise StoppingError("the server is stopping")

    async def _call(
        self, caller: Caller, request_id: str, body: CompletionRequest | ChatRequest, account: Account
    ) -> Call:
        if self._choosing is not None and self._choosing.has(body.model):
            target = await self._choosing.target(_key(caller), body)
            self._metrics.chosen(target)
        else:
            target = await self._resolved(_key(caller), body)
        account.target = target
        return Call(request_id, caller.tenant, target, body)

    async def _resolved(self, key: Key, body: CompletionRequest | ChatRequest) -> Target:
        while True:
            try:
                return self._router.resolve(key, body.model, body.user or "")
            except ColdError as cold:
                assert self._router.versions is not None  # it says so
                await self._router.versions.prepare(cold.line)

    @contextmanager
    def _admitted(self, caller: Caller) -> Iterator[None]:
        """A request of the caller is in flight inside, within its limits."""
        if self._stopping:
            raise StoppingError("the server is stopping; try again at another, or in a while")
        key = _key(caller)
        with self._limits.admitted(key.name, key.rpm, key.concurrency):
            self._running += 1
            self._idle.clear()
            self._metrics.in_flight.inc()
            try:
                yield
            finally:
                self._running -= 1
                self._metrics.in_flight.dec()
                if not self._running:
                    self._idle.set()

    @contextmanager
    def _accounted(self, caller: Caller, request_id: str, body: CompletionRequest | ChatRequest) -> Iterator[Account]:
        account = Account(self._clock, self._metrics)
        failure: BaseException | None = None
        try:
            yield account
        except BaseException as error:
            failure = error
            raise
        finally:
            self._close(account, caller, request_id, body, failure)

    def _close(
        self,
        account: Account,
        caller: Caller,
        request_id: str,
        body: CompletionRequest | ChatRequest,
        failure: BaseException | None,
    ) -> None:
        label, usage, seconds = account.label, account.usage, self._clock() - account.began
        status = 200 if failure is None else status_of(failure)
        self._metrics.requests.labels(label, str(status)).inc()
        if status in _REASONS:
            self._metrics.rejected.labels(_REASONS[status]).inc()
        if account.target is not None:
            self._metrics.prompt_tokens.labels(label).inc(usage.prompt)
            self._metrics.generated_tokens.labels(label).inc(usage.generated)
        if status == 200:
            self._metrics.duration.labels(label).observe(seconds)
        first = account.first_token
        line: dict[str, Any] = {
            "id": request_id,
            "tenant": caller.tenant,
            "model": body.model,
            "adapters": members_of(account.target) if account.target else [],
            "kind": "chat" if hasattr(body, "messages") else "completion",
            "stream": bool(body.stream),
            "status": status,
            "prompt_tokens": usage.prompt,
            "generated_tokens": usage.generated,
            "first_token_seconds": None if first is None else round(first, 6),
            "seconds": round(seconds, 6),
        }
        if account.target is not None and account.target.arm:
            line["arm"] = account.target.arm
        if account.target is not None and account.target.choice is not None:
            line["gate"] = account.target.choice.gate
        if failure is not None:
            line["error"] = type(failure).__name__
        if self._log.prompts:
            line |= {"request": dict(body.sent), "choices": account.choices}
        self._log.write(line)
        if self._outcomes is not None and account.target is not None and not self._stopping:
            self._outcomes.ended(request_id, caller.tenant, body, account.target, seconds, failure, account.answer)


def status_of(error: BaseException) -> int:
    """The HTTP status that an error of the gateway ends in."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return GONE
    for kind, status in (
        (UnauthenticatedError, 401),
        (ForbiddenError, 403),
        (UnknownModelError, 404),
        (UnknownRequestError, 404),
        (WithdrawnError, 409),
        (UnprocessableError, 422),
        (OverloadedError, 429),
        (StoppingError, 503),
        (RequestError, 400),
        (UserError, 400),
    ):
        if isinstance(error, kind):
            return status
    return 500


def _key(caller: Caller) -> Key:
    """What the caller may do; one that this gateway did not authenticate may do nothing."""
    if not isinstance(caller, KnownCaller):
        raise UnauthenticatedError("no valid API key")
    return caller.key
