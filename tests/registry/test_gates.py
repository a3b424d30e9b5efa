"""Gates: as text, by direction, against the same sealed test; whatever is missing refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.errors import UserError
from lorchestra.registry.gates import NotWorse, Requires, Threshold, check_gates, parse_gate, refuse
from lorchestra.registry.manifest import Manifest, Metric
from lorchestra.registry.mistakes import PromotionRefused

numbers = st.floats(-100, 100)


def manifest(number=1, metrics=None, **changes):
    fields = {
        "name": "clinic", "number": number, "digest": "sha256:" + "1" * 64,
        "files": {"a": {"sha256": "sha256:" + "2" * 64, "size": 3}}, "base": {}, "ranks": {}, "scales": {},
        "parameters": 1, "made_by": "foreign", "stage": "", "task": "", "recipe": {}, "settings": {}, "data": {},
        "parents": [], "context": [], "metrics": metrics or {}, "tools": {}, "created": "", "created_by": "", **changes,
    }  # fmt: skip
    return Manifest(**fields)


def sealed(value, low=None, high=None, better="lower", test="sha256:t"):
    return Metric(value=value, low=low, high=high, better=better, split="sealed", sealed=test)


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("loss<=1.2", Threshold("loss", "<=", 1.2)),
        (" loss < -1e-3 ", Threshold("loss", "<", -0.001)),
        ("accuracy>=.9", Threshold("accuracy", ">=", 0.9)),
        ("a.b-c>0", Threshold("a.b-c", ">", 0.0)),
        ("not-worse:loss", NotWorse("loss")),
        ("requires:data", Requires("data")),
    ],
)
def test_gates_are_read_and_written(text, gate):
    assert parse_gate(text) == gate
    assert parse_gate(str(gate)) == gate


@pytest.mark.parametrize(
    "text", ["", "loss", "loss=1", "loss==1", "loss<=", "<=1", "loss<=one", "loss<=nan", "loss<=1e999", "not-worse:",
             "not-worse", "requires:", "requires:money", "loss<=1<=2", "better:loss", "loss <= 1 2"],
)  # fmt: skip
def test_what_is_no_gate_is_told_with_the_forms(text):
    with pytest.raises(UserError, match=r"gates are loss<=|requires:"):
        parse_gate(text)


@given(numbers, numbers, st.sampled_from(["lower", "higher"]), st.booleans())
def test_a_threshold_lets_through_what_lies_on_its_better_side(value, bound, better, strict):
    sign = ("<" if better == "lower" else ">") + ("" if strict else "=")
    outcome = Threshold("loss", sign, bound).check(manifest(metrics={"loss": Metric(value=value, better=better)}), None)
    beyond = value < bound if better == "lower" else value > bound
    assert outcome.passed == (beyond or (value == bound and not strict))


@pytest.mark.parametrize(("better", "text"), [("higher", "accuracy<=0.9"), ("lower", "accuracy>0.9")])
def test_a_bound_on_the_wrong_side_is_a_mistake(better, text):
    with pytest.raises(UserError, match="let the worst through"):
        parse_gate(text).check(manifest(metrics={"accuracy": Metric(value=0.5, better=better)}), None)


@given(numbers, numbers, st.floats(0, 10), st.floats(0, 10), st.sampled_from(["lower", "higher"]))
def test_not_worse_means_not_beyond_the_bad_end_of_production_s_interval(ours, theirs, below, above, better):
    current = manifest(1, {"loss": sealed(theirs, theirs - below, theirs + above, better)})
    outcome = NotWorse("loss").check(manifest(2, {"loss": sealed(ours, better=better)}), current)
    assert outcome.passed == (ours <= theirs + above if better == "lower" else ours >= theirs - below)
    bare = manifest(1, {"loss": sealed(theirs, better=better)})
    outcome = NotWorse("loss").check(manifest(2, {"loss": sealed(ours, better=better)}), bare)
    assert outcome.passed == (ours <= theirs if better == "lower" else ours >= theirs), "without an interval the value"


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ({}, {"loss": sealed(1)}, "no loss of clinic@v2"),
        ({"loss": sealed(1)}, {"nll": sealed(1)}, "no loss of clinic@v1 .it has nll"),
        ({"loss": sealed(1, test="")}, {"loss": sealed(1)}, "clinic@v2 does not say on which"),
        ({"loss": sealed(1)}, {"loss": sealed(1, test="")}, "clinic@v1 does not say on which"),
        ({"loss": sealed(0)}, {"loss": sealed(9, test="sha256:u")}, "two different sealed tests"),
        ({"loss": sealed(1)}, {"loss": sealed(1, better="higher")}, "lower is better in one"),
    ],
)
def test_not_worse_refuses_where_the_two_cannot_be_compared(ours, theirs, told):
    import re

    outcome = NotWorse("loss").check(manifest(2, ours), manifest(1, theirs))
    assert not outcome.passed
    assert re.search(told, outcome.measured)


def test_the_first_version_is_not_worse_than_nothing():
    assert NotWorse("loss").check(manifest(), None).passed


PARENT = {"name": "a", "digest": "sha256:a", "coefficient": 1.0}


@pytest.mark.parametrize(
    ("what", "has", "has_not"),
    [
        ("data", {"data": {"notes": "sha256:1"}}, [{}, {"data": {"notes": ""}}]),
        ("lineage", {"made_by": "stage", "stage": "sft"}, [{}, {"made_by": "stage"}, {"made_by": "fusion"}]),
        (
            "lineage",
            {"made_by": "fusion", "parents": [PARENT]},
            [{"made_by": "fusion", "parents": [PARENT, {**PARENT, "digest": ""}]}],
        ),
        ("base", {"base": {"weights": "sha256:1"}}, [{}, {"base": {"name": "tiny"}}]),
        ("recipe", {"recipe": {"stages": []}}, [{}]),
        ("sealed", {"metrics": {"loss": sealed(1)}}, [{}, {"metrics": {"loss": Metric(value=1, split="validation")}}]),
    ],
)
def test_what_is_required_must_be_told(what, has, has_not):
    assert Requires(what).check(manifest(**has), None).passed
    for lacking in has_not:
        assert not Requires(what).check(manifest(**lacking), None).passed


def test_a_refusal_lists_every_gate_with_what_was_asked_and_measured():
    gates = [parse_gate("loss<=1.2"), parse_gate("requires:data")]
    candidate = manifest(2, {"loss": Metric(value=1.0, low=0.9, high=1.1)})
    outcomes = check_gates(gates, candidate, None)
    with pytest.raises(PromotionRefused) as told:
        refuse(outcomes, candidate, "production")
    text = str(told.value)
    assert "loss<=1.2: passed; measured 1 (0.9 to 1.1), asked <= 1.2" in text
    assert "requires:data: refused" in text
    assert "1 of 2 gates" in text
    refuse(outcomes[:1], candidate, "production")
