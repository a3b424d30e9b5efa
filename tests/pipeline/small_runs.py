"""A recipe of two stages that runs in a second or two on the tiny model, for what comes after a run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lorchestra.events import SILENT

WORDS = ("fever", "cough", "pain", "rash", "nausea", "swelling", "fatigue", "headache", "dizzy", "cramps")


def write_data(directory: Path) -> None:
    chance = random.Random(0)
    for name in ("general", "clinic"):
        with (directory / f"{name}.jsonl").open("w") as out:
            for i in range(40):
                ask = f"{name} {i}: {chance.choice(WORDS)} {chance.choice(WORDS)}?"
                out.write(json.dumps({"prompt": ask, "completion": f"{'Yes' if i % 2 else 'No'}, {name}."}) + "\n")


def small_recipe(base: Path, publish: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The values of a recipe; ``publish`` is its section, if it has one."""
    return {
        "name": "small",
        "base": str(base),
        "dtype": "float32",
        "device": "cpu",
        "max_length": 96,
        "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0},
        "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 5e-2},
        "stages": [
            {"name": "general", "data": "general.jsonl"},
            {
                "name": "clinic", "data": "clinic.jsonl",
                "context": {"general": {"weight": 1.0, "schedule": "linear", "to": 0.5}},
            },
        ],
        "fusion": {"weights": {"general": 0.25, "clinic": 1.0}},
        "evaluate": {"test_limit": 6, "samples": 0},
        "deliver": {"merged": False, **({} if publish is None else {"publish": publish})},
    } | changes  # fmt: skip


class Listening:
    """A reporter that keeps what was said, and tells ``on_event(kind, fields)`` of every event."""

    def __init__(self, on_event=lambda kind, fields: None) -> None:
        self.said: list[str] = []
        self.task = SILENT.task
        self.on_event = on_event

    def event(self, kind: str, /, **fields: Any) -> None:
        self.on_event(kind, fields)

    def say(self, text: str) -> None:
        self.said.append(text)
