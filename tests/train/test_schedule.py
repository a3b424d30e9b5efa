"""Which examples a step sees: every item once an epoch, and the same at any step whoever asks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.train.schedule import BatchPlan
from lorchestra.train.settings import TrainSettings


@st.composite
def plans(draw, fixed=None):
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=90))
    given = TrainSettings(
        batch_size=draw(st.integers(1, 9)),
        gradient_accumulation=draw(st.integers(1, 4)),
        epochs=draw(st.integers(1, 3)),
    )
    kind = draw(st.booleans()) if fixed is None else fixed
    return lengths, given, draw(st.integers(0, 99)), kind


def epoch(plan, number):
    steps = range(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch)
    return [plan.step(step) for step in steps]


@given(plans())
@settings(max_examples=150, deadline=None)
def test_each_epoch_sees_each_item_once(arguments):
    plan = BatchPlan(*arguments)
    lengths, given, _, _ = arguments
    for number in range(3):
        steps = epoch(plan, number)
        seen = [i for step in steps for batch in step for i in batch]
        assert sorted(seen) == list(range(len(lengths)))
        assert all(1 <= len(batch) <= given.batch_size for step in steps for batch in step)
        assert all(1 <= len(step) <= given.gradient_accumulation for step in steps), "no step is empty"
        assert all(len(step) == given.gradient_accumulation for step in steps[:-1])


@given(plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_resume_at_any_step_sees_the_same_batches(arguments, data):
    whole = BatchPlan(*arguments)
    expected = [whole.step(step) for step in range(whole.steps)]
    start = data.draw(st.integers(0, whole.steps - 1))
    resumed = BatchPlan(*arguments)
    assert [resumed.step(step) for step in range(start, whole.steps)] == expected[start:]
    order = list(range(whole.steps))
    random.Random(0).shuffle(order)
    assert [resumed.step(step) for step in order] == [expected[step] for step in order], "in whatever order"


@given(plans(fixed=True))
@settings(max_examples=60, deadline=None)
def test_a_fixed_plan_keeps_its_micro_batches(arguments):
    plan = BatchPlan(*arguments)
    composed = {tuple(batch) for batch in plan.composition()}
    for number in range(3):
        assert {tuple(batch) for step in epoch(plan, number) for batch in step} == composed


@given(plans(fixed=True))
@settings(max_examples=60, deadline=None)
def test_a_fixed_composition_goes_by_length(arguments):
    lengths = arguments[0]
    order = [lengths[i] for batch in BatchPlan(*arguments).composition() for i in batch]
    assert order == sorted(order)


@pytest.mark.parametrize("count", [20, 65])
def test_few_items_meet_other_company_every_epoch_too(count):
    plan = BatchPlan(list(range(1, count + 1)), TrainSettings(batch_size=8, epochs=2), 0, fixed=False)
    first, second = ({tuple(sorted(batch)) for step in epoch(plan, n) for batch in step} for n in (0, 1))
    assert first != second


def test_like_lengths_share_a_micro_batch():
    chance = random.Random(0)
    lengths = [chance.randint(10, 500) for _ in range(512)]
    plan = BatchPlan(lengths, TrainSettings(batch_size=8), 0, fixed=False)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for step in epoch(plan, 0) for batch in step)
    order = list(range(512))
    chance.shuffle(order)
    at_random = sum(max(lengths[i] for i in order[k : k + 8]) * 8 for k in range(0, 512, 8))
    assert sum(lengths) <= padded < 1.15 * sum(lengths) < at_random


def orders(plan, numbers):
    return [tuple(tuple(batch) for step in epoch(plan, number) for batch in step) for number in numbers]


@pytest.mark.parametrize("fixed", [True, False])
def test_epochs_and_seeds_differ_in_order(fixed):
    lengths = [10 + i % 7 for i in range(64)]
    given = TrainSettings(batch_size=4)
    found = orders(BatchPlan(lengths, given, 0, fixed), range(3)) + orders(
        BatchPlan(lengths, given, 1, fixed), range(3)
    )
    assert len(set(found)) == 6
    assert found[:3] == orders(BatchPlan(lengths, given, 0, fixed), range(3))


def test_without_fixing_an_epoch_brings_other_company():
    lengths = [10 + i % 7 for i in range(512)]
    plan = BatchPlan(lengths, TrainSettings(batch_size=4), 0, fixed=False)
    first, second = ({frozenset(batch) for step in epoch(plan, k) for batch in step} for k in (0, 1))
    assert len(first & second) < len(first) / 2


@pytest.mark.parametrize(
    ("items", "given", "steps", "per_epoch"),
    [
        (22, {"batch_size": 4, "epochs": 2}, 12, 6),
        (22, {"batch_size": 4, "gradient_accumulation": 4, "epochs": 2}, 4, 2),
        (22, {"batch_size": 4, "epochs": 0.5}, 3, 6),
        (22, {"batch_size": 4, "epochs": 0.01}, 1, 6),
        (22, {"batch_size": 4, "epochs": 9, "max_steps": 5}, 5, 6),
        (22, {"batch_size": 100}, 1, 1),
        (1, {"batch_size": 8, "gradient_accumulation": 8}, 1, 1),
    ],
)
def test_how_many_steps(items, given, steps, per_epoch):
    plan = BatchPlan([5] * items, TrainSettings(**given), 0, fixed=False)
    assert (plan.steps, plan.steps_per_epoch) == (steps, per_epoch)
