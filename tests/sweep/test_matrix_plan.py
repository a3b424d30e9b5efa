"""A matrix's plan tells the truth: what it calls cached is reused, what it counts is trained, nothing is fetched."""

from __future__ import annotations

import json
import socket

import pytest
from tests.cli.conftest import lorchestra  # noqa: F401  (the fixture of the command line)
from tests.sweep.test_matrix import hospital, load, steps, write_examples  # noqa: F401

from lorchestra.errors import RecipeError
from lorchestra.pipeline.cache import SCRATCH
from lorchestra.pipeline.estimate import Machine
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.plan import plan
from lorchestra.recipe.recipe import Recipe
from lorchestra.sweep.matrix.execute import run_matrix
from lorchestra.sweep.matrix.plan import plan_matrix

MACHINE = Machine("cpu", "float32", 1e11, 1e10, 10**11)


def look(matrix):
    return plan_matrix(matrix, MACHINE)


def states(found):
    return {row.name: row.state for row in found.departments}


def shared(found):
    return {step.name: step.state for step in found.plan.steps[: found.shared]}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a plan must not use the network; it connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


def test_before_the_run_and_after_it(hospital, tmp_path):  # noqa: F811
    rows = ["icu,rows/d0.jsonl,3,", "er,rows/d1.jsonl,,5"]
    matrix = load(hospital(2, "name,data,lora.rank,max_steps", *rows))
    before = look(matrix)
    assert shared(before) == {"base": "here", "data:general": "here", "data": "each run", "general": "to do"}
    assert states(before) == {"icu": "to do", "er": "to do"}
    assert [row.digest for row in before.departments] == ["", ""], "both rest on a stage that is not there"
    assert not list((tmp_path / "home").glob("steps/*")), "nothing was done"
    done = run_matrix(matrix, directory=tmp_path / "run")
    for row, outcome in zip(before.departments, done.outcomes, strict=True):
        assert row.outlook.examples == outcome.examples
        assert (row.outlook.steps, row.outlook.trainable, row.outlook.rank) == (
            outcome.steps, outcome.trainable, outcome.rank,
        )  # fmt: skip
        assert row.seconds > 0
        assert row.memory > 0
    after = look(matrix)
    assert shared(after)["general"] == "cached"
    assert states(after) == {"icu": "cached", "er": "cached"}
    made = {json.loads(path.read_text())["digest"] for path in steps(tmp_path / "home", "department")}
    assert {row.digest for row in after.departments} == made, "the very steps that the run made"
    assert [row.seconds for row in after.departments] == [0.0, 0.0]
    assert all(step.finished for step in after.plan.steps)
    assert [row.memory for row in after.departments] == [None, None]


def test_what_a_run_of_one_department_trained_is_not_trained_again(hospital, tmp_path):  # noqa: F811
    """What is left is to sum and to judge it."""
    matrix = load(hospital(2))
    run(Recipe.load(tmp_path / "recipe.yaml", ["stages.clinic.data=rows/d0.jsonl"]), directory=tmp_path / "alone")
    found = look(matrix)
    assert states(found) == {"Ward-0.x": "trained", "Ward-1.x": "to do"}
    trained, other = found.departments
    assert 0 < trained.seconds < other.seconds
    before = len(steps(tmp_path / "home", "stage"))
    run_matrix(matrix, directory=tmp_path / "run")
    assert len(steps(tmp_path / "home", "stage")) == before + 1


def test_a_changed_row_and_a_new_one(hospital, tmp_path):  # noqa: F811
    table = hospital(3)
    run_matrix(load(table), directory=tmp_path / "run")
    write_examples(tmp_path / "rows/d1.jsonl", "other")
    table.write_text(table.read_text() + "twin,rows/d0.jsonl\nfresh,rows/d2.jsonl\n")
    found = look(load(table))
    assert states(found) == {
        "Ward-0.x": "cached", "Ward-1.x": "to do", "Ward-2.x": "cached", "twin": "trained", "fresh": "trained",
    }  # fmt: skip
    assert set(states(look(load(table, "stages.general.max_steps=3"))).values()) == {"to do"}


def test_two_rows_of_one_training_cost_it_once(hospital):  # noqa: F811
    first, twin = look(
        load(hospital(1, "name,data", "a,rows/d0.jsonl", "b,rows/d0.jsonl"), "stages.clinic.context=[]")
    ).departments
    assert twin.note == "trained once for both, with a"
    assert 0 < twin.seconds < first.seconds


def test_one_that_was_stopped_goes_on(hospital, tmp_path, monkeypatch):  # noqa: F811
    matrix = load(hospital(1), "stages.clinic.train.checkpoint_every=1", "stages.clinic.max_steps=4")
    from lorchestra.train.loop import Loop

    step = Loop._step

    def stop(self, number):
        if self.name == "clinic" and number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Loop, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_matrix(matrix, directory=tmp_path / "run")
    assert list((tmp_path / "home/steps").glob(f"stage-*.work/{SCRATCH}/step-*"))
    (row,) = look(matrix).departments
    assert (row.state, row.note) == ("begun", "goes on after step 3 of 4")


