"""The surface of a search: every candidate is drawn once, where its λ say, escaped, the chosen one marked."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from lorchestra.report.figures import Candidate
from lorchestra.report.surface import surface
from lorchestra.report.write import render_report


def candidates(K, count=8):
    return [
        Candidate(tuple(math.sin(7 * i + k) for k in range(K)), 1 - i / 10, f"<no {i}>", best=i == count - 1)
        for i in range(count)
    ]


@pytest.mark.parametrize("K", [1, 2, 4, 9])
def test_every_candidate_is_drawn_once(K):
    names = [f"m{k}&<script>" for k in range(K)]
    tree = ElementTree.fromstring(str(surface(names, candidates(K))))
    shapes = tree.findall("polyline") if K > 2 else [c for c in tree.findall("circle") if c.get("class") == "candidate"]
    assert [shape.find("title").text for shape in shapes] == [f"<no {i}>" for i in range(8)], "the best is on top"
    assert len([c for c in tree.findall("circle") if c.get("class") == "ring"]) == (K if K > 2 else 1)
    labels = "".join(tree.itertext())
    assert "m0&<script" in labels
    if K > 2:
        assert [len(shape.get("points").split()) for shape in shapes] == [K] * 8


def test_places_follow_the_coefficients():
    found = [Candidate((x, y), 1.0, f"{x} {y}") for x, y in ((0.0, 0.0), (1.0, 0.0), (0.0, 2.0), (0.5, 1.0))]
    dots = ElementTree.fromstring(str(surface(("a", "b"), found))).findall("circle")
    at = {dot.find("title").text: (float(dot.get("cx")), float(dot.get("cy"))) for dot in dots}
    assert at["1.0 0.0"][0] > at["0.0 0.0"][0]
    assert at["0.0 2.0"][1] < at["0.0 0.0"][1], "up is more"
    middle = [(a + b) / 2 for a, b in zip(at["1.0 0.0"], at["0.0 2.0"], strict=True)]
    assert at["0.5 1.0"] == pytest.approx(middle, abs=0.02)


def test_the_best_has_the_darkest_colour():
    dots = re.findall(r'class="candidate"[^>]*fill="(#\w+)"', str(surface(("a", "b"), candidates(2))))
    assert dots[-1] == "#00224e"
    assert len(set(dots)) == 8


def test_nothing_to_draw():
    assert surface(("a", "b", "c"), candidates(3)) == "", "three members have the simplex"
    assert surface(("a", "b"), []) == ""
    assert surface([f"m{k}" for k in range(40)], candidates(40)) == ""
    assert surface(("a", "b"), [Candidate((math.nan, 1.0), 1.0, "x")]) == ""


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_stands_in_the_page(K):
    names, tried = [f"m{k}" for k in range(K)], candidates(K)
    rows = [{"weights": dict(zip(names, c.weights, strict=True)), "origin": "tpe", "score": c.score} for c in tried]
    search = {"members": names, "chosen": rows[-1]["weights"], "candidates": rows}
    assert render_report({"title": "t", "search": search}).count('class="surface"') == (K != 3)
