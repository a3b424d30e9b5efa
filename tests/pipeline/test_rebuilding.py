"""Recipes on record, carried out on a second tiny base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import dense_logits, lorchestra, other_base  # noqa: F401  (the command line, a second base)
from tests.pipeline.small_runs import small_recipe, write_data

from lorchestra.errors import UserError
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.prepare import prepare
from lorchestra.pipeline.rebuilding import Rebuilder, selected
from lorchestra.recipe.recipe import Recipe
from lorchestra.registry.mistakes import UnknownReferenceError
from lorchestra.registry.registry import Registry


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_dir):
    """A warm cache, and a registry with a version that a run published, to be copied."""
    root = tmp_path_factory.mktemp("made")
    write_data(root)
    Registry.open(str(root / "registry"), create=True).close()
    asked = {"registry": "registry", "name": "ward", "alias": "production", "stages": True, "tags": ["sft"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORCHESTRA_HOME", str(root / "home"))
        run(Recipe.from_dict(small_recipe(tiny_dir, asked), root), directory=root / "run")
    return root


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """The data and a copy of the registry; the cache is shared."""
    monkeypatch.setenv("LORCHESTRA_HOME", str(made / "home"))
    monkeypatch.setenv("LORCHESTRA_REGISTRY", str(tmp_path / "registry"))
    shutil.copytree(made / "registry", tmp_path / "registry")
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    return tmp_path


@pytest.fixture
def registry(place):
    with Registry.open(str(place / "registry")) as opened:
        yield opened


@pytest.fixture
def rebuild(place, other_base):  # noqa: F811
    """``rebuild(reference)`` on the second base."""

    def go(reference, base=None, dry_run=False, where="data"):
        worker = Rebuilder(str(place / "registry"), str(base or other_base), place / where, place / "runs", dry_run)
        return worker.work(reference)

    return go


def mean_loss(base: Path, adapter: Path, recipe: Recipe) -> float:
    """Nats a token of the sealed answers by dense float64 algebra, and transformers' own forward pass."""
    prepared = prepare(recipe)
    total = count = 0.0
    for data in prepared.data.values():
        for example in data.splits.test[: recipe.evaluate.test_limit]:
            item = prepared.renderer.sft(example)
            (branch,) = item.branches
            ids = torch.tensor([[*item.prompt, *branch.ids]])
            logs = dense_logits(base, {adapter: 1.0}, ids)[0].log_softmax(-1)
            for k, (token, learned) in enumerate(zip(branch.ids, branch.supervised, strict=True)):
                if learned:
                    total -= float(logs[len(item.prompt) + k - 1, token])
                    count += 1
    return total / count


@pytest.mark.slow
def test_a_candidate_on_a_new_base(rebuild, registry, place, tiny_dir, other_base, tmp_path):  # noqa: F811
    found = rebuild("ward@v1")
    assert (found.state, found.reason, found.candidate) == ("done", "", "ward@v2")
    old, new = registry.resolve("ward@v1").manifest, registry.resolve("ward@v2").manifest
    assert registry.resolve("ward").reference == "ward@v1", "no alias is moved"
    assert [(state.name, state.alias) for state in registry.aliases()] == [("ward", "production")]
    assert (new.note, new.tags) == ("rebuilt from ward@v1", ["rebuilt"])
    assert new.base.weights != old.base.weights
    assert "ward@v1" not in {parent.name for parent in new.parents}
    assert {parent.name: parent.coefficient for parent in new.parents} == {"general": 0.25, "clinic": 1.0}
    assert new.data == old.data
    assert {name: metric.sealed for name, metric in new.metrics.items()} == {
        name: metric.sealed for name, metric in old.metrics.items()
    }
    assert new.recipe == {**old.recipe, "base": str(other_base)}
    # The difference, against dense algebra.
    compared = found.compared
    assert compared.paired
    for manifest, base, told in ((old, tiny_dir, compared.before), (new, other_base, compared.after)):
        registry.pull(manifest.reference, tmp_path / manifest.reference)
        recipe = Recipe.from_dict({**manifest.recipe, "base": str(base)}, place / "data")
        assert told == pytest.approx(mean_loss(base, tmp_path / manifest.reference, recipe), abs=1e-4)
        assert told == pytest.approx(manifest.metrics["loss"].value, abs=1e-6)
    assert compared.difference.estimate == pytest.approx(compared.after - compared.before)
    assert compared.difference.low < compared.difference.estimate < compared.difference.high
    assert found.remarks == ()
    # Again: nothing is trained, scored or pushed twice.
    readings = (Path(place / "runs") / "ward-v1" / "report.json").read_text()
    again = rebuild("ward@v1")
    assert again == found
    assert len(registry.versions("ward")) == 2
    ledger = json.loads(readings)["evaluation"]["ledger"]
    assert json.loads((place / "runs" / "ward-v1" / "report.json").read_text())["evaluation"]["ledger"][0]["reads"] == (
        ledger[0]["reads"] + 1
    ), "the old version was read once more for the comparison, and not twice"
    # And what is rebuilt can be rebuilt: back, it is the version that there was.
    back = rebuild("ward@v2", base=tiny_dir)
    assert registry.resolve(back.candidate).manifest.digest == old.digest


