"""Queries for versions: by reference, by filters, as whole versions or as lines of a list."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, exists, func, select

from lorchestra.errors import UserError
from lorchestra.registry.gates import OPERATORS, parse_threshold
from lorchestra.registry.manifest import Manifest, digest_of
from lorchestra.registry.mistakes import DamagedError, UnknownReferenceError
from lorchestra.registry.reference import Reference
from lorchestra.registry.sql.catalog import (
    PRODUCTION,
    AliasState,
    Measured,
    Revocation,
    Summary,
    Target,
    Version,
)
from lorchestra.registry.sql.schema import aliases, manifests, names, version_metrics, version_tags, versions

_SHOWN = 5  # nearest names in a message
_FEW = 500  # versions that are asked for one by one; of more, a whole span of ids is read
_WHOLE = (
    versions.c.id,
    versions.c.name,
    versions.c.number,
    versions.c.manifest_digest,
    versions.c.state,
    versions.c.revoked_at,
    versions.c.revoked_by,
    versions.c.revoked_why,
    manifests.c.text,
)
_LINE = tuple(versions.c[field] for field in Summary._fields if field not in ("aliases", "tags"))
_TARGET = tuple(versions.c[field] for field in Target._fields)
_MEASURED = tuple(version_metrics.c[field] for field in Measured._fields)


class Filter(NamedTuple):
    """Which versions; an empty field takes all.

    Args:
        name: of the adapter.
        base: the base's name, or its weights' digest (12 digits of it are enough).
        tag: one of its tags.
        metric: that it has (``loss``), or what is asked of it (``loss<=1.2``).
        state: ``ready`` or ``revoked``.
        alias: that leads to it.
        since: made at this time or later, ISO 8601.
    """

    name: str = ""
    base: str = ""
    tag: str = ""
    metric: str = ""
    state: str = ""
    alias: str = ""
    since: str = ""

    def conditions(self) -> list[ColumnElement[bool]]:
        """For ``where``.

        Raises:
            UserError: a state, metric or time that is none.
        """
        found: list[ColumnElement[bool]] = []
        if self.name:
            found.append(versions.c.name == self.name)
        if self.base.startswith("sha256:"):
            found.append(_begins(versions.c.base_weights, self.base))
        elif self.base:
            found.append(versions.c.base_name == self.base)
        if self.tag:
            tag = version_tags.c
            found.append(exists().where(tag.version_id == versions.c.id, tag.tag == self.tag))
        if self.metric:
            found.append(self._metric())
        if self.state:
            if self.state not in ("ready", "revoked"):
                raise UserError(f"a version's state is ready or revoked, not {self.state!r}")
            found.append(versions.c.state == self.state)
        if self.alias:
            found.append(versions.c.id.in_(select(aliases.c.version_id).where(aliases.c.alias == self.alias)))
        if self.since:
            found.append(versions.c.created >= _time(self.since))
        return found

    def _metric(self) -> ColumnElement[bool]:
        column = version_metrics.c
        threshold = parse_threshold(self.metric)
        name = threshold[0] if threshold else self.metric
        having = select(column.version_id).where(column.name == name)
        if threshold:
            _, sign, bound = threshold
            having = having.where(OPERATORS[sign](column.value, bound))
        return versions.c.id.in_(having)


def whole_of() -> Select[Any]:
    """A query for versions with their manifests: rows for :func:`version_of`."""
    return select(*_WHOLE).outerjoin(manifests, manifests.c.version_id == versions.c.id)


def whole(connection: Connection, wanted: Filter, limit: int = 0) -> list[Version]:
    """Versions with their manifests, the newest first."""
    query = whole_of().where(*wanted.conditions()).order_by(versions.c.id.desc())
    return [version_of(row) for row in connection.execute(query.limit(limit) if limit else query)]


def summaries(connection: Connection, wanted: Filter, limit: int = 0, offset: int = 0) -> list[Summary]:
    """Lines of a list, the newest first, in two queries however many they are.

    Raises:
        DamagedError: a line cannot be read.
    """
    query = select(*_LINE, versions.c.tags).where(*wanted.conditions()).order_by(versions.c.id.desc())
    rows = connection.execute(query.limit(limit or None).offset(offset)).all()
    here = _among(aliases.c.version_id, [row[0] for row in rows])
    pointing = select(aliases.c.version_id, aliases.c.alias).where(here)
    words: dict[int, tuple[str, ...]] = {}
    for id, word in connection.execute(pointing.order_by(aliases.c.alias)):
        words[id] = (*words.get(id, ()), word)
    read = cache(_tags)  # few are different
    made = partial(tuple.__new__, Summary)  # as Summary._make, in half of its time
    return [made((*row[:-1], words.get(row[0], ()), read(row[-1]))) for row in rows]


def count(connection: Connection, wanted: Filter) -> int:
    """How many versions there are."""
    return int(connection.execute(select(func.count()).select_from(versions).where(*wanted.conditions())).scalar_one())


def measured(connection: Connection, ids: Sequence[int], name: str = "") -> dict[int, dict[str, Measured]]:
    """Id → name → metric, of those versions that have any: of ``name`` alone if it is given."""
    column = version_metrics.c
    query = select(column.version_id, column.name, *_MEASURED).where(_among(column.version_id, ids))
    found: dict[int, dict[str, Measured]] = {}
    for id, metric, *values in connection.execute(query.where(column.name == name) if name else query):
        found.setdefault(id, {})[metric] = Measured(*values)
    return found


def resolved(connection: Connection, reference: Reference) -> Version:
    """The version that ``reference`` leads to, revoked or not.

    A name alone is its alias ``production``, and without one the latest version that is not revoked.

    Raises:
        UnknownReferenceError: it leads to none, or a short digest to several; the message names the nearest.
    """
    row = connection.execute(_selecting(reference)).first() if reference.selector else _of_name(connection, reference)
    if row is None:
        raise UnknownReferenceError(_unknown(connection, reference))
    if reference.digest:
        _check_single(connection, reference)
    return version_of(row)


def alias_states(connection: Connection, name: str = "", alias: str = "") -> list[AliasState]:
    """Aliases with the versions that they lead to, by name and word."""
    query = select(*[aliases.c[c] for c in ("name", "alias", "since", "by", "generation")], *_TARGET)
    query = query.join(versions, versions.c.id == aliases.c.version_id).order_by(aliases.c.name, aliases.c.alias)
    if name:
        query = query.where(aliases.c.name == name)
    if alias:
        query = query.where(aliases.c.alias == alias)
    return [
        AliasState(of, word, Target(*target), since, by, generation)
        for of, word, since, by, generation, *target in connection.execute(query)
    ]


def by_ids(connection: Connection, ids: Iterable[int]) -> dict[int, Version]:
    """Id → version, of those that are there."""
    query = whole_of().where(versions.c.id.in_(list(ids)))
    return {row.id: version_of(row) for row in connection.execute(query)}


def version_of(row: Any) -> Version:
    """A row of :func:`whole_of` as a value, its manifest held to its digest.

    Raises:
        DamagedError: the manifest is missing, or not what was written.
    """
    reference = f"{row.name}@v{row.number}"
    if row.text is None or digest_of(row.text.encode("utf-8", "surrogatepass")) != row.manifest_digest:
        what = "is missing" if row.text is None else "is not what was written (its digest differs)"
        raise DamagedError(
            f"the manifest of {reference} {what}; `lorchestra registry verify` tells what else is, and a backup has it "
            "whole",
            reference,
        )
    manifest = Manifest.parse(row.text)
    revoked = Revocation(row.revoked_at, row.revoked_by, row.revoked_why) if row.state == "revoked" else None
    return Version(manifest, row.id, row.state, revoked)


def _selecting(reference: Reference) -> Any:
    query = whole_of().where(versions.c.name == reference.name)
    if reference.version is not None:
        return query.where(versions.c.number == reference.version)
    if reference.digest:
        ready_first = (versions.c.state == "ready").desc(), versions.c.number.desc()
        return query.where(_begins(versions.c.digest, reference.digest)).order_by(*ready_first).limit(1)
    return (
        whole_of()
        .join(aliases, aliases.c.version_id == versions.c.id)
        .where(aliases.c.name == reference.name, aliases.c.alias == reference.alias)
    )


def _of_name(connection: Connection, reference: Reference) -> Any:
    row = connection.execute(_selecting(Reference(reference.name, PRODUCTION))).first()
    if row is not None:
        return row
    latest = whole_of().where(versions.c.name == reference.name, versions.c.state == "ready")
    return connection.execute(latest.order_by(versions.c.number.desc()).limit(1)).first()


def _check_single(connection: Connection, reference: Reference) -> None:
    query = select(versions.c.digest).distinct()
    query = query.where(versions.c.name == reference.name, _begins(versions.c.digest, reference.digest)).limit(2)
    if len(connection.execute(query).all()) > 1:
        raise UnknownReferenceError(f"{reference} is more than one version; write more digits of the digest")


def _unknown(connection: Connection, reference: Reference) -> str:
    known = set(connection.execute(select(names.c.name)).scalars())
    if reference.name not in known:
        near = difflib.get_close_matches(reference.name, known, _SHOWN, 0.5)
        what = f"there is no adapter {reference.name!r} in this registry"
        if near:
            return f"{what}; the nearest are {', '.join(near)}"
        return f"{what}; " + (f"there are {_listed(sorted(known))}" if known else "it is empty")
    query = select(versions.c.number).where(versions.c.name == reference.name)
    numbers = connection.execute(query.order_by(versions.c.number.desc()).limit(_SHOWN)).scalars()
    words = connection.execute(select(aliases.c.alias).where(aliases.c.name == reference.name)).scalars().all()
    there = [f"{reference.name}@{word}" for word in sorted(words)] + [f"{reference.name}@v{k}" for k in numbers]
    if not reference.selector:
        what = f"every version of {reference.name} was "
        return what + (f"revoked ({_listed(there)})" if there else "removed")
    near = difflib.get_close_matches(str(reference), there, _SHOWN, 0.8)
    return f"there is no {reference}; " + (
        f"there are {_listed(near or there)}" if there else "every version was removed"
    )


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _begins(column: ColumnElement[str], prefix: str) -> ColumnElement[bool]:
    """A range, so that the index serves; 'g' follows every hexadecimal digit."""
    return (column >= prefix) & (column < prefix + "g")


def _among(column: ColumnElement[int], ids: Sequence[int]) -> ColumnElement[bool]:
    """Those of ``ids``; of many, all between the smallest and the largest, which costs one look into the index."""
    return column.in_(ids) if len(ids) <= _FEW else column.between(min(ids), max(ids))


def _tags(text: str) -> tuple[str, ...]:
    try:
        return tuple(map(str, json.loads(text)))
    except (ValueError, TypeError):
        raise DamagedError(
            f"the tags of a version are not what was written ({text[:40]!r}); `lorchestra registry verify` names it, "
            "and a backup has it whole",
            "tags",
        ) from None


def _time(text: str) -> str:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no time; write 2026-03-15 or 2026-03-15T12:00:00+00:00") from None
    aware = found if found.tzinfo else found.replace(tzinfo=UTC)
    return aware.astimezone(UTC).isoformat(timespec="milliseconds")
