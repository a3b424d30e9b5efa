"""``gc``: what nothing needs goes, and only that.

Rows go before blobs. A blob goes while the catalog is held, after a look whether a version needs it by now; a push
looks, while it holds the catalog, whether its blobs are there still. So neither can miss the other, and the grace
period only spares pushes that are under way from storing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import Connection, or_, select

from lorchestra.registry.changing import moves, trail
from lorchestra.registry.mistakes import NeededError, RegistryError
from lorchestra.registry.reference import parse_reference
from lorchestra.registry.sql.catalog import Catalog, Transaction, Version
from lorchestra.registry.sql.finding import resolved
from lorchestra.registry.sql.schema import aliases, rollouts, version_files, version_parents, versions

if TYPE_CHECKING:
    from lorchestra.registry.store.blobs import Blobs
    from lorchestra.registry.store.stored import Stored

GRACE = timedelta(hours=1)
BATCH = 50  # blobs that go while the catalog is held once


@dataclass(frozen=True)
class GcPlan:
    """What goes, or went.

    Args:
        blobs: digest and bytes.
        leftovers: what killed processes were writing.
        versions: references.
        done: it went; else it was looked at alone.
    """

    blobs: tuple[tuple[str, int], ...] = ()
    leftovers: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    done: bool = False

    @property
    def bytes(self) -> int:
        """Of the blobs."""
        return sum(size for _, size in self.blobs)


def collect(
    catalog: Catalog, blobs: Blobs, *, dry_run: bool, older_than: timedelta, wanted: Sequence[str], why: str
) -> GcPlan:
    """See :meth:`lorchestra.registry.registry.Registry.gc`."""
    with catalog.reading() as connection:
        _check_leases(catalog, connection)
        gone = _asked_for(connection, wanted)
    if gone and not dry_run:
        _remove(catalog, wanted, why)
    unneeded = _unneeded(catalog, blobs, {version.id for version in gone}, older_than)
    leftovers = blobs.leftovers(older_than)
    if not dry_run:
        batches = [unneeded[start : start + BATCH] for start in range(0, len(unneeded), BATCH)]
        unneeded = [stored for batch in batches for stored in _delete(catalog, blobs, batch, why)]
        for leftover in leftovers:
            blobs.discard(leftover)
    return GcPlan(
        tuple((stored.digest, stored.size) for stored in unneeded),
        tuple(leftover.name for leftover in leftovers),
        tuple(version.reference for version in gone),
        done=not dry_run,
    )


def _check_leases(catalog: Catalog, connection: Connection) -> None:
    for kind, by in catalog.leases(connection):
        raise RegistryError(f"nothing is removed now: a {kind} by {by} is under way. Try again when it has ended")


def _asked_for(connection: Connection, wanted: Sequence[str]) -> list[Version]:
    """The versions that are to go.

    Raises:
        NeededError: something needs one of them; all reasons are told.
    """
    found = {}
    for text in wanted:
        version = resolved(connection, parse_reference(text))
        found[version.id] = version
    reasons = [reason for version in found.values() for reason in _needs(connection, version, set(found))]
    if reasons:
        raise NeededError("nothing was removed: " + "; ".join(reasons))
    return list(found.values())


def _needs(connection: Connection, version: Version, going: set[int]) -> list[str]:
    """Who needs a version, of what stays."""
    reference, digest, name = version.reference, version.manifest.digest, version.manifest.name
    found = []
    query = select(aliases.c.alias).where(aliases.c.version_id == version.id)
    found += [f"{name}@{alias} leads to {reference}" for alias in connection.execute(query).scalars()]
    running = select(rollouts.c.alias).where(
        rollouts.c.ended.is_(None),
        or_(rollouts.c.stable_version == version.id, rollouts.c.candidate_version == version.id),
    )
    found += [f"the canary of {name}@{alias} is on {reference}" for alias in connection.execute(running).scalars()]
    held = Transaction(connection, "")
    for alias in connection.execute(select(aliases.c.alias).where(aliases.c.name == name)).scalars().all():
        if reference in trail(moves(held, name, alias))[-2:-1]:
            found.append(f"a rollback of {name}@{alias} would go to {reference}")
    same = select(versions.c.id).where(versions.c.digest == digest, versions.c.id.not_in(going)).limit(1)
    if connection.execute(same).first() is None:
        child = (
            select(versions.c.name, versions.c.number)
            .join(version_parents, version_parents.c.version_id == versions.c.id)
            .where(version_parents.c.digest == digest, versions.c.id.not_in(going))
            .distinct()
            .limit(3)
        )
        found += [f"{row.name}@v{row.number} descends from {reference}" for row in connection.execute(child)]
    return found


def _remove(catalog: Catalog, wanted: Sequence[str], why: str) -> None:
    with catalog.transaction() as held:
        _check_leases(catalog, held.connection)
        for version in _asked_for(held.connection, wanted):
            told = {"manifest": version.manifest.manifest_digest, "digest": version.manifest.digest}
            held.audit("gc", name=version.manifest.name, before=version.reference, why=why, details=told)
            held.execute(versions.delete().where(versions.c.id == version.id))


def _unneeded(catalog: Catalog, blobs: Blobs, going: set[int], older_than: timedelta) -> list[Stored]:
    query = select(version_files.c.blob).where(version_files.c.version_id.not_in(going)).distinct()
    with catalog.reading() as connection:
        needed = set(connection.execute(query).scalars())
    now = datetime.now(UTC)
    return [found for found in blobs.all() if found.digest not in needed and now - found.modified >= older_than]


def _delete(catalog: Catalog, blobs: Blobs, batch: Sequence[Stored], why: str) -> list[Stored]:
    """Those of the batch that no version needs now."""
    with catalog.transaction() as held:
        _check_leases(catalog, held.connection)
        query = select(version_files.c.blob).where(version_files.c.blob.in_([stored.digest for stored in batch]))
        needed = set(held.execute(query).scalars())
        going = [stored for stored in batch if stored.digest not in needed]
        if going:
            told = {"blobs": len(going), "bytes": sum(stored.size for stored in going)}
            held.audit("gc", why=why, details=told)
        for stored in going:
            blobs.delete(stored.digest)
    return going
