"""Canaries: a candidate answers a growing share of an alias's traffic, until it is promoted, or taken back.

    running ──step──► running … ──promote──► promoted
       ├──abort──► aborted            by a person, or because the alias was moved meanwhile
       └──rollback──► rolled-back     by a guard, or because the candidate was revoked

The alias itself stays where it is until the promotion. Whoever serves counts what it sees
(:mod:`lorchestra.registry.canary.observations`) and calls :func:`advance` every few seconds; any number of processes
may, and each change is made by one of them, once.
"""

from __future__ import annotations

import logging
import secrets
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import select

from lorchestra.errors import UserError
from lorchestra.registry.canary.guards import Guards
from lorchestra.registry.canary.observations import stamp
from lorchestra.registry.canary.plan import Plan
from lorchestra.registry.canary.watching import (
    Action,
    Rollout,
    State,
    Status,
    all_canaries,
    canary_of,
    evidence,
    last_canary_of,
    looked,
)
from lorchestra.registry.changing import alias_of, check_alias, led_to, move
from lorchestra.registry.mistakes import RevokedError
from lorchestra.registry.reference import Reference, parse_reference
from lorchestra.registry.sql.catalog import PRODUCTION, AliasState, Transaction, Version
from lorchestra.registry.sql.finding import resolved
from lorchestra.registry.sql.schema import aliases, rollouts

if TYPE_CHECKING:
    from lorchestra.registry.registry import Registry

_ENDS: dict[Action, State] = {
    "canary-promote": "promoted", "canary-abort": "aborted", "canary-rollback": "rolled-back"
}  # fmt: skip
_log = logging.getLogger(__name__)


class Change(NamedTuple):
    """What :func:`advance` did: the canary as it is after it, the audit log's action, and why."""

    rollout: Rollout
    action: Action
    why: str


def start(
    registry: Registry,
    name: str,
    candidate: str,
    *,
    alias: str = PRODUCTION,
    plan: Plan | None = None,
    guards: Guards | None = None,
    salt: str = "",
    why: str = "",
    now: datetime | None = None,
) -> Rollout:
    """Let ``candidate`` answer the first share of what ``name@alias`` is asked.

    Args:
        registry: both versions are in.
        name: of the adapter.
        candidate: a reference to a version of it (``clinic@v3``), or the part after the ``@``.
        alias: whose traffic.
        plan: steps and hold.
        guards: what is asked of the candidate.
        salt: of the split; by default one that was never used.
        why: for the history.
        now: the time; by default the clock's.

    Raises:
        UnknownReferenceError: there is no such version.
        UserError: the alias leads nowhere or there already, the candidate is of another adapter or base, or a canary
            of this alias is running.
        RevokedError: the candidate or the stable version was revoked.
    """
    plan, guards = plan or Plan(), guards or Guards()
    reference = parse_reference(candidate) if "@" in candidate else Reference(name, candidate)
    check_alias(name, alias)
    with registry.catalog.transaction() as held:
        if there := canary_of(held.connection, name, alias):
            raise UserError(
                f"a canary of {there} ({there.candidate.reference}) has been running since {there.started}; promote or "
                f"abort it first (`lorchestra registry canary status {there}`)"
            )
        version = resolved(held.connection, reference)
        stable = _stable(name, alias, version, led_to(held, name, alias))
        made = {"plan": plan.to_json(), "guards": guards.to_json(), "salt": salt or secrets.token_hex(16)}
        row = {
            "name": name, "alias": alias, "stable_version": stable.id, "candidate_version": version.id, **made,
            "share": plan.steps[0], "step": 0, "state": "running", "started": stamp(now), "stepped": stamp(now),
            "ended": None, "by": held.actor, "why": why, "evidence": {"format": 1, "base": {}, "steps": []},
        }  # fmt: skip
        held.execute(rollouts.insert(), row)
        started = _running(held, name, alias)
        held.audit(
            "canary-start", name=name, alias=alias, before=stable.reference, after=version.reference, why=why,
            details={"rollout": started.id, **made},
        )  # fmt: skip
    return started


def running(registry: Registry) -> list[Rollout]:
    """The canaries that split traffic now: not one whose alias was moved, or one of whose versions was revoked."""
    with registry.catalog.reading() as connection:
        leads = {(row.name, row.alias): row.version_id for row in connection.execute(select(aliases))}
        found = all_canaries(connection)
    return [
        rollout
        for rollout in found
        if leads.get((rollout.name, rollout.alias)) == rollout.stable.id
        and rollout.candidate.state == rollout.stable.state == "ready"
    ]


def status(registry: Registry, name: str, alias: str = PRODUCTION, now: datetime | None = None) -> Status:
    """The canary of ``name@alias`` that runs, or else the last one.

    Raises:
        UserError: there was none.
    """
    with registry.catalog.reading() as connection:
        found = last_canary_of(connection, name, alias)
        if found is None:
            raise _none(name, alias, "there never was a canary")
        return looked(connection, found, _time(now))


def advance(registry: Registry, now: datetime | None = None) -> list[Change]:
    """Do what is due of every canary: take back a candidate that a guard does not hold for, or that was revoked; go
    on to the next step where the hold is over and the guards allow it.

    Args:
        registry: of the canaries.
        now: the time; by default the clock's.

    Returns:
        What this call did; what another process did in the meantime is not in it.
    """
    with registry.catalog.reading() as connection:
        seen = [looked(connection, rollout, _time(now)) for rollout in all_canaries(connection)]
    changes = [_advance(registry, status.rollout, now) for status in seen if status.action != "wait"]
    return [change for change in changes if change is not None]


