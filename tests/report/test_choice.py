"""The choice on the page: the applied rule, what it is worth, the Pareto front; never broken by its data."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.report.choice import behind, choice_section
from lorchestra.report.values import percent
from lorchestra.report.weights import search_section
from lorchestra.report.write import render_report

MEMBERS = ["general", "clinic"]


def interval(estimate, half=0.01):
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half, "n": 20}


def standing(origin, weights, ratios, *, front, picked=0.0, lowest=0.7, excess=0.0):
    score = sum(ratios) / 2
    return {
        "weights": dict(zip(MEMBERS, weights, strict=True)), "origin": origin, **interval(score), "score": score,
        "ratios": {name: interval(value) for name, value in zip(MEMBERS, ratios, strict=True)},
        "behind": interval(score - lowest, 0.0 if score == lowest else 0.05), "error": 0.02, "excess": excess,
        "undominated": front, "picked": picked,
    }  # fmt: skip


def search():
    return {
        "strategy": "gradient",
        "members": MEMBERS,
        "chosen": {"general": 1.0, "clinic": 0.0},
        "validation_items": 40,
        "candidates": [
            standing("base", (0, 0), (1.0, 1.0), front=False),
            standing("single", (1, 0), (0.6, 0.9), front=True, picked=0.9),
            standing("gradient", (0.7, 0.4), (0.7, 0.7), front=True, picked=0.1),
            standing("single", (0, 1), (0.95, 0.8), front=False, excess=0.3),
        ],
        "selection": {
            "rule": "one_se", "goal": "the mean over domains of loss / base loss", "tolerance": 0.02,
            "chosen": 1, "adapters": 1, "minimum": 2, "folds": 5, "repeats": 10,
            "groups": {"general": 20, "clinic": 20}, "reasons": ["Because <b>."],
            "worth": [
                {"rule": "one_se", "taken": 1, "naive": 0.75, "honest": interval(0.76), "optimism": interval(0.01)},
                {"rule": "minimum", "taken": 2, "naive": 0.7, "honest": interval(0.77), "optimism": interval(0.07)},
            ],
        },
    }  # fmt: skip


def test_worth_names_the_applied_rule_and_gives_both_scores():
    one, other = choice_section(search(), MEMBERS)["worth"]
    assert (one["rule"], one["applied"], one["taken"]) == ("One standard error", True, "1·general (single)")
    assert (other["naive"], other["honest"], other["optimism"]) == ("0.7000", "0.7700", "+0.0700")
    assert other["honest_interval"] == "[0.7600, 0.7800]"
    assert other["applied"] is False


def test_the_front_has_the_undominated_and_the_marked_in_order_of_their_scores():
    front = choice_section(search(), MEMBERS)["front"]
    assert front["domains"] == MEMBERS
    assert [(row["name"], row["mark"]) for row in front["rows"]] == [
        ("0.7·general + 0.4·clinic (gradient)", "minimum"),
        ("1·general (single)", "chosen"),
    ]
    assert [cell["text"] for cell in front["rows"][1]["cells"]] == ["0.6000", "0.9000"]
    data = search()
    for row in data["candidates"]:
        row["ratios"] = {"general": interval(0.9)}
    assert choice_section(data, MEMBERS)["front"] == {}, "one domain has no front"


def test_a_dominated_choice_is_shown_and_said():
    data = search()
    data["selection"]["chosen"] = 3
    rows = choice_section(data, MEMBERS)["front"]["rows"]
    assert [(row["mark"], row["dominated"]) for row in rows if row["dominated"]] == [("chosen", True)]
    assert [row["excess"] for row in rows] == ["", "", "0.3000"]


def test_long_fronts_keep_the_chosen():
    data = search()
    data["candidates"] += [standing("grid", (0, k), (0.5, 0.5), front=True) for k in range(30)]
    front = choice_section(data, MEMBERS)["front"]
    assert front["more"] == 32 - len(front["rows"])
    assert {"chosen", "minimum"} <= {row["mark"] for row in front["rows"]}


def test_candidates_show_their_distance_to_the_lowest_and_how_often_folds_took_them():
    found = search_section(search(), {})
    assert found["compared"]
    rows = {row["origin"] + row["score"]: row["behind"] for row in found["rows"]}
    assert rows["single0.7500"]["text"] == "0.0500"
    assert rows["single0.7500"]["error"] == "± 0.0200"
    assert rows["single0.7500"]["picked"] == percent(0.9)
    assert rows["gradient0.7000"]["picked"] == percent(0.1)


def test_the_page_has_it_all_escaped():
    page = render_report({"title": "x", "search": search()})
    assert "Because &lt;b&gt;." in page
    for text in ("What the choice is worth", "Plain minimum", "applied", "Domain by domain", "Over the limit"):
        assert text in page


def test_a_report_without_a_choice_is_as_it_was():
    data = search()
    del data["selection"]
    for row in data["candidates"]:
        for key in ("behind", "ratios", "picked"):
            del row[key]
    assert choice_section(data, MEMBERS) == {}
    found = search_section(data, {})
    assert not found["compared"]
    assert "What the choice is worth" not in render_report({"title": "x", "search": data})
    assert behind({}, (0, 1), False) == {}


JUNK = st.sampled_from([None, True, "x", -1, 10**9, 0.5, [], {}, [{}], {"a": 1}, ["x"]])


@pytest.mark.parametrize("part", ["selection", "candidates"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_leaf_may_be_anything(part, data):
    found = search()
    here = found[part]
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        inner = here[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            here[key] = data.draw(JUNK)
            break
        here = inner
    render_report(json.loads(json.dumps({"title": "x", "search": found})))
