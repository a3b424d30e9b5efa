"""The text side of the embedded engine: calls in, OpenAI's choices out, tokens in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol, cast

from lorchestra.serve.embedded.formats import Chats, Completions, Format
from lorchestra.serve.embedded.generation import Finish, Generation, Produced, Sampling, TokenEngine
from lorchestra.serve.embedded.prompts import Prompt, Prompts, text_of
from lorchestra.serve.embedded.sampled import refuse_unable, sampling
from lorchestra.serve.embedded.vocabulary import Vocabulary
from lorchestra.serve.embedded.writing import Piece, Placed, Writer, placed_prompt
from lorchestra.serve.engine import Answer, Call, Chunk, RequestError, Served, StoppingError, Usage
from lorchestra.serve.wire import ChatRequest, CompletionRequest, check_defaults, with_defaults

MOST_SEQUENCES = 2048  # prompts times choices of one request
_INT64 = 2**63


class AdapterTokens(TokenEngine, Protocol):
    """A token engine with its adapters, as :class:`~lorchestra.serve.engine.Engine` has them."""

    @property
    def ready(self) -> bool: ...

    async def start(self) -> None: ...

    async def stop(self, grace: float) -> None: ...

    async def load(self, adapter: Served) -> None: ...

    async def unload(self, adapter: Served) -> None: ...

    def resident(self) -> Sequence[str]: ...

    async def features(self, prompt: tuple[int, ...], layers: int, last: bool) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class _Plan:
    """A call, ready to run: its sequences in the order of their choices."""

    generations: tuple[Generation, ...]
    prompts: tuple[Prompt, ...]
    stops: tuple[str, ...]
    echo: bool
    format: Format
    prompt_tokens: int


@dataclass(frozen=True)
class _Part:
    """A piece of choice ``index``, and tokens that were generated for all choices so far."""

    index: int
    piece: Piece
    generated: int


class TextEngine:
    """An :class:`~lorchestra.serve.engine.Engine` on a token engine.

    Args:
        tokens: generates.
        tokenizer: of the base (transformers); its chat template holds where an adapter has none of its own.
        end_ids: tokens that end an answer, of the model's generation config; the tokenizer's eos is one anyway.
        rows: of the model's output; token ids are below it and below the tokenizer's size.
    """

    def __init__(
        self, tokens: AdapterTokens, tokenizer: Any, end_ids: Sequence[int] = (), rows: int | None = None
    ) -> None:
        self._tokens = tokens
        self._vocabulary = Vocabulary(tokenizer)
        self._size = min(self._vocabulary.size, rows or self._vocabulary.size)
        self._prompts = Prompts(tokenizer, self._vocabulary, self._size, tokens.max_length)
        eos = tokenizer.eos_token_id
        self._ends = frozenset((*end_ids, *(() if eos is None else (eos,))))
        # One thread: a tokenizer is not made for two, and the event loop goes on meanwhile.
        self._thread = ThreadPoolExecutor(1, "lorchestra-prompts")
        self._numbers = count()

    @property
    def ready(self) -> bool:
        return self._tokens.ready

    async def start(self) -> None:
        await self._tokens.start()

    async def stop(self, grace: float) -> None:
        await self._tokens.stop(grace)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def load(self, adapter: Served) -> None:
        check_defaults(adapter.defaults, adapter.name)
        await self._off_loop(self._prompts.check, adapter)
        await self._tokens.load(adapter)

    async def unload(self, adapter: Served) -> None:
        await self._tokens.unload(adapter)

    def resident(self) -> Sequence[str]:
        return self._tokens.resident()

    async def features(self, body: CompletionRequest | ChatRequest, layers: int, last: bool) -> Sequence[float]:
        refuse_unable(body)
        if isinstance(body, ChatRequest):
            prompt: Prompt = await self._off_loop(self._prompts.chat, body, None)
            blank = not any(text_of(message).strip() for message in body.messages)
        else:
            items = _items(body)
            if len(items) > 1:
                raise RequestError(
                    f"prompt: {len(items)} prompts at once; {body.model!r} chooses for one prompt, so send each as a "
                    "request of its own",
                    "prompt",
                )
            prompt = await self._off_loop(self._prompts.completion, items[0], "prompt")
            blank = not prompt.text.strip()
        return () if blank else await self._tokens.features(prompt.ids, layers, last)

    async def answer(self, call: Call) -> Answer:
        plan = await self._planned(call)
        texts = [prompt.text if plan.echo else "" for prompt in plan.prompts]
        tokens: list[list[Placed]] = [[] for _ in plan.prompts]
        ends: list[Finish | None] = [None] * len(plan.prompts)
        generated = 0
        async with aclosing(self._run(plan)) as parts:
            async for part in parts:
                texts[part.index] += part.piece.text
                tokens[part.index] += part.piece.tokens
                ends[part.index] = part.piece.finish
                generated = part.generated
        choices = [plan.format.whole(i, texts[i], tokens[i], ends[i]) for i in range(len(texts))]
        return Answer(choices, Usage(plan.prompt_tokens, generated))

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        plan = await self._planned(call)
        opened: set[int] = set()
        async with aclosing(self._run(plan)) as parts:
            async for part in parts:
                usage, text = Usage(plan.prompt_tokens, part.generated), part.piece.text
                if part.index not in opened:
                    opened.add(part.index)
                    opening = plan.format.opening(part.index)
                    if opening is not None:
                        yield Chunk((opening,), usage)
                    text = plan.prompts[part.index].text + text if plan.echo else text
                choice = plan.format.part(part.index, text, part.piece.tokens, part.piece.finish)
                yield Chunk((choice,), usage)

    async def _planned(self, call: Call) -> _Plan:
        if not self.ready:
            raise StoppingError("the engine is starting or stopping; try again in a while")
        body, adapter = call.body, call.target.single
        refuse_unable(body)
        # Each prompt is a job of its own: those of others come in between.
        if isinstance(body, ChatRequest):
            prompts = [await self._off_loop(self._prompts.chat, body, adapter)]
        else:
            items = _items(body)
            places = [f"prompt.{i}" if len(items) > 1 else "prompt" for i in range(len(items))]
            prompts = [
                await self._off_loop(self._prompts.completion, item, place)
                for item, place in zip(items, places, strict=True)
            ]
        plan: _Plan = await self._off_loop(self._plan, call, prompts)
        return plan

    def _plan(self, call: Call, prompts: Sequence[Prompt]) -> _Plan:
        body, adapter = call.body, call.target.single
        filled = with_defaults(body, adapter.defaults, adapter.name) if adapter is not None else body
        ends = self._ends
        if isinstance(body, ChatRequest):
            ends |= self._prompts.ends(adapter)
        generations = []
        for prompt in prompts:
            asked = sampling(filled, body.most_tokens, len(prompt.ids), self._tokens.max_length, ends, self._size)
            for choice in range(body.choices):
                own = replace(asked, seed=_seed(asked, choice))
                name = f"{call.id}/{next(self._numbers)}"
                who = call.target
                generations.append(Generation(name, call.tenant, prompt.ids, who.members, own, who.layers))
        kind = Chats if isinstance(body, ChatRequest) else Completions
        texts: Format = kind(self._vocabulary, generations[0].sampling.logprobs)
        return _Plan(
            tuple(generations),
            tuple(prompt for prompt in prompts for _ in range(body.choices)),
            filled.stops,
            isinstance(body, CompletionRequest) and bool(body.echo),
            texts,
            sum(len(prompt.ids) for prompt in prompts),
        )

    async def _run(self, plan: _Plan) -> AsyncGenerator[_Part, None]:
        """Pieces of all choices as they come; each choice has at least one, and its last one says why it ended."""
        counts = [0] * len(plan.generations)
        if len(plan.generations) == 1:
            async with aclosing(self._sequence(plan, 0)) as pieces:
                async for piece, counts[0] in pieces:
                    yield _Part(0, piece, counts[0])
            return
        queue: asyncio.Queue[tuple[int, Piece, int] | BaseException | None] = asyncio.Queue()

        async def follow(index: int) -> None:
            try:
                async with aclosing(self._sequence(plan, index)) as pieces:
                    async for piece, made in pieces:
                        queue.put_nowait((index, piece, made))
            except Exception as error:  # raised again below, in the one who reads
                queue.put_nowait(error)
            else:
                queue.put_nowait(None)

        tasks = [asyncio.create_task(follow(index)) for index in range(len(plan.generations))]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                    continue
                index, piece, counts[index] = item
                yield _Part(index, piece, sum(counts))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _sequence(self, plan: _Plan, index: int) -> AsyncGenerator[tuple[Piece, int], None]:
        """Pieces of one choice, and tokens that it has."""
        generation, prompt = plan.generations[index], plan.prompts[index]
        start = len(prompt.text) if plan.echo else 0
        writer = Writer(self._vocabulary, plan.stops, generation.sampling.min_tokens, start)
        opening: tuple[Placed, ...] = ()
        # A generator in all but the contract's name: closing it frees the slot.
        steps = cast("Any", self._tokens.generate(generation))
        async with aclosing(steps):
            async for produced in steps:
                step: Produced = produced
                if step.prompt:
                    opening = placed_prompt(self._vocabulary, step.prompt, prompt.hidden)
                piece = writer.add(step)
                if piece.text or piece.finish is not None or opening:
                    yield replace(piece, tokens=(*opening, *piece.tokens)), writer.count
                    opening = ()
                if piece.finish is not None:
                    return
        raise StoppingError("the engine ended without finishing the answer; try again")

    async def _off_loop(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


def _items(request: CompletionRequest) -> Sequence[str | Sequence[int]]:
    """The prompts of a request.

    Raises:
        RequestError: too many, with as many choices.
    """
    given = request.prompt
    one = isinstance(given, str) or isinstance(given[0], int)
    items = cast("list[str | list[int]]", [given] if one else given)
    if len(items) * request.choices > MOST_SEQUENCES:
        raise RequestError(
            f"n: {len(items)} prompts with {request.choices} choices each are more than {MOST_SEQUENCES}; "
            "send fewer at once",
            "n",
        )
    return items


def _seed(asked: Sampling, choice: int) -> int | None:
    """Of a choice, 64 bits."""
    return None if asked.seed is None else (asked.seed + choice + _INT64) % (2 * _INT64) - _INT64
