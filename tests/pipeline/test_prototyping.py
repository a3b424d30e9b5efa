"""A run leaves prototypes beside its adapters, so that a server's ``auto`` knows what they are for."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.gate.scenes import random_adapter
from tests.pipeline.small_runs import Listening, small_recipe, write_data
from tests.pipeline.test_single import recipe_of

from lorchestra.adapter.adapter import Adapter
from lorchestra.data.render import Branch, Rendered
from lorchestra.gate import prototypes
from lorchestra.gate.features import features
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.prototyping import MOST, combine_prototypes, write_prototypes
from lorchestra.pipeline.single import tune
from lorchestra.recipe.recipe import Recipe
from lorchestra.registry.registry import Registry


def read(directory):
    """Verified against the adapter beside it."""
    return prototypes.load(directory, Adapter.load(directory).digest)


def test_stages_and_their_fusion_have_prototypes_and_they_are_pushed_with_them(tiny_dir, tmp_path):
    write_data(tmp_path)
    with Registry.open(str(tmp_path / "registry"), create=True, actor="tester") as registry:
        publish = {"registry": str(tmp_path / "registry"), "stages": True}
        recipe = Recipe.from_dict(small_recipe(tiny_dir, publish), tmp_path)
        run(recipe, directory=tmp_path / "run", reporter=Listening())
        stages = {name: read(tmp_path / "run" / "adapters" / name) for name in ("general", "clinic")}
        fused = read(tmp_path / "run" / "final" / "adapter")
        counts = [one.prompts for one in stages.values()]
        assert fused.prompts == sum(counts) == 48  # the training part of both stages: 0.6 of 80
        both = torch.cat([stages["general"].centroids, stages["clinic"].centroids])
        assert torch.equal(fused.centroids, both)
        for name in registry.names():
            pulled = tmp_path / "pulled" / name
            registry.pull(name, pulled)
            assert read(pulled).prompts in (*counts, 48)
        assert len(registry.names()) == 3


def test_an_adapter_that_is_trained_alone_has_them_from_the_cache_too(tiny_dir, tmp_path):
    first = tune(recipe_of(tiny_dir, tmp_path), tmp_path / "out", logs=tmp_path / "logs")
    again = tune(recipe_of(tiny_dir, tmp_path), tmp_path / "other", logs=tmp_path / "logs")
    assert (first.cached, again.cached) == (False, True)
    assert read(tmp_path / "out").prompts == read(tmp_path / "other").prompts == first.examples["train"]


def items(count, prompt=(5, 6, 7)):
    return [Rendered((*prompt, 4 + i % 250), (Branch((9, 2), (True, True)),)) for i in range(count)]


def test_they_are_of_the_training_prompts(tmp_path):
    model = make_tiny_model()
    adapter = random_adapter(model, 0)
    adapter.save(tmp_path / "a")
    write_prototypes(model, adapter, items(30), tmp_path / "a", Listening())
    x = features(model, [item.prompt for item in items(30)], prototypes.FEATURES)
    assert torch.allclose(read(tmp_path / "a").centroids[0], x.mean(dim=0), atol=1e-5)
    write_prototypes(model, adapter, items(3 * MOST), tmp_path / "a", Listening())
    assert read(tmp_path / "a").prompts == MOST


@pytest.mark.parametrize("without", [[], [Rendered((), (Branch((9, 2), (True, True)),))]])
def test_texts_without_prompts_have_none(tmp_path, without):
    adapter = random_adapter(make_tiny_model(), 0)
    adapter.save(tmp_path / "a")
    write_prototypes(make_tiny_model(), adapter, without, tmp_path / "a", Listening())
    assert read(tmp_path / "a") is None


def test_a_model_that_shows_no_features_is_told_of_and_nothing_is_lost(tmp_path):
    shallow = make_tiny_model(num_hidden_layers=1)
    adapter, listening = random_adapter(shallow, 0), Listening()
    adapter.save(tmp_path / "a")
    write_prototypes(shallow, adapter, items(3), tmp_path / "a", listening)
    assert read(tmp_path / "a") is None
    assert "no prototypes are written" in listening.said[0]


def test_a_fusion_with_a_member_that_nothing_is_known_of_has_none(tmp_path):
    model = make_tiny_model()
    one, other = random_adapter(model, 0), random_adapter(model, 1)
    one.save(tmp_path / "one")
    other.save(tmp_path / "other")
    write_prototypes(model, one, items(3), tmp_path / "one", Listening())
    (tmp_path / "sum").mkdir()
    combine_prototypes(one, {"one": tmp_path / "one", "other": tmp_path / "other"}, tmp_path / "sum")
    assert not list((tmp_path / "sum").iterdir())
