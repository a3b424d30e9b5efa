"""``lorchestra registry canary`` and ``feedback``, as a person types them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from lorchestra.data.load import DataSpec, load_examples
from lorchestra.registry.canary import rollout
from lorchestra.registry.canary.feedback import Answered, record, remember
from lorchestra.registry.canary.observations import Tally, observe
from lorchestra.registry.registry import Registry

SHORT = ("--steps", "10,100", "--hold", "1m", "--min-requests", "10")


@pytest.fixture
def registry(lorchestra, make_adapter, tmp_path, monkeypatch):
    """clinic@v1 in production, clinic@v2 beside it."""
    where = tmp_path / "registry"
    monkeypatch.setenv("LORCHESTRA_REGISTRY", str(where))
    monkeypatch.setenv("LORCHESTRA_ACTOR", "ann")
    with Registry.open(str(where), create=True) as opened:
        opened.push(make_adapter(tmp_path / "one", 1), "clinic", alias="production")
        opened.push(make_adapter(tmp_path / "two", 2), "clinic")
        yield opened


def seen(registry, requests, errors=0):
    """What a gateway counts."""
    (found,) = rollout.running(registry)
    tallies = {"stable": Tally(), "candidate": Tally()}
    for arm, failed in (("stable", 0), ("candidate", errors)):
        for k in range(requests):
            tallies[arm].failed() if k < failed else tallies[arm].answered(0.5)
    observe(registry.catalog, found.id, "g1", tallies)


def test_start_watch_and_promote(lorchestra, registry):
    told = lorchestra("registry", "canary", "start", "clinic", "clinic@v2", *SHORT, "--why", "new notes")
    assert (told.code, told.out.strip()) == (0, "clinic@v2 answers 10 % of the users of clinic@production")
    seen(registry, 40)
    told = lorchestra("registry", "canary", "status", "clinic")
    assert told.code == 0
    lines = [line.split() for line in told.out.splitlines()]
    assert told.out.startswith("clinic@production: running, step 1 of 2, started ")
    assert "by ann (new notes)" in told.out
    assert ["stable", "clinic@v1", "90", "%", "40", "0", "(0.00", "%)", "0.5", "s", "–"] in lines
    assert ["candidate", "clinic@v2", "10", "%", "40", "0", "(0.00", "%)", "0.5", "s", "–"] in lines
    assert {"errors", "latency", "score", "limit"} <= {line[0] for line in lines if line}
    assert "next: this step is held for another " in told.out
    rollout.advance(registry, datetime.now(UTC) + timedelta(minutes=2))
    assert "100 %" in lorchestra("registry", "canary", "status", "clinic@production").out
    told = lorchestra("registry", "canary", "promote", "clinic", "--why", "all well")
    assert (told.code, told.out.strip()) == (0, "clinic@production → clinic@v2")
    assert registry.resolve("clinic").reference == "clinic@v2"
    assert registry.history("clinic")[0].why == "all well"
    assert "promoted at " in lorchestra("registry", "canary", "status", "clinic").out


def test_status_as_json_is_what_was_asked_and_seen(lorchestra, registry):
    lorchestra("registry", "canary", "start", "clinic", "v2", *SHORT, "--max-score-drop", "none",
               "--max-error-increase", "0.5", "--max-latency-increase", "10", "--max-error-rate", "30",
               "--alpha", "0.1", "--promote-at-end")  # fmt: skip
    seen(registry, 40, errors=2)
    told = json.loads(lorchestra("registry", "canary", "status", "clinic", "--json").out)
    assert (told["state"], told["stable"], told["candidate"], told["share"]) == (
        "running", "clinic@v1", "clinic@v2", 0.1
    )  # fmt: skip
    assert told["plan"] == {"steps": [0.1, 1.0], "hold": 60.0, "promote": True}
    assert told["guards"] == {
        "alpha": 0.1, "max_error_increase": 0.005, "max_latency_increase": 0.1, "max_score_drop": None,
        "max_error_rate": 0.3, "min_requests": 10,
    }  # fmt: skip
    assert told["arms"]["candidate"]["errors"] == 2
    assert [reading["guard"] for reading in told["readings"]] == ["errors", "latency", "limit"]
    assert told["action"] == "wait"


def test_a_failing_version_is_refused_and_taken_back_and_the_status_says_why(lorchestra, registry):
    lorchestra("registry", "canary", "start", "clinic", "clinic@v2", *SHORT)
    seen(registry, 40, errors=40)
    told = lorchestra("registry", "canary", "promote", "clinic")
    told.refused("cannot be promoted", "error rate higher by 100.00 points", "--force")
    rollout.advance(registry)
    told = lorchestra("registry", "canary", "status", "clinic")
    assert "rolled-back at " in told.out
    assert "error rate higher by 100.00 points" in told.out
    assert "broken" in told.out
    assert registry.resolve("clinic").reference == "clinic@v1"


def test_abort(lorchestra, registry):
    lorchestra("registry", "canary", "start", "clinic", "clinic@v2", *SHORT)
    told = lorchestra("registry", "canary", "abort", "clinic", "--why", "answers in French")
    assert told.out.strip() == "the canary of clinic@production is over: clinic@v1 answers everybody"
    lorchestra("registry", "canary", "abort", "clinic").refused("no canary is running", "canary start clinic")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("clinic", "clinic@v9"), ("clinic@v9",)),
        (("clinic", "clinic@v1"), ("leads to clinic@v1 already",)),
        (("clinic@v1", "clinic@v2"), ("NAME@ALIAS",)),
        (("clinic", "clinic@v2", "--steps", "5,1"), ("grow",)),
        (("clinic", "clinic@v2", "--steps", "5,x"), ("--steps", "1,5,25,100")),
        (("clinic", "clinic@v2", "--steps", "5,200"), ("between 0 and 1",)),
        (("clinic", "clinic@v2", "--hold", "soon"), ("10m",)),
        (("clinic", "clinic@v2", "--max-error-increase", "little"), ("--max-error-increase", "none")),
        (("clinic", "clinic@v2", "--max-score-drop", "-1"), ("--max-score-drop", "at least 0")),
        (("clinic", "clinic@v2", "--alpha", "2"), ("alpha",)),
    ],
)
def test_what_cannot_be_started(lorchestra, registry, given, words):
    lorchestra("registry", "canary", "start", *given).refused(*words)
    assert rollout.running(registry) == []


def test_without_a_canary_or_a_registry(lorchestra, registry, monkeypatch):
    lorchestra("registry", "canary", "status", "clinic").refused("there never was a canary of clinic@production")
    monkeypatch.delenv("LORCHESTRA_REGISTRY")
    lorchestra("registry", "canary", "status", "clinic").refused("--registry", "LORCHESTRA_REGISTRY")


def test_feedback_becomes_data_for_a_stage(lorchestra, registry, tmp_path):
    asked = [{"role": "user", "content": "What is a fever?"}]
    answers = {"a": ("A raised temperature.", "up"), "b": ("A bird.", "down"), "c": (None, "up")}
    remember(registry, [
        Answered(one, "clinic", None, "acme", prompt=asked if answer else None, answer=answer)
        for one, (answer, _) in answers.items()
    ])  # fmt: skip
    remember(registry, [Answered("d", "clinic", None, "acme", prompt="Once", answer=" upon")])
    for one, (_, thumb) in answers.items():
        record(registry, one, "acme", thumb=thumb)
    record(registry, "d", "acme", score=0.7)
    told = lorchestra("registry", "feedback", "export", "-o", "pairs.jsonl")
    assert told.out.strip() == "pairs.jsonl: 1 pair"
    assert "1 scored answer in no pair; --singles" in told.err
    assert "1 opinion of answers whose prompts were not logged" in told.err
    told = lorchestra("registry", "feedback", "export", "-o", "pairs.jsonl", "--singles", "singles.jsonl")
    assert told.out.splitlines() == ["pairs.jsonl: 1 pair", "singles.jsonl: 1 scored answer"]
    (pair,) = load_examples(DataSpec(str(tmp_path / "pairs.jsonl")), "dpo").examples
    assert (pair.prompt[0].content, pair.gold, pair.rejected) == (
        "What is a fever?", "A raised temperature.", "A bird."
    )  # fmt: skip
    assert lorchestra("registry", "feedback", "export", "-o", "p", "--since", "2999-01-01").out.strip() == "p: 0 pairs"
    lorchestra("registry", "feedback", "export", "-o", "p", "--since", "soon").refused("--since", "2026-03-15")
    lorchestra("registry", "feedback", "export", "-o", "p", "--singles", "p").refused("file of its own")
