"""What became of answers, written to the registry in batches beside the requests: for canaries, and for feedback.

Nothing here is on a request's path. What was counted of a canary is written whole each time, so that a write that is
lost or repeated changes nothing; what was answered is kept in memory while the registry is away, as far as it goes.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lorchestra.errors import AdapterError, LorchestraError, UserError
from lorchestra.registry.canary.observations import Tally
from lorchestra.registry.mistakes import RegistryError
from lorchestra.serve.engine import StoppingError, Target, UnprocessableError
from lorchestra.serve.ports import UnknownRequestError
from lorchestra.serve.wire import ChatRequest, CompletionRequest, FeedbackRequest

if TYPE_CHECKING:
    from lorchestra.registry.canary.feedback import Answered
    from lorchestra.registry.canary.traffic import Arm
    from lorchestra.serve.following import Follower
    from lorchestra.serve.metrics import RegistryMetrics

WRITE = 0.25  # seconds between two writes
ADVANCE = 5.0  # seconds between two looks at the guards
PATIENCE = 35.0  # seconds for a write; SQLite alone may wait 30 for another's
MOST = 20_000  # answers that are kept in memory
BATCH = 500  # of them in one write
REMEMBERED = timedelta(days=30)  # for feedback
TIDY = 3600.0  # seconds between two removals of what is older
_PREFIXES = ("chatcmpl-", "cmpl-")  # of the id in a response's body
_log = logging.getLogger("lorchestra.serve.registry")
T = TypeVar("T")


class Outcomes:
    """One gateway's. It belongs to one event loop.

    Args:
        follower: of the registry.
        metrics: are told.
        prompts: keep prompts and answers, for training on feedback.
        advance: seconds between two looks at the guards.
    """

    def __init__(
        self, follower: Follower, metrics: RegistryMetrics, *, prompts: bool = False, advance: float = ADVANCE
    ) -> None:
        self.prompts = prompts
        self._follower, self._registry, self._metrics, self._every = follower, follower.registry, metrics, advance
        self._gateway = uuid.uuid4().hex  # a process that is started again counts from nothing, in a row of its own
        self._tallies: dict[tuple[int, Arm], Tally] = {}
        self._changed: set[int] = set()
        self._answered: deque[Answered] = deque()
        self._threads = ThreadPoolExecutor(2, "lorchestra-outcomes")
        self._writing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._told: dict[str, str] = {}

    def start(self) -> None:
        """Begin to write, on the running event loop."""
        loops = ((WRITE, self.flush), (self._every, self._advance), (TIDY, self._tidy))
        self._tasks = [asyncio.ensure_future(self._again(every, work)) for every, work in loops]

    async def stop(self) -> None:
        """Write what there is, and no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await asyncio.wait_for(self.flush(), 5)
        except (LorchestraError, TimeoutError) as error:
            _log.warning("what was counted last is lost: %s", error or "the registry does not answer")
        self._threads.shutdown(wait=False, cancel_futures=True)

    def ended(
        self,
        request_id: str,
        tenant: str,
        body: CompletionRequest | ChatRequest,
        target: Target,
        seconds: float,
        error: BaseException | None,
        answer: str | None,
    ) -> None:
        """A request has ended that ``target`` was to answer.

        Args:
            request_id: of it.
            tenant: whose.
            body: what was asked.
            target: who answered.
            seconds: from its beginning to its end.
            error: that it ended in; ``None`` if it was answered.
            answer: the text, where there is one and prompts are kept.
        """
        if target.arm and target.rollout is not None:
            self._count(target, target.rollout, target.arm, seconds, error)
        if error is None:
            self._answered.append(self._row(request_id, tenant, body, target, answer))
            if len(self._answered) > MOST:
                self._answered.popleft()
                self._metrics.lost.inc()

    async def feedback(self, tenant: str, said: FeedbackRequest) -> None:
        """Keep what a tenant says of an answer.

        Raises:
            UnknownRequestError: nothing was answered to this tenant under that id.
            UnprocessableError: a comment that cannot be kept.
            StoppingError: the registry cannot be reached.
        """
        from lorchestra.registry.canary import feedback

        # The id in a response's body has a prefix; who sends that means the same. Whoever asks, both are looked for.
        ids = [said.request_id, *(said.request_id.removeprefix(p) for p in _PREFIXES if said.request_id.startswith(p))]

        def record() -> None:
            for last, request_id in zip((*[False] * (len(ids) - 1), True), ids, strict=True):
                try:
                    feedback.record(
                        self._registry, request_id, tenant, score=said.score, thumb=said.thumb, comment=said.comment
                    )
                    return
                except feedback.UnknownRequestError as error:
                    if last:
                        raise UnknownRequestError(str(error)) from None

        try:
            await self.flush()
            await self._off(record)
        except UnknownRequestError:
            raise
        except UserError as error:
            raise UnprocessableError(str(error), "comment") from None
        except RegistryError as error:
            _log.error("feedback is not kept: %s", error)
            raise StoppingError("feedback cannot be kept at the moment; send it again in a while") from None

    async def flush(self) -> None:
        """Write what there is.

        Raises:
            RegistryError: the registry cannot be reached; what there is stays.
        """
        from lorchestra.registry.canary.feedback import remember
        from lorchestra.registry.canary.observations import observe

        async with self._writing:
            while self._answered:
                rows = [self._answered.popleft() for _ in range(min(BATCH, len(self._answered)))]
                try:
                    await self._off(partial(remember, self._registry, rows))
                except BaseException:
                    self._answered.extendleft(reversed(rows))
                    raise
            for rollout in sorted(self._changed):
                tallies: dict[Arm, Tally] = {
                    arm: replace(tally) for (of, arm), tally in self._tallies.items() if of == rollout
                }
                self._changed.discard(rollout)
                try:
                    await self._off(partial(observe, self._registry.catalog, rollout, self._gateway, tallies))
                except RegistryError:
                    self._changed.add(rollout)
                    raise

    def _count(self, target: Target, rollout: int, arm: Arm, seconds: float, error: BaseException | None) -> None:
        # Only what the version can be blamed for: not a mistake of the client, a limit, a client that left, or a
        # revocation.
        failed = error is not None and (
            isinstance(error, AdapterError | StoppingError)
            or (isinstance(error, Exception) and not isinstance(error, LorchestraError))
        )
        if error is not None and not failed:
            return
        tally = self._tallies.setdefault((rollout, arm), Tally())
        if failed:
            tally.failed()
        else:
            tally.answered(seconds)
        self._changed.add(rollout)
        self._metrics.arms.labels(target.members[0][0].name, arm, "failed" if failed else "answered").inc()

    def _row(
        self, request_id: str, tenant: str, body: CompletionRequest | ChatRequest, target: Target, answer: str | None
    ) -> Answered:
        from lorchestra.registry.canary.feedback import Answered

        single = target.single
        kept = self.prompts and answer is not None and (prompt := _prompt(body)) is not None
        return Answered(
            request_id, single.name if single else target.asked, single.version if single else None, tenant,
            body.user or "", target.arm, prompt if kept else None, answer if kept else None,
        )  # fmt: skip

    async def _advance(self) -> None:
        """Do what is due of the canaries; of all gateways, one does it."""
        if not self._follower.snapshot.canaries:
            return
        from lorchestra.registry.canary.rollout import advance

        def work() -> bool:
            changes = advance(self._registry)
            self._metrics.rolled_back.inc(sum(change.action == "canary-rollback" for change in changes))
            return bool(changes)

        await self.flush()
        if await self._off(work):
            self._follower.look()

    async def _tidy(self) -> None:
        from lorchestra.registry.canary.feedback import forget

        await self._off(lambda: forget(self._registry, datetime.now(UTC) - REMEMBERED))

    async def _again(self, every: float, work: Callable[[], Any]) -> None:
        name = work.__name__
        while True:
            await asyncio.sleep(every)
            try:
                await work()
                if self._told.pop(name, ""):
                    _log.warning("the registry takes what is written to it again")
            except RegistryError as error:
                if not self._told.get(name):
                    _log.error("the registry takes nothing: %s", error)
                self._told[name] = str(error)
            except Exception:  # counting must go on, whatever this was
                if not self._told.get(name):
                    _log.exception("writing to the registry failed")
                self._told[name] = "failed"

    async def _off(self, work: Callable[[], T]) -> T:
        if self._follower.down:  # a directory that was removed would be written to all the same, for nobody
            raise RegistryError(self._follower.down)
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.wait_for(running, PATIENCE)
        except TimeoutError:  # what it does all the same is done twice then, which changes nothing
            raise RegistryError(f"the registry did not answer within {PATIENCE:g} seconds") from None


def _prompt(body: CompletionRequest | ChatRequest) -> str | Sequence[Mapping[str, Any]] | None:
    """What stood before the answer; ``None`` where it is not one text, or turns of texts."""
    if isinstance(body, CompletionRequest):
        return body.prompt if isinstance(body.prompt, str) else None
    turns = [{"role": turn.role, "content": turn.content} for turn in body.messages]
    return turns if all(isinstance(turn["content"], str) for turn in turns) else None
