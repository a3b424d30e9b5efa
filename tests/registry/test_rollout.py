"""Canaries, over both databases: steps, holds, guards, promotion, and several gateways at once."""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import UserError
from lorchestra.registry.canary import feedback, rollout
from lorchestra.registry.canary.guards import Guards
from lorchestra.registry.canary.observations import Tally, observe
from lorchestra.registry.canary.plan import Plan, duration, parse_duration
from lorchestra.registry.mistakes import RevokedError, UnknownReferenceError
from lorchestra.registry.registry import Registry

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOLD = timedelta(minutes=10)
PLAN = Plan((0.1, 0.5, 1.0), HOLD)
GUARDS = Guards(min_requests=50)


def minutes(count: float) -> datetime:
    return START + timedelta(minutes=count)


def pushed(registry, make):
    """clinic@v1 in production, clinic@v2 beside it."""
    registry.push(make(1), "clinic", alias="production")
    registry.push(make(2), "clinic")
    return registry


@pytest.fixture
def clinic(registry, make):
    return pushed(registry, make)


@pytest.fixture
def here(local, make):
    """The same on SQLite alone."""
    return pushed(local, make)


class Gateway:
    """A gateway process: counts, and writes what it has counted."""

    def __init__(self, registry, name="g1"):
        self.registry, self.name = registry, name
        self.tallies = {"stable": Tally(), "candidate": Tally()}

    def serve(self, arm, requests, errors=0, seconds=0.5):
        for k in range(requests):
            if k < errors:
                self.tallies[arm].failed()
            else:
                self.tallies[arm].answered(seconds * (1 + k % 3))

    def write(self):
        for found in rollout.running(self.registry):
            observe(self.registry.catalog, found.id, self.name, self.tallies)


def begin(registry, **more):
    return rollout.start(registry, "clinic", "clinic@v2", **{"plan": PLAN, "guards": GUARDS, "now": START, **more})


def led(registry):
    return registry.resolve("clinic@production").reference


def actions(registry):
    return [entry.action for entry in registry.history("clinic") if entry.action.startswith("canary")][::-1]


def test_a_good_candidate_goes_through_every_step_and_is_promoted_by_hand(clinic):
    started = begin(clinic, why="better notes")
    assert (started.state, started.share, started.stable.reference) == ("running", 0.1, "clinic@v1")
    gateway, shares = Gateway(clinic), []
    for step in range(3):
        gateway.serve("candidate", 100, errors=1)
        gateway.serve("stable", 100 if step < 2 else 0, errors=1)
        gateway.write()
        assert rollout.advance(clinic, minutes(11 * step + 9)) == [], "held"
        changes = rollout.advance(clinic, minutes(11 * step + 11))
        shares += [(change.action, change.rollout.share) for change in changes]
        assert led(clinic) == "clinic@v1", "the alias does not move before the promotion"
    assert shares == [("canary-step", 0.5), ("canary-step", 1.0)]
    seen = rollout.status(clinic, "clinic", now=minutes(60))
    assert "canary promote clinic@production" in seen.next
    assert rollout.promote(clinic, "clinic", why="all well", now=minutes(61)).version.reference == "clinic@v2"
    assert led(clinic) == "clinic@v2"
    assert actions(clinic) == ["canary-start", "canary-step", "canary-step", "canary-promote"]
    ended = rollout.status(clinic, "clinic")
    assert (ended.rollout.state, ended.action) == ("promoted", "wait")
    assert [step["arms"]["candidate"]["requests"] for step in ended.rollout.evidence["steps"]] == [100, 100, 100]
    assert rollout.running(clinic) == rollout.advance(clinic, minutes(90)) == []
    assert clinic.verify() == []


def test_the_alias_rolls_back_after_a_promotion(here):
    begin(here)
    rollout.promote(here, "clinic", now=START)
    assert here.rollback("clinic").version.reference == "clinic@v1"
    assert here.verify() == []


def test_it_promotes_itself_only_where_the_plan_says_so(here):
    begin(here, plan=Plan((0.5,), HOLD, promote=True))
    gateway = Gateway(here)
    gateway.serve("candidate", 60)
    gateway.serve("stable", 60)
    gateway.write()
    assert [change.action for change in rollout.advance(here, minutes(11))] == ["canary-promote"]
    assert led(here) == "clinic@v2"


