"""What gateways see of the two arms of a rollout, and what people say of the answers: counted in the catalog.

Each gateway process has a row of its own for each arm and writes into it what it has seen *so far*: a write that is
repeated changes nothing, and none waits for another's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorchestra.registry.canary.guards import FASTEST, SLOWEST, Counts
from lorchestra.registry.canary.traffic import ARMS, Arm

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Connection

    from lorchestra.registry.sql.catalog import Catalog


@dataclass
class Tally:
    """What one gateway process has seen of one arm of one rollout since it began. It belongs to one thread."""

    requests: int = 0
    errors: int = 0
    latency_n: int = 0
    latency_sum: float = 0.0
    latency_sq: float = 0.0

    def answered(self, seconds: float) -> None:
        """One request was answered; ``seconds`` is its latency, by whatever measure, but one for all."""
        logarithm = math.log(min(max(seconds, FASTEST), SLOWEST))
        self.requests += 1
        self.latency_n += 1
        self.latency_sum += logarithm
        self.latency_sq += logarithm**2

    def failed(self) -> None:
        """One request failed, and not because of what the client sent or because it left."""
        self.requests += 1
        self.errors += 1


def observe(
    catalog: Catalog, rollout: int, gateway: str, tallies: Mapping[Arm, Tally], now: datetime | None = None
) -> None:
    """Write what ``gateway`` has seen so far, in place of what it wrote before.

    Args:
        catalog: of the registry.
        rollout: its id. One that has ended keeps counting, and nothing comes of it.
        gateway: of this process alone: a process that is started again has another.
        tallies: arm → what was seen.
        now: the time; by default the clock's.
    """
    rows = [
        {"rollout_id": rollout, "arm": arm, "gateway": gateway, "updated": stamp(now), **vars(tally), **_NO_SCORES}
        for arm, tally in tallies.items()
    ]
    if not rows:
        return
    from lorchestra.registry.sql.schema import observations

    with catalog.writing() as connection:
        statement = upsert(connection, observations, rows, ("rollout_id", "arm", "gateway"))
        connection.execute(statement)


def totals(connection: Connection, rollout: int) -> dict[Arm, Counts]:
    """Requests, errors and latencies of both arms, of all gateways, since the rollout began."""
    from sqlalchemy import func, select

    from lorchestra.registry.sql.schema import observations

    columns = [observations.c[name] for name in ("requests", "errors", "latency_n", "latency_sum", "latency_sq")]
    query = select(observations.c.arm, *(func.sum(column) for column in columns))
    query = query.where(observations.c.rollout_id == rollout).group_by(observations.c.arm)
    found = {
        row[0]: Counts(int(row[1]), int(row[2]), int(row[3]), float(row[4]), float(row[5]))
        for row in connection.execute(query)
    }
    return {arm: found.get(arm, Counts()) for arm in ARMS}


def scores(connection: Connection, name: str, versions: Mapping[Arm, int], since: str) -> dict[Arm, Counts]:
    """Feedback on what the versions of a rollout answered as its arms, given at ``since`` or later."""
    from sqlalchemy import func, select

    from lorchestra.registry.sql.schema import feedback

    query = select(feedback.c.arm, func.count(), func.sum(feedback.c.score)).where(
        feedback.c.name == name, feedback.c.at >= since
    )
    found = {}
    for arm, version in versions.items():
        row = connection.execute(
            query.where(feedback.c.arm == arm, feedback.c.version_id == version).group_by(feedback.c.arm)
        ).first()
        found[arm] = Counts(score_n=int(row[1]), score_sum=float(row[2])) if row else Counts()
    return found


def upsert(connection: Connection, table: Any, rows: list[dict[str, Any]], key: tuple[str, ...]) -> Any:
    """INSERT … ON CONFLICT (key) DO UPDATE, of SQLite or PostgreSQL."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    statement = insert(table).values(rows)
    changed = {name: statement.excluded[name] for name in rows[0] if name not in key}
    return statement.on_conflict_do_update(index_elements=list(key), set_=changed)


def stamp(now: datetime | None = None) -> str:
    """ISO 8601 in UTC, milliseconds: as texts they sort by time.

    Raises:
        ValueError: ``now`` has no time zone.
    """
    from datetime import UTC, datetime

    if now is None:
        now = datetime.now(UTC)
    if now.tzinfo is None:
        raise ValueError(f"{now} has no time zone")
    return now.astimezone(UTC).isoformat(timespec="milliseconds")


_NO_SCORES = {"score_sum": 0.0, "score_sq": 0.0, "score_n": 0}  # these are counted from the feedback itself
