"""What the names of a registry lead to at one moment, in memory: read in a few queries, never changed, quick to ask.

Whoever answers requests asks this and no database: a lookup is a few dictionaries, however many versions there are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from lorchestra.registry.canary.traffic import Arm, arm_of
from lorchestra.registry.reference import Reference
from lorchestra.registry.sql.catalog import PRODUCTION

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from lorchestra.registry.sql.catalog import Catalog

_SAMPLE = 2  # blobs of the oldest version and of the newest: one that lost its files is no store that is away
_MANY = 500  # names, of which a query asks one by one


class Line(NamedTuple):
    """A version, as far as names go.

    Args:
        id: never given twice.
        name: of the adapter.
        number: 2 of ``clinic@v2``.
        digest: of the weights.
        base_weights: digest of the base that it was trained on; empty if unknown.
        revoked: why it was; ``None`` if it was not.
        created: when, ISO 8601 in UTC.
    """

    id: int
    name: str
    number: int
    digest: str
    base_weights: str
    revoked: str | None
    created: str

    @property
    def reference(self) -> str:
        """``clinic@v2``."""
        return f"{self.name}@v{self.number}"


class Split(NamedTuple):
    """A canary, as far as traffic goes: see :mod:`lorchestra.registry.canary.rollout`."""

    rollout: int
    stable: int
    candidate: int
    salt: str
    share: float

    def arm(self, tenant: str, user: str) -> Arm:
        """Who answers this user."""
        return arm_of(self.share, self.salt, tenant, user)


@dataclass(frozen=True)
class Name:
    """What one adapter's name leads to.

    Args:
        versions: by number.
        pointers: alias → version; the empty alias is the name alone, and absent if every version was revoked.
        splits: alias → canary that splits its traffic; the empty one is that of ``production``.
    """

    versions: Mapping[int, Line]
    pointers: Mapping[str, Line]
    splits: Mapping[str, Split] = field(default_factory=dict)

    def exact(self, reference: Reference) -> Line | None:
        """The version that a number or digest names; of several with one digest, the newest that is not revoked."""
        if reference.version is not None:
            return self.versions.get(reference.version)
        first = bisect_left(self._by_digest, reference.digest, key=lambda line: line.digest)
        found = list(
            takewhile(lambda line: line.digest.startswith(reference.digest), islice(self._by_digest, first, None))
        )
        if len({line.digest for line in found}) != 1:  # none, or too few digits
            return None
        return max(found, key=lambda line: (line.revoked is None, line.number))

    @cached_property
    def _by_digest(self) -> list[Line]:
        return sorted(self.versions.values(), key=lambda line: line.digest)


@dataclass(frozen=True)
class Snapshot:
    """A registry's names.

    Args:
        generation: of the catalog, when this was read.
        names: what they lead to.
        by_id: every version.
        canaries: how many run, with those that split no traffic any more and have not been ended yet.
        sample: digests of some blobs that are needed, to see whether the store is there.
    """

    generation: int = 0
    names: Mapping[str, Name] = field(default_factory=dict)
    by_id: Mapping[int, Line] = field(default_factory=dict)
    canaries: int = 0
    sample: tuple[str, ...] = ()

    def pointers(self) -> Iterator[tuple[str, str, Line]]:
        """Name, alias (empty: the name alone), version."""
        for name, found in self.names.items():
            for alias, line in found.pointers.items():
                yield name, alias, line

    def holding(self, digest: str) -> Sequence[Line]:
        """Versions of any name with the weights ``digest``: those that are not revoked first, then by name, the newest
        first."""
        return self._by_digest.get(digest, ())

    @cached_property
    def _by_digest(self) -> Mapping[str, Sequence[Line]]:
        found: dict[str, list[Line]] = {}
        for line in sorted(self.by_id.values(), key=lambda line: (line.revoked is not None, line.name, -line.number)):
            found.setdefault(line.digest, []).append(line)
        return found

    @classmethod
    def read(cls, catalog: Catalog, before: Snapshot | None = None) -> Snapshot:
        """As it is now.

        Args:
            catalog: of the registry.
            before: what it was; of versions only those are read that the audit log tells of since.

        Raises:
            RegistryError: the catalog cannot be reached.
        """
        from sqlalchemy import func, select

        from lorchestra.registry.sql.schema import aliases, audit, rollouts, version_files, versions

        column, split = versions.c, rollouts.c
        wanted = (column.id, column.name, column.number, column.digest, column.base_weights)
        query = select(*wanted, column.state, column.revoked_why, column.created)
        running = select(split.name, split.alias, split.id, split.stable_version, split.candidate_version, split.salt,
                         split.share).where(split.ended.is_(None))  # fmt: skip
        files = version_files.c
        ends = [
            select(files.blob).order_by(order).limit(_SAMPLE) for order in (files.version_id, files.version_id.desc())
        ]
        with catalog.reading() as connection:
            generation = int(connection.execute(select(func.coalesce(func.max(audit.c.id), 0))).scalar_one())
            since = None if before is None else _since(connection, before.generation, generation)
            kept: dict[int, Line] = {}
            if before is not None and since is not None:
                kept = {id: line for id, line in before.by_id.items() if line.name not in since}
                query = query.where(column.name.in_(since))
            read = {
                row[0]: Line(*row[:5], (row[6] or "no reason was given") if row[5] == "revoked" else None, row[7])
                for row in (connection.execute(query) if since is None or since else ())
            }
            lines = dict(sorted({**kept, **read}.items()))
            pointed = connection.execute(select(aliases.c.name, aliases.c.alias, aliases.c.version_id)).all()
            canaries = connection.execute(running).all()
            sample = tuple(sorted({blob for end in ends for blob in connection.execute(end).scalars()}))
        return cls._of(generation, lines, pointed, canaries, sample)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, of which :meth:`from_dict` makes the same again."""
        named = [(name, alias, line.id) for name, alias, line in self.pointers() if alias]
        splits = [
            (name, alias, *split)
            for name, found in self.names.items()
            for alias, split in found.splits.items()
            if alias
        ]
        return {
            "generation": self.generation, "lines": list(self.by_id.values()), "aliases": named, "canaries": splits,
            "running": self.canaries, "sample": self.sample,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Snapshot:
        """From :meth:`as_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is not from there.
        """
        lines = {line.id: line for line in (Line(*fields) for fields in told["lines"])}
        made = cls._of(told["generation"], lines, told["aliases"], told["canaries"], tuple(told["sample"]))
        return replace(made, canaries=told["running"])

    @classmethod
    def _of(
        cls,
        generation: int,
        lines: Mapping[int, Line],
        pointed: Iterable[Sequence[Any]],
        canaries: Sequence[Sequence[Any]],
        sample: tuple[str, ...],
    ) -> Snapshot:
        """From versions by id; name, alias, id; name, alias and the fields of a split."""
        splits: dict[str, dict[str, Split]] = {}
        for name, alias, *rest in canaries:
            splits.setdefault(name, {})[alias] = Split(*rest)
        words: dict[str, dict[str, Line]] = {}
        for name, alias, version in pointed:
            words.setdefault(name, {})[alias] = lines[version]
        numbers: dict[str, dict[int, Line]] = {}
        for line in lines.values():
            numbers.setdefault(line.name, {})[line.number] = line
        names = {
            name: _name(known, words.get(name, {}), splits.get(name, {}), lines) for name, known in numbers.items()
        }
        return cls(generation, names, lines, len(canaries), sample)


def _name(
    numbers: Mapping[int, Line], words: dict[str, Line], canaries: Mapping[str, Split], lines: Mapping[int, Line]
) -> Name:
    ready = [line for line in numbers.values() if line.revoked is None]
    if PRODUCTION in words:
        words[""] = words[PRODUCTION]
    elif ready:
        words[""] = max(ready, key=lambda line: line.number)
    splits = {}
    for alias, split in canaries.items():
        stable, candidate = words.get(alias), lines.get(split.candidate)
        if stable is None or candidate is None or stable.id != split.stable:
            continue  # the alias was moved meanwhile: whoever advances canaries ends this one
        if stable.revoked is None and candidate.revoked is None:
            splits[alias] = split
    if PRODUCTION in splits:
        splits[""] = splits[PRODUCTION]
    return Name(numbers, words, splits)


def _since(connection: Connection, before: int, now: int) -> set[str] | None:
    """Names that anything was done to since; ``None`` where that cannot be told."""
    from sqlalchemy import select

    from lorchestra.registry.sql.schema import audit

    done = connection.execute(select(audit.c.name, audit.c.action).where(audit.c.id > before).distinct()).all()
    if now < before or any(action == "restore-backup" for _, action in done):
        return None
    found = {name for name, _ in done if name}
    return found if len(found) <= _MANY else None
