"""A run that is killed again and again ends with what an uninterrupted run gives, bit for bit."""

from __future__ import annotations

import collections
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorchestra.adapter.adapter import Adapter
from lorchestra.pipeline.cache import Step, StepCache, outputs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

KILLS = 20
WORDS = ("fever", "cough", "pain", "rash", "nausea", "swelling", "fatigue", "headache", "dizzy", "cramps")


def write_data(directory):
    chance = random.Random(0)
    for name in ("general", "clinic"):
        with (directory / f"{name}.jsonl").open("w") as out:
            for i in range(60):
                ask = f"{name} {i}: {chance.choice(WORDS)} {chance.choice(WORDS)}?"
                out.write(json.dumps({"prompt": ask, "completion": f"{'Yes' if i % 2 else 'No'}, {name}."}) + "\n")
    with (directory / "pairs.jsonl").open("w") as out:
        for i in range(60):
            out.write(json.dumps({"prompt": f"pair {i}: {chance.choice(WORDS)}?", "chosen": "Noted.",
                                  "rejected": "lol ok"}) + "\n")  # fmt: skip


def recipe(tiny_dir):
    """Dropout, accumulation, a curriculum, early stopping, the best checkpoint: all that a resume must restore."""
    return {
        "name": "killed",
        "base": str(tiny_dir),
        "dtype": "float32",
        "device": "cpu",
        "max_length": 96,
        "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "train": {
            "max_steps": 20, "batch_size": 4, "learning_rate": 5e-3, "checkpoint_every": 2, "eval_every": 5,
            "eval_limit": 6,
        },
        "stages": [
            {"name": "general", "data": "general.jsonl", "train": {"gradient_accumulation": 2}},
            {
                "name": "clinic", "data": "clinic.jsonl", "context": {"general": 1.0},
                "lora": {"orthogonality": {"mode": "projection", "against_context": True}},
                "train": {"learning_rate": 2.0, "eval_every": 2, "patience": 1, "scheduler": "constant"},
            },
            {
                "name": "preference", "task": "dpo", "data": "pairs.jsonl",
                "context": {"general": {"weight": 1.0, "schedule": "cosine", "to": 0.5}, "clinic": 1.0},
            },
        ],
        "fusion": {"candidates": 8, "validation_limit": 4},
        "evaluate": {"test_limit": 6, "samples": 2, "sample_tokens": 4, "mixed_baseline": True},
    }  # fmt: skip


