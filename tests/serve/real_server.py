"""``lorchestra serve`` as a process of its own on the tiny model, and what a merged model says in float64."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from torch.func import functional_call

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.registry.access import add_key
from lorchestra.serve.embedded.vocabulary import Vocabulary

PATHS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
START = 600.0  # seconds that a server may take to come up on a busy machine


def make_base(directory: Path) -> Path:
    """The tiny model as a model directory."""
    make_tiny_model().save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


def make_adapter(seed: int, rank: int, size: float = 0.25) -> Adapter:
    """For the tiny model; it changes what that says a great deal."""
    noise, modules = torch.Generator().manual_seed(seed), {}
    for path, module in make_tiny_model().named_modules():
        if path.endswith(PATHS):
            m, n = module.weight.shape
            B, A = torch.randn(m, rank, generator=noise), torch.randn(rank, n, generator=noise)
            modules[path] = LowRank(size * B / rank**0.5, A)
    return Adapter(modules)


@dataclass(frozen=True)
class RealServer:
    """A server that answers.

    Args:
        url: of it.
        process: that it is.
        stderr: file that it writes to.
    """

    url: str
    process: psutil.Popen
    stderr: Path


@contextmanager
def serving(base: Path, place: Path, *arguments: str, threads: int = 1) -> Iterator[RealServer]:
    """``lorchestra serve base …`` on a free port, until the block ends; its standard error lies in ``place``."""
    place.mkdir(parents=True, exist_ok=True)
    told = place / "stderr.txt"
    words = [sys.executable, "-m", "lorchestra", "serve", str(base), "--port", "0", "--engine", "embedded"]
    words += ["--device", "cpu", "--dtype", "float32", *arguments]
    with told.open("wb") as stderr:
        process = psutil.Popen(
            words,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**dict(psutil.Process().environ()), "OMP_NUM_THREADS": str(threads)},
        )
    try:
        yield RealServer(_address(process, told), process, told)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: psutil.Popen, told: Path) -> str:
    until = time.monotonic() + START
    while time.monotonic() < until:
        for line in told.read_text(errors="replace").splitlines():
            if line.startswith("ready at "):
                return line.removeprefix("ready at ").removesuffix("/v1").strip()
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"the server did not come up: {told.read_text(errors='replace')[-2000:]}")


def make_keys(file: Path, tenants: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A file of keys, one for each tenant and its adapters, and an operator's; name → secret."""
    secrets = {name: add_key(file, name, adapters=list(adapters)) for name, adapters in tenants.items()}
    return secrets | {"operator": add_key(file, "operator", adapters="all", role="operator")}


class Reference:
    """What the base with a weighted sum of adapters merged into it says, in float64, without any cache.

    Args:
        adapters: name → adapter.
    """

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._model = make_tiny_model().double()
        self._adapters = dict(adapters)
        self._weights = lru_cache(maxsize=256)(self._sum)
        self.tokenizer = make_tiny_tokenizer()
        vocabulary = Vocabulary(self.tokenizer)
        self._ids = {vocabulary.shown(i): i for i in range(vocabulary.size)}
        assert len(self._ids) == vocabulary.size

    def ids(self, shown: Sequence[str]) -> list[int]:
        """Of tokens, as an answer shows them."""
        return [self._ids[token] for token in shown]

    @torch.no_grad()
    def logprobs(
        self, members: Sequence[tuple[str, float]], ids: Sequence[int], bias: Mapping[int, float]
    ) -> torch.Tensor:
        """``[len(ids), V]``: after each token, of the next one."""
        weights = self._weights(tuple(members))
        logits = functional_call(self._model, weights, (torch.tensor([list(ids)]),)).logits[0]
        for token, value in bias.items():
            logits[:, token] += value
        return torch.log_softmax(logits, -1)

    def _sum(self, members: tuple[tuple[str, float], ...]) -> dict[str, torch.Tensor]:
        weights = dict(self._model.named_parameters())
        for name, coefficient in members:
            for path, update in self._adapters[name].modules.items():
                key = f"{path}.weight"
                weights[key] = weights[key] + coefficient * (update.B.double() @ update.A.double())
        return weights
