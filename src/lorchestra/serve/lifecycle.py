"""A server's life: it listens, its engine comes up, it answers, and on a signal it finishes what it has begun."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import uvicorn

from lorchestra.errors import UserError
from lorchestra.serve.engine import Engine

if TYPE_CHECKING:
    from fastapi import FastAPI

FLUSH = 5.0  # seconds for answers that are whole to reach their readers
ABRUPT = 2.0  # seconds for an engine to let go after a second signal
_log = logging.getLogger("lorchestra.serve")


class Drains(Protocol):
    """What is drained."""

    @property
    def running(self) -> int:
        """Requests that have no whole answer yet."""
        ...

    async def drain(self, grace: float) -> bool:
        """Take nothing new, and wait for what runs; whether all of it ended in time."""
        ...


def listen(host: str, port: int) -> socket.socket:
    """A socket that connections queue at, before anything slow is begun.

    Raises:
        UserError: the place is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {_why(error)}; choose another --host or --port") from None


def _why(error: OSError) -> str:
    """The system's words; Python adds the address to them, which is said already."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)


def check_tls(certificate: Path, key: Path | None) -> None:
    """Whether the files are a certificate and its key.

    Raises:
        UserError: they are not.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        names = f"{certificate} and {key}" if key else f"{certificate}"
        raise UserError(
            f"TLS: {names} are not a certificate (PEM) and its private key without password: {why}"
        ) from None


class Outcome:
    """How a server ended.

    Args:
        signal: that asked it to; ``None`` if it ended by itself.
        cut: requests that were not finished.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.cut = 0


async def serve(
    app: FastAPI,
    engine: Engine,
    drains: Drains,
    listener: socket.socket,
    *,
    grace: float,
    certificate: Path | None = None,
    key: Path | None = None,
    up: Callable[[], None] = lambda: None,
) -> Outcome:
    """Bring ``engine`` up, answer until a signal, and let go of everything.

    On SIGTERM or SIGINT new requests are refused (503, and ``/ready`` says so, so that a balancer looks elsewhere), and
    the server ends when what runs has ended, or after ``grace`` seconds. A second signal does not wait.

    Args:
        app: see ``create_app``.
        engine: behind it.
        drains: the gateway between them.
        listener: from :func:`listen`; connections wait in it while the engine comes up.
        grace: seconds.
        certificate: of TLS.
        key: of the certificate.
        up: called when requests are answered.
    """
    await engine.start()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    server = _Server(config, drains, grace, up)
    try:
        await server.serve(sockets=[listener])
    finally:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(engine.stop(0.0), ABRUPT if server.force_exit else None)
    return server.outcome


class _Server(uvicorn.Server):
    """uvicorn, which stops listening at the first signal, but later: when what runs has ended."""

    def __init__(self, config: uvicorn.Config, drains: Drains, grace: float, up: Callable[[], None]) -> None:
        super().__init__(config)
        self.outcome = Outcome()
        self._drains, self._grace, self._up = drains, grace, up
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._up()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._asked, signal.Signals(sig))

    def _asked(self, sig: signal.Signals) -> None:
        if self._draining is not None:
            self.outcome.cut = self._drains.running
            self.force_exit = self.should_exit = True
            return
        self.outcome.signal = sig
        _log.warning("%s: %d requests run; no more are taken", sig.name, self._drains.running)
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        whole = await self._drains.drain(self._grace)
        if not whole and not self.force_exit:
            self.outcome.cut = self._drains.running
            _log.error("%d requests were not finished within %g seconds", self.outcome.cut, self._grace)
        self.config.timeout_graceful_shutdown = int(FLUSH) if whole else 1
        self.should_exit = True
