"""Runs that publish: what the registry then knows, once, and what is told before anything is trained."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pipeline.small_runs import Listening, small_recipe, write_data
from tests.registry.conftest import postgres  # noqa: F401  (the fixture of a real server)

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import RecipeError
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.plan import plan
from lorchestra.recipe.publish import MEASURED, holds_password
from lorchestra.recipe.recipe import Recipe
from lorchestra.registry.lineage import related
from lorchestra.registry.mistakes import NoRegistryError, PromotionRefused, RegistryError, RevokedError
from lorchestra.registry.registry import Registry

VARIABLE = "${LORCHESTRA_REGISTRY}"


@pytest.fixture(scope="module")
def warm_home(tmp_path_factory) -> Path:
    """A cache that all runs of this file share: what is trained once is not trained again."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def place(tmp_path, monkeypatch, warm_home):
    """Data, an empty registry that the environment names, and the shared cache."""
    monkeypatch.setenv("LORCHESTRA_HOME", str(warm_home))
    monkeypatch.setenv("LORCHESTRA_REGISTRY", str(tmp_path / "registry"))
    write_data(tmp_path)
    Registry.open(str(tmp_path / "registry"), create=True).close()
    return tmp_path


@pytest.fixture
def go(place, tiny_dir):
    """``go(publish, **changes)`` carries the recipe out in the one run directory."""

    def carry_out(publish, reporter=None, **changes):
        recipe = Recipe.from_dict(small_recipe(tiny_dir, publish, **changes), place)
        return run(recipe, directory=place / "run", reporter=reporter or Listening())

    return carry_out


@pytest.fixture
def registry(place):
    with Registry.open(str(place / "registry"), actor="somebody else") as opened:
        yield opened


def sealed(home: Path, domain: str) -> str:
    """Of the items that the ledger says were read."""
    entries = map(json.loads, (home / "sealed-tests.jsonl").read_text().splitlines())
    items = next(entry["items"] for entry in entries if entry["domain"] == domain)
    return "sha256:" + hashlib.sha256(json.dumps(sorted(items), separators=(",", ":")).encode()).hexdigest()


