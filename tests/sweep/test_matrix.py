"""Many departments on the tiny model: shared stages once, every department exact, mistakes told beforehand."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import lorchestra  # noqa: F401  (the fixture of the command line)

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import RecipeError
from lorchestra.pipeline.execute import run
from lorchestra.recipe.recipe import Recipe
from lorchestra.sweep.matrix.execute import run_matrix
from lorchestra.sweep.matrix.outcome import Outcome, judged, remarks
from lorchestra.sweep.matrix.rows import Matrix

RECIPE = """\
name: hospital
base: {base}
dtype: float32
max_length: 96
split: {{train: 0.6, validation: 0.2, test: 0.2}}
lora: {{rank: 2, alpha: 4, dropout: 0}}
train: {{max_steps: 2, batch_size: 4, learning_rate: 5.0e-3}}
seeds: {{init: 3, data: 1}}
stages:
  - name: general
    data: general.jsonl
  - name: clinic
    data: anything.jsonl
    context: {{general: {{weight: 1.0, schedule: linear, to: 0.5}}}}
fusion: {{weights: last}}
evaluate: {{test_limit: 6}}
"""
WORDS = ["fever", "cough", "pain", "rash", "nausea", "swelling", "fatigue", "headache", "dizzy", "cramps"]


def write_examples(path: Path, name: str, count: int = 40) -> None:
    chance = random.Random(name)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        for i in range(count):
            ask = f"{name} {i}: {chance.choice(WORDS)} {chance.choice(WORDS)}?"
            out.write(json.dumps({"prompt": ask, "completion": f"{'Yes' if i % 2 else 'No'}, {name}."}) + "\n")


@pytest.fixture
def hospital(tmp_path, tiny_dir):
    """``hospital(n)`` writes a recipe, n departments' examples and their table; it returns the table."""

    def write(count: int = 3, header: str = "name,data", *rows: str) -> Path:
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=tiny_dir))
        write_examples(tmp_path / "general.jsonl", "general")
        for k in range(count):
            write_examples(tmp_path / "rows" / f"d{k}.jsonl", f"ward {k}")
        table = tmp_path / "departments.csv"
        lines = rows or [f"Ward-{k}.x,rows/d{k}.jsonl" for k in range(count)]
        table.write_text("\n".join([header, *lines, ""]))
        return table

    return write


def load(table: Path, *overrides: str) -> Matrix:
    return Matrix.load(table, table.parent / "recipe.yaml", overrides)


def refused(table: Path) -> str:
    with pytest.raises(RecipeError) as error:
        load(table)
    return str(error.value)


def steps(home: Path, kind: str) -> list[Path]:
    """Markers of finished steps; one that was killed between its marker and its rename is not yet one."""
    found = home.glob(f"steps/{kind}-*/done.json")
    return sorted(marker for marker in found if marker.parent.suffix != ".work")