def test_rows_that_a_run_could_not_deliver_are_told_and_the_others_planned(hospital, tmp_path):  # noqa: F811
    rows = ["good,rows/d0.jsonl,", "broken,rows/broken.jsonl,", "few,rows/few.jsonl,", "odd,rows/d1.jsonl,[q_prj]"]
    table = hospital(2, "name,data,lora.target_modules", *rows)
    (tmp_path / "rows/broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    write_examples(tmp_path / "rows/few.jsonl", "few", 2)
    matrix = load(table)
    found = look(matrix)
    assert found.failed == ("broken", "few", "odd")
    result = run_matrix(matrix, directory=tmp_path / "run")
    assert result.failed == found.failed
    assert [row.note for row in found.departments] == [outcome.reason for outcome in result.outcomes]


def test_one_that_diverged_is_told_as_a_run_tells_it(hospital, tmp_path):  # noqa: F811
    header, row = "name,data,learning_rate,train.max_grad_norm", "wild,rows/d0.jsonl,1.0e+30,0"
    matrix = load(hospital(1, header, row), "train.scheduler=constant", "train.max_steps=6")
    result = run_matrix(matrix, directory=tmp_path / "run")
    (planned,) = look(matrix).departments
    assert (planned.state, planned.note) == ("diverged", result.outcomes[0].reason)


def test_what_is_not_here_is_named_and_not_fetched(hospital, no_network):  # noqa: F811
    rows = ["near,rows/d0.jsonl", "far,hf:ward/far@main/train.jsonl"]
    table = hospital(1, "name,data", *rows)
    found = look(load(table))
    assert states(found) == {"near": "to do", "far": "to fetch"}
    assert "'hf:ward/far@main/train.jsonl' has not been fetched yet" in found.departments[1].note
    assert found.plan.seconds > 0
    assert any("1 department to be fetched first" in note for note in found.plan.notes)
    nothing = look(load(table, "base=hf:some/base"))
    assert states(nothing) == {"near": "to do", "far": "to fetch"}
    near = nothing.departments[0]
    known = found.departments[0].outlook
    assert (near.seconds, near.outlook.examples, near.outlook.rank) == (None, known.examples, 2)
    assert nothing.plan.seconds is None


def test_what_stands_for_the_environment_stays_as_it_is_written(hospital, tmp_path, monkeypatch, no_network):  # noqa: F811
    monkeypatch.setenv("LORCHESTRA_ORG", "secretive")
    matrix = load(hospital(1, "name,data", "far,'hf:${LORCHESTRA_ORG}/far@main/train.jsonl'".replace("'", "")))
    told = json.dumps(look(matrix).as_dict())
    assert "secretive" not in told
    assert "${LORCHESTRA_ORG}" in told
    remote = Recipe.load(
        tmp_path / "recipe.yaml", ["base=hf:${LORCHESTRA_ORG}/base", "stages.clinic.data=general.jsonl"]
    )
    assert "secretive" not in json.dumps(plan(remote, MACHINE).as_dict())


def test_the_shared_part_is_refused_as_a_run_refuses_it(hospital, tmp_path):  # noqa: F811
    matrix = load(hospital(1), "lora.target_modules=[q_prj]")
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        look(matrix)


def test_the_command(hospital, lorchestra, tmp_path):  # noqa: F811
    table = hospital(2)
    told = lorchestra("plan", "recipe.yaml", "--matrix", table)
    assert told.code == 0, told.err
    lines = told.out.splitlines()
    (heading,) = [line for line in lines if line.startswith("department")]
    assert heading.split() == [
        "department",
        "state",
        "examples",
        "rank",
        "steps",
        "trainable",
        "time",
        "memory",
        "remarks",
    ]
    (row,) = [line for line in lines if line.startswith("Ward-1.x  ")]
    assert row.split()[1:3] == ["to", "do"]
    assert " GB" in row
    assert "warning" in row
    assert "to go" in told.out
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "home/steps").exists()
    lorchestra("run", "recipe.yaml", "--matrix", table)
    told = lorchestra("plan", "recipe.yaml", "--matrix", table)
    assert "to go" not in told.out
    assert "Every step is cached" in told.out
    found = json.loads(lorchestra("plan", "recipe.yaml", "--matrix", table, "--json").out)
    assert {name: row["state"] for name, row in found["departments"].items()} == {
        "Ward-0.x": "cached", "Ward-1.x": "cached",
    }  # fmt: skip
    assert [step["name"] for step in found["steps"]] == ["base", "data:general", "data", "general"]
    (tmp_path / "rows/d1.jsonl").write_text("{oops\n")
    told = lorchestra("plan", "recipe.yaml", "--matrix", table)
    assert told.code == 1
    assert "d1.jsonl:1" in told.out
    table.write_text("name,data,lora.rnk\nicu,rows/d0.jsonl,1\n")
    lorchestra("plan", "recipe.yaml", "--matrix", table).refused("did you mean 'lora.rank'?")
