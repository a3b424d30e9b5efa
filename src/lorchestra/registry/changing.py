"""What a transaction may do to versions and aliases, each with its line in the audit log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select

from lorchestra.errors import UserError
from lorchestra.registry.manifest import Manifest
from lorchestra.registry.mistakes import RevokedError, TakenError
from lorchestra.registry.reference import Reference
from lorchestra.registry.sql.audit import MOVES, Entry, entry_of
from lorchestra.registry.sql.catalog import AliasState, Revocation, Transaction, Version
from lorchestra.registry.sql.finding import alias_states, version_of, whole_of
from lorchestra.registry.sql.schema import (
    aliases,
    audit,
    manifests,
    names,
    rollouts,
    version_files,
    version_metrics,
    version_parents,
    version_tags,
    versions,
)


def next_number(held: Transaction, name: str) -> int:
    """What the next version of ``name`` is called: one more than the highest ever given, from 1."""
    last = held.execute(select(names.c.last).where(names.c.name == name)).scalar()
    return 1 if last is None else int(last) + 1


def same_content(held: Transaction, name: str, content: str) -> Version | None:
    """The version of ``name`` that has these very files."""
    row = held.execute(whole_of().where(versions.c.name == name, versions.c.content == content)).first()
    return None if row is None else version_of(row)


def enter(
    held: Transaction, manifest: Manifest, *, action: str, why: str, details: Mapping[str, Any] | None = None
) -> Version:
    """A new version, ready, and its line in the log.

    Raises:
        TakenError: its number is another's.
    """
    query = select(versions.c.id).where(versions.c.name == manifest.name, versions.c.number == manifest.number)
    if held.execute(query).first() is not None:
        raise TakenError(
            f"{manifest.reference} is there already, with other content; a version never changes. Leave the number "
            f"out: the next free one is v{next_number(held, manifest.name)}"
        )
    marks = fingerprint(manifest)
    told = {**(details or {}), **marks}
    entry = held.audit(action, name=manifest.name, after=manifest.reference, why=why, details=told)
    last = held.execute(select(names.c.last).where(names.c.name == manifest.name)).scalar()
    if last is None:
        held.execute(names.insert(), {"name": manifest.name, "last": manifest.number})
    elif manifest.number > last:
        held.execute(names.update().where(names.c.name == manifest.name).values(last=manifest.number))
    held.execute(versions.insert(), version_row(manifest, entry.id))
    held.execute(manifests.insert(), {"version_id": entry.id, "text": manifest.canonical().decode()})
    for table, rows in beside(manifest, entry.id).items():
        if rows:
            held.execute(table.insert(), rows)
    return Version(manifest, entry.id, "ready", None)


def fingerprint(manifest: Manifest) -> dict[str, str]:
    """What the log says of a new version: enough to find any change of it later."""
    return {"manifest": manifest.manifest_digest, "digest": manifest.digest, "content": manifest.content}


def version_row(manifest: Manifest, number: int) -> dict[str, Any]:
    """The row of a new version with the id ``number``."""
    return {
        "id": number,
        "name": manifest.name,
        "number": manifest.number,
        "digest": manifest.digest,
        "content": manifest.content,
        "manifest_digest": manifest.manifest_digest,
        "base_name": manifest.base.name,
        "base_weights": manifest.base.weights,
        "made_by": manifest.made_by,
        "task": manifest.task,
        "tags": json.dumps(manifest.tags, ensure_ascii=False),
        "rank": max(manifest.ranks.values(), default=0),
        "parameters": manifest.parameters,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "created": manifest.created,
        "created_by": manifest.created_by,
        "state": "ready",
        "revoked_at": None,
        "revoked_by": None,
        "revoked_why": None,
    }


def beside(manifest: Manifest, number: int) -> dict[Any, list[dict[str, Any]]]:
    """Table → rows that repeat parts of the manifest, so that versions are found by them."""
    parents = [("parent", manifest.parents), ("context", manifest.context)]
    return {
        version_files: [
            {"version_id": number, "path": path, "blob": entry.sha256, "size": entry.size}
            for path, entry in manifest.files.items()
        ],
        version_parents: [
            {
                "version_id": number, "kind": kind, "position": position, "name": parent.name,
                "digest": parent.digest, "coefficient": parent.coefficient,
            }
            for kind, entries in parents
            for position, parent in enumerate(entries)
        ],
        version_tags: [{"version_id": number, "tag": tag} for tag in manifest.tags],
        version_metrics: [
            {"version_id": number, "name": name, **metric.model_dump()} for name, metric in manifest.metrics.items()
        ],
    }  # fmt: skip


def alias_of(held: Transaction, name: str, alias: str) -> AliasState | None:
    """Where ``name@alias`` leads; ``None`` for nowhere."""
    found = alias_states(held.connection, name, alias)
    return found[0] if found else None


def led_to(held: Transaction, name: str, alias: str) -> Version | None:
    """The version that ``name@alias`` leads to, with its manifest; ``None`` for nowhere."""
    query = whole_of().join(aliases, aliases.c.version_id == versions.c.id)
    row = held.execute(query.where(aliases.c.name == name, aliases.c.alias == alias)).first()
    return None if row is None else version_of(row)


def move(
    held: Transaction,
    version: Version,
    alias: str,
    *,
    action: str,
    why: str,
    details: Mapping[str, Any] | None = None,
) -> AliasState:
    """Let the alias of the version's name lead to it, and say so in the log.

    Where it leads there already nothing happens and nothing is said.
    """
    name = version.manifest.name
    check_alias(name, alias)
    before = alias_of(held, name, alias)
    if before is not None and before.version.id == version.id:
        return before
    entry = held.audit(
        action,
        name=name,
        alias=alias,
        before=before.version.reference if before else "",
        after=version.reference,
        why=why,
        details={"digest": version.manifest.digest, **(details or {})},
    )
    row = {"version_id": version.id, "since": held.at, "by": held.actor, "generation": entry.id}
    if before is None:
        held.execute(aliases.insert(), {"name": name, "alias": alias, **row})
    else:
        held.execute(aliases.update().where(aliases.c.name == name, aliases.c.alias == alias).values(row))
    return AliasState(name, alias, version.target, held.at, held.actor, entry.id)


def drop_alias(held: Transaction, name: str, alias: str, why: str) -> None:
    """Let an alias lead nowhere.

    Raises:
        UserError: it does not lead anywhere, or a canary splits its traffic.
    """
    before = alias_of(held, name, alias)
    if before is None:
        raise UserError(f"there is no alias {name}@{alias}; `lorchestra registry list {name}` shows those there are")
    running = select(rollouts.c.id).where(
        rollouts.c.name == name, rollouts.c.alias == alias, rollouts.c.ended.is_(None)
    )
    if held.execute(running).first() is not None:
        raise UserError(f"a canary runs on {name}@{alias}; end it first (`lorchestra registry canary abort {name}`)")
    held.audit("unalias", name=name, alias=alias, before=before.version.reference, why=why)
    held.execute(aliases.delete().where(aliases.c.name == name, aliases.c.alias == alias))


def mark(held: Transaction, version: Version, revoked: Revocation | None, why: str) -> Version:
    """Revoke a version, or take that back. Where it is so already nothing happens."""
    if (version.revoked is None) == (revoked is None):
        return version
    action, after = ("revoke", "revoked") if revoked else ("restore", "ready")
    before = "ready" if revoked else "revoked"
    name, reference = version.manifest.name, version.reference
    held.audit(action, name=name, before=before, after=after, why=why, details={"version": reference})
    held.execute(
        versions.update()
        .where(versions.c.id == version.id)
        .values(
            state=after,
            revoked_at=revoked.at if revoked else None,
            revoked_by=revoked.by if revoked else None,
            revoked_why=revoked.why if revoked else None,
        )
    )
    return Version(version.manifest, version.id, "revoked" if revoked else "ready", revoked)


def check_ready(version: Version) -> None:
    """Nothing, if the version is not revoked.

    Raises:
        RevokedError: it is.
    """
    if version.revoked is not None:
        raise RevokedError(
            f"{version.reference} was revoked by {version.revoked.by} on {version.revoked.at[:10]}: "
            f"{version.revoked.why or 'no reason was given'}. Take another version, or reinstate it"
        )


def moves(held: Transaction, name: str, alias: str) -> list[Entry]:
    """Every move of an alias, the oldest first."""
    query = select(audit).where(audit.c.name == name, audit.c.alias == alias, audit.c.action.in_(sorted(MOVES)))
    return [entry_of(row) for row in held.execute(query.order_by(audit.c.id))]


def trail(entries: Sequence[Entry]) -> list[str]:
    """The versions that lie behind an alias, the present one last, by its moves.

    A move forward puts one on top; a rollback goes down to the one that it went to. So after two rollbacks the alias
    is two versions back, not where it was.
    """
    found: list[str] = []
    for entry in entries:
        if entry.action == "unalias":
            found.clear()
        elif entry.action == "rollback" and entry.after in found[:-1]:
            place = max(k for k, reference in enumerate(found[:-1]) if reference == entry.after)
            del found[place + 1 :]
        elif not found or found[-1] != entry.after:
            found.append(entry.after)
    return found


def check_alias(name: str, alias: str) -> None:
    """Whether ``alias`` is a word that may follow the ``@``.

    Raises:
        UserError: it is none, or a version or digest.
    """
    if Reference(name, alias).alias != alias or not alias:
        raise UserError(f"{alias!r} is a version or a digest, no alias; an alias is a word, as production in {name}@…")
