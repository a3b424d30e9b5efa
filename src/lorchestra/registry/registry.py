"""``Registry``: versions of adapters, names that move between them, and everything that was ever done to either.

A registry is a catalog (SQL) and a store of blobs. A push stores blobs, then enters the version in one transaction;
whoever is killed in between leaves blobs that nothing names, and ``gc`` takes them.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from lorchestra.errors import UserError
from lorchestra.registry.location import Location
from lorchestra.registry.naming import full_name
from lorchestra.registry.reader import Reader, as_reference
from lorchestra.registry.reference import Reference, check_name
from lorchestra.registry.sql.audit import plain_text
from lorchestra.registry.sql.catalog import (
    PRODUCTION,
    AliasState,
    Catalog,
    Revocation,
    Transaction,
    Version,
)

if TYPE_CHECKING:
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.registry.collecting import GcPlan
    from lorchestra.registry.gates import Gate
    from lorchestra.registry.manifest import Manifest, Metric

ACTOR = "LORCHESTRA_ACTOR"


class Registry(Reader):
    """A registry that is open. Threads may share it; a process that forks opens its own."""

    @classmethod
    def open(cls, url: str, *, create: bool = False, actor: str = "") -> Self:
        """The registry at ``url``; its tables are upgraded if an earlier lorchestra made them.

        Args:
            url: see :class:`~lorchestra.registry.location.Location`.
            create: make it where there is none.
            actor: who works with it, for the audit log; by default ``LORCHESTRA_ACTOR``, or user@host.

        Raises:
            UserError: the URL names no registry, or there is none and none was to be made.
            RegistryError: it cannot be reached, or a newer lorchestra made it.
        """
        from lorchestra.registry.store.blobs import Blobs

        location = Location.parse(url)
        blobs = Blobs(location.blobs)
        who = plain_text(os.environ.get(ACTOR, "") or actor or _myself(), "actor")
        return cls(location, Catalog.open(location.database, shown=location.shown, actor=who, create=create), blobs)

    @classmethod
    def later(cls, url: str, *, actor: str = "") -> Self:
        """The registry at ``url``, which cannot be reached now; see :meth:`Catalog.later`.

        Raises:
            UserError: the URL names no registry.
        """
        from lorchestra.registry.store.blobs import Blobs

        location = Location.parse(url)
        who = plain_text(os.environ.get(ACTOR, "") or actor or _myself(), "actor")
        return cls(location, Catalog.later(location.database, shown=location.shown, actor=who), Blobs(location.blobs))

    def close(self) -> None:
        """Close its connections."""
        self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def push(
        self,
        directory: Path,
        name: str,
        *,
        note: str = "",
        tags: Iterable[str] = (),
        metrics: Mapping[str, Metric] | None = None,
        recipe: Mapping[str, Any] | None = None,
        number: int | None = None,
        alias: str = "",
        why: str = "",
    ) -> Version:
        """Keep the adapter in ``directory`` as a new version of ``name``.

        The same files under the same name are the version that is there already: it is returned as it is (and the
        alias moved to it), unless other metrics, tags, notes or numbers are asked for.

        Args:
            directory: a PEFT directory, ours or anybody's; it is not trusted.
            name: of the adapter; a full name (``medical_diagnosis_v2_20250315``) says its number and tags too.
            note: for people.
            tags: words.
            metrics: beside those of its ``lorchestra.json``, of which they replace those with the same name.
            recipe: that it was made by, as run.
            number: of the version; by default one more than the highest so far.
            alias: moved to it in the same transaction.
            why: for the audit log.

        Raises:
            UserError: the directory holds no adapter that is taken, the name or a tag is none, or the number another's.
            RegistryError: the catalog or the store cannot be reached, or is full; no version is entered then.
        """
        from lorchestra.registry.pushing import Wanted, push

        if (full := full_name(name)) is not None:
            if number is not None and full.version not in (None, number):
                raise UserError(
                    f"{name!r} is version {full.version}, and version {number} is asked for; say one of them"
                )
            name, number, tags = full.name, full.version if number is None else number, [*tags, *full.labels]
        wanted = Wanted(name, note, tuple(dict.fromkeys(tags)), metrics or {}, recipe or {}, number, alias, why)
        return push(self.catalog, self.blobs, Path(directory), wanted)

    def admit(
        self, manifest: Manifest, *, action: str = "import", why: str = "", details: Mapping[str, Any] | None = None
    ) -> Version:
        """Enter a version made elsewhere, manifest and all; its blobs are in the store already.

        A version with the same name and content that is there is returned as it is.

        Raises:
            DamagedError: a blob is missing, or has another size.
            TakenError: another version has its number.
        """
        from lorchestra.registry.pushing import admit

        return admit(self.catalog, self.blobs, manifest, action=action, why=why, details=details or {})

    def alias(self, name: str, alias: str, reference: Reference | str, why: str = "") -> AliasState:
        """Let ``name@alias`` lead to a version of ``name``; where it does already, nothing happens.

        Raises:
            UserError: the alias is no word, or the version another name's.
            UnknownReferenceError: there is no such version.
            RevokedError: it was revoked.
        """
        from lorchestra.registry.changing import move

        with self.catalog.transaction() as held:
            return move(held, _ready(held, reference, name), alias, action="alias", why=why)

    def unalias(self, name: str, alias: str, why: str = "") -> None:
        """Let ``name@alias`` lead nowhere.

        Raises:
            UserError: it leads nowhere, or a canary splits its traffic.
        """
        from lorchestra.registry.changing import drop_alias

        with self.catalog.transaction() as held:
            drop_alias(held, name, alias, why)

    def promote(
        self,
        reference: Reference | str,
        alias: str = PRODUCTION,
        gates: Sequence[Gate] = (),
        why: str = "",
        force: bool = False,
    ) -> AliasState:
        """Move an alias to a version that passes the gates. What they said goes into the audit log.

        Args:
            reference: of the version.
            alias: of its name.
            gates: see :mod:`lorchestra.registry.gates`; they see what the alias leads to at this moment.
            why: for the audit log.
            force: move it though a gate refuses; this needs a reason.

        Raises:
            PromotionRefused: a gate refused it; nothing is moved.
            UserError: a gate that makes no sense for its metric, or ``force`` without a reason.
            UnknownReferenceError, RevokedError: as :meth:`alias`.
        """
        from lorchestra.registry.changing import check_alias, led_to, move
        from lorchestra.registry.gates import check_gates, refuse

        if force and not why.strip():
            raise UserError("a promotion against its gates needs a reason, for the audit log (--why)")
        with self.catalog.transaction() as held:
            version = _ready(held, reference)
            check_alias(version.manifest.name, alias)
            before = led_to(held, version.manifest.name, alias)
            outcomes = check_gates(gates, version.manifest, before.manifest if before else None)
            if not force:
                refuse(outcomes, version.manifest, alias)
            told: dict[str, Any] = {"gates": [outcome.as_dict() for outcome in outcomes]} if outcomes else {}
            if force:
                told["forced"] = True
            return move(held, version, alias, action="promote", why=why, details=told)

    def rollback(self, name: str, alias: str = PRODUCTION, why: str = "", to: str = "") -> AliasState:
        """Move an alias back to where it was before, by the audit log: twice is two versions back.

        Args:
            name: of the adapter.
            alias: of it.
            why: for the audit log.
            to: a reference to one it has been at; by default the one before.

        Raises:
            UserError: it has been nowhere before, or never at ``to``.
            RevokedError: that version was revoked; the message names the last one that was not.
        """
        from lorchestra.registry.rolling import rollback

        with self.catalog.transaction() as held:
            return rollback(held, name, alias, why=why, to=to)

    def revoke(self, reference: Reference | str, why: str) -> Version:
        """Take a version out of use at once. Aliases stay where they are: who serves them refuses.

        Raises:
            UserError: no reason.
            UnknownReferenceError: there is no such version.
        """
        from lorchestra.registry.changing import mark

        if not why.strip():
            raise UserError("a revocation needs a reason: whoever used the version will ask (--why)")
        with self.catalog.transaction() as held:
            return mark(held, _found(held, reference), Revocation(held.at, held.actor, why), why)

    def reinstate(self, reference: Reference | str, why: str) -> Version:
        """Take a revocation back.

        Raises:
            UserError: no reason.
            UnknownReferenceError: there is no such version.
        """
        from lorchestra.registry.changing import mark

        if not why.strip():
            raise UserError("taking a revocation back needs a reason, for the audit log (--why)")
        with self.catalog.transaction() as held:
            return mark(held, _found(held, reference), None, why)

    def gc(
        self,
        dry_run: bool = True,
        older_than: timedelta = timedelta(hours=1),
        *,
        versions: Sequence[str] = (),
        why: str = "",
    ) -> GcPlan:
        """Take away blobs that no version needs, what killed processes left, and versions that are asked for.

        Args:
            dry_run: only tell what would go.
            older_than: blobs and leftovers that were put later stay: a push may be under way.
            versions: references of versions that are to go; their blobs go with them, once they are old enough.
            why: for the audit log.

        Raises:
            NeededError: an alias, its rollback, a canary or another version's lineage needs one of them.
            RegistryError: a backup or the like is under way, or the store is down.
        """
        from lorchestra.registry.collecting import collect

        return collect(self.catalog, self.blobs, dry_run=dry_run, older_than=older_than, wanted=versions, why=why)

    def accept(self, name: str, kind: Literal["tokenizer", "template"], base: BaseId, why: str) -> None:
        """Record that a changed tokenizer or template is meant; see :func:`lorchestra.registry.bases.accept`."""
        from lorchestra.registry.bases import accept

        with self.catalog.transaction() as held:
            accept(held, name, kind, base, why)

    def derive(self, base_weights: str, derived: BaseId, method: str, drift: Mapping[str, Any], why: str) -> None:
        """Record a base that was made from another; see :func:`lorchestra.registry.bases.derive`."""
        from lorchestra.registry.bases import derive

        with self.catalog.transaction() as held:
            derive(held, base_weights, derived, method, drift, why)


def _found(held: Transaction, reference: Reference | str) -> Version:
    from lorchestra.registry.sql.finding import resolved

    return resolved(held.connection, as_reference(reference))


def _ready(held: Transaction, reference: Reference | str, name: str = "") -> Version:
    from lorchestra.registry.changing import check_ready

    wanted = as_reference(reference)
    if name and name != wanted.name:
        check_name(name)
        raise UserError(f"an alias of {name} leads to versions of {name}, not to {wanted}; push it as {name} first")
    version = _found(held, wanted)
    check_ready(version)
    return version


def _myself() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError, ImportError):  # no such user, as in some containers
        return f"{os.getuid() if hasattr(os, 'getuid') else 'somebody'}@{socket.gethostname()}"
