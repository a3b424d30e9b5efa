"""The misrouting harness: a real server under traffic that comes, goes, loads, evicts and changes its adapters.

    python -m tests.serve.misrouting --minutes 10 --out benchmarks/results/misrouting.json

57 adapters on the tiny model, with memory for about a third of them, each tenant with a key of its own. Requests come
at random: completions and chats, whole and streamed, greedy and sampled, mixtures, scored prompts, clients that leave
before the first token or in the midst of an answer. Meanwhile an operator unloads adapters and loads others under the
same names. Every answer is looked at:

- Each token's log-probability, and those of the alternatives, are those of a float64 model with just these adapters
  merged, asked alone and without a cache, within ``TOLERANCE``.
- A greedy token is the likeliest there; one that is less likely by no more than ``TOLERANCE`` counts as rounding.
- A name that changed its weights while a request was under way may answer with either; one that was not there for a
  time may be 404 in that time alone.

At the end the server must be idle, answer all 57 at once, and hold no more threads, file handles and memory than
before.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
from tests.serve.real_server import RealServer, Reference, make_adapter, make_base, make_keys, serving

TOLERANCE = 1e-3  # nats; float32 on a model this small is within about 1e-5
APART = 0.1  # nats that any two adapters differ by, at some token after each of the prompts
RANKS = (2, 4, 8, 12)
BIAS = {0: -100.0, 1: -100.0, 3: -100.0}  # special tokens, which a random model likes as well as any
END = 2
MEMORY = "0.8MB"  # of adapters that take 30 to 59 kB each
GROWTH = 24 * 2**20  # bytes that the server may grow by between the second quarter of the time and the last
Members = tuple[tuple[str, float], ...]


class MismatchError(AssertionError):
    """An answer that is not of the adapters it was asked of."""


@dataclass
class Period:
    """A version of an adapter under a name: from when it was asked for to when it was gone."""

    version: str
    asked: float
    served: float = float("inf")
    leaving: float = float("inf")
    gone: float = float("inf")


@dataclass
class Outcome:
    """What came of it."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    largest: float = 0.0  # difference of a log-probability
    tokens: int = 0
    figures: dict[str, Any] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "problems": self.problems[:20],
            "requests": dict(sorted(self.counts.items())),
            "tokens_checked": self.tokens,
            "largest_logprob_difference": self.largest,
            "tolerance": TOLERANCE,
            **self.figures,
        }


def check(
    reference: Reference,
    members: Members,
    prompt: Sequence[int],
    answer: Sequence[tuple[str, float | None, Mapping[str, float]]],
    greedy: bool,
    finish: str | None = None,
    bias: Mapping[int, float] = BIAS,
) -> float:
    """Whether an answer is of these adapters.

    Args:
        reference: says what they say.
        members: adapters with coefficients.
        prompt: ids before it.
        answer: its tokens as shown, with log-probabilities, and alternatives.
        greedy: whether each is the likeliest.
        finish: ``stop`` where the end of the turn came next.
        bias: of the request.

    Returns:
        the largest difference of a log-probability.

    Raises:
        MismatchError: it is not.
    """
    ids = reference.ids([token for token, _, _ in answer])
    exact = reference.logprobs(members, [*prompt, *ids], bias)[len(prompt) - 1 :]
    largest = 0.0
    for i, (token, (_, logprob, top)) in enumerate(zip(ids, answer, strict=True)):
        told = dict(zip(reference.ids(list(top)), top.values(), strict=True)) | {token: logprob}
        for other, value in told.items():
            largest = max(largest, abs(value - float(exact[i, other])))
        if largest > TOLERANCE:
            raise MismatchError(f"token {i}: log-probabilities differ by {largest:.4g}")
        if greedy and float(exact[i].max() - exact[i, token]) > TOLERANCE:
            raise MismatchError(f"token {i} is not the likeliest")
    if greedy and finish == "stop" and float(exact[len(ids)].max() - exact[len(ids), END]) > TOLERANCE:
        raise MismatchError("it ended where the end of the turn is not the likeliest")
    return largest


