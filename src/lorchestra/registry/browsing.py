"""A registry in pages, for those who look around in it: adapters, versions, aliases, canaries and the audit log.

Every page is a few queries, however much there is. The filters are those of :mod:`lorchestra.registry.sql.finding`,
and a text that names, tags, bases and makers are searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Connection, exists, func, or_, select

from lorchestra.registry.canary.watching import Status, all_canaries, last_canary_of, looked
from lorchestra.registry.sql.audit import Entry, entry_of
from lorchestra.registry.sql.catalog import Version
from lorchestra.registry.sql.finding import Filter, version_of, whole_of
from lorchestra.registry.sql.schema import aliases, audit, rollouts, version_tags, versions

if TYPE_CHECKING:
    from lorchestra.registry.registry import Registry

MOST = 200  # rows of a page, and words of a facet
T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some rows of many.

    Args:
        rows: of this page.
        total: how many there are in all.
    """

    rows: Sequence[T]
    total: int


class Pointed(NamedTuple):
    """Where an alias leads, without the version's manifest."""

    name: str
    alias: str
    number: int
    state: str
    since: str
    by: str
    canary: bool


class Shelf(NamedTuple):
    """One adapter, as a list of adapters shows it.

    Args:
        name: of it.
        versions: how many the filter finds.
        revoked: of them.
        newest: the highest number of them.
        changed: when the last one was made.
        base: of the newest.
        aliases: of the name.
    """

    name: str
    versions: int
    revoked: int
    newest: int
    changed: str
    base: str
    aliases: tuple[Pointed, ...]


@dataclass(frozen=True)
class Facets:
    """Words that filters can be set to."""

    tags: tuple[str, ...]
    bases: tuple[str, ...]
    aliases: tuple[str, ...]


def facets(registry: Registry) -> Facets:
    """The words that are in use, sorted; at most :data:`MOST` of each."""
    with registry.catalog.reading() as connection:
        found = [
            connection.execute(select(column).where(column != "").distinct().order_by(column).limit(MOST)).scalars()
            for column in (version_tags.c.tag, versions.c.base_name, aliases.c.alias)
        ]
        tags, bases, words = (tuple(column) for column in found)
    return Facets(tags, bases, words)


def adapters(registry: Registry, wanted: Filter, text: str = "", *, limit: int, offset: int = 0) -> Page[Shelf]:
    """The names that have such versions, those first whose last one is the newest.

    Raises:
        UserError: a filter that is none.
    """
    conditions = _conditions(wanted, text)
    newest = func.max(versions.c.id)
    revoked = func.count().filter(versions.c.state == "revoked")
    latest = func.max(versions.c.number), func.max(versions.c.created), newest
    query = (
        select(versions.c.name, func.count(), revoked, *latest)
        .where(*conditions)
        .group_by(versions.c.name)
        .order_by(newest.desc())
    )
    query = query.limit(_size(limit)).offset(offset)
    total = select(func.count(versions.c.name.distinct())).where(*conditions)
    with registry.catalog.reading() as connection:
        rows = connection.execute(query).all()
        there = int(connection.execute(total).scalar_one())
        bases = select(versions.c.id, versions.c.base_name).where(versions.c.id.in_([row[5] for row in rows]))
        base = {row.id: row.base_name for row in connection.execute(bases)}
        words: dict[str, list[Pointed]] = {}
        for one in _pointed(connection, aliases.c.name.in_([row[0] for row in rows])):
            words.setdefault(one.name, []).append(one)
    shelves = [
        Shelf(row[0], row[1], row[2], row[3], row[4], base.get(row[5], ""), tuple(words.get(row[0], ())))
        for row in rows
    ]
    return Page(shelves, there)


def versions_in(registry: Registry, wanted: Filter, text: str = "", *, limit: int, offset: int = 0) -> Page[Version]:
    """Versions with their manifests, the newest first.

    Raises:
        UserError: a filter that is none.
        DamagedError: a manifest is not what was written.
    """
    conditions = _conditions(wanted, text)
    query = whole_of().where(*conditions).order_by(versions.c.id.desc()).limit(_size(limit)).offset(offset)
    with registry.catalog.reading() as connection:
        found = [version_of(row) for row in connection.execute(query)]
        total = connection.execute(select(func.count()).select_from(versions).where(*conditions)).scalar_one()
    return Page(found, int(total))