class Runs:
    """The warm process, and one place where runs of one recipe are carried out."""

    def __init__(self, tmp_path: Path, values: dict, data: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_runs.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.server.stdout.readline() == "ready\n"
        self.tmp_path, self.values, self.data = tmp_path, values, data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait(timeout=60)

    def go(self, place: str, **death) -> bool:
        """One run in ``place``; whether it came to its end."""
        order = {
            "recipe": self.values, "data": str(self.data), "directory": str(self.run_dir(place)),
            "home": str(self.home(place)), "result": str(self.tmp_path / f"{place}.json"), **death,
        }  # fmt: skip
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        assert answer["killed"] or answer["code"] == 0, "a run must end well, or be killed; its traceback is above"
        return not answer["killed"]

    def home(self, place: str) -> Path:
        return self.tmp_path / place / "home"

    def run_dir(self, place: str) -> Path:
        return self.tmp_path / place / "run"

    def outcome(self, place: str) -> dict:
        """Everything that must not depend on how often a run was killed."""
        report = json.loads((self.run_dir(place) / "report.json").read_text())
        rows = ("name", "digest", "history", "validation", "best_step", "stopped_early", "tokens")
        return {
            **json.loads((self.tmp_path / f"{place}.json").read_text()),
            "evaluation": report["evaluation"],
            "verdict": report["verdict"],
            "search": report["search"],
            "samples": report["samples"],
            "stages": [{key: stage[key] for key in rows} for stage in report["stages"]],
            "final": outputs(self.run_dir(place) / "final" / "model"),
        }


@pytest.fixture
def runs(tmp_path, tiny_dir):
    write_data(tmp_path)
    with Runs(tmp_path, recipe(tiny_dir), tmp_path) as found:
        yield found


def assert_nothing_is_half_there(runs, place, whole):
    """Whatever stands under a final name is complete; ``whole`` is the outcome of an uninterrupted run."""
    steps = runs.home(place) / "steps"
    for directory in steps.iterdir() if steps.exists() else []:
        if directory.is_dir() and not directory.name.endswith(".work"):
            note = json.loads((directory / "done.json").read_text())
            StepCache(steps).verify(Step(directory, note["info"], note["digest"], cached=True))
            assert set(outputs(directory)) == {*note["outputs"], "done.json"}, "a finished step holds what it noted"
    final = runs.run_dir(place) / "final"
    if (final / "adapter").exists():
        assert Adapter.load(final / "adapter").digest == whole["digests"]["fused"]
    if (final / "model").exists():
        assert outputs(final / "model") == whole["final"]
    for path in [*runs.run_dir(place).glob("*.json"), *runs.home(place).glob("fingerprints/*.json")]:
        json.loads(path.read_text())
    if (runs.run_dir(place) / "report.html").exists():
        assert (runs.run_dir(place) / "report.html").read_text().rstrip().endswith("</html>")


def assert_tidy(runs, place):
    names = [p.name for root in (runs.home(place), runs.run_dir(place)) for p in root.rglob("*")]
    left = [name for name in names if any(mark in name for mark in (".work", "partial", ".old", "scratch", "trash"))]
    assert not left, "nothing unfinished is left behind"
    lines = (runs.run_dir(place) / "events.jsonl").read_text().splitlines()
    assert all(json.loads(line)["event"] for line in lines)


def doing(runs, place):
    """What a kill interrupted, from the journal: the open task, or what came before."""
    journal = runs.run_dir(place) / "events.jsonl"
    tasks, before = [], "the start"
    for line in journal.read_text().splitlines() if journal.exists() else []:
        event = json.loads(line)
        if event["event"] == "run":
            tasks, before = [], "the start"
        elif event["event"] == "begin":
            tasks.append(event["name"])
        elif event["event"] == "end":
            tasks.remove(event["name"])
        elif event["event"] == "step":
            before = event["name"]
    return tasks[0] if tasks else f"after {before}"


def killed_until_done(runs, place, whole, death, struck):
    """Run, kill, look, run again …; returns how many kills it took."""
    for attempt in range(400):
        if runs.go(place, **death(attempt)):
            return attempt
        struck[doing(runs, place)] += 1
        assert_nothing_is_half_there(runs, place, whole)
    raise AssertionError("400 attempts did not bring the run to its end")


def test_killed_at_random_moments(runs, capsys):
    started = time.monotonic()
    assert runs.go("whole")
    duration = time.monotonic() - started
    whole = runs.outcome("whole")

    assert [stage["stopped_early"] for stage in whole["stages"]] == [False, True, False]
    assert any(stage["best_step"] < stage["history"][-1]["step"] for stage in whole["stages"])
    kills, struck, seed = 0, collections.Counter(), 0
    while kills < KILLS:
        chance, place = random.Random(seed), f"killed-{seed}"

        def death(attempt, chance=chance):
            # Growing, so that a machine that is busier than it was during the whole run still gets to the end.
            return {"seconds": chance.uniform(0.05, 0.4) * duration * 1.02**attempt}

        kills += killed_until_done(runs, place, whole, death, struck)
        assert runs.outcome(place) == whole
        assert_tidy(runs, place)
        seed += 1
    with capsys.disabled():
        print(f"\n{kills} kills at random moments in {seed} runs of {duration:.1f} s: {dict(struck.most_common())}")


def test_killed_just_before_any_change_of_the_file_system(runs, capsys):
    """Renames, removals, writes: a kill in the gap before each of a random few hundred."""
    assert runs.go("whole")
    whole = runs.outcome("whole")
    chance, struck = random.Random(7), collections.Counter()
    kills = killed_until_done(runs, "killed", whole, lambda attempt: {"events": chance.randint(1, 90)}, struck)
    assert kills >= KILLS
    assert runs.outcome("killed") == whole
    assert_tidy(runs, "killed")
    with capsys.disabled():
        print(f"\n{kills} kills at changes of the file system: {dict(struck.most_common())}")
