"""A gate in a recipe: fitted, chosen, judged on the sealed test, delivered if it wins; cached, planned, resumed."""

from __future__ import annotations

import collections
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from tests.pipeline.small_runs import WORDS, Listening
from tests.pipeline.test_resume import Runs, assert_tidy, killed_until_done, warm_process

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank import Bank
from lorchestra.base.load import load_base
from lorchestra.errors import AdapterError, RecipeError
from lorchestra.evaluate.ledger import Ledger
from lorchestra.evaluate.metrics import loss_ratios
from lorchestra.evaluate.score import score
from lorchestra.evaluate.verdict import ALL
from lorchestra.gate.features import features
from lorchestra.gate.store import load
from lorchestra.pipeline.cache import outputs
from lorchestra.pipeline.choosing import domains_of
from lorchestra.pipeline.execute import RunResult, run
from lorchestra.pipeline.judging import sealed_items
from lorchestra.pipeline.plan import plan
from lorchestra.pipeline.prepare import prepare
from lorchestra.recipe.recipe import Recipe
from lorchestra.report.write import render_report

ANSWERS = {"law": "It is so by statute.", "clinic": "Rest, and drink water."}


def write_data(directory: Path) -> None:
    """Questions that differ by a word or two, and two answers that no one model should give to all."""
    for seed, (name, answer) in enumerate(ANSWERS.items()):
        chance = random.Random(seed)
        with (directory / f"{name}.jsonl").open("w") as out:
            for i in range(40):
                ask = f"{name.upper() * 2} {i}: {chance.choice(WORDS)} {chance.choice(WORDS)}?"
                out.write(json.dumps({"prompt": ask, "completion": answer}) + "\n")


def values(base: Path, gate: Any = True, **changes: Any) -> dict[str, Any]:
    return {
        "name": "gated",
        "base": str(base),
        "dtype": "float32",
        "device": "cpu",
        "max_length": 96,
        "split": {"train": 0.5, "validation": 0.2, "test": 0.3},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0},
        "train": {"max_steps": 12, "batch_size": 6, "learning_rate": 0.03},
        "stages": [{"name": name, "data": f"{name}.jsonl"} for name in ANSWERS],
        "fusion": {"weights": "equal", "gate": gate},
        "evaluate": {"test_limit": None, "samples": 0},
        "deliver": {"merged": False},
    } | changes


class Gated:
    """Where a recipe with a gate has been run, and what came of it."""

    def __init__(self, where: Path, base: Path) -> None:
        write_data(where)
        self.where, self.base = where, base
        self.home = where / "home"
        self.recipe = Recipe.from_dict(values(base), where)
        self.before = plan(self.recipe)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.result = self.run()
        self.report = json.loads((where / "run" / "report.json").read_text())

    def run(self, recipe: Recipe | None = None, directory: str = "run") -> RunResult:
        heard = Listening(lambda kind, fields: self.events.append((kind, fields)))
        return run(recipe or self.recipe, directory=self.where / directory, reporter=heard)

    def steps(self, directory: str = "run") -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in json.loads((self.where / directory / "plan.json").read_text())["steps"]}


@pytest.fixture(scope="module")
def gated(tmp_path_factory, tiny_dir):
    where = tmp_path_factory.mktemp("gated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORCHESTRA_HOME", str(where / "home"))
        return Gated(where, tiny_dir)


@pytest.fixture
def same_home(gated, monkeypatch):
    monkeypatch.setenv("LORCHESTRA_HOME", str(gated.home))


def test_a_gate_that_wins_is_delivered_with_its_adapters(gated):
    result, told = gated.result, gated.report["gate"]
    assert told["kept"], told["sentence"]
    assert result.gate == gated.where / "run" / "final" / "gate"
    assert result.gate_verdict == told["sentence"]
    assert told["sentence"].startswith("The gate is kept: its sealed-test loss is ")
    assert (gated.where / "run" / "final" / "adapter").is_dir(), "the static sum is there all the same"
    members = {path.name: Adapter.load(path) for path in sorted((result.gate / "adapters").iterdir())}
    assert set(members) == set(ANSWERS)
    gate = load(result.gate, {name: adapter.digest for name, adapter in members.items()})
    assert gate.members == tuple(ANSWERS)
    with pytest.raises(AdapterError):
        load(result.gate, {"law": members["clinic"].digest, "clinic": members["law"].digest})
    assert not [path.name for path in (gated.where / "run" / "final").iterdir() if path.name.startswith(".")]