def events(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


def trained(directory: Path) -> list[str]:
    """What was trained in this process, in order."""
    return [e["name"] for e in events(directory) if e["event"] == "begin" and e["name"].startswith("train ")]


def check_exact(delivered: Path, parents: dict[str, Path]) -> None:
    """The delivered adapter is Σ λ·ΔW of its lineage's parents, every ΔW formed densely in float64."""
    adapter = Adapter.load(delivered)
    known = {Adapter.load(path).digest: path for path in parents.values()}
    sums: dict[str, torch.Tensor] = {}
    for parent in adapter.lineage.parents:
        for path, update in Adapter.load(known[parent.digest]).modules.items():
            dense = parent.coefficient * (update.B.double() @ update.A.double())
            sums[path] = sums.get(path, torch.zeros_like(dense)) + dense
    assert adapter.modules.keys() == sums.keys()
    for path, update in adapter.modules.items():
        assert sums[path].norm() > 0
        torch.testing.assert_close(update.B.double() @ update.A.double(), sums[path], rtol=1e-5, atol=1e-9)


def stage_adapters(home: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent / "adapter" for path in steps(home, "stage")}


def check_matrix(result, directory: Path, home: Path, count: int) -> None:
    assert result.failed == ()
    assert len(steps(home, "stage")) == count + 1, "the shared stage once, and one stage a department"
    told = json.loads((directory / "departments.json").read_text())
    assert list(told["departments"]) == [outcome.name for outcome in result.outcomes]
    assert len({found["digest"] for found in told["departments"].values()}) == count
    parents = stage_adapters(home)
    for name, found in told["departments"].items():
        delivered = directory / found["adapter"]
        adapter = Adapter.load(delivered)
        assert adapter.digest == found["digest"]
        assert adapter.lineage.name == name
        assert {p.name: p.coefficient for p in adapter.lineage.parents} == {"general": 0.5, "clinic": 1.0}
        assert adapter.lineage.parents[0].digest == told["shared"]["general"]
        assert adapter.base.weights == told["base"]["weights"]
        assert adapter.lineage.data == found["data"]
        assert adapter.lineage.metrics["nll"]["delivered"]["estimate"] > 0
        check_exact(delivered, parents)
    page = (directory / "departments.html").read_text()
    for outcome in result.outcomes:
        assert outcome.name in page


def test_every_department_is_delivered_exactly_and_the_shared_stage_trained_once(hospital, tmp_path):
    table = hospital(3)
    result = run_matrix(load(table), directory=tmp_path / "run")
    check_matrix(result, tmp_path / "run", tmp_path / "home", 3)
    assert trained(tmp_path / "run") == ["train general", "train clinic", "train clinic", "train clinic"]
    assert Adapter.load(tmp_path / "run" / "adapters" / "general").digest == result.shared["general"]
    again = run_matrix(load(table), directory=tmp_path / "again")
    assert trained(tmp_path / "again") == []
    assert all(outcome.cached for outcome in again.outcomes)
    keep = ("created",)
    one, two = (json.loads((tmp_path / d / "departments.json").read_text()) for d in ("run", "again"))
    assert {k: v for k, v in one.items() if k not in keep} == {k: v for k, v in two.items() if k not in keep}
    assert all(outcome.readings == 1 for outcome in again.outcomes), "a reused judgement reads nothing anew"


@pytest.mark.slow
def test_57_departments(hospital, tmp_path):
    table = hospital(57)
    result = run_matrix(load(table), directory=tmp_path / "run")
    check_matrix(result, tmp_path / "run", tmp_path / "home", 57)
    assert trained(tmp_path / "run").count("train general") == 1
    assert trained(tmp_path / "run").count("train clinic") == 57


def test_a_department_is_what_a_run_of_its_recipe_makes(hospital, tmp_path, monkeypatch):
    header, row = "name,data,lora.rank,max_steps,context.general", "icu,rows/d0.jsonl,3,4,0.7"
    table = hospital(1, header, row)
    matrix = load(table)
    result = run_matrix(matrix, directory=tmp_path / "matrix")
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "other"))  # nothing is taken from the cache
    settings = ["data=rows/d0.jsonl", "lora.rank=3", "max_steps=4", "context.general=0.7"]
    recipe = Recipe.load(tmp_path / "recipe.yaml", [f"stages.clinic.{text}" for text in settings])
    alone = run(recipe, directory=tmp_path / "alone")
    assert Adapter.load(tmp_path / "matrix/departments/icu/adapter").digest == Adapter.load(alone.adapter).digest
    assert result.shared["general"] == alone.digests["general"]
    assert result.outcomes[0].members["clinic"] == alone.digests["clinic"]
    rows = json.loads(alone.report.with_name("report.json").read_text())["evaluation"]["rows"]
    theirs = {r["model"]: r["estimate"] for r in rows if r["domain"] == "clinic" and r["metric"] == "nll"}
    ours = result.outcomes[0].test.models
    assert ours["base"].estimate == pytest.approx(theirs["base"], rel=1e-6)
    assert ours["delivered"].estimate == pytest.approx(theirs["delivered"], rel=1e-4)
    assert ours["shared"].estimate != ours["base"].estimate


@pytest.mark.parametrize(
    ("weights", "rank", "expected"),
    [
        ("search", None, {"general": 0.5, "clinic": 1.0}),
        ("equal", None, {"general": 0.5, "clinic": 0.5}),
        ("{general: 0.2, clinic: 0.9}", None, {"general": 0.2, "clinic": 0.9}),
        ("{clinic: 1}", None, {"clinic": 1.0}),
        ("last", 3, {"general": 0.5, "clinic": 1.0}),
    ],
)
def test_the_recipes_fusion_holds(hospital, tmp_path, weights, rank, expected):
    overrides = [f"fusion.weights={weights}", *([f"fusion.rank={rank}"] if rank else [])]
    matrix = load(hospital(1), *overrides)
    result = run_matrix(matrix, directory=tmp_path / "run")
    (outcome,) = result.outcomes
    assert outcome.reason == ""
    assert outcome.weights == expected
    delivered = Adapter.load(tmp_path / "run/departments/Ward-0.x/adapter")
    assert {p.name: p.coefficient for p in delivered.lineage.parents} == expected
    if rank is None:
        assert outcome.retained == 1.0
        check_exact(tmp_path / "run/departments/Ward-0.x/adapter", stage_adapters(tmp_path / "home"))
    else:
        assert max(update.rank for update in delivered.modules.values()) == rank
        assert outcome.retained < 1.0
    assert any("search is not run" in line for line in result.left_out) == (weights == "search")