def _advance(registry: Registry, rollout: Rollout, now: datetime | None) -> Change | None:
    """Look again where nobody else can act, and act."""
    with registry.catalog.transaction() as held:
        present = canary_of(held.connection, rollout.name, rollout.alias)
        if present is None or present.id != rollout.id:
            return None
        seen = looked(held.connection, present, _time(now))
        if seen.action == "wait":  # another was first
            return None
        if seen.action == "canary-step":
            _step(held, seen, now)
        else:
            _end(held, seen, seen.action, seen.next, now)
        after = last_canary_of(held.connection, rollout.name, rollout.alias)
    assert after is not None
    level = logging.WARNING if seen.action in ("canary-rollback", "canary-abort") else logging.INFO
    _log.log(level, "%s of %s, %s: %s", seen.action, after, after.candidate.reference, seen.next)
    return Change(after, seen.action, seen.next)


def promote(
    registry: Registry,
    name: str,
    alias: str = PRODUCTION,
    *,
    why: str = "",
    force: bool = False,
    now: datetime | None = None,
) -> AliasState:
    """Let the alias lead to the candidate, whatever step it is in, and end the canary: both or neither.

    Args:
        registry: of the canary.
        name: of the adapter.
        alias: whose canary.
        why: for the history.
        force: even if a guard is broken.
        now: the time; by default the clock's.

    Raises:
        UserError: none is running, a guard is broken, the candidate was revoked, or the alias was moved meanwhile.
    """
    with registry.catalog.transaction() as held:
        seen = looked(held.connection, _running(held, name, alias), _time(now))
        moved = seen.action == "canary-abort"
        revoked = seen.rollout.candidate.state == "revoked"
        if moved or revoked or (seen.action == "canary-rollback" and not force):
            what = "abort it" if moved or revoked else "abort it, or promote it with --force"
            raise UserError(f"the canary of {seen.rollout} cannot be promoted: {seen.next}; {what}")
        _end(held, seen, "canary-promote", why, now)
        there = alias_of(held, name, alias)
    assert there is not None
    return there


def abort(
    registry: Registry, name: str, alias: str = PRODUCTION, *, why: str = "", now: datetime | None = None
) -> Rollout:
    """End the canary; everybody is answered by the stable version again.

    Raises:
        UserError: none is running.
    """
    with registry.catalog.transaction() as held:
        seen = looked(held.connection, _running(held, name, alias), _time(now))
        _end(held, seen, "canary-abort", why, now)
        ended = last_canary_of(held.connection, name, alias)
    assert ended is not None
    return ended


def _step(held: Transaction, seen: Status, now: datetime | None) -> None:
    rollout, number = seen.rollout, seen.rollout.step + 1
    changed = {"step": number, "share": rollout.plan.steps[number], "stepped": stamp(now)}
    held.execute(
        rollouts.update().where(rollouts.c.id == rollout.id).values(**changed, evidence=evidence(seen, stamp(now)))
    )
    held.audit(
        "canary-step", name=rollout.name, alias=rollout.alias, before=rollout.stable.reference,
        after=rollout.candidate.reference, why=seen.next, details={**_told(seen), "to_share": changed["share"]},
    )  # fmt: skip


def _end(held: Transaction, seen: Status, action: Action, why: str, now: datetime | None) -> None:
    rollout = seen.rollout
    changed = {"state": _ENDS[action], "ended": stamp(now), "why": why or rollout.why}
    held.execute(
        rollouts.update().where(rollouts.c.id == rollout.id).values(**changed, evidence=evidence(seen, stamp(now)))
    )
    if action == "canary-promote":
        move(held, rollout.candidate, rollout.alias, action=action, why=why, details=_told(seen))
        return
    held.audit(
        action, name=rollout.name, alias=rollout.alias, before=rollout.candidate.reference,
        after=rollout.stable.reference, why=why, details=_told(seen),
    )  # fmt: skip


def _told(seen: Status) -> dict[str, Any]:
    arms = {arm: {"requests": counts.requests, "errors": counts.errors} for arm, counts in seen.arms.items()}
    guards = {reading.guard: f"{reading.state}: {reading}" for reading in seen.readings}
    return {
        "rollout": seen.rollout.id, "step": seen.rollout.step, "share": seen.rollout.share, "arms": arms,
        "guards": guards,
    }  # fmt: skip


def _stable(name: str, alias: str, version: Version, stable: Version | None) -> Version:
    """The version that ``version`` may be tried against."""
    if version.manifest.name != name:
        raise UserError(f"{version.reference} is no version of {name}; a canary of {name}@{alias} tries one of its own")
    if stable is None:
        raise UserError(
            f"{name}@{alias} leads nowhere, so there is nothing to try {version.reference} against; "
            f"`lorchestra registry promote {version.reference} --to {alias}` lets it lead there"
        )
    if stable.id == version.id:
        raise UserError(f"{name}@{alias} leads to {version.reference} already; a canary tries another version")
    for one in (version, stable):
        if one.revoked is not None:
            raise RevokedError(f"{one.reference} was revoked ({one.revoked.why}), so there can be no canary with it")
    bases = [one.manifest.base.weights for one in (stable, version)]
    if all(bases) and bases[0] != bases[1]:
        raise UserError(
            f"{version.reference} was trained on another base than {stable.reference}, and one server has one base. "
            "Serve the new base beside the old one instead"
        )
    return stable


def _running(held: Transaction, name: str, alias: str) -> Rollout:
    found = canary_of(held.connection, name, alias)
    if found is None:
        raise _none(name, alias, "no canary is running")
    return found


def _none(name: str, alias: str, what: str) -> UserError:
    return UserError(f"{what} of {name}@{alias}; `lorchestra registry canary start {name} {name}@vN` starts one")


def _time(now: datetime | None) -> datetime:
    return datetime.fromisoformat(stamp(now))