def test_what_the_verdict_says_of_the_gate_is_what_its_coefficients_do(gated, same_home):
    """Each sealed item alone on the base, with the coefficients that the delivered gate gives its prompt."""
    prepared = prepare(gated.recipe)
    base = load_base(prepared.directory, device="cpu", dtype="float32")
    gate = load(gated.result.gate)
    bank = Bank(base.model, base.id)
    for name in gate.members:
        bank.load(name, gated.result.gate / "adapters" / name)
    ours, theirs = {}, {}
    for name, domain in domains_of(prepared, "test", None, choices=True).items():
        theirs[name] = score(base.model, domain, base.pad_id)
        sums = []
        for item in domain.items:
            x = features(base.model, [item.prompt], gate.spec.features)
            (row,) = gate.named_coefficients(x)
            with bank.using(dict(row)):
                one = score(base.model, type(domain)(name, "sft", (item,), (0,), ("g",)), base.pad_id)
            sums.append(one.sums[0])
        ours[name] = type(theirs[name])("sft", tuple(sums), theirs[name].tokens, domain.gold, domain.groups)
    bank.unmount()
    ratio = sum(loss_ratios(ours, theirs, {}).values()) / 2
    rows = gated.report["gate"]["evaluation"]["rows"]
    (told,) = [row["estimate"] for row in rows if row["model"] == "gate" and row["domain"] == ALL]
    assert told == pytest.approx(ratio, rel=1e-4)


def test_each_domain_is_given_its_adapter_and_prompts_are_explained(gated):
    told = gated.report["gate"]
    for name, other in (("law", "clinic"), ("clinic", "law")):
        assert told["means"][name][name] > 0.8 > 0.2 > told["means"][name][other]
        assert told["own"][name]["estimate"] > 0.9
        assert told["oracle"][name] == {name: 1.0}
    assert {row["domain"] for row in told["prompts"]} == set(ANSWERS)
    lines = [json.loads(line)["prompt"] for name in ANSWERS for line in (gated.where / f"{name}.jsonl").open()]
    for row in told["prompts"]:
        assert row["prompt"] in lines
        assert sum(row["coefficients"].values()) == pytest.approx(1, abs=1e-5)
        assert len(row["nearest"]) == 3
        assert all(near["prompt"] in lines and near["prompt"] != row["prompt"] for near in row["nearest"])
        assert row["nearest"][0]["domain"] == row["domain"]
    page = render_report(gated.report)
    assert 'id="gate"' in page
    assert escape(told["sentence"]) in page


def test_no_prompt_is_in_the_gate_unless_it_is_asked_for(gated):
    said = (gated.result.gate / "gate.json").read_text()
    assert "LAWLAW" not in said
    assert "fever" not in said


def test_the_sealed_test_is_read_once_for_the_static_sum_and_once_for_the_gate(gated, same_home):
    items = sealed_items(prepare(gated.recipe))
    assert {name: Ledger.here().count(found) for name, found in items.items()} == {"law": 2, "clinic": 2}
    assert gated.result.readings == {"law": 2, "clinic": 2}
    assert {row["reads"] for row in gated.report["gate"]["ledger"]} == {2}


def test_training_and_choice_never_see_the_sealed_test(gated, same_home):
    prepared = prepare(gated.recipe)
    sealed = {turn.content for data in prepared.data.values() for e in data.splits.test for turn in e.prompt}
    validation = {turn.content for d in prepared.data.values() for e in d.splits.validation for turn in e.prompt}
    for row in gated.report["gate"]["prompts"]:
        assert row["prompt"] in validation
        assert not {row["prompt"], *(near["prompt"] for near in row["nearest"])} & sealed
        assert not {near["prompt"] for near in row["nearest"]} & validation


def test_a_plan_foretells_the_steps_and_a_second_run_reuses_them(gated, same_home):
    kinds = [step.kind for step in gated.before.steps]
    assert kinds[-2:] == ["gate", "judge"]
    assert gated.before.step("gate").needs == ("data", *ANSWERS)
    assert gated.before.step("judge").needs == ("gate", "evaluate")
    assert all(gated.before.step(name).seconds > 0 for name in ("gate", "judge"))
    assert (
        gated.before.step("gate").note
        == "softmax: no member was trained beside another, so they share one prompt's weight"
    )
    after = plan(gated.recipe)
    assert {name: after.step(name).digest for name in ("gate", "judge")} == {
        name: gated.steps()[name]["digest"] for name in ("gate", "judge")
    }
    assert all(step.finished for step in after.steps)
    page = gated.where / "run" / "final" / "gate" / "gate.safetensors"
    stamp = page.stat().st_mtime_ns
    again = gated.run()
    assert all(row["cached"] for name, row in gated.steps().items() if name != "data")
    assert again.gate_verdict == gated.result.gate_verdict
    assert again.readings == gated.result.readings
    assert page.stat().st_mtime_ns == stamp


