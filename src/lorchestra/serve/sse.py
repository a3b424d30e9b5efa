"""Server-sent events: a stream that ends when its reader leaves, and lets go of what it held."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


def event(data: Mapping[str, Any]) -> bytes:
    """One event; JSON has no raw line breaks, so it is one line, also for clients that split at Unicode's others."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_BREAKS)
    return b"data: " + text.encode() + b"\n\n"


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves. The request's body was read before.

    Raises:
        ClientGoneError: it left.
    """
    return await _unless_gone(request.receive, work)


class EventStream(Response):
    """Events as they come, in the order they come.

    Args:
        events: encoded; closed (``aclose``) when they end and when the client leaves.
        source: what they are made of; closed too, because a generator that was never asked closes nothing.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], source: AsyncIterator[Any]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._source = events, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send(send))
        except (ClientGoneError, OSError):  # OSError: what a server may raise on a closed connection
            return
        finally:
            await close(self._events)
            await close(self._source)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._events:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def close(iterator: AsyncIterator[Any]) -> None:
    """Close an asynchronous generator; other iterators have nothing to close."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        # Whatever ended the wait, nothing is left running: a cancelled task is waited for, so that it frees its slot.
        for other in (task, gone):
            other.cancel()
        await asyncio.wait((task, gone))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
