"""Feedback: only on what was served, only by whom it was served to, and read by the loader of the next stage."""

from __future__ import annotations

import json
import math
import stat
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from lorchestra.data.load import DataSpec, load_examples
from lorchestra.errors import DataError, UserError
from lorchestra.registry.canary.feedback import Answered, UnknownRequestError, export, forget, record, remember
from lorchestra.registry.sql.schema import feedback, served

NOW = datetime(2026, 3, 1, tzinfo=UTC)
ASKED = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a fever?"})


def rows(registry, table):
    with registry.catalog.reading() as connection:
        return connection.execute(select(table)).all()


def judged(registry, request, score, *, name="clinic", tenant="acme", prompt=None, answer=None, at=NOW):
    """Served and judged."""
    remember(registry, [Answered(request, name, None, tenant, "ann", prompt=prompt, answer=answer)], at)
    record(registry, request, tenant, score=score, now=at)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_only_the_tenant_that_was_served_is_heard(registry):
    remember(registry, [Answered("r1", "clinic", 7, "acme", "ann", "candidate")], NOW)
    with pytest.raises(UnknownRequestError) as others:
        record(registry, "r1", "globex", thumb="down")
    with pytest.raises(UnknownRequestError) as nobodys:
        record(registry, "r2", "acme", thumb="down")
    assert str(others.value) == str(nobodys.value), "nobody learns whether another was served"
    assert rows(registry, feedback) == []
    record(registry, "r1", "acme", thumb="down", comment="wrong dose", now=NOW)
    (row,) = rows(registry, feedback)
    assert (row.score, row.comment, row.arm, row.version_id, row.name) == (0.0, "wrong dose", "candidate", 7, "clinic")


def test_feedback_again_replaces_what_was_said(registry):
    judged(registry, "r1", 0.2)
    record(registry, "r1", "acme", thumb="up", comment="on second thoughts", now=NOW)
    (row,) = rows(registry, feedback)
    assert (row.score, row.comment) == (1.0, "on second thoughts")


def test_the_same_id_of_two_tenants_is_two_requests(registry):
    judged(registry, "r1", 0.0, tenant="acme")
    judged(registry, "r1", 1.0, tenant="globex")
    assert sorted(row.score for row in rows(registry, feedback)) == [0.0, 1.0]


def test_no_name_of_a_tenant_or_user_is_kept(local):
    judged(local, "r1", 1.0)
    for table in (served, feedback):
        (row,) = rows(local, table)
        assert not {"acme", "ann"} & set(map(str, row))
        assert len(row.tenant_hash) == len(row.user_hash) == 32


def test_what_is_forgotten_cannot_be_judged_and_what_was_said_stays(registry):
    judged(registry, "old", 1.0, at=NOW - timedelta(days=31))
    judged(registry, "new", 1.0)
    assert forget(registry, NOW - timedelta(days=30)) == 1
    with pytest.raises(UnknownRequestError):
        record(registry, "old", "acme", thumb="down")
    record(registry, "new", "acme", thumb="down")
    assert sorted(row.score for row in rows(registry, feedback)) == [0.0, 1.0]


def test_many_at_a_time_and_one_of_them_twice(registry):
    remember(registry, [Answered(f"r{k % 3}", "clinic", None, "acme") for k in range(5)], NOW)
    remember(registry, [], NOW)
    assert len(rows(registry, served)) == 3


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "either a score"),
        ({"score": 1.0, "thumb": "up"}, "either a score"),
        ({"score": 1.01}, "0 .bad. to 1"),
        ({"score": -0.5}, "0 .bad. to 1"),
        ({"score": math.nan}, "0 .bad. to 1"),
        ({"score": True}, "0 .bad. to 1"),
        ({"thumb": "sideways"}, "up or down"),
        ({"score": 1, "comment": "x" * 4001}, "4,001 characters"),
        ({"score": 1, "comment": "\0"}, "NUL"),
    ],
)
def test_feedback_that_is_none(local, said, message):
    remember(local, [Answered("r1", "clinic", None, "acme")], NOW)
    with pytest.raises(UserError, match=message):
        record(local, "r1", "acme", **said)
    assert rows(local, feedback) == []


@pytest.mark.parametrize("request_id", ["", "\0", "\ud800", "r1' OR 1=1", "x" * 100_000])
def test_ids_that_are_none(registry, request_id):
    remember(registry, [Answered("r1", "clinic", None, "acme")], NOW)
    with pytest.raises(UnknownRequestError):
        record(registry, request_id, "acme", score=1)


