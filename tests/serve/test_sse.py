"""A stream lets go of what it held, whenever its reader leaves."""

from __future__ import annotations

import asyncio

import pytest

from lorchestra.serve.sse import EventStream


@pytest.mark.parametrize("heard", [0, 1, 2])
def test_a_reader_that_leaves_closes_what_the_events_are_made_of(heard):
    closed = []

    async def source():
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append("source")

    async def work():
        parts = source()
        await anext(parts)  # as a server does, to refuse before it streams

        async def events():
            try:
                async for part in parts:
                    yield part
            finally:
                closed.append("events")

        sent, left = [], asyncio.Event()

        async def send(message):
            if message["type"] == "http.response.body":
                sent.append(message["body"])
            if len(sent) >= heard:
                left.set()
                await asyncio.sleep(3600)

        async def receive():
            if heard:
                await left.wait()
            return {"type": "http.disconnect"}

        await asyncio.wait_for(EventStream(events(), parts)({"type": "http"}, receive, send), 10)
        return sent

    assert len(asyncio.run(work())) <= heard
    assert closed[-1] == "source"
    assert closed == (["events", "source"] if heard else ["source"])
