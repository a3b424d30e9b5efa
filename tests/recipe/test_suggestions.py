"""What the examples settle: tables that are monotone and valid, and keys that are set, which nothing touches."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from lorchestra.errors import RecipeError
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import SETTLED
from lorchestra.recipe.suggestions import (
    StageExamples,
    detectable,
    lines,
    settle,
    suggest_dropout,
    suggest_epochs,
    suggest_folds,
    suggest_learning_rate,
    suggest_patience,
    suggest_rank,
)
from lorchestra.train.settings import LoraSettings, TrainSettings

SIZES = sorted({*range(1, 60), *(round(10 ** (k / 20)) for k in range(20, 110)), 199, 200, 499, 500, 999, 1000, 9_999})
FEW = StageExamples(train=60, validation=8, test=8, tokens=40.0)
MANY = StageExamples(train=20_000, validation=900, test=900, tokens=40.0)
DEFAULT = LoraSettings()
KEYS = {f"{section}.{key}" for section, keys in SETTLED.items() for key in keys}


def recipe(stage=None, **values) -> Recipe:
    return Recipe.from_dict(
        {"name": "x", "base": "b", "stages": [{"name": "a", "data": "a.jsonl"} | (stage or {})]} | values
    )


def settled(recipe: Recipe, examples: StageExamples = FEW):
    """The settings of the only stage, and key → value of what was suggested."""
    made, told = settle(recipe, {"a": examples})
    stage = made.stages[0]
    return made.lora_of(stage), made.train_of(stage), {found.key: found.value for found in told["a"]}


class TestTables:
    @pytest.mark.parametrize(
        ("suggest", "direction"),
        [
            (suggest_rank, 1),
            (suggest_dropout, -1),
            (lambda n: suggest_learning_rate(n, "sft"), -1),
            (lambda n: suggest_learning_rate(n, "dpo"), -1),
            (lambda n: suggest_epochs(n, "sft", 5.0, 8), -1),
            (lambda n: suggest_epochs(n, "sft", 200.0, 8), -1),
            (lambda n: suggest_epochs(n, "dpo", 200.0, 8), -1),
        ],
    )
    def test_monotone_in_n_valid_and_with_n_in_the_reason(self, suggest, direction):
        found = [suggest(n) for n in SIZES]
        values = np.array([one.value for one in found])
        assert (direction * np.diff(values) >= 0).all()
        section, _, key = found[0].key.partition(".")
        for n, one in zip(SIZES, found, strict=True):
            {"lora": LoraSettings, "train": TrainSettings}[section].model_validate({key: one.value})
            assert re.match(rf"{n:,} examples?: \w", one.reason)
            assert one.text == f"{one.key} {one.value:.4g} ({one.reason})"

    def test_updates_are_enough_or_the_examples_repeated_as_often_as_they_may_be(self):
        for n in SIZES:
            for batch in (4, 8, 32):
                for task, tokens, most in (("sft", 5.0, 6), ("sft", 200.0, 4), ("dpo", 5.0, 3)):
                    epochs = suggest_epochs(n, task, tokens, batch).value
                    updates = epochs * math.ceil(n / batch)
                    assert epochs == int(epochs)
                    assert 1 <= epochs <= most
                    assert updates >= 150 or epochs == most
                    assert epochs == 1 or updates - math.ceil(n / batch) < 150, "and not once more than that takes"

    def test_a_larger_scale_has_a_smaller_rate_and_a_smaller_one_has_the_same(self):
        plain = suggest_learning_rate(300, "sft").value
        for scale in (0.1, 2.0, DEFAULT.scale):
            assert suggest_learning_rate(300, "sft", scale).value == plain
        for scale in (8.0, 16.0, 64.0):
            found = suggest_learning_rate(300, "sft", scale)
            assert found.value * scale == pytest.approx(plain * DEFAULT.scale, rel=0.03)  # two digits
            assert f"{scale:.3g}" in found.reason

    def test_patience_is_for_few(self):
        assert suggest_patience(499).value == 3
        assert suggest_patience(500) is None
        assert "499 examples" in suggest_patience(499).reason

    def test_folds_from_many_for_few_to_none(self):
        found = [suggest_folds(n) for n in range(20, 3000)]
        folds = [one.value or 1 for one in found]
        assert set(folds) == {10, 5, 1}
        assert folds == sorted(folds, reverse=True)
        for n, one in enumerate(found, start=20):
            assert one.reason.startswith(f"{n:,} examples: ")
            assert ("`lorchestra sweep` with folds" in one.reason) == (one.value is not None)
        assert all(suggest_folds(n).value <= max(n, 5) for n in range(1, 60)), "a fold is not empty"
        assert "a hold-out test of 12 tells accuracies apart that differ by 0.40 or more" in suggest_folds(120).reason
        assert "a hold-out test of 40 " in suggest_folds(120, held_out=40).reason
        assert "more than there is" in suggest_folds(9).reason
        assert suggest_folds(9, held_out=0).value == 5

    @pytest.mark.parametrize("n", [12, 40, 150])
    def test_what_a_test_can_find_is_found_four_times_out_of_five(self, n):
        """A simulation: two models that disagree on a fifth of n questions, and a paired t-test at 5 %."""
        from scipy.stats import t

        apart, draws = detectable(n), np.random.default_rng(0).random((40_000, n))
        if apart > 0.2:  # they would have to disagree on more: the same variance from a normal instead
            values = apart + math.sqrt(0.2) * np.random.default_rng(1).standard_normal((40_000, n))
        else:
            values = (draws < 0.1 + apart / 2).astype(float) - (draws > 0.9 + apart / 2)
        error = values.std(axis=1, ddof=1) / math.sqrt(n)
        power = (values.mean(axis=1) / np.maximum(error, 1e-12) > t.ppf(0.975, n - 1)).mean()
        assert 0.75 < power < 0.87


class TestOpenKeys:
    def test_all_are_settled_where_nothing_is_set(self):
        lora, train, told = settled(recipe())
        assert lora == LoraSettings(dropout=0.1), "rank and α are the plain defaults"
        assert train == TrainSettings(epochs=4.0, learning_rate=5e-4, patience=3)
        assert told.keys() == KEYS - {"lora.alpha"} | {"folds"}
        lora, train, told = settled(recipe(), MANY)
        assert told.keys() == KEYS - {"train.patience"} | {"folds"}
        assert (lora.rank, lora.dropout, train.epochs, train.learning_rate) == (16, 0.0, 1.0, 2e-4)
        assert train.patience is None
        assert told["folds"] is None

    @pytest.mark.parametrize("key", sorted(KEYS))
    @pytest.mark.parametrize("where", ["recipe", "stage", "set", "set on the stage"])
    def test_a_key_that_is_set_is_never_touched(self, key, where, tmp_path):
        """To its default too: what counts is that it stands there."""
        section, _, name = key.partition(".")
        plain = {"lora": LoraSettings, "train": TrainSettings}[section].model_fields[name].default
        other = {"rank": 3, "alpha": 5.0, "dropout": 0.3, "epochs": 2.5, "learning_rate": 1e-3, "patience": 7}[name]
        (tmp_path / "r.yaml").write_text("name: x\nbase: b\nstages: [{name: a, data: a.jsonl}]\n")
        for value in (plain, other):
            text = "null" if value is None else value
            made = {
                "recipe": lambda v=value: recipe(**{section: {name: v}}),
                "stage": lambda v=value: recipe({section: {name: v}}, **{section: {name: 1 if v is None else v}}),
                "set": lambda t=text: Recipe.load(tmp_path / "r.yaml", [f"{key}={t}"]),
                "set on the stage": lambda t=text: Recipe.load(tmp_path / "r.yaml", [f"stages.a.{key}={t}"]),
            }[where]()
            lora, train, told = settled(made)
            assert getattr({"lora": lora, "train": train}[section], name) == value
            assert key not in told

    def test_shorthand_on_the_stage_is_set_too(self):
        _, train, told = settled(recipe({"epochs": 2, "learning_rate": 3e-3}))
        assert (train.epochs, train.learning_rate) == (2.0, 3e-3)
        assert not {"train.epochs", "train.learning_rate", "train.patience"} & told.keys()

    @pytest.mark.parametrize("values", [{"train": {"max_steps": 9}}, {"stage": {"max_steps": 9}}])
    def test_max_steps_says_how_long(self, values):
        _, train, told = settled(recipe(**values))
        assert (train.max_steps, train.epochs, train.patience) == (9, 1.0, None)
        assert not {"train.epochs", "train.patience"} & told.keys()
        _, train, told = settled(recipe({"epochs": "auto"}, train={"max_steps": 9}))
        assert (train.max_steps, train.epochs) == (None, 4.0), "unless the stage asks for epochs"

    def test_the_scale_is_kept_where_neither_rank_nor_alpha_is_set(self):
        for scaling in ("lora", "rslora", "constant"):
            for examples in (FEW, MANY):
                lora, _, told = settled(recipe(lora={"scaling": scaling}), examples)
                assert lora.rank == (8 if examples is FEW else 16)
                assert lora.scale == pytest.approx(LoraSettings(scaling=scaling).scale, rel=1e-15)
                changes = examples is MANY and scaling != "constant"
                assert ("lora.alpha" in told) == changes, "told where it changes"

    def test_alpha_of_a_rank_that_is_set_stays(self):
        lora, _, told = settled(recipe(lora={"rank": 2}))
        assert (lora.rank, lora.alpha) == (2, 16.0)
        assert "lora.alpha" not in told
        lora, _, told = settled(recipe(lora={"alpha": 3.0}))
        assert (lora.rank, lora.alpha) == (8, 3.0)

    def test_the_rate_heeds_the_scale_that_is_set(self):
        _, train, _ = settled(recipe(lora={"alpha": 64.0}))
        assert train.learning_rate == suggest_learning_rate(60, "sft", 64 / 8**0.5).value < 5e-4

    def test_without_validation_there_is_no_patience(self):
        _, train, told = settled(recipe(), StageExamples(60, 0, 8, 40.0))
        assert train.patience is None
        assert "train.patience" not in told

    def test_the_advice_counts_all_examples_and_those_the_verdict_reads(self):
        _, told = settle(recipe(evaluate={"test_limit": 5}), {"a": FEW})
        assert told["a"][-1].reason.startswith("76 examples: a hold-out test of 5 ")
        _, told = settle(recipe(evaluate={"test_limit": None}), {"a": FEW})
        assert " test of 8 " in told["a"][-1].reason
        _, told = settle(recipe(), {"a": StageExamples(60, 8, 0, 40.0)})
        assert " test of 6 " in told["a"][-1].reason, "a tenth, where none is held out"

    def test_what_is_settled_is_settled(self):
        once, _ = settle(recipe(), {"a": FEW})
        assert not once.open_keys(once.stages[0])
        again, told = settle(once, {"a": MANY})
        assert again.stages == once.stages
        assert [found.key for found in told["a"]] == ["folds"]


AUTO = {section: dict.fromkeys(keys, "auto") for section, keys in SETTLED.items()}


class TestAuto:
    """``auto`` is the same as not setting a key; on a stage it undoes what is set for all."""

    def test_for_all_and_on_a_stage(self):
        expected = settled(recipe())
        assert settled(recipe(**AUTO)) == expected
        assert settled(recipe(AUTO)) == expected
        assert settled(recipe({"epochs": "auto", "learning_rate": "auto"})) == expected
        lora, train = {"rank": 3, "alpha": 7.0, "dropout": 0.2}, {"epochs": 9.0, "learning_rate": 1.0, "patience": 1}
        assert settled(recipe(AUTO, lora=lora, train=train)) == expected

    def test_by_set(self, tmp_path):
        (tmp_path / "r.yaml").write_text(
            "name: x\nbase: b\nlora: {rank: 3}\nstages: [{name: a, data: a.jsonl, max_steps: 4}]\n"
        )
        made = Recipe.load(tmp_path / "r.yaml", ["lora.rank=auto", "stages.a.epochs=auto"])
        assert settled(made) == settled(recipe())

    def test_a_dump_is_read_again_with_the_same_keys_open(self):
        made = recipe({"lora": {"rank": "auto"}}, lora={"rank": 8, "alpha": 16}, train={"epochs": 1.0})
        dumped = made.model_dump(mode="json")
        assert dumped["lora"]["dropout"] == dumped["train"]["learning_rate"] == "auto"
        assert (dumped["lora"]["rank"], dumped["train"]["epochs"]) == (8, 1.0)
        again = Recipe.from_dict(dumped)
        assert again.model_dump() == made.model_dump()
        assert again.open_keys(again.stages[0]) == made.open_keys(made.stages[0])

    @pytest.mark.parametrize(
        ("values", "place"),
        [
            ({"lora": {"scaling": "auto"}}, "lora.scaling"),
            ({"train": {"batch_size": "auto"}}, "train.batch_size"),
            ({"stage": {"lora": {"sigma": "auto"}}}, "stages.0.lora.sigma"),
            ({"stage": {"max_steps": "auto"}}, "max_steps"),
            ({"lora": {"rank": "atuo"}}, "lora.rank: expected a whole number, got 'atuo'"),
            ({"stage": {"lora": {"rank": "some"}}}, "stages.0.lora.rank: expected a whole number, got 'some'"),
            ({"stage": {"train": {"epochs": "Auto"}}}, "epochs: expected a number, got 'Auto'"),
        ],
    )
    def test_only_what_examples_can_settle_may_be_auto(self, values, place):
        with pytest.raises(RecipeError, match=re.escape(place)):
            recipe(**values)


def test_lines_are_one_a_suggestion_under_what_they_are():
    _, told = settle(recipe(), {"a": FEW})
    shown = lines(told)
    assert shown[0].startswith("not set, so settled from the examples")
    assert [line.split()[1] for line in shown[1 : len(told["a"])]] == [found.key for found in told["a"][:-1]]
    assert shown[len(told["a"]) :] == ["to judge stages with so many examples:", f"  a: {told['a'][-1].text}"]
    fixed, told = settle(recipe(lora={"rank": 8, "dropout": 0}, train={"epochs": 1, "learning_rate": 1e-4}), {"a": FEW})
    assert len(lines(told)) == 2, "nothing of what was set"
    assert lines({}) == []
    assert fixed.lora_of(fixed.stages[0]).alpha == 16.0