class Traffic:
    """Everything that is asked of one server.

    Args:
        url: of it.
        secrets: keys.
        reference: what is right.
        versions: name → versions of it, as the reference calls them; the first is served at the beginning.
        places: version → its directory.
        seed: of everything random.
    """

    def __init__(
        self,
        url: str,
        secrets: Mapping[str, str],
        reference: Reference,
        versions: Mapping[str, Sequence[str]],
        places: Mapping[str, Path],
        seed: int,
    ) -> None:
        self.outcome = Outcome()
        self._url, self._secrets, self._reference = url, secrets, reference
        self._versions, self._places = versions, places
        self._judges = ThreadPoolExecutor(1)  # beside the event loop, so that clients read at once
        self._random = random.Random(seed)
        self._names = list(versions)
        self._shares = [1 / (rank + 1) for rank in range(len(self._names))]  # Zipf's, exponent 1
        begin = float("-inf")
        self._periods = {name: [Period(of[0], begin, begin)] for name, of in versions.items()}
        text = "".join(self._random.choice("abcdefgh ijkl\n发热?") for _ in range(400))
        self._prompts = [text[start : start + length] for start, length in zip(range(24), itertools.cycle(
            (1, 2, 5, 9, 17, 30, 64, 110, 250)))]  # fmt: skip

    async def run(self, seconds: float, rate: float, changes: float) -> None:
        """``rate`` requests a second for a time, and an adapter that changes every ``changes`` seconds."""
        async with self._client() as client:
            ending = asyncio.Event()
            operator = asyncio.create_task(self._operate(client, changes, ending))
            running: set[asyncio.Task[None]] = set()
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                await asyncio.sleep(self._random.expovariate(rate))
                if len(running) < 96:
                    task = asyncio.create_task(self._one(client))
                    running.add(task)
                    task.add_done_callback(running.discard)
            ending.set()
            await operator
            if running:
                await asyncio.wait(running, timeout=600)
            if running:
                self.outcome.problems.append(f"{len(running)} requests had no answer after 600 seconds")

    async def everyone(self) -> None:
        """All adapters at once."""
        async with self._client() as client:
            await asyncio.gather(
                *(self._ask(client, "everyone", ((name, 1.0),), name, stream=i % 2 == 0)
                  for i, name in enumerate(self._names))
            )  # fmt: skip

    async def page(self) -> str:
        """The server's metrics."""
        async with self._client() as client:
            return (await client.get("/metrics", headers=self._headers("operator"))).text

    def _client(self) -> httpx2.AsyncClient:
        # A connection for each request: one that is kept may be closed by the server just when it is used again.
        limits = httpx2.Limits(max_connections=256, max_keepalive_connections=0)
        return httpx2.AsyncClient(base_url=self._url, timeout=600, limits=limits)

    def _headers(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._secrets[tenant]}"}

    async def _one(self, client: httpx2.AsyncClient) -> None:
        draw = self._random
        kind = draw.choices(
            ("whole", "stream", "leaves", "leaves early", "mixture", "base", "chat", "sampled", "scored"),
            (30, 25, 12, 6, 9, 4, 5, 5, 4),
        )[0]
        name = draw.choices(self._names, self._shares)[0]
        members: Members = ((name, 1.0),)
        if kind == "mixture":
            chosen = draw.sample(self._names, draw.choice((2, 3)))
            members = tuple((other, draw.choice((0.5, 0.3, -0.4, 1.0))) for other in chosen)
        elif kind == "base":
            members = ()
        tenant = "operator" if kind == "mixture" else name
        await self._ask(client, kind, members, tenant, stream=kind in ("stream", "leaves"))

    async def _ask(self, client: httpx2.AsyncClient, kind: str, members: Members, tenant: str, stream: bool) -> None:
        draw = self._random
        prompt = draw.choice(self._prompts)
        body: dict[str, Any] = {
            "model": "+".join(f"{name}={c}" for name, c in members) if kind == "mixture" else
                     members[0][0] if members else "base",
            "max_tokens": draw.randint(1, 40), "temperature": 0,
            "logit_bias": {str(i): value for i, value in BIAS.items()}, "stream": stream,
        }  # fmt: skip
        path = "/v1/completions"
        if kind == "chat":
            path = "/v1/chat/completions"
            turns = [{"role": "user", "content": prompt}]
            body |= {"messages": turns, "logprobs": True, "top_logprobs": 2}
            text = self._reference.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = self._reference.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self._reference.tokenizer(prompt)["input_ids"]
            body |= {"prompt": draw.choice((prompt, ids)), "logprobs": 2}
        if kind == "sampled":
            body |= {"temperature": 1.0, "seed": draw.randint(0, 99), "n": 2, "top_p": draw.choice((1.0, 0.9))}
        elif kind == "scored":
            body |= {"max_tokens": 0, "echo": True}
        began = time.monotonic()
        try:
            if kind == "leaves early":
                with suppress(httpx2.TimeoutException):
                    await client.post(path, json=body, headers=self._headers(tenant), timeout=draw.uniform(0, 0.05))
                self.outcome.counts[kind] += 1
                return
            if stream:
                parts = draw.randint(1, 12) if kind == "leaves" else None
                status, choices = await self._streamed(client, path, body, tenant, parts)
            else:
                answer = await client.post(path, json=body, headers=self._headers(tenant))
                status = answer.status_code
                choices = answer.json()["choices"] if status == 200 else answer.text
            judged = (kind, members, ids, body, status, choices, began, time.monotonic())
            await asyncio.get_running_loop().run_in_executor(self._judges, self._judge, *judged)
        except Exception as error:
            self.outcome.problems.append(f"{kind} {body['model']}: {type(error).__name__}: {error}")

    async def _streamed(
        self, client: httpx2.AsyncClient, path: str, body: Mapping[str, Any], tenant: str, parts: int | None
    ) -> tuple[int, Any]:
        """Status, and the one choice put together; after ``parts`` events the client leaves."""
        tokens: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        finish, seen, ended = None, 0, False
        async with client.stream("POST", path, json=body, headers=self._headers(tenant)) as answer:
            if answer.status_code != 200:
                return answer.status_code, (await answer.aread()).decode()
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    raise AssertionError(f"the stream said {event['error']}")
                for choice in event["choices"]:
                    for key, values in tokens.items():
                        values += choice["logprobs"][key]
                    finish = choice["finish_reason"] or finish
                seen += 1
                if seen == parts:
                    break
        if parts is None and not (ended and finish):
            raise AssertionError("the stream was cut")
        return 200, [{"logprobs": tokens, "finish_reason": finish}]

    def _judge(
        self,
        kind: str,
        members: Members,
        ids: Sequence[int],
        body: Mapping[str, Any],
        status: int,
        choices: Any,
        began: float,
        ended: float,
    ) -> None:
        self.outcome.counts[f"{kind} {status}"] += 1
        possible = [self._possible(name, began, ended) for name, _ in members]
        if status == 404 and any(None in versions for versions in possible):
            return
        if status != 200:
            raise AssertionError(f"HTTP {status}: {choices}")
        for choice in choices:
            answer = _tokens(choice["logprobs"])
            prompt = list(ids)
            if kind == "scored":
                if self._reference.ids([token for token, _, _ in answer]) != prompt:
                    raise AssertionError("the echo is not the prompt")
                prompt, answer = prompt[:1], answer[1:]
            elif body["stream"] is False and choice["finish_reason"] == "length" and len(answer) != body["max_tokens"]:
                raise AssertionError(f"{len(answer)} tokens of {body['max_tokens']}")
            self._compare(members, possible, prompt, answer, kind, body, choice["finish_reason"])

    def _compare(
        self,
        members: Members,
        possible: Sequence[set[str | None]],
        prompt: Sequence[int],
        answer: Sequence[tuple[str, float | None, Mapping[str, float]]],
        kind: str,
        body: Mapping[str, Any],
        finish: str | None,
    ) -> None:
        said = "no version was served"
        greedy = body["temperature"] == 0 and kind != "scored"
        for versions in itertools.product(*([v for v in some if v is not None] for some in possible)):
            own = tuple((version, c) for version, (_, c) in zip(versions, members, strict=True))
            try:
                largest = check(self._reference, own, prompt, answer, greedy, finish)
            except MismatchError as error:
                said = str(error)
                continue
            self.outcome.largest = max(self.outcome.largest, largest)
            self.outcome.tokens += len(answer)
            return
        raise MismatchError(f"{said}; {len(prompt)} prompt tokens, {dict(body)}")

    def _possible(self, name: str, began: float, ended: float) -> set[str | None]:
        """Versions of ``name`` that a request of that time may have met; ``None``: that it was not there."""
        periods = self._periods[name]
        out: set[str | None] = {p.version for p in periods if p.asked <= ended and p.gone >= began}
        pairs = zip(periods, [*periods[1:], Period("", float("inf"))], strict=True)
        if any(before.leaving <= ended and after.served >= began for before, after in pairs):
            out.add(None)
        return out

    async def _operate(self, client: httpx2.AsyncClient, every: float, ending: asyncio.Event) -> None:
        """Unload an adapter and load another under its name, again and again; what is begun is finished."""
        changing = [name for name, versions in self._versions.items() if len(versions) > 1][:8]  # the busiest
        while not ending.is_set():
            await asyncio.sleep(self._random.expovariate(1 / every))
            name = self._random.choice(changing)
            before = self._periods[name][-1]
            other = self._random.choice([v for v in self._versions[name] if v != before.version])
            before.leaving = time.monotonic()
            await self._operated(client, "unload", {"lora_name": name})
            before.gone = time.monotonic()
            await asyncio.sleep(self._random.choice((0, 0.1, 0.5)))
            period = Period(other, time.monotonic())
            self._periods[name].append(period)
            await self._operated(client, "load", {"lora_name": name, "lora_path": str(self._places[other])})
            period.served = time.monotonic()
            self.outcome.counts["changes of an adapter"] += 1

    async def _operated(self, client: httpx2.AsyncClient, verb: str, body: Mapping[str, str]) -> None:
        headers, path = self._headers("operator"), f"/v1/{verb}_lora_adapter"
        try:
            answer = await client.post(path, json=body, headers=headers)
            if answer.status_code != 200:
                self.outcome.problems.append(f"{verb} {body}: {answer.status_code} {answer.text}")
        except httpx2.HTTPError as error:
            self.outcome.problems.append(f"{verb} {body}: {type(error).__name__}: {error}")


