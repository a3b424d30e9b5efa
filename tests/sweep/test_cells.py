"""A specification → cells, and a cell → its recipe."""

from __future__ import annotations

import math

import pytest

from lorchestra.errors import RecipeError
from lorchestra.sweep.cells import Cell, cells, condition, grid, recipe_of, setting_key, tuning_cells


def lora_and_train(spec, settings, seed=0):
    recipe = recipe_of(spec, Cell(settings, seed))
    stage = recipe.stages[-1]
    return recipe.lora_of(stage), recipe.train_of(stage)


def test_the_grid_is_walked_seed_by_seed(make_spec):
    spec = make_spec(axes={"lora.rank": [2, 4], "lora.scaling": ["lora", "rslora"]}, seeds=2)
    found = cells(spec)
    assert [cell.seed for cell in found] == [0] * 4 + [1] * 4
    assert [tuple(cell.settings.values()) for cell in found[:4]] == [
        (2, "lora"), (2, "rslora"), (4, "lora"), (4, "rslora"),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert {cell.fold for cell in cells(spec, folds=3)} == {0, 1, 2}


def test_without_axes_there_is_one_setting():
    assert grid({}) == [{}]


def test_names():
    cell = Cell({"lora.rank": 4, "lora.scaling": "rslora", "train.learning_rate": 1e-5}, 0, 2)
    assert cell.name == "rank 4 · scaling rslora · learning_rate 1e-05 · seed 0 · fold 3"


def test_tuned_values_stand_beside_the_axes_that_keep_them(make_spec):
    spec = make_spec(axes={"lora.rank": [2, 4]}, tune={"train.learning_rate": [0.1, 0.2]}, seeds=[7, 8])
    tried = tuning_cells(spec)
    assert {cell.seed for cell in tried} == {7}, "the first seed alone"
    assert len(tried) == 4
    kept = {setting_key({"lora.rank": 2}): {"train.learning_rate": 0.2}}
    kept[setting_key({"lora.rank": 4})] = {"train.learning_rate": 0.1}
    assert [cell.settings["train.learning_rate"] for cell in cells(spec, kept)] == [0.2, 0.1, 0.2, 0.1]
    assert cells(spec, kept)[0] in tried, "what was tried and kept is the same training"


@pytest.mark.parametrize("rate", [1e-5, 2e-4, 0.01, 1])
def test_values_arrive_as_they_are(make_spec, rate):
    _, train = lora_and_train(make_spec(), {"train.learning_rate": rate})
    assert train.learning_rate == rate


def test_stage_keys_are_the_swept_stages_and_others_the_recipes(make_spec):
    spec = make_spec(stage="earlier")
    recipe = recipe_of(spec, Cell({"lora.rank": 16, "epochs": 3, "max_length": 32}, 0))
    assert recipe.lora_of(recipe.stage("earlier")).rank == 16
    assert recipe.train_of(recipe.stage("earlier")).epochs == 3
    assert recipe.lora_of(recipe.stage("colours")).rank == 2
    assert recipe.max_length == 32


def test_one_scale_at_the_anchor_and_one_product_everywhere(make_spec):
    spec = make_spec(anchor={"rank": 8, "scale": 2}, scaled_learning_rate=2e-3)
    for scaling, exponent in (("lora", 1), ("rslora", 0.5), ("constant", 0)):
        for rank in (4, 8, 64):
            lora, train = lora_and_train(spec, {"lora.rank": rank, "lora.scaling": scaling})
            assert lora.scale == pytest.approx(2 * (8 / rank) ** exponent)
            assert lora.scale * train.learning_rate == pytest.approx(2e-3)
            assert lora.rank == rank


def test_a_rank_that_is_left_open_is_pinned_where_the_learning_rate_follows_from_it(recipe, make_spec):
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("rank: 2, alpha: 4, ", ""), encoding="utf-8")
    found = recipe_of(make_spec(axes={"data.size": [10]}, scaled_learning_rate=2e-3), Cell({"data.size": 10}, 0))
    assert not {"lora.rank", "lora.alpha", "train.learning_rate"} & set(found.open_keys(found.stages[-1]))
    free = recipe_of(make_spec(axes={"data.size": [10]}, anchor=True), Cell({"data.size": 10}, 0))
    assert "lora.rank" in free.open_keys(free.stages[-1])
    assert free.lora_of(free.stages[-1]).alpha == pytest.approx(2 * math.sqrt(8))


def test_the_same_key_in_two_spellings_is_refused(make_spec):
    with pytest.raises(RecipeError, match=r"lora.rank and stages.colours.lora.rank are the same key"):
        recipe_of(make_spec(), Cell({"lora.rank": 2, "stages.colours.lora.rank": 4}, 0))


def test_conditions_are_what_losses_are_not_compared_across():
    settings = {
        "lora.rank": 4, "train.learning_rate": 0.1, "epochs": 2, "stages.s.context.t.weight": 1,
        "stages.t.lora.rank": 2, "data.noise": 0.2, "base": "b", "max_length": 64, "stages.s.data.0.limit": 9,
    }  # fmt: skip
    assert set(condition(settings)) == {"data.noise", "base", "max_length", "stages.s.data.0.limit"}


def test_values_that_are_mappings_are_told_whole():
    settings = {"lora.orthogonality": {"mode": "penalty", "weight": 0.1}, "stages.s.context": {}}
    name = Cell(settings, 0).name
    assert name == "orthogonality mode penalty, weight 0.1 · context none · seed 0"
