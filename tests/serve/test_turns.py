"""At most so many at once, and no tenant's flood before another's request."""

from __future__ import annotations

import asyncio

import pytest

from lorchestra.serve.engine import OverloadedError
from lorchestra.serve.fair import FairQueue
from lorchestra.serve.turns import Turns


def test_no_more_run_than_may_and_a_flood_does_not_delay_another_tenant():
    async def main():
        turns = Turns(2)
        order, most = [], 0

        async def request(tenant, index):
            nonlocal most
            async with turns.turn(tenant, f"{tenant}{index}"):
                most = max(most, turns.running)
                order.append(tenant)
                turns.queue.charge(tenant, prompt_tokens=10)
                await asyncio.sleep(0.002)

        flood = [asyncio.create_task(request("flood", i)) for i in range(20)]
        await asyncio.sleep(0.001)
        await asyncio.gather(*flood, *(request("calm", i) for i in range(3)))
        assert most == 2
        assert turns.running == 0
        assert max(i for i, tenant in enumerate(order) if tenant == "calm") < 10
        assert len(order) == 23

    asyncio.run(main())


def test_who_leaves_the_queue_or_is_cancelled_in_its_turn_makes_room():
    async def main():
        turns = Turns(1)
        held = asyncio.Event()

        async def request(item, wait=None):
            async with turns.turn("t", item):
                if wait is not None:
                    await wait.wait()
                return item

        first = asyncio.create_task(request("first", held))
        second, third = asyncio.create_task(request("second")), asyncio.create_task(request("third"))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        assert len(turns.queue) == 1
        first.cancel()
        assert await third == "third"
        # Cancelled in the moment its turn comes: the turn goes on to the next.
        first = asyncio.create_task(request("a", held))
        second, third = asyncio.create_task(request("b")), asyncio.create_task(request("c"))
        await asyncio.sleep(0)
        held.set()
        await first
        second.cancel()
        assert await asyncio.wait_for(third, 1) == "c"
        assert (turns.running, len(turns.queue)) == (0, 0)

    asyncio.run(main())


def test_a_full_queue_refuses_and_forgets_the_refused():
    async def main():
        turns = Turns(1, FairQueue(per_tenant=1, total=1, assured=0))
        held = asyncio.Event()

        async def request(item):
            async with turns.turn("t", item):
                await held.wait()

        running = [asyncio.create_task(request(item)) for item in ("a", "b")]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await request("c")
        assert (turns.running, len(turns.queue)) == (1, 1)
        held.set()
        await asyncio.gather(*running)
        assert (turns.running, len(turns.queue)) == (0, 0)

    asyncio.run(main())