def test_all_that_is_known_is_published(go, registry, place, warm_home, monkeypatch):
    monkeypatch.setenv("LORCHESTRA_DATA", str(place))
    stages = small_recipe(place)["stages"]
    stages[0]["data"] = "${LORCHESTRA_DATA}/general.jsonl"
    asked = {"name": "ward", "alias": "staging", "tags": ["sft", "fused"], "note": "of November", "stages": True}
    result = go(asked, stages=stages)
    assert result.published.reference == "ward@v1"
    assert result.published.alias == "ward@staging"
    assert result.published.stages == ("ward-general@v1", "ward-clinic@v1")
    version = registry.resolve("ward@staging")
    told = version.manifest
    assert version.reference == "ward@v1"
    assert (told.note, told.tags, told.digest) == ("of November", ["fused", "sft"], result.digests["fused"])

    # Figures: those of the verdict, and the loss of all items together by plain sums.
    rows = json.loads((place / "run" / "report.json").read_text())["evaluation"]["rows"]
    found = {(row["domain"], row["metric"]): row for row in rows if row["model"] == "delivered"}
    for domain in ("general", "clinic"):
        metric = told.metrics[f"{domain}.loss"]
        row = found[domain, "nll"]
        assert [metric.value, metric.low, metric.high, metric.n] == [row[k] for k in ("estimate", "low", "high", "n")]
        assert (metric.split, metric.better, metric.sealed) == ("sealed", "lower", sealed(warm_home, domain))
    assert told.metrics["loss_ratio"].value == found["all domains", "loss_ratio"]["estimate"]
    scores = json.loads(result.scores.read_text())["delivered"].values()
    pairs = [(item[0], count[0]) for s in scores for item, count in zip(s["sums"], s["tokens"], strict=True)]
    assert len(pairs) == 12
    assert told.metrics["loss"].value == pytest.approx(-sum(p for p, _ in pairs) / sum(n for _, n in pairs))
    assert told.metrics["loss"].low < told.metrics["loss"].value < told.metrics["loss"].high
    assert len({metric.sealed for metric in told.metrics.values()}) == 3, "two domains and both together"

    # Where it comes from: the stages, which lineage finds, and their contexts at their final weights.
    parents = {parent.name: (parent.coefficient, parent.digest) for parent in told.parents}
    assert parents == {name: (result.weights[name], result.digests[name]) for name in ("general", "clinic")}
    assert told.settings["contexts"] == {"clinic": {"general": 0.5}}
    clinic = registry.resolve("ward-clinic").manifest
    assert [(member.name, member.coefficient) for member in clinic.context] == [("general", 0.5)]
    assert told.tools["torch"] == clinic.tools["torch"]
    names = {node.name for node in related(registry, version).nodes.values()}
    assert names == {"ward@v1", "ward-general@v1", "ward-clinic@v1"}

    # What it was made with: the recipe as it was written, which is a recipe again, and the data.
    assert told.recipe["stages"][0]["data"][0]["source"] == "${LORCHESTRA_DATA}/general.jsonl"
    assert str(place) not in json.dumps(told.recipe).replace(str(told.base.name), "")
    assert "publish" not in told.recipe["deliver"]
    again = Recipe.from_dict(told.recipe, place)
    assert again.model_dump(mode="json", exclude={"deliver": {"publish"}}) == told.recipe
    assert set(told.data) == {"${LORCHESTRA_DATA}/general.jsonl", "clinic.jsonl"}
    assert told.data["clinic.jsonl"] == clinic.data["clinic.jsonl"]
    # The directory tells the same without a registry.
    lineage = Adapter.load(result.adapter).lineage
    assert lineage.metrics["loss"]["value"] == told.metrics["loss"].value
    assert lineage.data == told.data


def test_one_domain_has_its_figures_by_their_plain_names(go, registry, place):
    stages = small_recipe(place)["stages"][:1]
    go({"name": "one"}, stages=stages, fusion={"weights": "equal"})
    metrics = registry.resolve("one").manifest.metrics
    assert set(metrics) == {"loss", "general.loss", "loss_ratio"}
    assert metrics["loss"] == metrics["general.loss"]
    assert len({metric.sealed for metric in metrics.values()}) == 1
    assert {name.rpartition(".")[2] for name in metrics} <= set(MEASURED)


def test_a_run_that_is_run_again_publishes_nothing_twice(go, registry):
    asked = {"alias": "staging", "gates": ["loss<=9", "requires:data"], "stages": True}
    first = go(asked)
    log = [entry.hash for entry in registry.history()]
    second = go(asked)
    assert first.published == second.published
    assert first.published.reference == "small@v1", "without a name it is the recipe's"
    assert [entry.hash for entry in registry.history()] == log
    assert registry.verify() == []


def test_an_alias_that_was_moved_away_is_left(go, registry):
    asked = {"name": "ward", "alias": "production"}
    go(asked)
    other = go(asked, fusion={"weights": {"general": 1.0, "clinic": 1.0}})
    assert other.published.reference == "ward@v2"
    registry.rollback("ward", why="it swears")
    hearing = Listening()
    again = go(asked, hearing, fusion={"weights": {"general": 1.0, "clinic": 1.0}})
    assert (again.published.reference, again.published.alias) == ("ward@v2", "")
    assert registry.resolve("ward@production").reference == "ward@v1"
    (note,) = [text for text in hearing.said if "is left there" in text]
    assert "ward@production led to ward@v2 before and was moved to ward@v1 by somebody else" in note


