"""``run``, ``plan`` and ``check`` of a recipe that publishes, as a person types them."""

from __future__ import annotations

import json

import pytest
from tests.pipeline.small_runs import small_recipe, write_data

from lorchestra.registry.registry import Registry

FAST = ("--set", "stages.0.max_steps=1", "--set", "stages.1.max_steps=1")


@pytest.fixture
def recipe(tmp_path, tiny_dir, monkeypatch):
    """``recipe(publish)`` writes one beside its data and an empty registry."""
    monkeypatch.setenv("LORCHESTRA_REGISTRY", str(tmp_path / "registry"))
    write_data(tmp_path)
    Registry.open(str(tmp_path / "registry"), create=True).close()

    def write(publish):
        (tmp_path / "recipe.yaml").write_text(json.dumps(small_recipe(tiny_dir, publish)))

    return write


def test_published_and_refused(lorchestra, recipe, tmp_path):
    recipe({"name": "ward", "alias": "staging", "gates": ["loss<=0.1"]})
    planned = lorchestra("plan", "recipe.yaml", *FAST)
    assert "publish: ward to ${LORCHESTRA_REGISTRY}; ward@staging if loss<=0.1" in planned.out
    refused = lorchestra("run", "recipe.yaml", *FAST)
    assert refused.code == 1
    for words in ("ward@v1 is published.", "loss<=0.1: refused; measured", "Everything that was made is kept in"):
        assert words in refused.err
    assert "The delivered model " in refused.err
    assert "Traceback" not in refused.err
    told = lorchestra("run", "recipe.yaml", *FAST, "--set", "deliver.publish.gates=[loss<=9]")
    assert told.code == 0, told.err
    assert "published: ward@v1 in ${LORCHESTRA_REGISTRY}; ward@staging leads to it" in told.err
    (line,) = [line for line in told.out.splitlines() if line.startswith("published")]
    assert line.split() == ["published", "ward@v1,", "ward@staging"]
    found = json.loads(lorchestra("run", "recipe.yaml", *FAST, "--set", "deliver.publish.gates=[]", "--json").out)
    assert found["published"] == {"reference": "ward@v1", "alias": "ward@staging", "stages": []}
    shown = lorchestra("registry", "list", "--metric", "loss")
    assert shown.out.count("ward@v1") == 1


@pytest.mark.parametrize("verb", ["run", "plan", "check"])
def test_what_cannot_be_published_is_told_at_once(lorchestra, recipe, verb, tmp_path, monkeypatch):
    recipe({"registry": "nowhere"})
    lorchestra(verb, "recipe.yaml").refused("deliver.publish.registry", "nowhere", "lorchestra registry init")
    monkeypatch.setenv("LORCHESTRA_REGISTRY", str(tmp_path / "of-nobody's-business"))
    recipe({})
    told = lorchestra(verb, "recipe.yaml")
    told.refused("${LORCHESTRA_REGISTRY}", "lorchestra registry init")
    assert "business" not in told.err
    secret = "postgresql://me:hunter2@host/db?blobs=/x"
    told = lorchestra(verb, "recipe.yaml", "--set", f"deliver.publish.registry={secret}")
    told.refused("holds a password", "${LORCHESTRA_REGISTRY}")
    assert "hunter2" not in told.err
    assert not (tmp_path / "home" / "steps").exists()