def test_the_context_alone_is_what_shared_means(hospital, tmp_path):
    """Without a context there is nothing shared to compare with, and the base stands for it."""
    table = hospital(1)
    alone = run_matrix(load(table, "stages.clinic.context=[]"), directory=tmp_path / "run")
    assert not alone.context
    (outcome,) = alone.outcomes
    assert outcome.test.models["shared"] == outcome.test.models["base"]
    assert outcome.test.over_shared == outcome.test.over_base


def test_departments_may_be_rows_of_one_file(hospital, tmp_path):
    hospital(2)
    both = [json.loads(line) | {"ward": k} for k in range(2) for line in (tmp_path / f"rows/d{k}.jsonl").open()]
    (tmp_path / "anything.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    table = tmp_path / "departments.csv"
    table.write_text("name,data.where,data.limit\nfirst,ward == 0,\nsecond,ward == 1,30\n")
    result = run_matrix(load(table), directory=tmp_path / "run")
    assert [sum(outcome.examples.values()) for outcome in result.outcomes] == [40, 30]
    direct = tmp_path / "direct.csv"
    direct.write_text("name,data\nfirst,rows/d0.jsonl\n")
    same = run_matrix(load(direct), directory=tmp_path / "same")
    assert same.outcomes[0].digest == result.outcomes[0].digest, "the examples count, not where they lay"


def test_a_table_elsewhere_names_data_beside_itself(hospital, tmp_path):
    hospital(1)
    (tmp_path / "lists").mkdir()
    (tmp_path / "rows").rename(tmp_path / "lists" / "rows")
    table = tmp_path / "lists" / "departments.tsv"
    table.write_text("name\tdata\nicu\trows/d0.jsonl\n")
    matrix = Matrix.load(table, tmp_path / "recipe.yaml")
    assert matrix.recipe_of(matrix.departments[0]).stages[-1].data[0].source == "lists/rows/d0.jsonl"
    result = run_matrix(matrix, directory=tmp_path / "run")
    assert result.failed == ()
    lines = tmp_path / "lists" / "departments.jsonl"
    lines.write_text(json.dumps({"name": "icu", "data": "rows/d0.jsonl", "lora.rank": 2, "max_steps": None}) + "\n")
    again = run_matrix(Matrix.load(lines, tmp_path / "recipe.yaml"), directory=tmp_path / "again")
    assert again.outcomes[0].digest == result.outcomes[0].digest


def test_the_recipes_reading_of_its_source_holds_for_every_department(hospital, tmp_path):
    table = hospital(1)
    rows = [json.loads(line) for line in (tmp_path / "rows/d0.jsonl").open()]
    odd = [{"frage": row["prompt"], "antwort": row["completion"]} for row in rows]
    (tmp_path / "rows/d0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    fields = "stages.clinic.data={source: anything.jsonl, fields: {prompt: frage, completion: antwort}}"
    result = run_matrix(load(table, fields), directory=tmp_path / "run")
    assert result.failed == ()


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "..", ".hidden", "a\\b", "/etc", "ends.", "a b", "ü", "x" * 65, "a:b"]
)
def test_names_that_are_no_names(hospital, name):
    said = refused(hospital(1, "name,data", f"{name},rows/d0.jsonl"))
    assert "departments.csv:2" in said
    assert repr(name) in said


def test_names_that_are_taken(hospital):
    rows = ["icu,rows/d0.jsonl", "ICU,rows/d0.jsonl", "base,rows/d0.jsonl", ",rows/d0.jsonl"]
    said = refused(hospital(1, "name,data", *rows)).splitlines()
    assert said[0] == "departments.csv:3: the name 'ICU' is taken by departments.csv:2"
    assert said[1].startswith("departments.csv:4: 'base' is a reserved word")
    assert said[2] == "departments.csv:5: the department has no name"
    assert len(said) == 3


