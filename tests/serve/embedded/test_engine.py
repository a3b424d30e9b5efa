"""The continuous engine, on both cores, against one request at a time on a merged model."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch
from tests.serve.embedded.worlds import GREEDY, World, adapter_for, collected, same

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, UserError
from lorchestra.serve.embedded.core import Limits, Setup
from lorchestra.serve.embedded.engine import Room
from lorchestra.serve.embedded.generation import Sampling
from lorchestra.serve.embedded.local import loaded
from lorchestra.serve.engine import OverloadedError, RequestError, Served, StoppingError

BATCH, WAIT = 8, 24  # sequences that run, and that one tenant may have waiting


@pytest.fixture(scope="module")
def apart(tiny_dir, tmp_path_factory):
    """One process for all tests of this file."""
    world = World(tiny_dir, tmp_path_factory.mktemp("adapters"), True, Room(WAIT, 30), max_batch=BATCH)
    yield world
    world.close()


@pytest.fixture
def here(tiny_dir, tmp_path):
    world = World(tiny_dir, tmp_path, False, Room(WAIT, 30), max_batch=BATCH)
    yield world
    world.close()


@pytest.fixture(params=["here", pytest.param("apart", marks=pytest.mark.slow)])
def world(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def make(tiny_dir, tmp_path):
    """``make(**options)``: a world in this process."""
    made = []

    def one(**options):
        made.append(World(tiny_dir, tmp_path, **options))
        return made[-1]

    yield one
    for world in made:
        world.close()


MEMBERS = ({}, {"a0": 1.0}, {"a1": 1.0}, {"a2": 1.0}, {"a3": 1.0}, {"a0": 0.5, "a3": -0.3}, {"a1": 0.7, "a2": 0.7})


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_that_of_the_merged_model_whoever_shares_the_batch(world, seed):
    draw = random.Random(seed)
    many = []
    for members in MEMBERS * 3:
        prompt = [draw.randrange(4, 260) for _ in range(draw.choice((1, 2, 17, 40, 130)))]
        sampling = Sampling(
            draw.choice((0, 1, 5, 30)),
            temperature=0,
            logprobs=draw.choice((None, 0, 3)),
            prompt_logprobs=draw.choice((None, 2)),
            logit_bias=draw.choice(({}, {7: 2.0, 9: -3.0})),
            frequency_penalty=draw.choice((0.0, 0.5)),
            stop_ids=frozenset(draw.sample(range(4, 260), 8)),
            min_tokens=draw.choice((0, 3)),
        )
        many.append(world.generation(members, prompt, sampling))

    async def work():
        async def later(generation):
            await asyncio.sleep(draw.random() * 0.3)
            return await collected(world.engine, generation)

        return await asyncio.gather(*map(later, many))

    found = world.run(work)
    for generation, result in zip(many, found, strict=True):
        same(result, asyncio.run(world.expected(generation)))
    assert world.holds_nothing()


def test_a_seed_gives_the_same_tokens_alone_and_among_others(world):
    hot = Sampling(12, temperature=1.3, top_p=0.9, seed=5, logprobs=0)
    prompt = range(4, 20)

    async def work():
        alone = await collected(world.engine, world.generation({"a1": 1.0}, prompt, hot))
        others = [world.generation({f"a{i % 4}": 1.0}, range(9 + i, 60), replace(hot, seed=i)) for i in range(9)]
        among = await asyncio.gather(
            *(collected(world.engine, one) for one in (*others, world.generation({"a1": 1.0}, prompt, hot)))
        )
        return alone, among[-1], among[0]

    alone, among, other = world.run(work)
    same(among, alone)
    assert [t.id for t in other[0]] != [t.id for t in alone[0]]


def test_long_prompts_are_read_in_chunks_while_others_decode(world):
    long = world.generation({"a0": 1.0}, [4 + i % 250 for i in range(480)], GREEDY)
    short = world.generation({"a1": 1.0}, range(4, 9), replace(GREEDY, max_tokens=40))

    async def work():
        order = []

        async def follow(name, generation):
            results = [], (), None
            async with aclosing(world.engine.generate(generation)) as steps:
                async for produced in steps:
                    order.append(name)
                    results = [*results[0], *produced.tokens], (), produced.finish
            return results

        first = asyncio.create_task(follow("short", short))
        while not order:
            await asyncio.sleep(0)
        return await asyncio.gather(first, follow("long", long)), order

    (shorts, longs), order = world.run(work)
    same(shorts, asyncio.run(world.expected(short)))
    same(longs, asyncio.run(world.expected(long)))
    assert order.count("short") == 40
    assert order.index("long") < 40  # it came while the short one went on


def test_a_prompt_that_fills_its_context_is_read_beside_others(make):
    world = make(max_length=267)
    one_more = replace(GREEDY, max_tokens=1)
    many = [world.generation({"a0": 1.0}, [4 + (7 * i) % 250 for i in range(n)], one_more) for n in (266, 12, 266, 265)]
    many.append(
        world.generation({}, [4 + i % 250 for i in range(267)], replace(GREEDY, max_tokens=0, prompt_logprobs=1))
    )

    async def work():
        return await asyncio.gather(*(collected(world.engine, one) for one in many))

    for generation, found in zip(many, world.run(work), strict=True):
        same(found, asyncio.run(world.expected(generation)))


def test_a_client_that_leaves_frees_what_it_held_and_the_others_do_not_notice(world):
    stays = world.generation({"a1": 1.0}, range(4, 30), replace(GREEDY, max_tokens=30))

    async def work():
        task = asyncio.create_task(collected(world.engine, stays))
        for i in range(12):
            leaving = world.generation({f"a{i % 4}": 1.0}, range(4, 40), replace(GREEDY, max_tokens=400))
            async with aclosing(world.engine.generate(leaving)) as steps:
                for _ in range(i % 3):
                    await anext(steps)
        return await task

    same(world.run(work), asyncio.run(world.expected(stays)))
    assert world.holds_nothing()


def test_concurrent_first_requests_load_once_and_a_full_memory_lets_the_oldest_go(make):
    world = make(adapter_memory=70_000)
    one = world.core._bank.factors("a1", world.adapters["a1"]).bytes
    assert one < 70_000 < 3 * one

    async def work():
        results = []
        for name in ("a1", "a2", "a1", "a0", "a1"):
            many = [world.generation({name: 1.0}, range(4, 10)) for _ in range(6)]
            results += zip(many, await asyncio.gather(*(collected(world.engine, g) for g in many)), strict=True)
        return results

    for generation, found in world.run(work):
        same(found, asyncio.run(world.expected(generation)))
    happened = [event for event in world.heard if event[0] != "waited"]
    assert happened.count(("loaded", "a1")) == happened.count(("evicted", "a1")) + 1
    assert ("evicted", "a1") in happened or ("evicted", "a2") in happened
    assert len([event for event in world.heard if event[0] == "waited"]) == 30


def test_little_cache_memory_makes_requests_wait_and_all_are_answered(make):
    world = make(cache_memory=1, max_batch=4)
    many = [world.generation({"a0": 1.0}, range(4, 8 + i), GREEDY) for i in range(5)]
    most = []

    async def work():
        async def watch():
            while True:
                most.append(len(world.core._scheduler._decoding))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        found = await asyncio.gather(*(collected(world.engine, one) for one in many))
        watching.cancel()
        return found

    for generation, found in zip(many, world.run(work), strict=True):
        same(found, asyncio.run(world.expected(generation)))
    assert max(most) == 1


def test_unloading_waits_for_those_who_use_it(world):
    async def work():
        steps = world.engine.generate(world.generation({"a1": 1.0}, range(4, 9), replace(GREEDY, max_tokens=60)))
        await anext(steps)
        unloading = asyncio.create_task(world.engine.unload(world.served["a1"]))
        await anext(steps)
        before = unloading.done(), list(world.engine.resident())
        async for _ in steps:
            pass
        await unloading
        return before, list(world.engine.resident())

    (done, resident), after = world.run(work)
    assert not done
    assert world.served["a1"].key in resident
    assert world.served["a1"].key not in after
    assert ("evicted", "a1") in world.heard


def test_an_adapter_that_cannot_be_served_is_its_own_requests_error_alone(world, tmp_path):
    good = world.generation({"a1": 1.0}, range(4, 12), replace(GREEDY, max_tokens=30))
    huge = adapter_for(world.model, 0, 4, size=1e30)
    foreign = Adapter({"model.layers.0.self_attn.q_proj": LowRank(torch.ones(5, 1), torch.ones(1, 7))})
    elsewhere = Adapter({"transformer.h.0.attn": LowRank(torch.ones(5, 1), torch.ones(1, 7))})
    messages = {"huge": "not finite", "foreign": "shape", "elsewhere": "does not have"}
    for name, adapter in {"huge": huge, "foreign": foreign, "elsewhere": elsewhere}.items():
        adapter.save(tmp_path / name)
        world.served[name] = Served(name, adapter.digest, tmp_path / name)

    async def work():
        task = asyncio.create_task(collected(world.engine, good))
        said = {}
        for name in messages:
            try:
                await collected(world.engine, world.generation({name: 1.0}, range(4, 9)))
            except Exception as error:
                said[name] = error
        scored = replace(GREEDY, max_tokens=0, prompt_logprobs=1)
        with pytest.raises(AdapterError, match="not finite"):
            await collected(world.engine, world.generation({"huge": 1.0}, range(4, 9), scored))
        return await task, said

    found, said = world.run(work)
    same(found, asyncio.run(world.expected(good)))
    for name, message in messages.items():
        assert message in str(said[name])
        assert isinstance(said[name], AdapterError), name
    assert world.holds_nothing()


def test_a_step_that_fails_tells_those_in_it_and_the_engine_goes_on(here, caplog):
    world = here
    decoder = world.core._scheduler._decoder
    whole = decoder.hidden_states

    def broken(*arguments):
        decoder.hidden_states = whole
        raise MemoryError

    async def work():
        decoder.hidden_states = broken
        with pytest.raises(StoppingError, match="MemoryError"):
            await collected(world.engine, world.generation({"a1": 1.0}, range(4, 9)))
        assert world.engine.ready
        return await collected(world.engine, world.generation({"a1": 1.0}, range(4, 9)))

    same(world.run(work), asyncio.run(world.expected(world.generation({"a1": 1.0}, range(4, 9)))))
    assert world.holds_nothing()


@pytest.mark.parametrize("where", ["_slots.begin", "_bank.put"])
def test_memory_that_is_missing_where_an_answer_begins_is_told_and_nothing_is_held(here, caplog, where):
    world = here
    holder, name = where.split(".")
    held = getattr(world.core._scheduler, holder)
    whole = getattr(held, name)

    def broken(*arguments):
        setattr(held, name, whole)
        raise MemoryError

    async def work():
        setattr(held, name, broken)
        with pytest.raises(StoppingError, match="MemoryError"):
            await collected(world.engine, world.generation({"a1": 1.0}, range(4, 9)))
        assert not world.core._scheduler.running
        assert not world.core._bank._where
        return await collected(world.engine, world.generation({"a1": 1.0}, range(4, 9)))

    same(world.run(work), asyncio.run(world.expected(world.generation({"a1": 1.0}, range(4, 9)))))
    assert world.holds_nothing()


def test_a_model_that_fails_every_step_is_not_ready(here, caplog):
    world = here

    def broken(*arguments):
        raise MemoryError

    async def work():
        world.core._scheduler._decoder.hidden_states = broken
        for _ in range(3):
            with pytest.raises(StoppingError):
                await collected(world.engine, world.generation({}, range(4, 9)))
        assert not world.engine.ready

    world.run(work)


@pytest.mark.parametrize("grace", [0, 60])
def test_stopping_answers_what_runs_and_cuts_what_takes_too_long(make, grace):
    world = make()

    async def work():
        generation = world.generation({}, range(4, 9), replace(GREEDY, max_tokens=300))
        task = asyncio.create_task(collected(world.engine, generation))
        while not world.core._scheduler._decoding:
            await asyncio.sleep(0.001)
        await world.engine.stop(grace)
        with pytest.raises(StoppingError):
            await collected(world.engine, world.generation({}, range(4, 9)))
        with pytest.raises(StoppingError):
            await world.engine.load(world.served["a0"])
        return await task

    if grace:
        tokens, _, finish = world.run(work)
        assert (len(tokens), finish) == (300, "length")
    else:
        with pytest.raises(StoppingError, match="stopped before"):
            world.run(work)
    assert world.holds_nothing()


def test_too_many_that_wait_are_refused_at_once_and_there_is_room_when_some_have_left(world):
    long = replace(GREEDY, max_tokens=400)

    async def work():
        running = [world.engine.generate(world.generation({}, range(4, 9), long)) for _ in range(BATCH)]
        for steps in running:
            await anext(steps)
        waiting = [
            asyncio.create_task(collected(world.engine, world.generation({"a0": 1.0}, range(4, 9))))
            for _ in range(WAIT)
        ]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match=f"{WAIT} requests of yours wait") as refused:
            await collected(world.engine, world.generation({}, range(4, 9)))
        others = [
            asyncio.create_task(collected(world.engine, world.generation({}, range(4, 9), tenant="other")))
            for _ in range(8)
        ]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="32 requests wait"):
            await collected(world.engine, world.generation({}, range(4, 9), tenant="other"))
        for steps in running:
            await steps.aclose()
        found = await asyncio.gather(*waiting, *others)
        return refused.value.retry_after, found, await collected(world.engine, world.generation({}, range(4, 9)))

    pause, found, after = world.run(work)
    assert 1 <= pause <= 60 * 2
    for mine, members in ((found[0], {"a0": 1.0}), (found[WAIT - 1], {"a0": 1.0}), (found[-1], {}), (after, {})):
        same(mine, asyncio.run(world.expected(world.generation(members, range(4, 9)))))
    assert world.holds_nothing()


def test_adapters_are_loaded_on_request_and_one_that_cannot_be_is_an_error(world, tmp_path):
    elsewhere = Adapter({"transformer.h.0.attn": LowRank(torch.ones(5, 1), torch.ones(1, 7))})
    elsewhere.save(tmp_path / "elsewhere")
    other = replace(world.served["a3"], name="elsewhere", digest=elsewhere.digest, directory=tmp_path / "elsewhere")

    async def work():
        await world.engine.unload(world.served["a3"])
        before = list(world.engine.resident())
        await asyncio.gather(*(world.engine.load(world.served["a3"]) for _ in range(5)))
        with pytest.raises(AdapterError, match="does not have"):
            await world.engine.load(other)
        return before, list(world.engine.resident())

    world.heard.clear()
    before, after = world.run(work)
    key = world.served["a3"].key
    assert key not in before
    assert key in after
    assert len(after) == len(set(after))
    assert world.heard.count(("loaded", "a3")) == 1
    assert world.holds_nothing()


def test_what_no_sequence_can_be(world):
    async def work():
        for prompt, many in (((), 3), (range(4, 104), 500)):
            with pytest.raises(RequestError):
                await collected(world.engine, world.generation({}, prompt, replace(GREEDY, max_tokens=many)))

    world.run(work)
    assert world.holds_nothing()


def test_what_no_limits_can_be(tiny_dir):
    for options in ({"max_batch": 0}, {"max_length": 0}, {"max_length": 513}):
        with pytest.raises(UserError, match="expected"):
            loaded(Setup(tiny_dir, device="cpu", dtype="float32", limits=Limits(**options)))
