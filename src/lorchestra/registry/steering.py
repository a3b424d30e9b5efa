"""A canary steered by hand: on to the next step before its time, or every step held for longer (or not so long)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from lorchestra.errors import UserError
from lorchestra.registry.canary.observations import stamp
from lorchestra.registry.canary.plan import Plan
from lorchestra.registry.canary.watching import Rollout, Status, canary_of, evidence, looked
from lorchestra.registry.sql.catalog import PRODUCTION, Transaction
from lorchestra.registry.sql.schema import rollouts

if TYPE_CHECKING:
    from typing import Any

    from lorchestra.registry.registry import Registry


def step(
    registry: Registry, name: str, alias: str = PRODUCTION, *, why: str = "", now: datetime | None = None
) -> Rollout:
    """Go on to the next step, whatever is left of the hold and however few requests were answered.

    Args:
        registry: of the canary.
        name: of the adapter.
        alias: whose canary.
        why: for the history.
        now: the time; by default the clock's.

    Raises:
        UserError: none is running, it is in its last step, or it is to be taken back: a guard is broken, the candidate
            was revoked, or the alias was moved.
    """
    with registry.catalog.transaction() as held:
        seen = _seen(held, name, alias, now)
        rollout, number = seen.rollout, seen.rollout.step + 1
        if seen.action in ("canary-rollback", "canary-abort"):
            raise UserError(f"the canary of {rollout} cannot go on: {seen.next}; abort it")
        if number >= len(rollout.plan.steps):
            raise UserError(f"the canary of {rollout} is in its last step; promote it, or abort it")
        share = rollout.plan.steps[number]
        changed = {"step": number, "share": share, "stepped": stamp(now), "evidence": evidence(seen, stamp(now))}
        return _changed(held, seen, changed, why, {"share": rollout.share, "to_share": share, "by_hand": True})


def hold(
    registry: Registry,
    name: str,
    span: timedelta,
    alias: str = PRODUCTION,
    *,
    why: str = "",
    now: datetime | None = None,
) -> Rollout:
    """Let this step and those after it last ``span`` at least, each from its own beginning.

    Args:
        registry: of the canary.
        name: of the adapter.
        span: how long.
        alias: whose canary.
        why: for the history.
        now: the time; by default the clock's.

    Raises:
        UserError: none is running, or a negative span.
    """
    with registry.catalog.transaction() as held:
        seen = _seen(held, name, alias, now)
        before = seen.rollout.plan
        plan = Plan(before.steps, span, before.promote)
        told = {"share": seen.rollout.share, "hold": before.hold.total_seconds(), "to_hold": span.total_seconds()}
        return _changed(held, seen, {"plan": plan.to_json()}, why, told | {"by_hand": True})


def _seen(held: Transaction, name: str, alias: str, now: datetime | None) -> Status:
    found = canary_of(held.connection, name, alias)
    if found is None:
        raise UserError(f"no canary is running of {name}@{alias}; start one first")
    return looked(held.connection, found, now or datetime.now(UTC))


def _changed(held: Transaction, seen: Status, changed: dict[str, Any], why: str, told: dict[str, Any]) -> Rollout:
    rollout = seen.rollout
    held.execute(rollouts.update().where(rollouts.c.id == rollout.id).values(**changed))
    held.audit(
        "canary-step", name=rollout.name, alias=rollout.alias, before=rollout.stable.reference,
        after=rollout.candidate.reference, why=why, details={"rollout": rollout.id, "step": rollout.step, **told},
    )  # fmt: skip
    after = canary_of(held.connection, rollout.name, rollout.alias)
    assert after is not None
    return after
