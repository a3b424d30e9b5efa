"""What a specification says, and what is answered to one that says it wrongly."""

from __future__ import annotations

import math

import pytest

from lorchestra.errors import RecipeError
from lorchestra.sweep.spec import RANKS, Halving, SweepSpec


def load(tmp_path, text, *overrides):
    path = tmp_path / "ranks of mine.yaml"
    path.write_text(text, encoding="utf-8")
    return SweepSpec.load(path, overrides)


def test_what_is_not_said(tmp_path):
    spec = load(tmp_path, "recipe: r.yaml")
    assert spec.name == "ranks-of-mine"
    assert spec.axes == {"lora.rank": RANKS}
    assert spec.seeds == (0, 1, 2)
    assert spec.directory == tmp_path
    assert (spec.anchor, spec.halving, spec.folds) == (None, None, None)


def test_a_recipe_is_a_specification_too(recipe):
    spec = SweepSpec.load(recipe, ["seeds=2"])
    assert (spec.recipe, spec.name, spec.seeds) == ("recipe.yaml", "recipe", (0, 1))
    assert spec.axes == {"lora.rank": RANKS}


def test_a_recipe_with_a_name_that_no_directory_bears(tmp_path):
    path = tmp_path / "医学.yaml"
    path.write_text("name: 医 学\nbase: b\nstages: [{name: s, data: d}]", encoding="utf-8")
    assert SweepSpec.load(path).name == "sweep"


def test_short_forms(tmp_path):
    spec = load(tmp_path, "recipe: r\naxes: {lora.rank: 4}\nhalving: true\nanchor: false\nseeds: [3, 5]")
    assert spec.axes == {"lora.rank": (4,)}
    assert spec.halving == Halving()
    assert spec.anchor is None
    assert spec.seeds == (3, 5)


def test_overrides_are_yaml(tmp_path):
    spec = load(tmp_path, "recipe: r", "axes={lora.rank: [4, 8], data.noise: [0, 0.2]}", "seeds=5")
    assert spec.axes == {"lora.rank": (4, 8), "data.noise": (0, 0.2)}
    assert len(spec.seeds) == 5


def test_the_anchor_gives_all_scalings_one_scale_at_its_rank(make_spec):
    anchor = make_spec(anchor={"rank": 9, "scale": 3}).anchor
    scale = {
        "lora": anchor.alpha("lora") / 9,
        "rslora": anchor.alpha("rslora") / 3,
        "constant": anchor.alpha("constant"),
    }
    assert scale == pytest.approx(dict.fromkeys(scale, 3.0))


def test_rungs():
    assert Halving(first=0.1, reduction=3).rungs == pytest.approx((0.1, 0.3, 0.9))
    assert Halving(first=0.5, reduction=2).rungs == (0.5,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: r\naxis: {}", [":2", "unknown key 'axis'", "did you mean 'axes'"]),
        ("seeds: 2", ["'recipe' is missing"]),
        ("recipe: r\nrecipe: q", [":2", "second time"]),
        ("recipe: r\naxes: {data.sise: [3]}", ["unknown key 'data.sise'", "did you mean 'data.size'"]),
        ("recipe: r\naxes: {lora.rank: []}", ["lora.rank has no values"]),
        ("recipe: r\naxes: {fusion.weights: [last, equal]}", ["axes: fusion.weights changes nothing here"]),
        ("recipe: r\ntune: {name: [a, b]}", ["tune: name changes nothing here"]),
        ("recipe: r\nhalving: yes please", ["halving: expected true, or its settings", "'yes please'"]),
        ("recipe: r\naxes: {lora.rank: [4, 4.0]}", ["names a value twice"]),
        ("recipe: r\naxes: {lora.rank: [4]}\nset: {lora.rank: 8}", ["lora.rank stands in more than one"]),
        ("recipe: r\naxes: {lora.rank: [4]}\ntune: {lora.rank: [8]}", ["lora.rank stands in more than one"]),
        ("recipe: r\nanchor: true\nset: {lora.alpha: 8}", ["anchor settles lora.alpha"]),
        ("recipe: r\nscaled_learning_rate: 1\naxes: {train.learning_rate: [1]}", ["settles train.learning_rate"]),
        ("recipe: r\nseeds: [1, 1]", ["different numbers"]),
        ("recipe: r\nseeds: []", ["at least one"]),
        ("recipe: r\nseeds: 0", ["at least one seed"]),
        ("recipe: r\naxes: {seeds.init: [1, 2]}", ["seeds have a key of their own"]),
        ("recipe: r\nfolds: 1", ["folds", "at least 2"]),
        ("recipe: r\nhalving: {first: 2}", ["halving.first", "less than 1"]),
        ("recipe: r\nname: a/b", ["name"]),
        ("recipe: r\naxes: {data.size: [ten]}", ["data.size: expected a number of examples", "'ten'"]),
        ("recipe: r\naxes: {data.size: [0]}", ["data.size: expected", "got 0"]),
        ("recipe: r\nset: {data.noise: 20}", ["data.noise: expected a share", "got 20"]),
        ("recipe: r\nset: {data.noise: true}", ["data.noise: expected a share"]),
        ("recipe: r\nset: {data.imbalance: 0.5}", ["data.imbalance: expected"]),
        ("recipe: r\ntune: {data.size: [10, 20]}", ["tune: data.size is no setting to choose"]),
        ("- a", ["a list"]),
        ("recipe: r\naxes: {a: 1", [":2", "not closed"]),
    ],
)  # fmt: skip
def test_a_mistake_is_told_once_with_its_remedy(tmp_path, text, words):
    with pytest.raises(RecipeError) as told:
        load(tmp_path, text)
    for word in words:
        assert word in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_the_numbers_of_the_settings_are_finite(make_spec):
    for key in ("scaled_learning_rate",):
        with pytest.raises(RecipeError):
            make_spec(**{key: math.inf})