def _tokens(told: Mapping[str, Any]) -> list[tuple[str, float | None, Mapping[str, float]]]:
    if "content" in told:
        return [
            (entry["token"], entry["logprob"], {top["token"]: top["logprob"] for top in entry["top_logprobs"]})
            for entry in told["content"]
        ]
    return list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True))


def told_apart(reference: Reference, versions: Sequence[str], prompt: Sequence[int]) -> float:
    """The least that any two of them differ by, in a log-probability after some token of ``prompt``."""
    said = torch.stack([reference.logprobs(((version, 1.0),), prompt, {}) for version in versions]).flatten(1)
    distances = torch.cdist(said, said, p=float("inf"))
    return float(distances.fill_diagonal_(float("inf")).min())


def counted(page: str, name: str) -> float:
    """The sum of a metric's series."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines()
               if line.startswith((f"{name} ", f"{name}{{")))  # fmt: skip


async def drive(traffic: Traffic, server: RealServer, seconds: float, rate: float, changes: float) -> None:
    """Traffic for a time, and what is left of it afterwards."""
    outcome, processes = traffic.outcome, [server.process, *server.process.children(recursive=True)]

    def held() -> tuple[int, int]:
        return sum(one.num_threads() for one in processes), sum(one.num_fds() for one in processes)

    await traffic.everyone()
    await asyncio.sleep(6)  # uvicorn lets go of idle connections after 5
    before = held()
    memory: list[int] = []

    async def watch() -> None:
        while True:
            memory.append(sum(one.memory_info().rss for one in processes))
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    await traffic.run(seconds, rate, changes)
    watching.cancel()
    for _ in range(100):
        page = await traffic.page()
        if counted(page, "lorchestra_requests_in_flight") == 0:
            break
        await asyncio.sleep(0.1)
    else:
        outcome.problems.append("requests are in flight after all clients have gone")
    await traffic.everyone()
    for _ in range(20):
        await asyncio.sleep(1)
        after = held()
        if after[0] <= before[0] + 1 and after[1] <= before[1] + 2:
            break
    else:
        outcome.problems.append(f"threads and file handles: {before} before, {after} after")
    quarter = len(memory) // 4
    middle, late = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[3 * quarter :])
    if late - middle > GROWTH:
        outcome.problems.append(f"memory grew from {middle / 2**20:.0f} to {late / 2**20:.0f} MB")
    page = await traffic.page()
    loads, evictions = (counted(page, f"lorchestra_adapter_{what}_total") for what in ("loads", "evictions"))
    resident = counted(page, "lorchestra_adapters_resident")
    if not evictions or not resident < len(traffic._names):
        outcome.problems.append(f"nothing was evicted ({resident:.0f} adapters in memory): this tested nothing")
    outcome.figures |= {
        "loads": loads, "evictions": evictions, "adapters_in_memory": resident,
        "threads_and_file_handles": {"before": before, "after": after},
        "resident_mb": {"second_quarter": round(middle / 2**20, 1), "last_quarter": round(late / 2**20, 1)},
    }  # fmt: skip


def harness(
    place: Path, seconds: float, rate: float = 25.0, seed: int = 0, adapters: int = 57, more: Sequence[str] = ()
) -> Outcome:
    """All of it, in the directory ``place``; ``more`` words for the server's command line."""
    names = [f"tenant-{i:02d}" for i in range(adapters)]
    versions = {
        name: [f"{name}.{version}" for version in range(3 if i % 3 == 0 else 1)] for i, name in enumerate(names)
    }
    made, places = {}, {}
    for i, version in enumerate(itertools.chain(*versions.values())):
        made[version], places[version] = make_adapter(i, RANKS[i % len(RANKS)]), place / "adapters" / version
        made[version].save(places[version])
    reference = Reference(made)
    apart = min(told_apart(reference, list(made), prompt) for prompt in ([9], [70, 71, 72]))
    if apart < APART:
        raise AssertionError(f"two adapters differ by {apart:.3g} only: they cannot be told apart")
    secrets = make_keys(place / "keys.yaml", {name: [name] for name in names})
    words = [f"--adapter={name}={places[of[0]]}" for name, of in versions.items()]
    words += ["--name", "base", "--keys", str(place / "keys.yaml"), "--memory", MEMORY, "--max-batch", "24"]
    words += [
        "--enable-load",
        "--lora-root",
        str(place / "adapters"),
        "--request-log",
        str(place / "requests.log"),
        *more,
    ]
    began = time.monotonic()
    with serving(make_base(place / "model"), place, *words) as server:
        traffic = Traffic(server.url, secrets, reference, versions, places, seed)
        asyncio.run(drive(traffic, server, seconds, rate, changes=0.5))
        if server.process.poll() is not None:
            traffic.outcome.problems.append("the server ended")
        told = server.stderr.read_text(errors="replace")
        if "Traceback" in told:
            traffic.outcome.problems.append(f"the server's log has a traceback: {told[-3000:]}")
    traffic.outcome.figures |= {
        "seconds": round(time.monotonic() - began, 1),
        "adapters": adapters,
        "versions": len(made),
        "seed": seed,
        "server": list(more),
        "most_requests_per_second": rate,
        "least_difference_of_two_adapters": round(apart, 3),
    }
    return traffic.outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=25.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--with", dest="more", action="append", default=[], help="a word for the server, as --with=--kernel"
    )
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        outcome = harness(Path(place), 60 * given.minutes, given.rate, given.seed, more=given.more)
    text = json.dumps(outcome.report(), indent=2, ensure_ascii=False)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