def test_a_failing_candidate_is_taken_back_at_once_with_one_line_of_why(clinic, caplog):
    begin(clinic)
    gateway = Gateway(clinic)
    gateway.serve("candidate", 20, errors=20)
    gateway.serve("stable", 180, errors=2)
    gateway.write()
    with caplog.at_level(logging.INFO, "lorchestra.registry.canary.rollout"):
        (change,) = rollout.advance(clinic, minutes(1))  # long before the hold is over, or 50 requests
    assert (change.action, change.rollout.state) == ("canary-rollback", "rolled-back")
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert "clinic@production" in line.getMessage()
    assert "error rate higher by 98.89 points" in line.getMessage()
    assert led(clinic) == "clinic@v1"
    entry = clinic.history("clinic")[0]
    assert (entry.action, entry.before, entry.after) == ("canary-rollback", "clinic@v2", "clinic@v1")
    assert "error rate higher by" in entry.why
    assert entry.details["arms"]["candidate"] == {"requests": 20, "errors": 20}
    assert rollout.running(clinic) == rollout.advance(clinic, minutes(2)) == []
    assert rollout.status(clinic, "clinic").rollout.why == entry.why
    assert clinic.verify() == []


def test_a_slow_candidate_is_taken_back(here):
    begin(here)
    gateway = Gateway(here)
    gateway.serve("candidate", 300, seconds=1.2)
    gateway.serve("stable", 600, seconds=0.5)
    gateway.write()
    (change,) = rollout.advance(here, minutes(1))
    assert change.action == "canary-rollback"
    assert change.why.startswith("latency longer by 140.0 %")


def test_a_disliked_candidate_is_taken_back_by_feedback(clinic):
    begun = begin(clinic)
    version = {"stable": begun.stable.id, "candidate": begun.candidate.id}
    for arm, liked in (("candidate", 5), ("stable", 95)):
        ids = [f"{arm}-{k}" for k in range(100)]
        feedback.remember(
            clinic, [feedback.Answered(one, "clinic", version[arm], "acme", arm=arm) for one in ids], START
        )
        for k, one in enumerate(ids):
            thumb = "up" if k < liked else "down"
            feedback.record(clinic, one, "acme", thumb=thumb, now=minutes(1))
    (change,) = rollout.advance(clinic, minutes(2))
    assert change.action == "canary-rollback"
    assert change.why.startswith("score lower by 0.900")


def test_feedback_from_before_the_step_or_of_no_arm_does_not_count(here):
    begun = begin(here)
    rows = [("a", "candidate", begun.candidate.id), ("b", "", begun.candidate.id), ("c", "stable", begun.stable.id)]
    feedback.remember(here, [feedback.Answered(i, "clinic", v, "acme", arm=arm) for i, arm, v in rows], START)
    feedback.record(here, "c", "acme", score=0.5, now=START - timedelta(seconds=1))
    feedback.record(here, "a", "acme", score=1, now=minutes(1))
    feedback.record(here, "a", "acme", score=0.25, now=minutes(2))
    feedback.record(here, "b", "acme", score=0, now=minutes(1))
    arms = rollout.status(here, "clinic", now=minutes(3)).arms
    assert (arms["candidate"].score_n, arms["candidate"].score_sum) == (1, 0.25)
    assert arms["stable"].score_n == 0


def test_too_few_requests_keep_it_where_it_is(here):
    begin(here)
    gateway = Gateway(here)
    gateway.serve("candidate", 49)
    gateway.serve("stable", 500)
    gateway.write()
    assert rollout.advance(here, minutes(1000)) == []
    assert "49 requests of the 50" in rollout.status(here, "clinic", now=minutes(1000)).next
    gateway.serve("candidate", 1)
    gateway.write()
    assert [change.action for change in rollout.advance(here, minutes(1000))] == ["canary-step"]


def test_a_step_is_judged_on_its_own_requests(here):
    """A bad hour of both arms in the first step says nothing in the second, however the shares differ (Simpson)."""
    begin(here)
    gateway = Gateway(here)
    gateway.serve("candidate", 100, errors=2)
    gateway.serve("stable", 900, errors=18)
    gateway.write()
    rollout.advance(here, minutes(11))
    gateway.serve("candidate", 900, errors=360)  # now 40 % of everything fails
    gateway.serve("stable", 900, errors=360)
    gateway.write()
    seen = rollout.status(here, "clinic", now=minutes(12))
    assert (seen.arms["candidate"].requests, seen.arms["candidate"].errors) == (900, 360)
    errors = next(reading for reading in seen.readings if reading.guard == "errors")
    assert errors.worse == 0.0
    assert seen.action == "wait"
    pooled = (362 / 1000, 378 / 1800)
    assert pooled[0] - pooled[1] > 0.15, "pooled over the steps, the candidate would look far worse"


