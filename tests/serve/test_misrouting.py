"""The misrouting harness for 90 seconds, and whether it would see a wrong answer."""

from __future__ import annotations

import pytest
from tests.serve.misrouting import MismatchError, Period, Traffic, check, harness
from tests.serve.real_server import Reference, make_adapter


@pytest.mark.slow
def test_every_answer_is_from_the_right_adapter_and_nothing_is_left_behind(tmp_path):
    outcome = harness(tmp_path, 90)
    assert outcome.problems == []
    assert outcome.figures["evictions"] > 20
    assert outcome.counts["changes of an adapter"] > 3
    assert outcome.tokens > 1000


@pytest.fixture(scope="module")
def reference():
    return Reference({"a": make_adapter(1, 4), "b": make_adapter(2, 8)})


def greedy(reference, members, prompt, count):
    """An answer as a right server would give it."""
    ids, answer = list(prompt), []
    for _ in range(count):
        exact = reference.logprobs(members, ids, {})[-1]
        best = int(exact.argmax())
        shown = next(text for text, i in reference._ids.items() if i == best)
        answer.append((shown, float(exact[best]), {shown: float(exact[best])}))
        ids.append(best)
    return answer


def test_the_harness_takes_a_right_answer_and_no_other(reference):
    prompt, own = [70, 71, 72], (("a", 1.0),)
    answer = greedy(reference, own, prompt, 6)
    assert check(reference, own, prompt, answer, greedy=True, bias={}) < 1e-9
    for wrong in ((), (("b", 1.0),), (("a", 0.9),), (("a", 1.0), ("b", 0.05))):
        with pytest.raises(MismatchError, match="log-prob"):
            check(reference, wrong, prompt, answer, greedy=True, bias={})
    with pytest.raises(MismatchError, match="log-prob"):
        check(reference, own, [70, 71, 73], answer, greedy=True, bias={})
    with pytest.raises(MismatchError, match="ended"):
        check(reference, own, prompt, answer, greedy=True, finish="stop", bias={})


def test_a_token_that_is_not_the_likeliest_is_seen_where_it_should_be(reference):
    prompt, own = [70, 71, 72], (("a", 1.0),)
    exact = reference.logprobs(own, prompt, {})[-1]
    second = int(exact.topk(2).indices[1])
    shown = next(text for text, i in reference._ids.items() if i == second)
    answer = [(shown, float(exact[second]), {})]
    assert check(reference, own, prompt, answer, greedy=False, bias={}) < 1e-9
    with pytest.raises(MismatchError, match="not the likeliest"):
        check(reference, own, prompt, answer, greedy=True, bias={})


def test_versions_count_only_while_they_were_served():
    traffic = Traffic("", {}, Reference({}), {"x": ["x.0", "x.1"]}, {}, 0)
    first = traffic._periods["x"][0]
    assert traffic._possible("x", 5, 6) == {"x.0"}
    first.leaving, first.gone = 10, 12
    traffic._periods["x"].append(Period("x.1", 14, 16))
    assert traffic._possible("x", 5, 6) == {"x.0"}
    assert traffic._possible("x", 5, 11) == {"x.0", None}
    assert traffic._possible("x", 12.5, 13) == {None}
    assert traffic._possible("x", 11, 15) == {"x.0", None, "x.1"}
    assert traffic._possible("x", 17, 18) == {"x.1"}
    traffic._periods["x"][1].leaving = 20
    assert traffic._possible("x", 21, 22) == {"x.1", None}
