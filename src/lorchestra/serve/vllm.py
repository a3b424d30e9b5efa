"""The engine in front of vLLM: its servers answer, ours is who may ask them what, and which weights a name means."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorchestra.serve.engine import Answer, Call, Chunk, Observer, RequestError, Served, StoppingError, Target
from lorchestra.serve.turns import Turns
from lorchestra.serve.vllm_adapters import NOTHING, Workshop, target_key
from lorchestra.serve.vllm_process import Launch, slot_rank
from lorchestra.serve.vllm_server import Server
from lorchestra.serve.vllm_wire import body_of, chunks_of, path_of, usage_of

if TYPE_CHECKING:
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.serve.wire import ChatRequest, CompletionRequest

# A server that has the adapter is preferred until it has so many requests more than the least busy one.
_STICKS = 16


class VllmEngine:
    """Implements :class:`lorchestra.serve.engine.Engine`.

    Names at vLLM are ``name@digest``, or ``mixture@digest`` of its members' digests and weights, and are never used for
    other weights. What is loaded are copies of ours (scale folded, ``lora_alpha = r``): changing the original changes
    nothing. vLLM goes on answering for an adapter that it was told to unload (its #54839): it is this engine's callers
    that no longer ask for it.

    Args:
        launch: how vLLM is started; with ``urls``, how it was.
        identity: of the base; adapters of another one are refused.
        urls: of servers that run already; none to start one here.
        api_key: that they ask for.
        root: where adapters are written for them, seen by them under the same path; a temporary directory otherwise.
        concurrency: requests at all servers together; more wait in a fair queue.
        observer: hears of loads, evictions and waiting.
    """

    def __init__(
        self,
        launch: Launch,
        identity: BaseId,
        *,
        urls: Sequence[str] = (),
        api_key: str | None = None,
        root: Path | None = None,
        concurrency: int = 256,
        observer: Observer | None = None,
    ) -> None:
        self._own = Path(tempfile.mkdtemp(prefix="lorchestra-vllm-", dir=root))
        self._places: Sequence[str | None] = urls or (None,)
        self._workshops = [
            Workshop(launch.base, identity, self._own / str(index), slot_rank(launch.max_rank))
            for index in range(len(self._places))
        ]
        self.servers = [
            Server(launch, workshop, url, api_key, observer)
            for workshop, url in zip(self._workshops, self._places, strict=True)
        ]
        self.turns = Turns(concurrency)
        self._observer = observer
        self._salt = secrets.token_bytes(16)
        self._stopping = False
        self._answering = 0
        self._ended = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a server can answer now, with the adapters that it is to have."""
        return not self._stopping and any(server.ready for server in self.servers)

    @property
    def max_length(self) -> int | None:
        """Positions of a sequence, prompt and answer together."""
        return min((s.max_length for s in self.servers if s.max_length is not None), default=None)

    async def start(self) -> None:
        """Start or find the servers.

        Raises:
            LorchestraError, UserError: one does not come up; what was started is stopped.
        """
        try:
            await asyncio.gather(*(server.start() for server in self.servers))
        except BaseException:
            await self.stop(0.0)
            raise

    async def stop(self, grace: float) -> None:
        """As :meth:`lorchestra.serve.engine.Engine.stop`."""
        self._stopping = True
        if self._answering:
            with contextlib.suppress(TimeoutError):  # what runs on is cut off with its server
                await asyncio.wait_for(self._ended.wait(), grace)
        await asyncio.gather(*(server.stop() for server in self.servers))
        await asyncio.to_thread(shutil.rmtree, self._own, ignore_errors=True)

    async def load(self, adapter: Served) -> None:
        """As :meth:`lorchestra.serve.engine.Engine.load`, on every server that is up."""
        target = Target(adapter.name, ((adapter, 1.0),))
        if not self.ready:
            raise StoppingError("vLLM is not ready; try again in a while")

        async def on(index: int) -> None:
            async with self._in_use(index, target):
                return

        await asyncio.gather(*(on(index) for index, server in enumerate(self.servers) if server.ready))

    async def unload(self, adapter: Served) -> None:
        """As :meth:`lorchestra.serve.engine.Engine.unload`; mixtures with it go too."""
        drops = [s.slots.drop(key) for s in self.servers for key in s.slots.containing(adapter.digest)
                 if key == adapter.key or key.startswith("mixture@")]  # fmt: skip
        await asyncio.gather(*drops)

    def resident(self) -> Sequence[str]:
        """Keys of the adapters that a server holds; mixtures, too."""
        return sorted({key for server in self.servers for key in server.slots.loaded()} - {NOTHING})

    async def features(self, body: CompletionRequest | ChatRequest, layers: int, last: bool) -> Sequence[float]:
        """vLLM gives no states of its model."""
        raise RequestError(
            f"{body.model!r} chooses by the base's own states, which vLLM does not give; name an adapter or a mixture, "
            "or serve with --engine embedded",
            "model",
        )

    async def answer(self, call: Call) -> Answer:
        """As :meth:`lorchestra.serve.engine.Engine.answer`."""
        async with self._placed(call) as (server, key):
            body = body_of(call, key or server.base_name, self._salt_of(call.tenant), stream=False)
            async with server.asked(path_of(call), body, key) as response:
                await response.aread()
                payload = response.json()
        usage = usage_of(payload)
        self.turns.queue.charge(call.tenant, usage.prompt, usage.generated)
        return Answer(payload["choices"], usage)

    async def stream(self, call: Call) -> AsyncIterator[Chunk]:
        """As :meth:`lorchestra.serve.engine.Engine.stream`."""
        async with self._placed(call) as (server, key):
            body = body_of(call, key or server.base_name, self._salt_of(call.tenant), stream=True)
            prompt = generated = 0
            async with server.asked(path_of(call), body, key) as response:
                async for chunk in chunks_of(response.aiter_lines()):
                    self.turns.queue.charge(call.tenant, chunk.usage.prompt - prompt, chunk.usage.generated - generated)
                    prompt, generated = chunk.usage.prompt, chunk.usage.generated
                    yield chunk

    @asynccontextmanager
    async def _placed(self, call: Call) -> AsyncIterator[tuple[Server, str | None]]:
        """A server whose turn for ``call`` it is and that has its adapter, and what it calls that."""
        if not self.ready:
            raise StoppingError("vLLM is stopping" if self._stopping else "vLLM is not ready; try again in a while")
        self._answering += 1
        came = time.monotonic()
        key = target_key(call.target)
        try:
            async with self.turns.turn(call.tenant, uuid.uuid4().hex):
                index = self._choose(key)
                server = self.servers[index]
                server.running += 1
                try:
                    async with self._in_use(index, call.target) as used:
                        if self._observer is not None:
                            self._observer.waited(call.target.members, time.monotonic() - came)
                        yield server, used
                finally:
                    server.running -= 1
        finally:
            self._answering -= 1
            if self._stopping and not self._answering:
                self._ended.set()

    @asynccontextmanager
    async def _in_use(self, index: int, target: Target) -> AsyncIterator[str | None]:
        """What the server calls who answers, loaded; ``None`` for the base by its own name."""
        server, workshop, key = self.servers[index], self._workshops[index], target_key(target)
        if key is not None:
            async with server.slots.using(key, lambda: workshop.make(key, target)):
                yield key
        elif server.child is not None and server.child.on_cpu:
            async with server.slots.using(NOTHING, workshop.nothing):
                yield NOTHING
        else:
            yield None

    def _choose(self, key: str | None) -> int:
        """The least busy server; one that has the adapter already, unless it is much busier."""
        up = [index for index, server in enumerate(self.servers) if server.ready]
        if not up:
            raise StoppingError("vLLM is not ready; try again in a while")
        having = {index: key is None or key in self.servers[index].slots.loaded() for index in up}
        return min(up, key=lambda index: self.servers[index].running + (0 if having[index] else _STICKS))

    def _salt_of(self, tenant: str) -> str:
        return hashlib.blake2b(tenant.encode(), key=self._salt, digest_size=16).hexdigest()