def test_without_its_key_the_gate_is_gone_and_nothing_else_is_done_anew(gated, same_home):
    plain = Recipe.from_dict(values(gated.base, None), gated.where)
    assert not {"gate", "judge"} & {step.kind for step in plan(plain).steps}
    first = gated.run(directory="other")
    assert first.gate is not None
    again = gated.run(plain, "other")
    assert again.gate is None
    assert again.gate_verdict == ""
    assert not (gated.where / "other" / "final" / "gate").exists()
    assert all(row["cached"] for name, row in gated.steps("other").items() if name != "data")
    assert json.loads((gated.where / "other" / "report.json").read_text())["gate"] is None


def test_a_gate_that_does_not_win_is_told_of_and_not_delivered(gated, same_home):
    """One domain and one adapter, which is best at full strength: there is nothing to choose."""
    fusion = {"weights": "equal", "gate": {"activation": "sigmoid", "epochs": 0}}
    one = values(gated.base, stages=[{"name": "law", "data": "law.jsonl"}], fusion=fusion)
    found = gated.run(Recipe.from_dict(one, gated.where), "lost")
    told = json.loads((gated.where / "lost" / "report.json").read_text())["gate"]
    assert not told["kept"]
    assert found.gate is None
    assert found.gate_verdict == told["sentence"]
    assert found.gate_verdict.startswith("The gate is not kept: ")
    assert not (gated.where / "lost" / "final" / "gate").exists()
    assert (gated.where / "lost" / "final" / "adapter").is_dir()


def test_several_gates_are_fitted_and_validation_chooses(gated, same_home):
    several = Recipe.from_dict(
        values(gated.base, {"layers": [0, 1], "epochs": 0, "groups": 2, "top_k": 1}), gated.where
    )
    gated.run(several, "several")
    told = json.loads((gated.where / "several" / "report.json").read_text())["gate"]
    tried = {row["name"]: row["value"] for row in told["candidates"] if row["gate"]}
    assert set(tried) == {"gate:softmax-0-0", "gate:softmax-1-0"}
    (taken,) = [row["name"] for row in told["candidates"] if row["taken"]]
    assert tried[taken] == min(tried.values())
    assert {row["name"] for row in told["candidates"] if not row["gate"]} == {"base", "static", *ANSWERS}
    steps = plan(several)
    assert [step.name for step in steps.steps if step.kind == "gate"] == list(tried)
    assert all(step.finished for step in steps.steps)
    measured = [path for path in (gated.home / "steps").glob("measure-*") if path.is_dir()]
    assert len(measured) >= 1


def test_a_killed_fit_goes_on_with_what_was_measured(gated, same_home, monkeypatch):
    """What takes longest, scoring every adapter on every example, is a step of its own."""
    from lorchestra.pipeline import gating

    recipe = Recipe.from_dict(values(gated.base, {"examples": 9, "epochs": 1}), gated.where)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gating, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            gated.run(recipe, "killed")
    assert plan(recipe).step("gate").state == "to do"
    with monkeypatch.context() as patch:
        patch.setattr(gating, "measure", killed)
        found = gated.run(recipe, "killed")
    assert found.gate_verdict
    assert plan(recipe).step("gate").state == "cached"


def test_only_what_a_change_touches_is_fitted_again(gated, same_home):
    def state(gate: Any = True, **changes: Any) -> dict[str, str]:
        steps = plan(Recipe.from_dict(values(gated.base, gate, **changes), gated.where)).steps
        return {step.name: step.state for step in steps if step.kind in ("gate", "judge", "evaluate", "stage")}

    assert set(state().values()) == {"cached"}
    trained = dict.fromkeys((*ANSWERS, "evaluate"), "cached")
    assert state({"learning_rate": 2e-3}) == {**trained, "gate": "to do", "judge": "to do"}
    assert state(evaluate={"test_limit": 5, "samples": 0}) == {
        **trained, "evaluate": "to do", "gate": "cached", "judge": "to do",
    }  # fmt: skip
    assert state(fusion={"weights": "equal", "gate": True, "validation_limit": 4})["gate"] == "to do"


def test_layers_that_the_base_does_not_have_are_refused_before_anything_is_trained(gated, same_home):
    deep = Recipe.from_dict(values(gated.base, {"layers": [0, 3]}), gated.where)
    with pytest.raises(RecipeError, match=r"gate\.layers: is 3, and the base has 2 layers"):
        prepare(deep)
    with pytest.raises(RecipeError, match=r"gate\.groups: is 5, and the base has 2 layers"):
        prepare(Recipe.from_dict(values(gated.base, {"groups": 5}), gated.where))


