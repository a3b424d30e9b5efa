"""Whole sweeps of the tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lorchestra.errors import RecipeError, UserError
from lorchestra.evaluate.ledger import Ledger
from lorchestra.sweep.execute import run_sweep
from lorchestra.sweep.worker import Worker

TIMES = ("seconds", "created")


def told(result):
    return json.loads((result.directory / "sweep.json").read_text(encoding="utf-8"))


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def test_a_sweep_and_the_same_again(make_spec, tmp_path):
    spec = make_spec(axes={"lora.rank": [1, 2]}, seeds=2)
    first = run_sweep(spec, directory=tmp_path / "first")
    assert [row.settings for row in first.rows] == [{"lora.rank": 1}, {"lora.rank": 2}]
    assert all((row.runs, row.done) == (2, 2) for row in first.rows)
    assert first.start is not None
    assert first.start.metric == "accuracy"
    assert first.readings == 4, "four trainings were judged"
    again = run_sweep(spec, directory=tmp_path / "again")
    assert told(again)["cells"] == told(first)["cells"], "times included: nothing was trained anew"
    assert again.readings == 4
    written = told(first)
    assert written["cells_in_all"] == len(written["cells"]) == 4
    json.dumps(written, allow_nan=False)
    assert first.page.read_text(encoding="utf-8").startswith("<!doctype html>")
    events = [json.loads(line) for line in (first.directory / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "cell" for event in events) == 4
    assert any(event["event"] == "train_step" for event in events)


def test_advice_is_given_for_each_condition_of_the_data(make_spec, tmp_path):
    result = run_sweep(make_spec(axes={"lora.rank": [1, 2], "data.noise": [0, 0.4]}), directory=tmp_path / "s")
    assert [data for data, _ in result.advice] == [{"data.noise": 0}, {"data.noise": 0.4}]
    for data, found in result.advice:
        assert found.row is None or found.row.settings["data.noise"] == data["data.noise"]


@pytest.mark.slow
def test_tuned_keys_are_chosen_by_validation_with_the_first_seed(make_spec, tmp_path):
    rates = [1e-9, 1e-2, 1e30]
    spec = make_spec(axes={"lora.rank": [1, 2]}, tune={"train.learning_rate": rates}, seeds=[3, 4])
    result = run_sweep(spec, directory=tmp_path / "s")
    assert len(Ledger.here().path.read_text().splitlines()) == 4, "what was tried did not read the test"
    tried = {}
    for rank in (1, 2):
        one = make_spec(axes={"lora.rank": [rank], "train.learning_rate": rates}, seeds=[3])
        found = run_sweep(one, directory=tmp_path / f"r{rank}").outcomes
        tried[rank] = min((o for o in found if o.state == "done"), key=lambda o: o.validation_loss)
    kept = {json.loads(key)["lora.rank"]: values for key, values in result.tuned.items()}
    for rank, best in tried.items():
        assert kept[rank]["train.learning_rate"] == best.settings["train.learning_rate"]
    assert {(o.seed, o.learning_rate) for o in result.outcomes} == {
        (seed, best.learning_rate) for seed in (3, 4) for best in tried.values()
    }
    assert not [path for path in Worker(spec).cache.root.glob("stage-*") if path.suffix == ""], "no adapter is left"


@pytest.mark.slow
def test_a_setting_keeps_a_value_although_others_are_better(make_spec, tmp_path):
    spec = make_spec(
        axes={"train.batch_size": [2, 32]}, tune={"train.learning_rate": [1e-3, 1e-2]}, halving={"first": 0.3}
    )
    result = run_sweep(spec, directory=tmp_path / "s")
    assert len(result.tuned) == 2


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_of_what_was_stopped_or_diverged_no_checkpoint_is_left(make_spec, tmp_path, jobs):
    rates = [1e-9, 3e-3, 1e-2, 1e30]
    spec = make_spec(axes={"train.learning_rate": rates}, halving={"first": 0.5, "reduction": 2}, seeds=2)
    result = run_sweep(spec, directory=tmp_path / "s", jobs=jobs)
    assert {outcome.state for outcome in result.outcomes} == {"done", "stopped", "diverged"}
    left = [
        path.name for path in Worker(spec).cache.root.iterdir() if path.is_dir() and not path.name.startswith("cell-")
    ]
    assert {name.split("-")[0] for name in left} == {"rung", "start"}
    assert not [name for name in left if name.endswith(".work")]
    again = run_sweep(spec, directory=tmp_path / "s")
    assert told(again)["cells"] == told(result)["cells"]
    events = [json.loads(line) for line in (result.directory / "events.jsonl").read_text().splitlines()]
    first, second = (
        i for i, event in enumerate(events) if event.get("name") == "sweep s" and event["event"] == "begin"
    )
    assert not [event for event in events[second:] if event["event"] == "train_step"], "nothing was trained anew"
    if jobs == 1:  # steps of other processes are not among the events
        assert [event for event in events[first:second] if event["event"] == "train_step"]


@pytest.mark.slow
@pytest.mark.parametrize("halving", [None, {"first": 0.4}])
def test_a_sweep_that_is_killed_at_any_moment_comes_to_the_same(
    make_spec, recipe, tmp_path, monkeypatch, threads, halving
):
    threads(1)
    values = {"axes": {"lora.rank": [1, 2, 3]}, "tune": {"train.learning_rate": [1e-3, 1e-2]}, "halving": halving}
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "undisturbed"))
    spec = make_spec(seeds=2, **values)
    whole = told(run_sweep(spec, directory=tmp_path / "whole"))
    specification = {"recipe": "recipe.yaml", "name": "s", "seeds": 2, "test_limit": 6, **values}
    (recipe.parent / "s.yaml").write_text(json.dumps(specification), encoding="utf-8")
    command = [sys.executable, "-m", "lorchestra", "sweep", str(recipe.parent / "s.yaml"), "-o", str(tmp_path / "out")]
    environment = os.environ | {"LORCHESTRA_HOME": str(tmp_path / "killed"), "OMP_NUM_THREADS": "1"}
    steps = tmp_path / "killed" / "steps"
    for seen in (1, 3, 4, 7):  # killed with that many things in the cache, wherever that is
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if steps.is_dir() and len([path for path in steps.iterdir() if path.is_dir()]) >= seen:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        process.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
    for key in ("cells", "tuned", "advice"):
        assert timeless(written[key]) == timeless(whole[key]), key


def test_folds(make_spec, tmp_path):
    result = run_sweep(make_spec(folds=3, test_limit=None), directory=tmp_path / "s")
    assert [outcome.fold for outcome in result.outcomes] == [0, 1, 2]
    (row,) = result.rows
    assert row.test is not None
    assert sum(len(outcome.test.values) for outcome in result.outcomes) == 90, "every example is tested once"
    assert "90 test examples" in result.advice[0][1].rests_on
    assert result.start is None


def test_how_many_folds_is_asked_of_all_examples(make_spec, tmp_path):
    """90 before the split, of which 54 are trained on: below 200 it is ten folds, whatever a part of them would be."""
    said = []

    class Said:
        def task(self, name, total=None, unit="it"):
            from lorchestra.events import SILENT

            return SILENT.task(name, total, unit)

        def event(self, kind, /, **fields):
            return None

        def say(self, text):
            said.append(text)

    spec = make_spec(folds="auto", set={"train.max_steps": 1})
    assert run_sweep(spec, directory=tmp_path / "s", reporter=Said()).folds == 10
    assert any(line.startswith("folds: 10 folds (90 examples:") for line in said)


def test_a_learning_rate_that_explodes_is_never_recommended(make_spec, tmp_path):
    spec = make_spec(axes={"train.learning_rate": [1e-2, 1e30]}, seeds=2)
    result = run_sweep(spec, directory=tmp_path / "s")
    sound, exploded = result.rows
    assert (exploded.diverged, exploded.worse, exploded.validation, exploded.test) == (2, 2, None, None)
    ((_, advice),) = result.advice
    assert advice.row == sound
    alone = run_sweep(make_spec(axes={"train.learning_rate": [1e30]}), directory=tmp_path / "alone")
    assert alone.advice[0][1].row is None
    json.dumps(told(alone), allow_nan=False)


def test_a_preference_stage(make_spec, recipe, tmp_path):
    with (recipe.parent / "pairs.jsonl").open("w") as out:
        for k in range(40):
            out.write(json.dumps({"prompt": f"{k * 7919 % 1000}?", "chosen": "Noted.", "rejected": "lol"}) + "\n")
    text = recipe.read_text() + "  - {name: pairs, task: dpo, data: pairs.jsonl, context: {earlier: 1.0}}\n"
    recipe.write_text(text, encoding="utf-8")
    result = run_sweep(make_spec(stage="pairs", axes={"lora.rank": [1]}), directory=tmp_path / "s")
    assert result.rows[0].metric == "preference_accuracy"
    with pytest.raises(UserError, match="'pairs' has a context"):
        run_sweep(make_spec(stage="pairs", folds=2), directory=tmp_path / "f")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"axes": {"lora.rnk": [1]}}, ["axes: lora.rnk: unknown key 'rnk'", "did you mean 'rank'"]),
        ({"axes": {"lora.rank": [-1]}}, ["axes: lora.rank: expected at least 1", "-1"]),
        ({"axes": {"max_length": [2]}}, ["axes: max_length: expected at least 8"]),
        ({"set": {"rank": 4}}, ["set: rank: unknown key 'rank' here; it belongs under lora"]),
        ({"tune": {"stages.colours.train.epochs": [0]}}, ["tune: stages.1.train.epochs: expected more than 0"]),
        ({"axes": {"stages.colors.lora.rank": [1]}}, ["axes: stages.colors.lora.rank: there is no 'colors'"]),
        ({"axes": {"stages": {"colours": 1}}}, ["axes: stages"]),
        ({"stage": "colors"}, ["no stage 'colors'", "earlier, colours", "did you mean 'colours'"]),
        ({"recipe": "no.yaml"}, ["there is no recipe"]),
        ({"set": {"stages.colors.lora.rank": 2}}, ["colors", "did you mean 'colours'"]),
        ({"axes": {"base": ["./nowhere"]}}, ["nowhere"]),
    ],
)
def test_mistakes_are_told_before_anything_is_fetched_or_written(make_spec, tmp_path, values, words):
    with pytest.raises(UserError) as found:
        run_sweep(make_spec(**values), directory=tmp_path / "s")
    for word in words:
        assert word in str(found.value)
    assert "--set" not in str(found.value)
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "home").exists()


def test_mistakes_in_what_was_read_are_told_before_anything_is_trained(make_spec, tmp_path):
    with pytest.raises(UserError, match="5000"):
        run_sweep(make_spec(axes={"data.size": [5, 5000]}), directory=tmp_path / "s")
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        run_sweep(make_spec(axes={"lora.target_modules": [["q_prj"]]}), directory=tmp_path / "s")
    assert not list((tmp_path / "home").glob("steps/*"))
