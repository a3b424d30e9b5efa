"""A canary as it is now: what is kept of it, what was seen of its arms, and what is due."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, select

from lorchestra.errors import counted
from lorchestra.registry.canary.guards import Counts, Guards, Reading
from lorchestra.registry.canary.observations import scores, totals
from lorchestra.registry.canary.plan import Plan, duration
from lorchestra.registry.canary.traffic import ARMS, Arm, arm_of
from lorchestra.registry.sql.catalog import Version
from lorchestra.registry.sql.finding import alias_states, by_ids
from lorchestra.registry.sql.schema import rollouts

State = Literal["running", "promoted", "aborted", "rolled-back"]
Action = Literal["wait", "canary-step", "canary-promote", "canary-abort", "canary-rollback"]


@dataclass(frozen=True)
class Rollout:
    """One canary, as it is now.

    Args:
        id: never given twice.
        name: of the adapter.
        alias: whose traffic is split.
        stable: the version that the alias leads to.
        candidate: the version that is tried.
        salt: of the split.
        share: of the users that the candidate answers.
        step: of the plan, from 0.
        state: ``running``, or how it ended.
        plan: steps and hold.
        guards: what is asked of the candidate.
        started: when, ISO 8601 in UTC.
        stepped: when this step began.
        ended: when it ended; empty while it runs.
        by: who started it.
        why: it was started; of one that has ended, why it has.
        evidence: what was seen in the steps before, as plain JSON.
    """

    id: int
    name: str
    alias: str
    stable: Version
    candidate: Version
    salt: str
    share: float
    step: int
    state: State
    plan: Plan
    guards: Guards
    started: str
    stepped: str
    ended: str
    by: str
    why: str
    evidence: Mapping[str, Any]

    def arm(self, tenant: str, user: str = "") -> Arm:
        """Who answers this user; the same one always, as long as the share does not shrink."""
        return arm_of(self.share, self.salt, tenant, user)

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


@dataclass(frozen=True)
class Status:
    """A rollout and what was seen of it.

    Args:
        rollout: it.
        arms: of this step (of the last one, if it has ended).
        readings: of the guards.
        action: what :func:`advance` would do.
        next: the same as a sentence, with the reason.
    """

    rollout: Rollout
    arms: Mapping[Arm, Counts]
    readings: tuple[Reading, ...]
    action: Action
    next: str


def looked(connection: Connection, rollout: Rollout, now: datetime) -> Status:
    """What is seen of a canary, and what is to be done."""
    past = list(rollout.evidence["steps"])
    arms = _kept(past.pop()["arms"]) if rollout.ended else _seen(connection, rollout)
    stable = arms["stable"]
    if rollout.share >= 1 and past:  # nobody is left with the stable version: it is what it was in the step before
        stable += _kept(past[-1]["arms"])["stable"]
    readings = tuple(rollout.guards.readings(arms["candidate"], stable, len(rollout.plan.steps)))
    return Status(rollout, arms, readings, *_due(connection, rollout, arms["candidate"], readings, now))


def _kept(arms: Mapping[str, Any]) -> dict[Arm, Counts]:
    """Counts as the evidence keeps them; of none, none."""
    return {arm: Counts(**arms.get(arm, {})) for arm in ARMS}


def _seen(connection: Connection, rollout: Rollout) -> dict[Arm, Counts]:
    """Both arms in the present step."""
    versions: dict[Arm, int] = {"stable": rollout.stable.id, "candidate": rollout.candidate.id}
    given = scores(connection, rollout.name, versions, rollout.stepped)
    before, now = _kept(rollout.evidence["base"]), totals(connection, rollout.id)
    return {arm: now[arm].since(before[arm]) + given[arm] for arm in ARMS}


def evidence(seen: Status, until: str) -> dict[str, Any]:
    """What is kept of a canary when its step ends: the step, and what was counted up to then."""
    before = seen.rollout.evidence
    counted_so_far = {
        arm: _kept(before["base"])[arm] + replace(seen.arms[arm], score_n=0, score_sum=0.0) for arm in ARMS
    }
    step = {"share": seen.rollout.share, "from": seen.rollout.stepped, "to": until, "arms": _plain(seen.arms)}
    return {"format": 1, "base": _plain(counted_so_far), "steps": [*before["steps"], step]}


def _plain(arms: Mapping[Arm, Counts]) -> dict[str, Any]:
    return {arm: asdict(counts) for arm, counts in arms.items()}


def _due(
    connection: Connection, rollout: Rollout, candidate: Counts, readings: Iterable[Reading], now: datetime
) -> tuple[Action, str]:
    if rollout.ended:
        return "wait", f"{rollout.state} at {rollout.ended}" + (f": {rollout.why}" if rollout.why else "")
    if rollout.candidate.revoked is not None:
        return "canary-rollback", f"{rollout.candidate.reference} was revoked: {rollout.candidate.revoked.why}"
    there = alias_states(connection, rollout.name, rollout.alias)
    if not there or there[0].version.id != rollout.stable.id:
        where = f"leads to {there[0].version.reference}" if there else "leads nowhere"
        return "canary-abort", f"{rollout} {where} now, no longer to {rollout.stable.reference}"
    if broken := [reading for reading in readings if reading.state == "broken"]:
        return "canary-rollback", "; ".join(map(str, broken))
    if candidate.requests < rollout.guards.min_requests:
        return "wait", (
            f"the candidate has answered {counted(candidate.requests, 'request')} of the "
            f"{rollout.guards.min_requests:,} that a step asks for"
        )
    left = rollout.plan.hold - (now - datetime.fromisoformat(rollout.stepped))
    if left > timedelta(0):
        return "wait", f"this step is held for another {duration(left)}"
    if rollout.step + 1 < len(rollout.plan.steps):
        return "canary-step", f"the guards hold; on to {100 * rollout.plan.steps[rollout.step + 1]:g} % of the users"
    if rollout.plan.promote:
        return "canary-promote", "the guards held in every step"
    return "wait", f"the guards held in every step; `lorchestra registry canary promote {rollout}` ends it"


def canary_of(connection: Connection, name: str, alias: str) -> Rollout | None:
    """The canary of ``name@alias`` that runs."""
    found = _canaries(connection, rollouts.c.name == name, rollouts.c.alias == alias, rollouts.c.ended.is_(None))
    return found[0] if found else None


def last_canary_of(connection: Connection, name: str, alias: str) -> Rollout | None:
    """The canary of ``name@alias`` that runs, or the one that was last."""
    found = _canaries(connection, rollouts.c.name == name, rollouts.c.alias == alias)
    return found[-1] if found else None


def all_canaries(connection: Connection) -> list[Rollout]:
    """Those that run, the oldest first."""
    return _canaries(connection, rollouts.c.ended.is_(None))


def _canaries(connection: Connection, *conditions: ColumnElement[bool]) -> list[Rollout]:
    """The oldest first; without those whose versions were removed since they ended."""
    rows = connection.execute(select(rollouts).where(*conditions).order_by(rollouts.c.id)).all()
    versions = by_ids(connection, {number for row in rows for number in (row.stable_version, row.candidate_version)})
    return [
        Rollout(
            row.id, row.name, row.alias, versions[row.stable_version], versions[row.candidate_version], row.salt,
            row.share, row.step, row.state, Plan.from_json(row.plan), Guards(**row.guards), row.started, row.stepped,
            row.ended or "", row.by, row.why, row.evidence,
        )
        for row in rows
        if row.stable_version in versions and row.candidate_version in versions
    ]  # fmt: skip