def test_a_stage_reads_the_pairs_and_the_singles(registry, tmp_path):
    """What was asked and answered comes out of the loader of the next stage as it went in."""
    judged(registry, "a", 1.0, prompt=ASKED, answer="A raised temperature.")
    judged(registry, "b", 0.0, prompt=ASKED, answer='A kind of bird. 鸟\n"quoted"')
    judged(registry, "c", 0.5, prompt=ASKED, answer="Heat.")
    judged(registry, "d", 0.9, prompt="Once upon", answer=" a time.")
    judged(registry, "e", 0.1, prompt="No more", answer=" of this.")
    found = export(registry, tmp_path / "pairs.jsonl", tmp_path / "singles.jsonl")
    assert (found.pairs, found.singles, found.without_prompt) == (2, 2, 0)

    pairs = load_examples(DataSpec(str(tmp_path / "pairs.jsonl")), "dpo")
    assert pairs.format == "preference"
    assert [(e.gold, e.rejected) for e in pairs.examples] == [
        ("A raised temperature.", 'A kind of bird. 鸟\n"quoted"'),
        ("A raised temperature.", "Heat."),
    ]
    for example in pairs.examples:
        assert [(turn.role, turn.content) for turn in example.prompt] == [(t["role"], t["content"]) for t in ASKED]

    liked = load_examples(DataSpec(str(tmp_path / "singles.jsonl"), where="score >= 0.5"), "sft")
    assert [(e.prompt[0].content, e.gold) for e in liked.examples] == [("Once upon", " a time.")]


def test_equal_scores_make_no_pair_and_other_opinions_of_an_answer_are_averaged(local, tmp_path):
    judged(local, "a", 1.0, prompt="q", answer="one")
    judged(local, "b", 1.0, prompt="q", answer="two")
    judged(local, "c", 0.0, prompt="r", answer="three")
    judged(local, "d", 1.0, prompt="r", answer="three")
    judged(local, "e", 0.6, prompt="r", answer="four")
    found = export(local, tmp_path / "p", tmp_path / "s")
    (pair,) = lines(tmp_path / "p")
    assert (pair["chosen"], pair["chosen_score"], pair["rejected"], pair["rejected_score"]) == (
        "four",
        0.6,
        "three",
        0.5,
    )
    assert [row["completion"] for row in lines(tmp_path / "s")] == ["one", "two"]
    assert found.singles == 2


def test_tenants_and_adapters_are_not_mixed(local, tmp_path):
    judged(local, "a", 1.0, prompt="q", answer="one", tenant="acme")
    judged(local, "b", 0.0, prompt="q", answer="two", tenant="globex")
    judged(local, "c", 0.0, prompt="q", answer="three", name="audit")
    assert export(local, tmp_path / "p").pairs == 0
    assert export(local, tmp_path / "p", name="audit").singles == 1
    assert not (tmp_path / "s").exists()


def test_without_prompts_there_is_nothing_to_learn(local, tmp_path):
    judged(local, "a", 1.0)
    judged(local, "b", 1.0, prompt="q", answer="one", at=NOW - timedelta(days=9))
    found = export(local, tmp_path / "p", tmp_path / "s", since=NOW)
    assert (found.pairs, found.singles, found.without_prompt) == (0, 0, 1)
    assert (tmp_path / "p").read_text() == ""


def test_what_people_typed_is_readable_by_its_owner_alone(local, tmp_path):
    judged(local, "a", 1.0, prompt="q", answer="one")
    export(local, tmp_path / "p", tmp_path / "s")
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ps"} == {0o600}


def test_any_text_survives(registry, tmp_path):
    nasty = 'NUL \0, "quotes", \u2028 and ☃'
    judged(registry, "a", 1.0, prompt=nasty, answer="good")
    judged(registry, "b", 0.0, prompt=nasty, answer="bad \0")
    assert export(registry, tmp_path / "p").pairs == 1
    assert [row["prompt"] for row in map(json.loads, (tmp_path / "p").read_bytes().splitlines())] == [nasty]


def test_half_a_surrogate_pair_is_told_by_the_loader_and_stops_no_export(local, tmp_path):
    judged(local, "a", 1.0, prompt="half \ud83d", answer="good")
    judged(local, "b", 0.0, prompt="half \ud83d", answer="bad")
    assert export(local, tmp_path / "p.jsonl").pairs == 1
    with pytest.raises(DataError, match="surrogate"):
        load_examples(DataSpec(str(tmp_path / "p.jsonl")), "dpo")
