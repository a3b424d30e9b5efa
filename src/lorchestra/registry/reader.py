"""``Reader``: what a registry tells; nothing here changes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from lorchestra.registry.location import Location
from lorchestra.registry.naming import meant
from lorchestra.registry.reference import Reference, parse_reference
from lorchestra.registry.sql.audit import Entry
from lorchestra.registry.sql.catalog import AliasState, Catalog, Measured, Summary, Version

if TYPE_CHECKING:
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.registry.bases import BaseCheck
    from lorchestra.registry.checking import Finding
    from lorchestra.registry.manifest import Manifest
    from lorchestra.registry.store.blobs import Blobs


class Filters(TypedDict, total=False):
    """Which versions, beside the name; see :class:`lorchestra.registry.sql.finding.Filter`."""

    base: str
    tag: str
    metric: str
    state: str
    alias: str
    since: str


class Reader:
    """What a registry tells.

    Args:
        location: where it is.
        catalog: its catalog.
        blobs: its store.
    """

    def __init__(self, location: Location, catalog: Catalog, blobs: Blobs) -> None:
        self.location, self.catalog, self.blobs = location, catalog, blobs

    def resolve(self, reference: Reference | str) -> Version:
        """The version that a reference leads to, revoked or not.

        A name alone is its alias ``production``; without one, its latest version that is not revoked.

        Raises:
            UnknownReferenceError: it leads to none; the message names the nearest.
            DamagedError: its manifest is not what was written.
        """
        from lorchestra.registry.sql.finding import resolved

        with self.catalog.reading() as connection:
            return resolved(connection, as_reference(reference))

    def pull(self, reference: Reference | str, directory: Path) -> Version:
        """Write a version's files into ``directory``, bit-identical, whole or not at all.

        Raises:
            UnknownReferenceError: there is no such version.
            RevokedError: it was revoked.
            StorageError: the directory is not empty, or cannot be written.
            DamagedError: a blob is missing or damaged.
        """
        from lorchestra.registry.store.copies import pull

        version = self.resolve(reference)
        pull(version, self.blobs, Path(directory))
        return version

    def materialise(self, version: Version, cache: Path) -> Path:
        """A verified local copy in ``cache``; see :func:`lorchestra.registry.store.copies.materialise`."""
        from lorchestra.registry.store.copies import materialise

        return materialise(version, self.blobs, Path(cache))

    def versions(self, name: str = "", *, limit: int = 0, **wanted: Unpack[Filters]) -> list[Version]:
        """Versions with their manifests, the newest first; the filters are those of :class:`finding.Filter`.

        Raises:
            UserError: a filter that is none.
        """
        from lorchestra.registry.sql.finding import Filter, whole

        with self.catalog.reading() as connection:
            return whole(connection, Filter(name, **wanted), limit)

    def summaries(self, name: str = "", *, limit: int = 0, offset: int = 0, **wanted: Unpack[Filters]) -> list[Summary]:
        """As :meth:`versions`, without their manifests: what a list shows, quick for thousands.

        Raises:
            UserError: a filter that is none.
        """
        from lorchestra.registry.sql.finding import Filter, summaries

        with self.catalog.reading() as connection:
            return summaries(connection, Filter(name, **wanted), limit, offset)

    def count(self, name: str = "", **wanted: Unpack[Filters]) -> int:
        """How many :meth:`versions` there are.

        Raises:
            UserError: a filter that is none.
        """
        from lorchestra.registry.sql.finding import Filter, count

        with self.catalog.reading() as connection:
            return count(connection, Filter(name, **wanted))

    def measured(self, ids: Sequence[int], name: str = "") -> dict[int, dict[str, Measured]]:
        """Id → name → metric, of those versions that have any: of ``name`` alone if it is given."""
        from lorchestra.registry.sql.finding import measured

        with self.catalog.reading() as connection:
            return measured(connection, ids, name)

    def by_ids(self, ids: Iterable[int]) -> dict[int, Version]:
        """Id → version, of those that are there."""
        from lorchestra.registry.sql.finding import by_ids

        with self.catalog.reading() as connection:
            return by_ids(connection, ids)

    def aliases(self, name: str = "") -> list[AliasState]:
        """Aliases, by name and word."""
        from lorchestra.registry.sql.finding import alias_states

        with self.catalog.reading() as connection:
            return alias_states(connection, name)

    def names(self) -> list[str]:
        """Every name that has a version, sorted."""
        from sqlalchemy import select

        from lorchestra.registry.sql.schema import versions

        with self.catalog.reading() as connection:
            return sorted(connection.execute(select(versions.c.name).distinct()).scalars())

    def history(self, name: str = "", alias: str = "", limit: int = 0) -> list[Entry]:
        """The audit log, the newest entry first; see :meth:`Catalog.history`."""
        return self.catalog.history(name, alias, limit)

    def verify(self, deep: bool = True) -> list[Finding]:
        """Everything that is not as it was written; see :func:`lorchestra.registry.checking.verify`."""
        from lorchestra.registry.checking import verify

        return verify(self.catalog, self.blobs, deep=deep)

    def allowed_base(self, manifest: Manifest, base: BaseId) -> BaseCheck:
        """Whether a version may be served on ``base``; see :func:`lorchestra.registry.bases.allowed`."""
        from lorchestra.registry.bases import allowed

        with self.catalog.reading() as connection:
            return allowed(connection, manifest, base)

    def generation(self) -> int:
        """A number that grows with every change of the catalog; one cheap query."""
        return self.catalog.generation()


def as_reference(reference: Reference | str) -> Reference:
    """A reference, parsed where it is a text; a full name (``medical_diagnosis_v2``) is what it means.

    Raises:
        UserError: not by the grammar.
    """
    return meant(reference if isinstance(reference, Reference) else parse_reference(reference))