def test_where_everybody_has_the_candidate_the_stable_version_is_as_it_was(here):
    begin(here, plan=Plan((0.5, 1.0), HOLD))
    gateway = Gateway(here)
    for arm in ("candidate", "stable"):
        gateway.serve(arm, 1000, errors=10)
    gateway.write()
    rollout.advance(here, minutes(11))
    gateway.serve("candidate", 300, errors=60)
    gateway.write()
    (change,) = rollout.advance(here, minutes(12))
    assert change.action == "canary-rollback"
    assert "error rate higher by 19.00 points" in change.why
    ended = rollout.status(here, "clinic")
    assert next(r for r in ended.readings if r.guard == "errors").worse == pytest.approx(0.19)


def test_gateways_have_rows_of_their_own_and_repeated_writes_change_nothing(clinic):
    begin(clinic)
    one, other = Gateway(clinic, "one"), Gateway(clinic, "other")
    one.serve("candidate", 30, errors=3)
    other.serve("candidate", 12, errors=1)
    for gateway in (one, other, one, one):
        gateway.write()
    arms = rollout.status(clinic, "clinic", now=START).arms
    assert (arms["candidate"].requests, arms["candidate"].errors, arms["candidate"].latency_n) == (42, 4, 38)


def test_observations_are_no_part_of_the_history(clinic):
    begin(clinic)
    before = clinic.catalog.generation()
    gateway = Gateway(clinic)
    gateway.serve("stable", 5)
    gateway.write()
    rollout.advance(clinic, minutes(1))
    assert clinic.catalog.generation() == before


def test_of_eight_gateways_that_advance_at_once_one_does_it(registry_url, make):
    """Each with connections of its own, as processes have them."""
    with Registry.open(registry_url, create=True, actor="tester") as registry:
        pushed(registry, make)
        begin(registry, plan=Plan((0.1, 0.2, 0.3), HOLD))
        gateways = [Registry.open(registry_url, actor=f"g{k}") for k in range(8)]
        done: list[rollout.Change] = []
        for step in (1, 2):
            workers = []
            barrier = threading.Barrier(8)
            for k, opened in enumerate(gateways):
                gateway = Gateway(opened, f"g{k}-{step}")
                gateway.serve("candidate", 10)
                gateway.serve("stable", 10)
                gateway.write()

                def go(opened=opened, barrier=barrier, step=step):
                    barrier.wait()
                    done.extend(rollout.advance(opened, minutes(11 * step)))

                workers.append(threading.Thread(target=go))
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        for opened in gateways:
            opened.close()
        assert [change.rollout.step for change in done] == [1, 2]
        assert actions(registry) == ["canary-start", "canary-step", "canary-step"]
        assert registry.verify() == []


def test_one_canary_of_an_alias_at_a_time(clinic, make):
    clinic.push(make(3), "clinic", alias="staging")
    begin(clinic)
    with pytest.raises(UserError, match="has been running since"):
        begin(clinic)
    begin(clinic, alias="staging")
    rollout.abort(clinic, "clinic", now=START)
    assert begin(clinic).state == "running"
    assert {str(found) for found in rollout.running(clinic)} == {"clinic@production", "clinic@staging"}


def test_an_abort_leaves_everything_as_it_was(clinic):
    begin(clinic, why="try it")
    rollout.abort(clinic, "clinic", why="wrong data", now=minutes(1))
    assert led(clinic) == "clinic@v1"
    assert rollout.running(clinic) == []
    assert rollout.status(clinic, "clinic").next.endswith("wrong data")
    with pytest.raises(UserError, match="no canary is running"):
        rollout.abort(clinic, "clinic")


def test_a_revoked_candidate_answers_nobody_and_ends_it(clinic):
    begin(clinic)
    clinic.revoke("clinic@v2", "trained on the sealed test")
    assert rollout.running(clinic) == [], "at once, before anybody advances"
    with pytest.raises(UserError, match="was revoked: trained on the sealed test"):
        rollout.promote(clinic, "clinic", force=True)
    (change,) = rollout.advance(clinic, minutes(1))
    assert (change.action, change.rollout.state) == ("canary-rollback", "rolled-back")
    assert led(clinic) == "clinic@v1"