def test_without_the_old_base_the_intervals_are_compared(rebuild, registry, place, tiny_dir):
    recipe = {**registry.resolve("ward").manifest.recipe, "base": str(place / "gone")}
    registry.pull("ward", place / "pulled")
    registry.push(place / "pulled", "lone", recipe=recipe)
    found = rebuild("lone@v1")
    assert found.state == "done", found.reason
    assert not found.compared.paired
    (remark, alone) = found.remarks
    assert "not paired by item" in remark
    assert "lone has no alias production, so the name alone leads to lone@v2 now" in alone
    metrics = [registry.resolve(f"lone@v{k}").manifest.metrics["loss"] for k in (1, 2)]
    assert [found.compared.before, found.compared.after] == [metric.value for metric in metrics]


def test_a_dry_run_changes_nothing(rebuild, registry, place):
    log = len(registry.history())
    found = rebuild("ward@v1", dry_run=True)
    assert (found.state, found.candidate) == ("planned", "")
    assert "stage" in found.reason
    assert len(registry.history()) == log
    assert not (place / "runs").exists()


def change(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def test_what_cannot_be_rebuilt_says_why(rebuild, registry, place, tiny_dir):
    registry.pull("ward", place / "pulled")
    registry.push(place / "pulled", "by-hand")
    recipe = registry.resolve("ward").manifest.recipe
    registry.push(place / "pulled", "newer", recipe={**recipe, "entropy": 3})
    registry.push(place / "pulled", "reseeded", recipe={**recipe, "seeds": {"init": 0, "data": 5}})
    registry.push(place / "pulled", "foul", recipe=recipe)
    registry.revoke("foul", "it swears")
    for reference, words in {
        "by-hand@v1": ["no recipe on record"],
        "newer@v1": ["is not taken", "unknown key 'entropy'"],
        "reseeded@v1": ["the sealed test of general, clinic is not the one"],
        "ward-general@v1": ["is a stage of a recipe"],
        "foul@v1": ["was revoked", "it swears"],
    }.items():
        found = rebuild(reference)
        assert found.state == "failed"
        for text in words:
            assert text in found.reason
    (place / "empty").mkdir()
    away = rebuild("ward@v1", where="empty")
    assert away.state == "failed"
    assert "general.jsonl" in away.reason
    assert f"name that with --from (now {place / 'empty'})" in away.reason
    change(place / "data" / "clinic.jsonl", "Yes, clinic", "Perhaps, clinic")
    other = rebuild("ward@v1")
    assert other.state == "failed"
    assert "was trained on other examples" in other.reason
    assert "clinic.jsonl: " in other.reason
    assert "general.jsonl: " not in other.reason
    there = rebuild("ward@v1", base=tiny_dir)
    assert (there.state, there.candidate) == ("there", ""), "on its own base nothing is to be done"


def test_which_versions_are_meant(registry, place, tiny_dir):
    registry.pull("ward", place / "pulled")
    recipe = registry.resolve("ward").manifest.recipe
    for name in ("med_heart", "med_skin", "med_old"):
        registry.push(place / "pulled", name, recipe=recipe, tags=["med"])
    registry.revoke("med_old", "too old")
    assert selected(registry, ["med_*"]) == ["med_heart@v1", "med_skin@v1"]
    assert selected(registry, ["ward*"]) == ["ward@v1"], "stages are left out"
    assert selected(registry, ["ward@production", "med_*", "ward"]) == ["med_heart@v1", "med_skin@v1", "ward@v1"]
    assert selected(registry, [], tag="med") == ["med_heart@v1", "med_skin@v1"]
    assert selected(registry, ["ward", "med_*"], tag="sft") == ["ward@v1"]
    assert selected(registry, [], base=str(tiny_dir)) == ["med_heart@v1", "med_skin@v1", "ward@v1"]
    assert selected(registry, [], base=registry.resolve("ward").manifest.base.weights[:30]) == [
        "med_heart@v1", "med_skin@v1", "ward@v1",
    ]  # fmt: skip
    with pytest.raises(UserError, match="say what to rebuild"):
        selected(registry, [])
    with pytest.raises(UserError, match="nothing in the registry is meant"):
        selected(registry, ["x*"])
    with pytest.raises(UnknownReferenceError):
        selected(registry, ["wart"])


def test_over_a_filter_one_that_fails_does_not_stop_the_others(lorchestra, registry, place, other_base):  # noqa: F811
    registry.pull("ward", place / "pulled")
    registry.push(place / "pulled", "a-broken", recipe={"name": "x"})
    told = lorchestra("registry", "rebuild", "a-*", "ward", "--base", other_base, "--from", "data", "--run-dir", "r")
    assert told.code == 1
    rows = {line.split()[0]: line for line in told.out.splitlines() if line.startswith(("a-broken@v1 ", "ward@v1 "))}
    assert "failed" in rows["a-broken@v1"]
    assert "ward@v2" in rows["ward@v1"]
    assert "a-broken@v1: the recipe on record of a-broken@v1" in told.out
    assert "1 candidate pushed, no alias moved" in told.out
    assert (place / "r" / "ward-v1" / "report.html").exists()
    told = lorchestra(
        "registry", "rebuild", "ward@v1", "--base", other_base, "--from", "data", "--run-dir", "r", "--json"
    )
    assert told.code == 0, told.err
    (row,) = json.loads(told.out)
    assert (row["state"], row["candidate"]) == ("done", "ward@v2")
    assert row["compared"]["paired"]
    assert row["compared"]["low"] <= row["compared"]["difference"] <= row["compared"]["high"]
    nothing = lorchestra("registry", "rebuild", "ward@v2", "--base", other_base, "--from", "data")
    assert nothing.code == 0
    assert "ward@v2: it stands on" in nothing.out


@pytest.mark.slow
def test_two_at_a_time(lorchestra, registry, place, other_base):  # noqa: F811
    registry.pull("ward", place / "pulled")
    registry.push(place / "pulled", "ward-b", recipe=registry.resolve("ward").manifest.recipe)
    told = lorchestra("registry", "rebuild", "ward", "ward-b", "--base", other_base, "--from", "data", "--jobs", "2")
    assert told.code == 0, told.err + told.out
    assert [registry.resolve(f"{name}@v2").manifest.tags for name in ("ward", "ward-b")] == [["rebuilt"]] * 2


def test_mistakes_of_the_command(lorchestra, registry, place, other_base):  # noqa: F811
    lorchestra("registry", "rebuild", "ward").refused("Add --base NEW")
    lorchestra("registry", "rebuild", "--base", other_base).refused("say what to rebuild")
    lorchestra("registry", "rebuild", "ward", "--base", other_base, "--from", "nowhere").refused("--from nowhere")
    lorchestra("registry", "rebuild", "wart", "--base", other_base).refused("wart", "ward")
