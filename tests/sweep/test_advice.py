"""Which setting is recommended, on rows made by hand."""

from __future__ import annotations

import pytest
from tests.sweep.conftest import make_outcome

from lorchestra.sweep.advice import advise
from lorchestra.sweep.table import rows

EXAMPLES = {"train": 100, "validation": 20, "test": 3}


def table(**losses):
    """Setting r4, r8 … → its losses by seed; ``None`` diverged. Parameters grow with the rank."""
    found = []
    for name, values in losses.items():
        rank = int(name[1:])
        for seed, loss in enumerate(values):
            state = {"state": "diverged", "history": (), "test": None} if loss is None else {}
            found.append(make_outcome(loss, settings={"lora.rank": rank}, seed=seed, trainable=100 * rank, **state))
    return rows(found, ["lora.rank"])


def taken(found):
    return None if found.row is None else found.row.settings["lora.rank"]


def test_the_smallest_that_cannot_be_told_from_the_best():
    found = advise(table(r4=[1.30, 1.00, 1.10], r8=[1.15, 1.05, 1.10], r16=[1.25, 0.95, 1.05]), EXAMPLES)
    # r16 is best (1.083). r4 is worse in every seed by 0.05; r8 by −0.10, 0.10 and 0.05: 0.017 ± 0.060.
    assert found.best.settings == {"lora.rank": 16}
    assert taken(found) == 8
    assert "cannot be told" in found.sentence
    assert "100 training examples" in found.sentence


def test_the_best_if_it_can_be_told_from_all_smaller_ones():
    found = advise(table(r4=[2.0, 2.1, 2.0], r8=[1.0, 1.1, 1.0]), EXAMPLES)
    assert taken(found) == 8
    assert "lowest validation loss" in found.sentence


def test_pairs_count_and_not_the_spread_of_seeds():
    """Seeds differ by 1, settings by 0.1 in each: unpaired nobody could tell."""
    assert taken(advise(table(r4=[1.1, 2.1, 3.1], r8=[1.0, 2.0, 3.0]), EXAMPLES)) == 8


def test_one_setting_alone_is_no_choice():
    found = advise(rows([make_outcome(1.0, settings={}, seed=seed) for seed in range(3)], []), EXAMPLES)
    assert found.sentence == "There is one setting alone, for 100 training examples: its validation loss is 1.000."


def test_equals_go_to_the_smaller():
    assert taken(advise(table(r8=[1.0, 1.1], r4=[1.0, 1.1]), EXAMPLES)) == 4


def test_what_was_trained_with_another_seed_cannot_be_compared():
    """Halving may leave one setting the first seed alone, another one the second."""
    whole = make_outcome(1.0, settings={"lora.rank": 8}, seed=0, trainable=800)
    other = make_outcome(2.0, settings={"lora.rank": 4}, seed=1, trainable=400)
    stopped = [
        make_outcome(1.0, settings={"lora.rank": rank}, seed=seed, state="stopped", trainable=100 * rank, test=None)
        for rank, seed in ((8, 1), (4, 0))
    ]
    found = advise(rows([whole, other, *stopped], ["lora.rank"]), EXAMPLES)
    assert taken(found) == 8
    assert "cannot be told" not in found.sentence
    assert "It rests on 1 seed" in found.rests_on
    assert "without halving" in found.rests_on


def test_what_diverged_once_is_never_recommended():
    found = advise(table(r4=[0.1, None, 0.1], r8=[1.0, 1.0, 1.0]), EXAMPLES)
    assert taken(found) == 8
    assert found.best.settings == {"lora.rank": 8}


def test_what_ended_above_its_start_is_never_recommended():
    assert taken(advise(table(r4=[4.0, 4.0], r8=[1.0, 1.0]), EXAMPLES)) == 8
    none = advise(table(r4=[4.0, 4.0]), EXAMPLES)
    assert taken(none) is None
    assert "No setting can be recommended" in none.sentence


def test_fewer_seeds_than_others_have_are_not_enough():
    assert taken(advise(table(r4=[0.5], r8=[1.0, 1.0]), EXAMPLES)) == 8


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (table(r4=[None, None]), "diverged; try lower learning rates"),
        (rows([make_outcome(None)], ["lora.rank"]), "no validation examples"),
    ],
)
def test_why_none_is_recommended(found, word):
    assert word in advise(found, EXAMPLES).sentence


def test_what_it_rests_on():
    few = advise(table(r4=[1.0, 1.0]), EXAMPLES).rests_on
    assert "2 seeds, 20 validation examples and 3 test examples" in few
    assert "so few seeds" in few
    assert "so few" not in advise(table(r4=[1.0, 1.0, 1.1]), EXAMPLES).rests_on


def test_as_json():
    told = advise(table(r4=[1.0]), EXAMPLES).as_dict()
    assert told["settings"] == told["best"] == {"lora.rank": 4}
