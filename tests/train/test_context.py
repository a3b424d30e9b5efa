"""Curriculum schedules: where they start, stay and end, against the formulas written out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lorchestra.train.context import final_weights, first_weights, progress_at, weight_at, weights_at
from lorchestra.train.settings import ContextMember

fractions = st.floats(0, 1)
weights = st.floats(-2, 2)


@st.composite
def members(draw, schedules=("constant", "linear", "cosine", "step")):
    start, end = sorted((draw(fractions), draw(fractions)))
    if end - start < 1e-6:
        start, end = 0.0, 1.0
    return ContextMember(
        weight=draw(weights), to=draw(weights), schedule=draw(st.sampled_from(schedules)), start=start, end=end
    )


@given(members(), fractions)
def test_between_the_two_weights(member, progress):
    low, high = sorted((member.weight, member.to))
    found = weight_at(member, progress)
    assert low - 1e-12 <= found <= high + 1e-12


@given(members(("linear", "cosine")), fractions)
def test_formulas(member, progress):
    if progress <= member.start:
        expected = member.weight
    elif progress >= member.end:
        expected = member.to
    else:
        t = (progress - member.start) / (member.end - member.start)
        share = t if member.schedule == "linear" else math.sin(math.pi * t / 2) ** 2
        expected = (1 - share) * member.weight + share * member.to
    assert weight_at(member, progress) == pytest.approx(expected, abs=1e-9)


@given(members(("linear", "cosine")), fractions, fractions)
def test_monotone(member, a, b):
    first, second = sorted((a, b))
    change = weight_at(member, second) - weight_at(member, first)
    assert change * (member.to - member.weight) >= -1e-12


@given(members(("step",)), fractions)
def test_a_step_jumps_at_its_start(member, progress):
    assert weight_at(member, progress) == (member.weight if progress < member.start else member.to)


@given(members(("constant",)), fractions)
def test_constant_ignores_the_rest(member, progress):
    assert weight_at(member, progress) == member.weight


def test_the_articles_curriculum():
    """An old adapter fades over the second half, to a floor; halfway down at three quarters."""
    for schedule in ("linear", "cosine"):
        member = ContextMember(weight=1.0, schedule=schedule, to=0.2, start=0.5)
        found = [round(weight_at(member, t), 6) for t in (0.0, 0.5, 0.75, 1.0)]
        assert found == [1.0, 1.0, 0.6, 0.2]


def test_first_and_final_weights_of_a_context():
    context = {
        "kept": ContextMember(weight=0.7),
        "fading": ContextMember(weight=1.0, schedule="cosine", to=0.0),
        "floor": ContextMember(weight=1.0, schedule="linear", to=0.25, end=0.5),
        "dropped": ContextMember(weight=1.0, schedule="step", to=0.0, start=0.8),
        "from the start": ContextMember(weight=1.0, schedule="step", to=0.5, start=0.0),
    }
    assert first_weights(context) == {"kept": 0.7, "fading": 1.0, "floor": 1.0, "dropped": 1.0, "from the start": 0.5}
    final = {"kept": 0.7, "fading": 0.0, "floor": 0.25, "dropped": 0.0, "from the start": 0.5}
    assert final_weights(context) == pytest.approx(final)
    assert list(weights_at(context, 0.5)) == list(context), "in the context's order"
    assert first_weights({}) == final_weights({}) == {}


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.8, 0.2)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_fade_needs_time(schedule, start, end):
    with pytest.raises(ValidationError, match="must come before end"):
        ContextMember(schedule=schedule, start=start, end=end)


@given(members(), st.integers(2, 50))
def test_the_last_step_trains_at_the_weights_that_are_validated(member, steps):
    """And the first at those of the preference reference; by even strides between."""
    weights = [weight_at(member, progress_at(step, steps)) for step in range(steps)]
    assert {"m": weights[0]} == first_weights({"m": member})
    assert {"m": weights[-1]} == final_weights({"m": member})
    strides = [progress_at(step + 1, steps) - progress_at(step, steps) for step in range(steps - 1)]
    assert strides == pytest.approx([1 / (steps - 1)] * (steps - 1))


def test_a_single_step_trains_where_the_reference_stands():
    assert progress_at(0, 1) == 0.0