def test_another_note_is_told_and_another_test_is_another_version(go, registry):
    first = go({"name": "ward", "note": "one"})
    hearing = Listening()
    second = go({"name": "ward", "note": "two"}, hearing)
    assert second.published.reference == first.published.reference
    assert registry.resolve("ward").manifest.note == "one"
    assert any("ward@v1 already, and a version never changes" in text for text in hearing.said)
    third = go({"name": "ward"}, evaluate={"test_limit": 4, "samples": 0})
    assert third.published.reference == "ward@v2"
    old, new = (registry.resolve(f"ward@v{k}").manifest for k in (1, 2))
    assert old.digest == new.digest
    assert old.metrics["loss"].sealed != new.metrics["loss"].sealed


def test_a_gate_that_refuses_leaves_the_version_and_no_alias(go, registry, place):
    hearing = Listening()
    with pytest.raises(PromotionRefused) as refused:
        go({"name": "ward", "alias": "staging", "gates": ["loss<=0.1", "requires:lineage"]}, hearing)
    for words in ("ward@v1 is published", "loss<=0.1: refused", "1 of 2 gates", str(place / "run")):
        assert words in str(refused.value)
    assert refused.value.exit_code == 1
    assert hearing.said[-1].startswith("The delivered model "), "the verdict is not lost"
    assert [version.reference for version in registry.versions()] == ["ward@v1"]
    assert registry.aliases() == []
    assert (place / "run" / "report.html").exists()
    mended = go({"name": "ward", "alias": "staging", "gates": ["loss<=9"]})
    assert (mended.published.reference, mended.published.alias) == ("ward@v1", "ward@staging")


def test_a_revoked_version_is_not_published_again(go, registry):
    go({"name": "ward"})
    registry.revoke("ward@v1", "trained on the sealed test")
    with pytest.raises(RevokedError, match="trained on the sealed test"):
        go({"name": "ward"})


def test_a_store_that_is_gone_at_the_end_costs_nothing_but_the_publishing(go, registry, place):
    registry.close()
    trained = go(None)

    def lose(kind, fields):
        if kind == "step" and fields["kind"] == "evaluate":
            (place / "registry").rename(place / "lost")

    with pytest.raises(NoRegistryError) as failed:
        go({"name": "ward"}, Listening(lose))
    assert "Everything that was made is kept in" in str(failed.value)
    assert Adapter.load(place / "run" / "final" / "adapter").digest == trained.digests["fused"]
    (place / "lost").rename(place / "registry")
    assert go({"name": "ward"}).published.reference == "ward@v1"
    steps = json.loads((place / "run" / "plan.json").read_text())["steps"]
    assert all(step["cached"] for step in steps if step["kind"] not in ("data", "publish"))


@pytest.mark.parametrize(
    ("publish", "words"),
    [
        ({"name": "../clinic"}, ["deliver.publish.name", "is no name for an adapter"]),
        ({"name": "auto"}, ["deliver.publish.name", "reserved"]),
        ({"name": "x" * 125, "stages": True}, ["deliver.publish.name", "at most 128"]),
        ({"alias": "v2"}, ["deliver.publish.alias", "is a version or a digest"]),
        ({"alias": "Bad One"}, ["deliver.publish.alias", "no alias"]),
        ({"alias": "a", "gates": ["loss=<1"]}, ["deliver.publish.gates", "is no gate"]),
        ({"alias": "a", "gates": ["los<=1"]}, ["measures no 'los'; did you mean 'loss'?"]),
        ({"alias": "a", "gates": ["ward.loss<=1"]}, ["measures no 'ward.loss'"]),
        ({"gates": ["loss<=1"]}, ["there is no alias for them to guard"]),
        ({"alias": "a", "gates": "loss<=1"}, ["expected a list", "write [loss<=1]"]),
        ({"registry": "${SECRET}"}, ["${SECRET} may not be used here"]),
        ({"registry": ""}, ["deliver.publish.registry", "is empty"]),
        ({"regitsry": "x"}, ["unknown key 'regitsry'; did you mean 'registry'?"]),
        ("ward", ["write a mapping"]),
    ],
)
def test_mistakes_are_told_when_the_recipe_is_read(publish, words, tiny_dir, tmp_path):
    with pytest.raises(RecipeError) as refused:
        Recipe.from_dict(small_recipe(tiny_dir, publish), tmp_path)
    for text in words:
        assert text in str(refused.value)


