"""The page of a sweep: whole, unfinished, partial and hostile data; self-contained; the article's question answered."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.report.test_diagnosis import EVIL, Page, assert_self_contained
from tests.sweep.conftest import make_outcome, make_test

from lorchestra.report.sweep import render_sweep
from lorchestra.sweep.advice import advise
from lorchestra.sweep.table import rows

AXES = {"lora.rank": [4, 8, 64], "lora.scaling": ["lora", "rslora"]}


def make_data(axes=AXES, **changes):
    found = []
    first, second = list(axes)
    for seed in range(3):
        for rank, a in enumerate(axes[first]):
            for k, b in enumerate(axes[second]):
                made = {"settings": {first: a, second: b}, "seed": seed, "trainable": 1000 * (rank + 1)}
                if (rank, k, seed) == (2, 0, 2):
                    made |= {"state": "diverged", "history": (), "test": None}
                loss = None if "state" in made else 1.5 - rank / 10 + k / 20 + seed / 100
                test = make_test((1.0, 0.0, float(seed % 2), float(k)))
                found.append(make_outcome(loss, **{"test": test, **made}))
    table = rows(found, list(axes))
    data = {
        "created": "2026-01-01T00:00:00+00:00",
        "lorchestra": "0.1.0",
        "spec": {"name": "ranks", "axes": axes},
        "folds": None,
        "cells_in_all": len(found),
        "rows": [row.as_dict() for row in table],
        "advice": [{"data": {}, **advise(table, {"validation": 20, "test": 4}).as_dict()}],
        "readings": 17,
        "start": {"metric": "accuracy", "values": [1.0, 0.0, 0.0, 0.0], "weights": [1.0] * 4},
        "cells": [outcome.as_dict() for outcome in found],
    }
    return json.loads(json.dumps({**data, **changes}))


def text_of(html):
    return " ".join(" ".join(Page(html).words).replace("\u00a0", " ").split())


def test_what_was_measured_is_on_the_page():
    html = render_sweep(make_data())
    text = text_of(html)
    for words in (
        "ranks", "take rank", "It rests on 3 seeds, 20 validation examples and 4 test examples", "recommended",
        "3 of 3", "2 of 3, 1 diverged", "Before training the test accuracy is 25.0 %", "read 17 times",
        "Stability: trainings that diverged", "Test accuracy, mean over seeds", "Overfitting:", "1.510 ± 0.01",
    ):  # fmt: skip
        assert words in text, words
    assert "unfinished" not in text
    assert "nan" not in html.lower().replace("financ", "")
    assert html.count('class="chosen') == 1


def test_the_charts_are_over_ranks_evenly_and_leave_out_survivors():
    html = render_sweep(make_data())
    frames = [json.loads(text.replace("&#34;", '"')) for text in re.findall(r'data-frame="([^"]*)"', html)]
    assert frames
    for frame in frames:
        places, labels = zip(*frame["places"], strict=True)
        assert (frame["name"], labels) == ("rank", ("4", "8", "64"))
        assert (places[1] - places[0]) * 3 == pytest.approx(places[2] - places[1], abs=0.5), "as octaves"
    tests = re.search(r"Test accuracy, mean over seeds</figcaption>(.*?)</figure>", html, re.DOTALL)[1]
    lines = re.findall(r'points="([^"]*)"[^>]*data-name="([^"]*)"', tests)
    assert {name: len(points.split()) for points, name in lines} == {"lora": 2, "rslora": 3}
    assert len(re.findall(r'class="key dots hue\d"', html)) == 2, "one legend for all charts"


def test_more_lines_than_colours_are_said_to_be_left_out():
    axes = {"lora.rank": [4, 8, 16], "train.learning_rate": [k / 1000 for k in range(1, 12)]}
    assert "3 more in the table" in text_of(render_sweep(make_data(axes)))


def test_axes_without_numbers_have_a_table_and_no_charts():
    html = render_sweep(
        make_data({"lora.scaling": ["lora", "rslora", "constant"], "lora.init": ["kaiming", "rescaled"]})
    )
    assert 'id="plots"' not in html
    assert 'id="table"' in html


def test_unfinished_and_empty():
    assert "18 of 90 trainings are done" in text_of(render_sweep(make_data(cells_in_all=90)))
    for data in ({}, {"rows": [], "advice": [], "spec": None, "start": None}):
        assert "Every setting" in render_sweep(data)


def test_no_test_and_no_validation():
    data = make_data()
    for row in data["rows"]:
        row |= {"test": None, "metric": "", "validation": None, "validation_spread": None, "gap": None}
    text = text_of(render_sweep({**data, "start": None}))
    assert "Test accuracy" not in text
    assert "–" in text


def test_numbers_that_are_none_are_not_drawn():
    data = make_data()
    for row in data["rows"]:
        row |= {"validation": float("nan"), "gap": float("inf"), "gradient": float("-inf"), "gradient_spread": None}
    html = render_sweep(data)
    table = re.search(r"<table.*?</table>", html, re.DOTALL)[0]
    assert not re.search(r"\b(nan|inf|None|undefined)\b", table, re.IGNORECASE)
    assert not re.search(r'(x|y|cx|cy|points)="[^"]*(nan|inf)', html, re.IGNORECASE)


def test_self_contained_and_by_policy():
    assert_self_contained(render_sweep(make_data()))


def test_every_text_is_escaped():
    html = render_sweep(
        make_data(
            {"lora.rank": [4, 8, 64], EVIL: [EVIL, "x"]}, spec={"name": EVIL, "axes": {"lora.rank": [], EVIL: []}}
        )
    )
    page = Page(html)
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert "alert(1)" in " ".join(page.words)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(["spec", "rows", "advice", "start", "cells", "readings", "folds", "created"]), value=anything
)
def test_a_damaged_file_still_gives_a_page(key, value):
    Page(render_sweep({**make_data(), key: value}))


def test_a_damaged_start_is_none():
    for start in ({}, {"values": [1.0]}, {"values": [], "weights": []}, {"values": "x", "weights": None}):
        assert "Before training" not in text_of(render_sweep(make_data(start=start)))


def test_the_same_data_give_the_same_page():
    assert render_sweep(make_data()) == render_sweep(make_data())