def test_pairs_contexts_and_adapters_brought_in_take_part(gated, same_home, tmp_path):
    """A preference stage beside an earlier one: a sigmoid, for they are wanted together."""
    for name in ANSWERS:
        (tmp_path / f"{name}.jsonl").write_text((gated.where / f"{name}.jsonl").read_text())
    with (tmp_path / "pairs.jsonl").open("w") as out:
        for i in range(40):
            row = {"prompt": f"ASK {i}: {WORDS[i % 7]}?", "chosen": "Yes, surely.", "rejected": "No, never."}
            out.write(json.dumps(row) + "\n")
    stages = [
        {"name": "clinic", "data": "clinic.jsonl"},
        {"name": "taste", "task": "dpo", "data": "pairs.jsonl", "context": ["clinic"], "max_steps": 2},
    ]
    changes = {
        "stages": stages,
        "adapters": {"brought": str(gated.where / "run" / "adapters" / "law")},
        "fusion": {"members": ["brought", "clinic", "taste"], "weights": "equal", "gate": {"epochs": 1}},
        "evaluate": {"test_limit": 6, "samples": 0, "domains": {"law": "law.jsonl"}},
    }
    found = run(Recipe.from_dict(values(gated.base, **changes), tmp_path), directory=tmp_path / "run")
    told = json.loads((tmp_path / "run" / "report.json").read_text())["gate"]
    assert told["settings"]["activation"] == "sigmoid"
    assert set(told["means"]) == {"clinic", "taste", "law"}
    assert set(told["oracle"]) == {"clinic", "taste"}, "of an extra domain nothing but the sealed test is read"
    assert {row["domain"] for row in told["prompts"]} == {"clinic", "taste"}
    assert {d["domain"] for d in told["evaluation"]["differences"] if d["b"] == "oracle"} == {"clinic", "taste"}
    assert any(row["metric"] == "preference_accuracy" for row in told["evaluation"]["rows"] if row["model"] == "gate")
    if found.gate is not None:
        assert (found.gate / "adapters" / "brought").is_dir()


def test_a_gate_with_an_adapter_brought_in_is_whole(gated, same_home):
    """What is delivered needs nothing else: the adapter that no stage made is there too."""
    brought = str(gated.where / "run" / "adapters" / "law")
    fusion = {"members": ["house", *ANSWERS], "weights": "equal", "gate": {"examples": 20}}
    recipe = Recipe.from_dict(values(gated.base, adapters={"house": brought}, fusion=fusion), gated.where)
    found = gated.run(recipe, "brought")
    assert found.gate is not None, found.gate_verdict
    members = {path.name: Adapter.load(path).digest for path in (found.gate / "adapters").iterdir()}
    assert members["house"] == members["law"]
    assert load(found.gate, members).members == ("house", *ANSWERS)
    assert not (gated.where / "brought" / "adapters" / ".brought").exists()


class GatedRuns(Runs):
    def outcome(self, place: str) -> dict[str, Any]:
        told = json.loads((self.run_dir(place) / "report.json").read_text())["gate"]
        del told["settings"]["seconds"], told["ledger"]
        result = json.loads((self.directory / f"{place}.json").read_text())
        return {**result, "gate": told, "final": outputs(self.run_dir(place) / "final" / "gate")}


warm = pytest.fixture(name="warm", scope="module")(warm_process)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_just_before_any_change_of_the_file_system(warm, tmp_path, tiny_dir):
    """kill -9 from the first stage to the gate's delivery: the same gate, and never half of one under its name."""
    write_data(tmp_path)
    recipe = values(tiny_dir, {"epochs": 1, "layers": [0, 1], "examples": 12})
    runs = GatedRuns(warm, tmp_path, recipe, tmp_path)
    assert runs.go("whole")
    whole, struck, chance = runs.outcome("whole"), collections.Counter(), random.Random(5)
    assert whole["gate"]["kept"]

    def death(attempt: int) -> dict[str, int]:
        final = runs.run_dir("killed") / "final" / "gate"
        assert not final.exists() or outputs(final) == whole["final"]
        return {"events": chance.randint(20, 90) + attempt}  # growing: what is placed last takes many changes

    assert killed_until_done(runs, "killed", whole, death, struck) >= 5
    assert runs.outcome("killed") == whole
    assert_tidy(runs, "killed")
    assert not list((tmp_path / "killed").rglob(".gate.*"))
