"""One vLLM server: its adapters, its requests, and its life, whether we started it or found it at a URL."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from lorchestra.errors import AdapterError, LorchestraError, UserError
from lorchestra.serve.engine import Observer, RequestError, StoppingError
from lorchestra.serve.vllm_adapters import Portable, Workshop
from lorchestra.serve.vllm_process import Child, Launch
from lorchestra.serve.vllm_slots import Slots
from lorchestra.serve.vllm_wire import refusal

log = logging.getLogger(__name__)

# vLLM that mixes adapters up when one is loaded while others decode (its issue #47724): from, to before.
MIXES_UP = ((0, 22), (0, 25))
WATCH_EVERY = 1.0  # seconds between looks at a server that is well
STARTS_IN = 1800.0  # seconds that a server may take to become ready
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a server that ended is started again, doubled each time
_STRIKES = 3  # unanswered looks at a child that runs before it is taken for dead
_TIMEOUT = httpx2.Timeout(None, connect=5.0)  # an answer takes as long as it takes
_SHORT = httpx2.Timeout(10.0)


class Server:
    """One of the servers behind an engine.

    Args:
        launch: how it is started, or was.
        workshop: writes what it loads.
        url: of a server that runs already; ``None`` to start one.
        api_key: that a server at ``url`` asks for.
        observer: hears of adapters that come and go; not of mixtures.
    """

    def __init__(
        self,
        launch: Launch,
        workshop: Workshop,
        url: str | None = None,
        api_key: str | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.child = Child(launch) if url is None else None
        self.url = (url or "").rstrip("/")
        self.ready = False
        self.running = 0  # requests that were given to it and are not ended
        self.max_length: int | None = None
        self.base_name = ""
        self.slots = Slots(launch.max_cpu_loras, self._load, self._unload)
        self._workshop = workshop
        self._observer = observer
        key = self.child.api_key if self.child else api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx2.AsyncClient(headers=headers, timeout=_TIMEOUT, limits=limits, trust_env=False)
        self._quiet = _Quiet()
        self._load_alone = True
        self._alarm = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring it up, and keep it up from then on.

        Raises:
            LorchestraError: it ends, or does not become ready.
            UserError: it cannot be started, or is no vLLM that this engine can use.
        """
        try:
            await self._bring_up()
        except BaseException:
            await self.stop()
            raise
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Let go of it; one that we started ends."""
        self.ready = False
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self.child is not None:
            await self.child.stop()
        await self._client.aclose()

    @asynccontextmanager
    async def asked(self, path: str, body: dict[str, Any], key: str | None) -> AsyncIterator[httpx2.Response]:
        """Its answer to a request, status 200, not read yet; leaving the block ends the request there too.

        Args:
            path: of the endpoint.
            body: JSON.
            key: of the adapter that answers, which is in use (:attr:`slots`) meanwhile.

        Raises:
            RequestError, OverloadedError, StoppingError, LorchestraError: it refuses, or is gone.
        """
        if self.child is not None and self.child.on_cpu and body.get("echo") and body.get("logprobs") is not None:
            raise RequestError(
                "vLLM on a CPU ends when it is to score a prompt while it has adapters (0.32); leave out echo or "
                "logprobs, or serve with the embedded engine",
                "echo",
            )
        async with self._quiet.busy():
            try:
                for last in (key is None, True):
                    async with self._client.stream("POST", self.url + path, json=body) as response:
                        if response.status_code == 200:
                            yield response
                            return
                        await response.aread()
                        if response.status_code >= 500:
                            self._alarm.set()
                        if response.status_code != 404 or last:
                            raise refusal(response.status_code, _payload(response))
                    assert key is not None
                    await self._remind(key)
            except httpx2.TransportError as error:
                self._alarm.set()
                raise StoppingError(
                    f"vLLM stopped while it was answering ({type(error).__name__}); send the request again"
                ) from error

    async def _remind(self, key: str) -> None:
        """It does not know ``key``: it was restarted by somebody else between two looks."""
        log.warning("vLLM at %s has forgotten %s; it is loaded again", self.url, key)
        await self.slots.again(key)

    async def _load(self, portable: Portable) -> None:
        """Make ``portable`` known under its key, once.

        Raises:
            AdapterError: vLLM does not take it.
            StoppingError: vLLM is gone.
        """
        asked = {"lora_name": portable.key, "lora_path": str(portable.directory)}
        started = time.monotonic()
        async with self._quiet.alone() if self._load_alone else contextlib.nullcontext():
            response = await self._post("/v1/load_lora_adapter", asked)
            if response.status_code == 400 and "already been loaded" in response.text:
                # From an earlier life of ours, out of a directory that is gone by now: the weights are the same.
                await self._post("/v1/unload_lora_adapter", {"lora_name": portable.key})
                response = await self._post("/v1/load_lora_adapter", asked)
        if response.status_code != 200:
            log.error("vLLM does not load %s: %s", portable.key, response.text)
            why = str(refusal(response.status_code, _payload(response)))
            raise AdapterError(f"vLLM does not load {portable.key}: {why.replace(str(portable.directory), 'it')}")
        seconds = time.monotonic() - started
        log.info("vLLM loaded %s in %.0f ms", portable.key, 1000 * seconds)
        if self._observer is not None and portable.single is not None:
            self._observer.loaded(portable.single, seconds)

    async def _unload(self, portable: Portable) -> None:
        """Nobody asks for ``portable`` any more, and its name is never given to other weights."""
        try:
            response = await self._post("/v1/unload_lora_adapter", {"lora_name": portable.key})
            if response.status_code not in (200, 404):
                log.warning("vLLM does not unload %s: %s", portable.key, response.text)
        except StoppingError as error:
            log.info("%s was not unloaded: %s", portable.key, error)  # what is gone holds nothing
        await self._workshop.remove(portable)
        if self._observer is not None and portable.single is not None:
            self._observer.evicted(portable.single)

    async def _post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        try:
            return await self._client.post(self.url + path, json=body)
        except httpx2.TransportError as error:
            self._alarm.set()
            raise StoppingError(f"vLLM at {self.url} does not answer ({type(error).__name__})") from error

    async def _get(self, path: str) -> httpx2.Response | None:
        try:
            return await self._client.get(self.url + path, timeout=_SHORT)
        except httpx2.TransportError:
            return None  # the caller asks again, or says that it is gone

    async def _bring_up(self) -> None:
        """Until it answers, is known, and has the adapters that it had."""
        if self.child is not None:
            await self.child.start()
            self.url = self.child.url
        deadline = time.monotonic() + STARTS_IN
        while (response := await self._get("/health")) is None or response.status_code != 200:
            if self.child is not None and not self.child.running:
                raise self.child.failure()
            if time.monotonic() > deadline:
                raise LorchestraError(f"no vLLM has answered at {self.url} for {STARTS_IN:.0f} s; is it running there?")
            await asyncio.sleep(0.2)
        await self._learn()
        await self.slots.reload()
        self.ready = True
        log.info("vLLM at %s is ready", self.url)

    async def _learn(self) -> None:
        """Its version, the base's name and its length."""
        version, models = await self._get("/version"), await self._get("/v1/models")
        if models is None or models.status_code != 200:
            status = "nothing" if models is None else f"status {models.status_code}"
            raise UserError(f"{self.url}/v1/models answers with {status}; expected a vLLM server, and its API key")
        try:
            base = next(card for card in models.json()["data"] if not card.get("parent"))
            self.base_name, self.max_length = str(base["id"]), base.get("max_model_len")
        except (ValueError, TypeError, KeyError, StopIteration) as error:
            raise UserError(f"{self.url}/v1/models lists no base; expected a vLLM server") from error
        if (await self._post("/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""})).status_code == 404:
            raise UserError(
                f"vLLM at {self.url} loads no adapters at run time; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, as `lorchestra serve --engine vllm --print-command` shows"
            )
        try:
            told = str(version.json()["version"]) if version is not None else ""
        except (ValueError, TypeError, KeyError):
            told = ""  # not known, and treated so
        self._load_alone = loads_alone(told)
        if self._load_alone:
            log.warning("vLLM %s: requests are held back while an adapter loads", told or "of unknown version")

    async def _watch(self) -> None:
        """See that it is well; bring it up again when it is not."""
        pause, strikes, since = FIRST_PAUSE, 0, time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._alarm.wait(), WATCH_EVERY)
            self._alarm.clear()
            response = await self._get("/health")
            if response is not None and response.status_code == 200:
                strikes = 0
                if time.monotonic() - since > LONGEST_PAUSE:
                    pause = FIRST_PAUSE
                continue
            strikes += 1
            if self.child is not None and self.child.running and strikes < _STRIKES:
                continue
            self.ready = False
            log.error("vLLM at %s is gone%s", self.url, f": {self.child.failure()}" if self.child else "")
            while not self.ready:
                try:
                    if self.child is not None:
                        await self.child.stop()
                        log.info("vLLM is started again in %.0f s", pause)
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, LONGEST_PAUSE)
                    await self._bring_up()
                except LorchestraError as error:
                    log.error("vLLM is not back: %s", error)
                    await asyncio.sleep(0 if self.child else FIRST_PAUSE)
            strikes, since = 0, time.monotonic()


def loads_alone(version: str) -> bool:
    """Whether a vLLM of this version must not load while others decode: 0.22–0.24 (#47724), and any we cannot tell."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if found is None:
        return True
    first, end = MIXES_UP
    return first <= (int(found[1]), int(found[2])) < end


def _payload(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text


class _Quiet:
    """Many are busy, or one is alone; who wants to be alone waits for the busy ones and holds new ones back."""

    def __init__(self) -> None:
        self._busy = 0
        self._waiting = 0
        self._lock = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = asyncio.Event()
        self._open.set()

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        await self._open.wait()
        self._busy += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        self._waiting += 1
        self._open.clear()
        try:
            async with self._lock:
                await self._idle.wait()
                yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._open.set()