def test_gates_need_a_sealed_test(tiny_dir, tmp_path):
    split = {"train": 0.8, "validation": 0.2, "test": 0}
    with pytest.raises(RecipeError, match=r"split\.test is 0"):
        Recipe.from_dict(small_recipe(tiny_dir, {"alias": "a", "gates": ["loss<=1"]}, split=split), tmp_path)


@pytest.mark.parametrize(
    ("publish", "error", "words"),
    [
        ({"registry": "nowhere"}, RecipeError, "deliver.publish.registry"),
        ({"registry": "${LORCHESTRA_UNSET}"}, RecipeError, "LORCHESTRA_UNSET is not set"),
        ({"registry": "ftp://host/x"}, RecipeError, "is no registry"),
        ({"tags": ["Not A Tag"]}, RecipeError, "deliver.publish.tags"),
        ({"registry": "postgresql://u@127.0.0.1:9/db?blobs=/tmp/none"}, RegistryError, "127.0.0.1"),
    ],
)
def test_what_cannot_be_published_is_told_before_training(publish, error, words, place, tiny_dir, monkeypatch):
    monkeypatch.setenv("LORCHESTRA_HOME", str(place / "fresh"))
    recipe = Recipe.from_dict(small_recipe(tiny_dir, publish), place)
    for verb in (run, plan):
        with pytest.raises(error) as refused:
            verb(recipe, **({"directory": place / "run"} if verb is run else {}))
        assert words in str(refused.value)
    assert not (place / "fresh" / "steps").exists()


def test_a_relative_registry_is_relative_to_the_recipe(go, place, monkeypatch):
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert go({"registry": "registry", "name": "ward"}).published.reference == "ward@v1"
    assert list((place / "elsewhere").iterdir()) == []


def test_the_plan_says_what_is_published(place, tiny_dir):
    asked = {"name": "ward", "alias": "staging", "gates": ["loss<=9"]}
    found = plan(Recipe.from_dict(small_recipe(tiny_dir, asked), place))
    step = found.steps[-1]
    assert (step.name, step.needs, step.state) == ("publish", ("evaluate",), "each run")
    assert step.note == f"ward to {VARIABLE}; ward@staging if loss<=9"
    assert "publish" not in [s.name for s in plan(Recipe.from_dict(small_recipe(tiny_dir), place)).steps]


# ---- secrets

PASSWORD = "hunter2-of-the-registry"


@pytest.mark.parametrize(
    ("url", "holds"),
    [
        (f"postgresql://me:{PASSWORD}@host/db?blobs=/x", True),
        (f"postgresql://me@host/db?blobs=s3%3A%2F%2Fkey%3A{PASSWORD}%40bucket", True),
        (f"postgresql://me@host/db?password={PASSWORD}&blobs=/x", True),
        (f"postgresql://me:x${{LORCHESTRA_PW}}{PASSWORD}@host/db?blobs=/x", True),
        ("postgresql://me:${LORCHESTRA_PW}@host/db?blobs=/x", False),
        ("postgresql://me@host/db?blobs=s3://bucket/prefix", False),
        ("${LORCHESTRA_REGISTRY}", False),
        ("~/adapters", False),
    ],
)
def test_a_password_in_a_recipe_is_refused_and_not_repeated(url, holds, tiny_dir, tmp_path):
    assert holds_password(url) is holds
    recipe = small_recipe(tiny_dir, {"registry": url})
    if not holds:
        assert Recipe.from_dict(recipe, tmp_path)
        return
    (tmp_path / "recipe.yaml").write_text(json.dumps(small_recipe(tiny_dir, {})))
    for load in (
        lambda: Recipe.from_dict(recipe, tmp_path),
        lambda: Recipe.load(tmp_path / "recipe.yaml", [f"deliver.publish.registry={url}"]),
        lambda: Recipe.load(tmp_path / "recipe.yaml", [f"deliver.publish={{registry: [{url!r}]}}"]),
        lambda: Recipe.load(tmp_path / "recipe.yaml", [f"deliver.publish={url}"]),
    ):
        with pytest.raises(RecipeError) as refused:
            load()
        assert PASSWORD not in str(refused.value)