def test_all_rows_are_checked_before_anything_is_done(hospital, tmp_path):
    rows = ["a,rows/d9.jsonl,", "b,rows/d0.jsonl,four", "c,,", "d,rows/d0.jsonl,0", "e,rows/d0.jsonl,4"]
    said = refused(hospital(1, "name,data,lora.rank", *rows)).splitlines()
    assert [line.split(": ")[0] for line in said] == [f"departments.csv:{k}" for k in (2, 3, 4, 5)]
    assert "d9.jsonl" in said[0]
    assert "'d0.jsonl'" in said[0], "the nearest file"
    assert "lora.rank: expected a whole number, got 'four'" in said[1]
    assert "no data" in said[2]
    assert "at least 1" in said[3]
    assert not (tmp_path / "home" / "steps").exists()


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("lora.rnk", "did you mean 'lora.rank'?"),
        ("stages.clinic.lora.rnk", "lora.rank"),
        ("data.whre", "did you mean 'data.where'?"),
        ("max_length", "the same for all departments"),
        ("split.test", "the same for all departments"),
        ("stages.general.lora.rank", "shared by all departments"),
        ("context.clinic", "unknown column"),
        ("colour", "unknown column"),
        ("", "a column has no name"),
        ("stages.clinic.data", "are the same key"),
    ],
)
def test_columns_that_cannot_be(hospital, column, words):
    said = refused(hospital(1, f"name,data,{column}", "icu,rows/d0.jsonl,1", "er,rows/d0.jsonl,1"))
    assert words in said
    assert len(said.splitlines()) == 1, "one message, however many rows"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "departments.csv is empty"),
        ("name,data\n", "departments.csv has no rows"),
        ("data\nrows/d0.jsonl\n", "no column 'name'"),
        ("name,data\nicu\n", "departments.csv:2"),
        ("name,data,name\nicu,rows/d0.jsonl,er\n", "twice"),
    ],
)
def test_tables_that_are_none(hospital, text, words):
    table = hospital(1)
    table.write_text(text)
    assert words in refused(table)


def test_a_department_without_weight_would_not_be_delivered(hospital):
    assert "no weight" in refused(hospital(1, "name,data,fusion.weights", "icu,rows/d0.jsonl,{general: 1}"))


def test_what_fails_late_fails_alone(hospital, tmp_path):
    rows = [
        "good,rows/d0.jsonl,,", "broken,rows/broken.jsonl,,", "wild,rows/d1.jsonl,1.0e+30,0", "few,rows/few.jsonl,,",
        "also,rows/d2.jsonl,,",
    ]  # fmt: skip
    table = hospital(3, "name,data,learning_rate,train.max_grad_norm", *rows)
    (tmp_path / "rows/broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    write_examples(tmp_path / "rows/few.jsonl", "few", 2)
    matrix = load(table, "train.scheduler=constant", "train.max_steps=6")
    result = run_matrix(matrix, directory=tmp_path / "run")
    states = {outcome.name: outcome.state for outcome in result.outcomes}
    assert states == {"good": "done", "broken": "failed", "wild": "diverged", "few": "failed", "also": "done"}
    assert result.failed == ("broken", "wild", "few")
    told = json.loads((tmp_path / "run/departments.json").read_text())["departments"]
    assert "broken.jsonl:2" in told["broken"]["reason"]
    assert told["broken"]["adapter"] is None
    assert "the" in told["few"]["reason"]
    assert sorted(p.name for p in (tmp_path / "run/departments").iterdir()) == ["also", "good"]
    page = (tmp_path / "run/departments.html").read_text()
    assert "broken.jsonl:2" in page
    assert result.remarks["wild"][0] == told["wild"]["reason"]
    assert not list((tmp_path / "home/steps").glob("stage-*.work")), "no checkpoint of it is left"


def test_the_command(hospital, lorchestra, tmp_path):  # noqa: F811
    table = hospital(2)
    told = lorchestra("run", "recipe.yaml", "--matrix", table)
    assert told.code == 0, told.err
    assert "Ward-0.x" in told.out
    assert "2 of 2 departments delivered" in told.out
    assert (tmp_path / "runs/hospital/departments/Ward-1.x/adapter/adapter_model.safetensors").exists()
    told = lorchestra("run", "recipe.yaml", "--matrix", table, "--json")
    found = json.loads(told.out)
    assert list(found["departments"]) == ["Ward-0.x", "Ward-1.x"]
    (tmp_path / "rows/d1.jsonl").write_text("{oops\n")
    told = lorchestra("run", "recipe.yaml", "--matrix", table)
    assert told.code == 1
    assert "d1.jsonl:1" in told.out
    assert "1 of 2 departments delivered" in told.out
    table.write_text("name,data,lora.rnk\n../up,rows/d0.jsonl,1\n")
    lorchestra("run", "recipe.yaml", "--matrix", table).refused("did you mean 'lora.rank'?")
    lorchestra("run", "recipe.yaml", "--matrix", "none.csv").refused("none.csv is not there")
    lorchestra("run", "recipe.yaml", "--jobs", "2").refused("--matrix")
    lorchestra("run", "recipe.yaml", "--matrix", table, "--executor", "rai").refused("did you mean 'ray'?")


@pytest.mark.slow
def test_two_jobs_deliver_what_one_does(hospital, tmp_path, monkeypatch, threads):
    threads(1)  # as many as each of the two has
    table = hospital(4)
    one = run_matrix(load(table), directory=tmp_path / "one")
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "other"))
    (tmp_path / "rows/d3.jsonl").write_text("{oops\n")
    two = run_matrix(load(table), directory=tmp_path / "two", jobs=2)
    assert [outcome.name for outcome in two.outcomes] == [outcome.name for outcome in one.outcomes]
    assert [outcome.digest for outcome in two.outcomes[:3]] == [outcome.digest for outcome in one.outcomes[:3]]
    assert [outcome.test for outcome in two.outcomes[:3]] == [outcome.test for outcome in one.outcomes[:3]]
    assert two.failed == ("Ward-3.x",)
    assert len(steps(tmp_path / "other", "stage")) == 4, "the shared stage is still trained once"


