"""Examples that are changed on purpose, and folds: what is held out stays clean and apart."""

from __future__ import annotations

import pytest

from lorchestra.errors import DataError, UserError
from lorchestra.pipeline.prepare import prepare
from lorchestra.recipe.recipe import Recipe
from lorchestra.sweep.examples import fold_of, folded, perturbed

STAGE = "colours"


@pytest.fixture
def prepared(recipe):
    return prepare(Recipe.load(recipe))


def parts(prepared):
    return dict(prepared.data[STAGE].splits.parts())


@pytest.mark.parametrize("settings", [{"data.size": 20}, {"data.noise": 0.4}, {"data.imbalance": 3}])
def test_only_training_examples_are_changed(prepared, settings):
    before, after = parts(prepared), parts(found := perturbed(prepared, STAGE, settings, 1))
    assert after["train"] != before["train"]
    assert (after["validation"], after["test"]) == (before["validation"], before["test"])
    assert len(found.data[STAGE].rendered["train"]) == len(after["train"])
    assert found.data[STAGE].rendered["test"] == prepared.data[STAGE].rendered["test"]
    assert found.data["earlier"] is prepared.data["earlier"]


def test_amounts(prepared):
    size, noise = 20, 0.4
    clean = parts(perturbed(prepared, STAGE, {"data.size": size}, 0))["train"]
    wrong = parts(perturbed(prepared, STAGE, {"data.size": size, "data.noise": noise}, 0))["train"]
    assert [example.prompt for example in clean] == [example.prompt for example in wrong]
    assert sum(a.gold != b.gold for a, b in zip(clean, wrong, strict=True)) == round(noise * size)


def test_the_seed_draws_other_examples(prepared):
    first, second = (parts(perturbed(prepared, STAGE, {"data.size": 20}, seed))["train"] for seed in (0, 1))
    assert first != second


def test_nothing_to_change_is_the_same_thing(prepared):
    assert perturbed(prepared, STAGE, {"data.noise": 0}, 0) is prepared


def test_too_many_are_refused(prepared):
    with pytest.raises(DataError, match="5000"):
        perturbed(prepared, STAGE, {"data.size": 5000}, 0)


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_test_every_example_once_and_part_no_group(prepared, folds):
    everything = [example for examples in parts(prepared).values() for example in examples]
    tested = []
    for fold in range(folds):
        found = parts(folded(prepared, STAGE, fold, folds))
        tested += found["test"]
        groups = {part: {example.group for example in examples} for part, examples in found.items()}
        assert not groups["test"] & (groups["train"] | groups["validation"])
        assert not groups["train"] & groups["validation"]
        assert sum(map(len, found.values())) == len(everything)
        assert found["validation"]
    assert len(tested) == len(everything)
    assert set(tested) == set(everything)


def test_validation_keeps_its_share_beside_training(tmp_path, tiny_dir):
    from tests.sweep.conftest import write_colours

    found = parts(folded(prepare(Recipe.load(write_colours(tmp_path, tiny_dir, 1200))), STAGE, 0, 4))
    assert len(found["test"]) / 1200 == pytest.approx(0.25, abs=0.06)
    assert len(found["validation"]) / len(found["train"]) == pytest.approx(0.2 / 0.6, abs=0.08)


def test_held_out_examples_stand_in_no_order_of_the_file(prepared):
    """So that the first n of them are a fair sample."""
    found = parts(folded(prepared, STAGE, 0, 2))["test"]
    places = [int(example.origin.rpartition(":")[2]) for example in found]
    assert places != sorted(places)
    assert len({fold_of(example, 2, 0) for example in found}) == 1


def test_a_stage_with_a_context_is_refused_by_name(recipe):
    text = recipe.read_text(encoding="utf-8") + "    context: {earlier: 1.0}\n"
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="'colours' has a context"):
        folded(prepare(Recipe.load(recipe)), STAGE, 0, 2)


def test_too_many_folds_are_refused(prepared):
    def all_of_them():
        for fold in range(500):
            folded(prepared, STAGE, fold, 500)

    with pytest.raises(UserError, match=r"too many for \d+ examples: nothing is left for the test part"):
        all_of_them()
