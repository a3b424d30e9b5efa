"""The gate's section: verdict, table, heat map, prompts explained; anything may be missing."""

from __future__ import annotations

import copy
import re

import pytest
from tests.report.test_write import Page, make_data

from lorchestra.report.gate import gate_section
from lorchestra.report.write import render_report

DOMAINS = ("general", "clinic")
MODELS = ("base", "general", "clinic", "uniform", "static", "oracle", "gate")


def make_gate():
    return {
        "sentence": "The gate is kept: its sealed-test loss is 3.1% of the base's below that of the static weights.",
        "kept": True,
        "notes": ["The oracle takes in each domain the coefficients with the lowest loss."],
        "warnings": ["The gate has collapsed: 'general' has 96% or more of the weight in every domain."],
        "members": ["general", "clinic", "preference"],
        "evaluation": {
            "models": list(MODELS),
            "domains": list(DOMAINS),
            "rows": [
                {"model": m, "domain": d, "metric": "nll", "estimate": 3 - k / 10, "low": 2.9 - k / 10,
                 "high": 3.1 - k / 10, "n": 40} for k, m in enumerate(MODELS) for d in DOMAINS
            ],
            "differences": [
                {"a": "gate", "b": m, "domain": d, "metric": "nll", "estimate": -0.1, "low": -0.2, "high": -0.05,
                 "n": 40} for m in MODELS[:-1] for d in DOMAINS
            ],
        },
        "means": {
            "general": {"general": 0.81, "clinic": 0.15, "preference": 0.04},
            "clinic": {"general": 0.07, "clinic": 0.9, "preference": 0.03},
        },
        "own": {"general": {"estimate": 0.95, "low": 0.9, "high": 0.98, "n": 40}},
        "oracle": {"general": {"general": 1.0}, "clinic": {"clinic": 1.0}},
        "prompts": [
            {
                "domain": domain,
                "prompt": f"What helps against a {domain} cold? 感冒了怎么办？",
                "coefficients": {"general": 0.7, "clinic": 0.25, "preference": 0.05},
                "nearest": [
                    {"domain": "general", "prompt": "I have a runny nose.", "similarity": 0.91},
                    {"domain": "clinic", "prompt": "Which antiviral, and at what dose?", "similarity": 0.6},
                ],
            }
            for domain in DOMAINS
        ],
        "candidates": [
            {"name": "gate:softmax-0-0", "value": 0.82, "gate": True, "taken": True},
            {"name": "gate:sigmoid-0-0", "value": 0.84, "gate": True, "taken": False},
            {"name": "static", "value": 0.86, "gate": False, "taken": False},
            {"name": "base", "value": 1.0, "gate": False, "taken": False},
        ],
        "history": [
            {"step": 0, "loss": None, "validation": 0.9},
            {"step": 10, "loss": 0.8, "validation": 0.84},
            {"step": 20, "loss": 0.7, "validation": 0.82},
        ],
        "settings": {"activation": "softmax", "layers": 0, "top_k": None, "prompts": 200, "parameters": 1731,
                     "digest": "sha256:gate-digest"},
        "ledger": [{"domain": "general", "digest": "ld", "reads": 4}],
    }  # fmt: skip


def whole():
    return {**make_data(), "gate": make_gate()}


def test_the_section_tells_what_was_judged_and_shows_it():
    page = Page(render_report(whole()))
    assert "gate" in page.ids
    for text in (
        "The gate is kept: its sealed-test loss",
        "The oracle takes in each domain",
        "The gate has collapsed",
        "general 4×",
        "gate:softmax-0-0",
        "0.8200",
        "感冒了怎么办？",
        "Which antiviral, and at what dose?",
        "cosine 0.91",
        "sha256:gate-digest",
        "its own adapter has the largest coefficient for 95",
        "kept",
    ):
        assert text in page.said
    assert {attrs.get("href") for tag, attrs in page.tags if tag == "a"} >= {"#gate"}


def test_the_heat_map_has_a_cell_for_every_domain_and_adapter():
    drawn = str(gate_section(make_gate(), {})["map"])
    assert drawn.count("<rect") == 6
    assert {"0.81", "0.90", "0.03"} <= set(re.findall(r">(−?\d\.\d\d)<", drawn))
    told = make_gate()
    told["means"]["clinic"]["preference"] = -0.2  # of linear coefficients
    assert "−0.20" in str(gate_section(told, {})["map"])
    assert "--worse" in str(gate_section(told, {})["map"])


def test_the_tables_mark_the_gate_and_compare_it_with_the_base():
    section = gate_section(make_gate(), {})
    (table,) = section["tables"]
    assert [row["name"] for row in table["rows"] if row["delivered"]] == ["gate"]
    (differences,) = section["differences"]
    assert [row["name"][1] for row in differences["rows"]][-1] == "base"
    assert section["candidates"][0]["name"] == "gate:softmax-0-0", "lowest first"
    lost = make_gate() | {"kept": False}
    assert ">not kept<" in render_report({**make_data(), "gate": lost})


def test_without_a_gate_there_is_no_section():
    for absent in (None, {}, [], "gone"):
        page = Page(render_report({**make_data(), "gate": absent}))
        assert "gate" not in page.ids
        assert "#gate" not in {attrs.get("href") for tag, attrs in page.tags if tag == "a"}


@pytest.mark.parametrize("anything", [None, -3, float("nan"), "text", [], {}, [1, "x"], {"a": {"b": [None]}}, [[1]]])
@pytest.mark.parametrize("key", list(make_gate()))
def test_any_part_may_be_anything(key, anything):
    told = make_gate()
    told[key] = anything
    Page(render_report({**make_data(), "gate": told}))
    if isinstance(made := make_gate()[key], list) and made and isinstance(made[0], dict):
        for inner in made[0]:
            told = copy.deepcopy(make_gate())
            told[key][0][inner] = anything
            Page(render_report({**make_data(), "gate": told}))


def test_hostile_prompts_stay_text():
    told = make_gate()
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    told["prompts"][0] |= {"prompt": hostile, "domain": hostile}
    told["prompts"][0]["nearest"][0] |= {"prompt": hostile, "domain": hostile}
    told["members"][0] = hostile
    told["means"]["general"][hostile] = 0.5
    told["sentence"] = hostile
    page = Page(render_report({**make_data(), "gate": told}))
    assert len(page.scripts) == 1
    assert "img" not in {tag for tag, _ in page.tags}
    assert hostile in page.said
