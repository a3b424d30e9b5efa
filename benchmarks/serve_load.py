"""The clients of ``benchmarks/serve.py``: streamed completions over HTTP, timed as they arrive.

Nothing but the standard library, and the same bytes to every server: on a machine of few cores the client's own work
comes out of what the server has.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """A completion to ask for: greedy, exactly ``new`` tokens.

    Args:
        model: the base or an adapter, as the server calls it.
        prompt: token ids.
        new: tokens to generate.
    """

    model: str
    prompt: Sequence[int]
    new: int


@dataclass
class Reply:
    """When it was sent, and when which tokens came, in seconds of ``time.perf_counter``."""

    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # time, tokens so far

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0][0] - self.sent

    @property
    def total(self) -> float:
        """Seconds to the last."""
        return self.arrivals[-1][0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds from each token to the next; tokens that come together share the time since the last."""
        out: list[float] = []
        for (before, had), (now, has) in zip(self.arrivals, self.arrivals[1:], strict=False):
            out += [(now - before) / (has - had)] * (has - had)
        return out


async def ask(port: int, request: Request) -> Reply:
    """One request, from connecting to the last token.

    Raises:
        RuntimeError: the server refused, or sent another number of tokens than was asked for.
    """
    body = json.dumps({
        "model": request.model, "prompt": list(request.prompt), "max_tokens": request.new, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    reply = Reply(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{request.model}: {status!r} {(await reader.read())[-2000:]!r}")
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"{request.model}: {event}")
            tokens = event["usage"]["completion_tokens"]
            if event["choices"] and tokens > (reply.arrivals[-1][1] if reply.arrivals else 0):
                reply.arrivals.append((now, tokens))
    finally:
        writer.close()
    if not reply.arrivals or reply.arrivals[-1][1] != request.new:
        raise RuntimeError(
            f"{request.model}: {reply.arrivals[-1:]} at the end, and {request.new} tokens were asked for"
        )
    return reply


def crowd(port: int, requests: Sequence[Request], clients: int) -> dict[str, Any]:
    """``clients`` at a time, each with its next request when its last one has ended: tokens a second and latencies."""

    async def run() -> tuple[list[Reply], float]:
        waiting = iter(requests)
        replies: list[Reply] = []

        async def client() -> None:
            for request in waiting:
                replies.append(await ask(port, request))

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return replies, time.perf_counter() - started

    replies, seconds = asyncio.run(run())
    return summary(replies, seconds)


def summary(replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    """Tokens a second of all together, and percentiles of seconds."""
    tokens = sum(reply.arrivals[-1][1] for reply in replies)
    return {
        "requests": len(replies),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "first_token": percentiles([reply.first for reply in replies]),
        "inter_token": percentiles([gap for reply in replies for gap in reply.gaps]),
        "total": percentiles([reply.total for reply in replies]),
    }


def summary_of_steps(rows: Sequence[Mapping[str, Any]], new: int, batch: int) -> dict[str, Any]:
    """The same of calls that were timed in their own process.

    Args:
        rows: of each call, ``seconds`` in all and ``tokens``, the seconds from its beginning to each token.
        new: tokens of an answer.
        batch: answers of a call.
    """
    replies = [Reply(0.0, [(moment, i + 1) for i, moment in enumerate(row["tokens"])]) for row in rows]
    found = summary(replies, sum(row["seconds"] for row in rows))
    tokens = len(rows) * new * batch
    return found | {
        "requests": len(rows) * batch, "tokens": tokens, "tokens_per_second": tokens / found["seconds"],
    }  # fmt: skip


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of a sample: the least value with at least this share at or below it."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 90, 95, 99)}


def median_of(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of every number over rounds of the same form."""
    out: dict[str, Any] = {}
    for key, value in rounds[0].items():
        values = [row[key] for row in rounds]
        out[key] = median_of(values) if isinstance(value, Mapping) else statistics.median(values)
    return out
