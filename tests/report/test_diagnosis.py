"""The page of a diagnosis: whole, partial and hostile data; self-contained; everything that was measured is on it."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.report.diagnosis import PAIRS, render_diagnosis
from lorchestra.report.heatmap import conflict, grid, matrix, ratio, share, signed

NAMES = ("terms", "notes", "style")
EVIL = "</title><script>alert(1)</script>\"'&<b x='"


def cells(**figures):
    return [
        {"layer": layer, "kind": kind, **{name: value + layer / 100 for name, value in figures.items()}}
        for layer in range(3)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ]


def make_data(names=NAMES):
    met = {
        "cosine": -0.25, "row_overlap": 0.75, "row_chance": 0.1, "row_angle": 20.0, "column_overlap": 0.125,
        "column_chance": 0.1, "column_angle": 80.0, "sign_conflict": 0.55, "sign_conflict_weighted": 0.625,
    }  # fmt: skip
    adapter = {
        "norm": 3.25, "relative": 0.012, "rank": 8, "effective_rank": 5.5, "rank_90": 4, "rank_99": 7,
        "kept": {"1": 0.5, "4": 0.9, "8": 1.0}, "cells": cells(norm=1.0, relative=0.01), "modules": {"x": {}, "y": {}},
    }  # fmt: skip
    pairs = [
        {"a": a, "b": b, "shared": 6, "overall": met, "cells": cells(**met)}
        for k, a in enumerate(names)
        for b in names[k + 1 :]
    ]
    return {
        "base": "my-base",
        "created": "2026-01-01",
        "lorchestra": "0.1.0",
        "adapters": {name: copy.deepcopy(adapter) for name in names},
        "pairs": pairs,
        "activation": {
            names[0]: {"tokens": 321, "overall": {names[-1]: 1.75}, "cells": cells(**{names[-1]: 1.75})},
        },
        "tiles": {"seen": 3, "total": 40, "sampled": {"model.x": {"corners": [[0, 256], [512, 0]], "total": 20}}},
        "reading": [
            {"kind": "fight", "text": "terms and notes fight in layers 0–2"},
            {"kind": "loose", "text": "so so"},
        ],
    }


class Page(HTMLParser):
    """Parsed: visible text, tags, attributes that would fetch something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.opened, self.words = [], [], [], []
        self.feed(text)
        assert self.opened == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag != "meta":
            self.opened.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def test_what_was_measured_is_on_the_page():
    html = render_diagnosis(make_data())
    page = Page(html)
    text = " ".join(page.words).replace("\u00a0", " ")
    said = (
        "terms and notes fight in layers 0–2", "3.25", "1.2 %", "5.5", "−0.25", "0.75", "55 %", "62.5 %", "1.75",
        "321 supervised tokens", "3 of 40 tiles", "(0, 256), (512, 0) of 20", "base my-base",
    )  # fmt: skip
    for words in said:
        assert words in text, words
    assert "layer 2, mlp.down_proj: −0.23" in text
    assert re.findall(r'<li class="trouble">(.*?)</li>', html) == ["terms and notes fight in layers 0–2"]


def assert_self_contained(html):
    """Nothing is fetched, and of scripts the policy allows the page's own alone."""
    assert Page(html).fetched == []
    assert not re.search(r"https?://|@import|url\(", html)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_self_contained_and_by_policy():
    assert_self_contained(render_diagnosis(make_data()))


def test_every_text_is_escaped():
    data = make_data((EVIL, EVIL + "2"))
    data["base"] = data["created"] = EVIL
    data["reading"] = [{"kind": EVIL, "text": EVIL}]
    data["tiles"]["sampled"] = {EVIL: {"corners": [[0, 0]], "total": 2}}
    for cell in data["pairs"][0]["cells"]:
        cell["kind"] = EVIL
    html = render_diagnosis(data)
    plain = Page(render_diagnosis(make_data(("a", "b"))))
    assert Page(html).tags.count("script") == plain.tags.count("script") == 1
    assert "b" not in Page(html).tags
    assert "alert(1)</script>" not in html


def test_one_adapter_without_a_base():
    data = make_data(("only",))
    data |= {"base": "", "activation": {}, "reading": [], "tiles": {"seen": 0, "total": 0, "sampled": {}}}
    data["adapters"]["only"]["relative"] = None
    for cell in data["adapters"]["only"]["cells"]:
        cell["relative"] = None
    html = render_diagnosis(data)
    assert 'id="pairs"' not in html
    assert 'id="together"' not in html
    assert "‖ΔW‖/‖W‖" not in html
    assert "No figure is beyond a threshold" in html
    assert "layer 0, mlp.down_proj: 1<" in html


def test_many_pairs_are_cut_to_the_most_related_and_said_so():
    data = make_data(tuple(f"a{k}" for k in range(6)))
    for k, pair in enumerate(data["pairs"]):
        pair["overall"] = {**pair["overall"], "cosine": k / 100}
    html = render_diagnosis(data)
    shown = re.findall(r'<h3>(a\d) <span class="soft">and</span> (a\d)</h3>', html)
    assert len(shown) == PAIRS < len(data["pairs"])
    assert ("a0", "a1") not in shown, "cosine 0"
    assert f"{len(data['pairs']) - PAIRS} more are in the JSON" in html


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_anything_may_be_missing_or_strange(draw):
    """Whatever stands where something else should be, the page is made."""
    data = make_data()
    strange = st.none() | st.text() | st.floats() | st.integers() | st.lists(st.integers(), max_size=2)
    for _ in range(3):
        spot, key = data, draw.draw(st.sampled_from(sorted(data)))
        while isinstance(spot[key], dict) and spot[key] and draw.draw(st.booleans()):
            spot, key = spot[key], draw.draw(st.sampled_from(sorted(spot[key])))
        spot[key] = draw.draw(strange)
    Page(render_diagnosis(data))


def test_colours_go_from_nothing_to_much():
    for tone in (signed, share, ratio):
        assert "0.0%" in tone(0.0)
        assert tone(0.2) != tone(0.4)
        assert tone(1.0) == tone(7.0)
    assert "--worse" in signed(-0.1)
    assert "--better" in signed(0.1)
    assert conflict(0.5) == signed(0.0)
    assert "--worse" in conflict(0.6)


def test_maps_leave_out_what_is_not_known():
    values = {("q", "0"): 0.5, ("q", "1"): None, ("o", "1"): float("nan")}
    assert str(grid(["q", "o"], ["0", "1"], values, share, "x")).count("<rect") == 1
    assert str(matrix(["a"], ["a", "b"], {("a", "b"): 2.0}, ratio, "x", str)).count("<rect") == 1