def pointed(registry: Registry, text: str = "", *, name: str = "", limit: int, offset: int = 0) -> Page[Pointed]:
    """Aliases, by name and word: those of ``name`` alone, or those whose name or word has ``text`` in it."""
    conditions: list[ColumnElement[bool]] = [aliases.c.name == name] if name else []
    if text:
        conditions.append(
            or_(*(column.icontains(text, autoescape=True) for column in (aliases.c.name, aliases.c.alias)))
        )
    with registry.catalog.reading() as connection:
        rows = _pointed(connection, *conditions, limit=_size(limit), offset=offset)
        total = connection.execute(select(func.count()).select_from(aliases).where(*conditions)).scalar_one()
    return Page(rows, int(total))


def canaries(registry: Registry, ended: int = 10) -> tuple[list[Status], list[Status]]:
    """The canaries that run, with what is seen of them, and the last ``ended`` that do not any more."""
    now = datetime.now(UTC)
    with registry.catalog.reading() as connection:
        running = [looked(connection, rollout, now) for rollout in all_canaries(connection)]
        latest = func.max(rollouts.c.id)
        query = select(rollouts.c.name, rollouts.c.alias).group_by(rollouts.c.name, rollouts.c.alias)
        query = query.having(func.count() == func.count(rollouts.c.ended)).order_by(latest.desc()).limit(ended)
        over = [last_canary_of(connection, row.name, row.alias) for row in connection.execute(query).all()]
        return running, [looked(connection, rollout, now) for rollout in over if rollout is not None]


def entries(
    registry: Registry,
    *,
    name: str = "",
    alias: str = "",
    action: str = "",
    actor: str = "",
    reference: str = "",
    before: int = 0,
    limit: int,
) -> list[Entry]:
    """The audit log, the newest entry first.

    Args:
        registry: whose.
        name: of one adapter alone.
        alias: of one alias alone.
        action: of one kind alone.
        actor: of one alone.
        reference: that led from or to this version (``clinic@v2``).
        before: only entries with a smaller id; 0 for all.
        limit: how many.
    """
    query = select(audit).order_by(audit.c.id.desc()).limit(_size(limit))
    for column, value in (
        (audit.c.name, name),
        (audit.c.alias, alias),
        (audit.c.action, action),
        (audit.c.actor, actor),
    ):
        if value:
            query = query.where(column == value)
    if reference:
        query = query.where(or_(audit.c.before == reference, audit.c.after == reference))
    if before:
        query = query.where(audit.c.id < before)
    with registry.catalog.reading() as connection:
        return [entry_of(row) for row in connection.execute(query)]


def pointing(registry: Registry, ids: Sequence[int]) -> dict[int, list[str]]:
    """Id of a version → the aliases that lead to it."""
    query = select(aliases.c.version_id, aliases.c.alias).where(aliases.c.version_id.in_(list(ids)))
    found: dict[int, list[str]] = {}
    with registry.catalog.reading() as connection:
        for id, alias in connection.execute(query.order_by(aliases.c.alias)):
            found.setdefault(id, []).append(alias)
    return found


def _pointed(
    connection: Connection, *conditions: ColumnElement[bool], limit: int | None = None, offset: int = 0
) -> list[Pointed]:
    split = exists().where(
        rollouts.c.name == aliases.c.name, rollouts.c.alias == aliases.c.alias, rollouts.c.ended.is_(None)
    )
    query = select(
        aliases.c.name, aliases.c.alias, versions.c.number, versions.c.state, aliases.c.since, aliases.c.by, split
    )
    query = query.join(versions, versions.c.id == aliases.c.version_id).where(*conditions)
    query = query.order_by(aliases.c.name, aliases.c.alias).limit(limit).offset(offset)
    found = connection.execute(query)
    return [Pointed(row[0], row[1], row[2], row[3], row[4], row[5], bool(row[6])) for row in found]


def _conditions(wanted: Filter, text: str) -> list[ColumnElement[bool]]:
    found = wanted.conditions()
    for word in text.split():
        tagged = exists().where(
            version_tags.c.version_id == versions.c.id, version_tags.c.tag.icontains(word, autoescape=True)
        )
        found.append(
            or_(
                versions.c.name.icontains(word, autoescape=True),
                versions.c.base_name.icontains(word, autoescape=True),
                versions.c.created_by.icontains(word, autoescape=True),
                tagged,
            )
        )
    return found


def _size(limit: int) -> int:
    return max(1, min(limit, MOST))
