"""A stage of the tiny model that learns three colours, and sweeps over it that take seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorchestra.sweep.outcome import HeldOut, Outcome
from lorchestra.sweep.spec import SweepSpec

RECIPE = """\
name: colours
base: {base}
dtype: float32
max_length: 64
split: {{train: 0.6, validation: 0.2, test: 0.2}}
lora: {{rank: 2, alpha: 4, dropout: 0}}
train: {{max_steps: 4, batch_size: 8, learning_rate: 0.01, eval_every: 2, checkpoint_every: 1, eval_limit: 6}}
stages:
  - name: earlier
    data: colours.jsonl
  - name: colours
    data:
      source: colours.jsonl
      fields: {{prompt: prompt, completion: completion, choices: choices}}
      group: patient
"""
COLOURS = ("red", "blue", "green")


def write_colours(directory: Path, base: Path, n: int = 90) -> Path:
    chance = random.Random(0)
    with (directory / "colours.jsonl").open("w", encoding="utf-8") as out:
        for k in range(n):
            colour = chance.choice(COLOURS)
            row = {"prompt": f"{colour[0]}{k * 7919 % 1000}", "completion": colour, "choices": COLOURS}
            out.write(json.dumps({**row, "patient": f"p{k // 2}"}) + "\n")
    path = directory / "recipe.yaml"
    path.write_text(RECIPE.format(base=base), encoding="utf-8")
    return path


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(n)``: torch's in this process, until the test ends. Sums of other threads have other last bits, so
    what is compared bit for bit with another process needs as many as that one has."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def recipe(tmp_path, tiny_dir) -> Path:
    return write_colours(tmp_path, tiny_dir)


@pytest.fixture
def make_spec(recipe) -> Callable[..., SweepSpec]:
    """``make_spec(seeds=1, …)``: a specification beside the recipe."""

    def make(**values: Any) -> SweepSpec:
        plain = {"recipe": "recipe.yaml", "name": "s", "axes": {"lora.rank": [2]}, "seeds": 1, "test_limit": 6}
        return SweepSpec.from_dict(plain | values, recipe.parent)

    return make


def make_test(values: tuple[float, ...]) -> HeldOut:
    n = len(values)
    return HeldOut("accuracy", values, (1.0,) * n, (1.0,) * n, (1.0,) * n, tuple(f"g{k}" for k in range(n)))


def make_outcome(loss: float | None = 1.0, **values: Any) -> Outcome:
    """A training of 12 steps in 3 epochs, validated after each, that ended with ``loss``."""
    rows = () if loss is None else ((0, 3.0), (4, loss + 0.2), (8, loss + 0.1), (12, loss))
    plain: dict[str, Any] = {
        "settings": {"lora.rank": 8}, "seed": 0, "fold": None, "state": "done", "step": 12, "steps": 12,
        "steps_per_epoch": 4, "examples": {"train": 100, "validation": 20, "test": 3}, "trainable": 800, "scale": 2.0,
        "learning_rate": 1e-3, "history": tuple((2.0 - k / 10, 1.0 + k / 10) for k in range(12)), "validation": rows,
        "best_step": 12, "seconds": 2.0, "tokens": 10, "test": make_test((1.0, 0.0, 1.0)), "adapter": "sha256:a",
        "digest": "d",
    }  # fmt: skip
    return Outcome(**(plain | values))


@pytest.fixture
def outcome() -> Callable[..., Outcome]:
    return make_outcome