def test_an_alias_that_is_moved_ends_it(clinic, make):
    clinic.push(make(3), "clinic")
    begin(clinic)
    clinic.promote("clinic@v3")
    assert rollout.running(clinic) == []
    with pytest.raises(UserError, match="leads to clinic@v3 now"):
        rollout.promote(clinic, "clinic", force=True)
    (change,) = rollout.advance(clinic, minutes(1))
    assert (change.action, change.rollout.state) == ("canary-abort", "aborted")
    assert led(clinic) == "clinic@v3"


def test_a_broken_guard_refuses_a_promotion_unless_forced(here):
    begin(here)
    gateway = Gateway(here)
    gateway.serve("candidate", 50, errors=50)
    gateway.serve("stable", 50)
    gateway.write()
    with pytest.raises(UserError, match=r"cannot be promoted: error rate higher .* --force"):
        rollout.promote(here, "clinic", now=START)
    assert led(here) == "clinic@v1"
    assert rollout.promote(here, "clinic", force=True, now=START).version.reference == "clinic@v2"


def test_users_stay_while_the_share_grows(here):
    begin(here)
    gateway = Gateway(here)
    gateway.serve("candidate", 100)
    gateway.serve("stable", 100)
    gateway.write()
    users = [("acme", f"user-{k}") for k in range(400)]
    (before,) = rollout.running(here)
    rollout.advance(here, minutes(11))
    (after,) = rollout.running(here)
    first = {user for user in users if before.arm(*user) == "candidate"}
    second = {user for user in users if after.arm(*user) == "candidate"}
    assert 0 < len(first) < len(second) < 400
    assert first < second
    rollout.abort(here, "clinic", now=minutes(12))
    again = begin(here)
    assert {user for user in users if again.arm(*user) == "candidate"} != first, "a new canary draws anew"


def test_what_cannot_be_started(clinic, make):
    other = BaseId("other", "sha256:" + "1" * 64, "", "")
    clinic.push(make(4, base=other), "clinic")
    clinic.push(make(5), "audit")
    for wanted, message in (
        ("clinic@v1", "leads to clinic@v1 already"),
        ("audit@v1", "no version of clinic"),
        ("clinic@v3", "another base"),
    ):
        with pytest.raises(UserError, match=message):
            rollout.start(clinic, "clinic", wanted)
    with pytest.raises(UnknownReferenceError, match="clinic@v9"):
        rollout.start(clinic, "clinic", "v9")
    with pytest.raises(UserError, match="leads nowhere"):
        rollout.start(clinic, "audit", "v1")
    with pytest.raises(UserError, match="no alias"):
        rollout.start(clinic, "clinic", "v2", alias="v1")
    clinic.revoke("clinic@v2", "bad")
    with pytest.raises(RevokedError, match="clinic@v2 was revoked"):
        begin(clinic)
    assert actions(clinic) == []
    with pytest.raises(UserError, match="there never was a canary of clinic@production"):
        rollout.status(clinic, "clinic")


def test_a_clock_that_goes_back_steps_nothing(here):
    begin(here)
    gateway = Gateway(here)
    gateway.serve("candidate", 100)
    gateway.serve("stable", 100)
    gateway.write()
    assert rollout.advance(here, START - timedelta(days=1)) == []
    with pytest.raises(ValueError, match="no time zone"):
        rollout.advance(here, datetime(2026, 3, 1))


@pytest.mark.parametrize(
    "steps", [(), (0.0, 0.5), (0.5, 0.5), (0.5, 0.2), (0.5, 1.5), (-0.1,), tuple(k / 100 for k in range(1, 40))]
)
def test_plans_that_are_none(steps):
    with pytest.raises(UserError, match=r"canary|share"):
        Plan(steps)


def test_a_plan_is_kept_whole():
    plan = Plan((0.1, 0.3), timedelta(hours=2), promote=True)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(UserError, match="less than nothing"):
        Plan(hold=timedelta(seconds=-1))


@given(st.integers(0, 10**7))
def test_a_duration_is_read_as_it_is_written(seconds):
    assert parse_duration(duration(timedelta(seconds=seconds))) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "10", "m", "10 m", "-5m", "1.5h", "10x", "9" * 9 + "d" + "9" * 9 + "d"])
def test_what_is_no_duration(text):
    with pytest.raises(UserError, match="10m"):
        parse_duration(text)