@pytest.mark.slow
def test_killed_and_run_again(hospital, tmp_path):
    table = hospital(6)
    environment = {**os.environ, "LORCHESTRA_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lorchestra", "run", "recipe.yaml", "--matrix", str(table), "--run-dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(steps(tmp_path / "home", "department")) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = set(steps(tmp_path / "home", "department"))
    assert len(before) < 6
    result = run_matrix(load(table), directory=tmp_path / "run")
    assert {outcome.cached for outcome in result.outcomes} == {True, False}
    assert sum(outcome.cached for outcome in result.outcomes) == len(before)
    check_matrix(result, tmp_path / "run", tmp_path / "home", 6)
    assert trained(tmp_path / "run").count("train general") == 1


def test_remarks_say_what_the_test_can_tell(hospital, tmp_path):
    result = run_matrix(load(hospital(2), "train.learning_rate=1e-9"), directory=tmp_path / "run")
    assert result.remarks["Ward-0.x"][0].startswith(("too few test examples", "the same answers"))
    done = result.outcomes[0]
    twin = Outcome("twin", "departments.csv:9", {}, "done", data=done.data, tests=done.tests)
    assert "the same examples as Ward-0.x" in remarks((done, twin), True)["twin"]
    untested = Outcome("dark", "departments.csv:9", {}, "done")
    assert remarks((untested,), True)["dark"] == ("no sealed test, so nothing is known of unseen questions",)


def test_better_is_lower_for_a_loss_and_higher_for_an_accuracy():
    from lorchestra.evaluate.score import Scores

    def scores(right: int, wrong: int) -> Scores:
        sums = tuple((-1.0, -2.0) if i < right else (-2.0, -1.0) for i in range(right + wrong))
        return Scores("sft", sums, ((1, 1),) * len(sums), (0,) * len(sums), tuple(f"g{i}" for i in range(len(sums))))

    good, bad = scores(38, 2), scores(4, 36)
    first, second = judged({"base": bad, "shared": bad, "delivered": good})
    assert (first.metric, second.metric) == ("accuracy", "nll")
    assert first.sign(first.over_base) == second.sign(second.over_base) == 1
    assert first.over_base.estimate == pytest.approx(34 / 40)
    worse = judged({"base": good, "shared": bad, "delivered": bad})
    assert [test.sign(test.over_base) for test in worse] == [-1, -1]
    assert [test.sign(test.over_shared) for test in worse] == [0, 0]