def test_a_password_is_kept_nowhere(postgres, place, tiny_dir, monkeypatch, warm_home):  # noqa: F811
    name = postgres.database()
    url = postgres.url(name, place / "blobs").replace("@/", f":{PASSWORD}@/")
    monkeypatch.setenv("LORCHESTRA_REGISTRY", url)
    Registry.open(url, create=True).close()
    hearing = Listening(lambda kind, fields: hearing.said.append(json.dumps(fields)))
    recipe = Recipe.from_dict(small_recipe(tiny_dir, {"name": "ward", "alias": "a", "gates": ["loss<=9"]}), place)
    told = json.dumps(plan(recipe).as_dict())
    assert run(recipe, directory=place / "run", reporter=hearing).published.alias == "ward@a"
    monkeypatch.setenv("LORCHESTRA_REGISTRY", url.replace(f"/{name}?", "/gone?"))
    with pytest.raises(RegistryError) as failed:
        run(recipe, directory=place / "run", reporter=hearing)
    kept = [path for root in (place / "run", warm_home, place / "blobs") for path in root.rglob("*") if path.is_file()]
    assert len(kept) > 20
    everything = [path.read_bytes().decode("latin-1") for path in kept] + [told, str(failed.value), *hearing.said]
    with Registry.open(url) as registry:
        everything += [version.manifest.canonical().decode() for version in registry.versions()]
        everything += [repr(entry) for entry in registry.history()]
    postgres.done(name)
    assert [text for text in everything if PASSWORD in text] == []
    assert any(VARIABLE in text for text in hearing.said)


# ---- kill -9

KILLED = """
import os, signal, sys
from pathlib import Path
from lorchestra.pipeline.execute import run
from lorchestra.recipe.recipe import Recipe
from lorchestra.registry.registry import Registry
import json, lorchestra.registry.pushing, scipy.stats, transformers.models.llama.modeling_llama

place, values = Path(sys.argv[1]), json.loads(sys.argv[2])
for verb, number in (("push", 1), ("push", 2), ("push", 3), ("promote", 1)):
    child = os.fork()
    if child == 0:
        real, left = getattr(Registry, verb), [number]
        def then_die(self, *args, **options):
            found = real(self, *args, **options)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return found
        setattr(Registry, verb, then_die)
        run(Recipe.from_dict(values, place), directory=place / "run")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    with Registry.open(str(place / "registry")) as registry:
        there = sorted(v.reference for v in registry.versions())
        print(json.dumps([os.WIFSIGNALED(status), there, [a.alias for a in registry.aliases()]]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_it_publishes(go, registry, place, tiny_dir):
    go(None)  # trained already: the kills are in the publishing
    asked = {"name": "ward", "alias": "staging", "gates": ["loss<=9"], "stages": True}
    command = [sys.executable, "-c", KILLED, str(place), json.dumps(small_recipe(tiny_dir, asked))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    versions = ["ward-general@v1", "ward-clinic@v1", "ward@v1"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [True, versions[:1], []],
        [True, sorted(versions[:2]), []],
        [True, sorted(versions), []],
        [True, sorted(versions), ["staging"]],
    ]
    assert registry.verify() == []
    assert go(asked).published.alias == "ward@staging"
    assert sorted(version.reference for version in registry.versions()) == sorted(versions)
    assert [entry.action for entry in registry.history()] == ["promote", "push", "push", "push"]
