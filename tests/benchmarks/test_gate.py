"""What the gate's benchmark counts: who is asked, naive Bayes, samples that are the same every time, its tables."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture
def parts(benchmarks, monkeypatch):
    monkeypatch.syspath_prepend(benchmarks)
    return importlib.import_module("gate_parts")


@pytest.fixture
def tables(benchmarks, monkeypatch):
    monkeypatch.syspath_prepend(benchmarks)
    return importlib.import_module("gate_tables")


@pytest.fixture
def worth(benchmarks, monkeypatch):
    monkeypatch.syspath_prepend(benchmarks)
    return importlib.import_module("gate_worth")


@pytest.fixture
def gate(script, parts):
    return script("gate")


def test_naive_bayes_is_bayes_rule_on_counts_with_one_added(parts):
    train = [("the dose of the drug", "medical"), ("the tax", "finance"), ("tax and tax", "finance")]
    # Words known: the, dose, of, drug, tax, and: 6. log P: tax is 1/11 in medical (0 + 1 of 5 + 6), 4/11 in finance.
    assert parts.naive_bayes(train, ["Tax", "drug drug", "", "zebra"]) == ["finance", "medical", "finance", "finance"]


def test_what_was_given_to_nobody_is_wrong_and_is_counted(gate):
    truth, said = ["a", "a", "b", "b"], ["a", "", "b", "a"]
    found = gate.shares(truth, said, ["1", "2", "3", "4"])
    assert (found["accuracy"], found["nobody"]) == (0.5, 0.25)
    assert found["by_domain"] == {"a": 0.5, "b": 0.5}
    assert found["low"] < 0.5 < found["high"]


def test_one_group_is_one_observation(gate):
    truth = ["a"] * 10
    apart = gate.shares(truth, truth, [str(i) for i in range(10)])
    together = gate.shares(truth, truth, ["1"] * 10)
    assert together["low"] < apart["low"] < 1


def one(parts, domain, number):
    return parts.One(domain, f"{domain} {number}", None, f"{domain} {number}")


def test_samples_are_the_same_every_time_and_of_every_domain(parts):
    every = [one(parts, name, k) for k in range(9) for name in ("a", "b")]
    case = parts.Case(None, {"a": None, "b": None}, {"train": every, "test": every}, {})
    drawn = case.drawn(4)
    assert drawn == case.drawn(4)
    assert [each.domain for each in drawn] == ["a"] * 4 + ["b"] * 4
    assert len({each.text for each in drawn}) == 8
    assert [each.text for each in case.first("test", 2)] == ["a 0", "a 1", "b 0", "b 1"]
    assert len(case.drawn(100)) == 18


def test_a_prompt_is_as_long_as_it_is_asked_to_be(parts):
    class Item:
        prompt = (5, 6, 7)

    case = parts.Case(None, {}, {"test": [parts.One("a", "", Item, "")]}, {})
    assert case.long_prompt(7) == [5, 6, 7, 5, 6, 7, 5]


def test_what_was_made_is_not_made_again(worth, tmp_path):
    made = []

    def make():
        made.append(1)
        return {"n": len(made)}

    assert worth.kept(tmp_path / "n.json", make) == worth.kept(tmp_path / "n.json", make) == {"n": 1}


def test_what_fails_leaves_nothing_behind_to_be_taken_for_finished(worth, tmp_path):
    def fail():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        worth.kept(tmp_path / "n.json", fail)
    assert worth.kept(tmp_path / "n.json", lambda: {"n": 2}) == {"n": 2}


def test_the_tables_of_what_is_timed(tables):
    lengths = {
        "128": {
            "prefill": {"seconds": 0.1, "share": 1.0},
            "1": {"seconds": 0.004, "share": 0.04, "bound": 1 / 30 + 0.02},
        }
    }
    shown = tables.table({"cost": {"layers_of_the_base": 30, "rounds": 5, "lengths": lengths}})
    assert "| 128 | 100.0 | 0.040 (0.053 allowed) |" in shown
    rows = {"1000": {"p50": 0.001, "p99": 0.0042, "made": 0.5}}
    shown = tables.table({"choice": {"features": 576, "rounds": 5, "prompts": 100, "rows": rows}})
    assert "| 1000 | 1.00 | 4.20 | 500.00 |" in shown
