"""The audit log: who moved what, when, from where to where, and why; each entry sealed by the one before.

The hash of an entry is SHA-256 of its predecessor's hash and its own canonical JSON. The first one's predecessor is the
registry's id, so that a log cannot be taken for another's. Ids have no gaps; the head (id and hash of the last entry)
is kept beside, so that a log whose end was cut off is noticed too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from lorchestra.errors import UserError
from lorchestra.registry.sql.schema import audit, meta

ACTIONS = frozenset(
    {
        "push", "alias", "promote", "rollback", "unalias", "revoke", "restore", "accept", "derive", "canary-start",
        "canary-step", "canary-promote", "canary-abort", "canary-rollback", "gc", "import", "restore-backup", "access",
    }
)  # fmt: skip
MOVES = frozenset({"alias", "promote", "rollback", "unalias", "canary-promote"})  # of these an alias is the outcome
LONGEST = 10_000  # characters of a reason


@dataclass(frozen=True)
class Entry:
    """One line of the log.

    Args:
        id: its place, from 1, without gaps.
        at: when, ISO 8601 in UTC.
        actor: who.
        action: one of :data:`ACTIONS`.
        name: of the adapter; empty where it is about none.
        alias: that was moved; empty where none was.
        before: what was there (``clinic@v1``); empty: nothing.
        after: what is there now; empty: nothing.
        why: in the actor's words.
        details: plain JSON, by action.
        hash: ``sha256:…``.
    """

    id: int
    at: str
    actor: str
    action: str
    name: str
    alias: str
    before: str
    after: str
    why: str
    details: Mapping[str, Any]
    hash: str

    def sealed(self, previous: str) -> str:
        """The hash it ought to have after an entry with the hash ``previous``."""
        own = [
            self.id, self.at, self.actor, self.action, self.name, self.alias, self.before, self.after, self.why,
            self.details,
        ]  # fmt: skip
        return "sha256:" + hashlib.sha256(f"{previous}\n{canonical(own)}".encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys and without spaces.

    Raises:
        UserError: it is no plain JSON.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: NaN, or half a surrogate pair
        raise UserError(f"what the audit log keeps must be plain JSON: {error}") from None
    return text


def plain_text(value: str, what: str) -> str:
    """``value``, if a database can keep it.

    Raises:
        UserError: it is too long, or holds a NUL or half a surrogate pair.
    """
    if len(value) > LONGEST:
        raise UserError(f"the {what} has {len(value):,} characters; at most {LONGEST:,} may be")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"the {what} holds a NUL or half a surrogate pair; write it without")
    return value


def append(
    connection: Connection,
    *,
    at: str,
    actor: str,
    action: str,
    name: str,
    alias: str,
    before: str,
    after: str,
    why: str,
    details: Mapping[str, Any],
) -> Entry:
    """Write one entry; the caller's transaction is alone."""
    if action not in ACTIONS:
        raise UserError(f"the audit log knows no action {action!r}; it knows {', '.join(sorted(ACTIONS))}")
    last, previous = head_of(connection)
    held = json.loads(canonical(dict(details)))
    texts = {"at": at, "actor": actor, "name": name, "alias": alias, "before": before, "after": after, "why": why}
    for what, value in texts.items():
        plain_text(value, what)
    bare = Entry(last + 1, at, actor, action, name, alias, before, after, why, held, "")
    entry = Entry(**{**vars(bare), "hash": bare.sealed(previous)})
    connection.execute(audit.insert(), {**vars(entry), "details": canonical(held)})
    connection.execute(meta.update().where(meta.c.key == "head").values(value=f"{entry.id} {entry.hash}"))
    return entry


def head_of(connection: Connection) -> tuple[int, str]:
    """Id and hash of the last entry; 0 and the registry's beginning before the first."""
    row = connection.execute(select(audit.c.id, audit.c.hash).order_by(audit.c.id.desc()).limit(1)).first()
    if row is not None:
        return row.id, row.hash
    found = connection.execute(select(meta.c.value).where(meta.c.key == "registry_id")).scalar()
    return 0, beginning(str(found))


def beginning(registry_id: str) -> str:
    """What the first entry is sealed with."""
    return "sha256:" + hashlib.sha256(f"lorchestra registry {registry_id}".encode()).hexdigest()


def entry_of(row: Any) -> Entry:
    """A row of the table.

    Raises:
        ValueError: its details are no JSON.
    """
    told = dict(row._mapping)
    return Entry(**{**told, "details": json.loads(told["details"])})


def breaks(rows: Iterable[Any], registry_id: str, head: str) -> Iterator[tuple[str, str]]:
    """Where the chain does not hold: ``(audit entry 3, what)``.

    Args:
        rows: of the table, by id.
        registry_id: which the first entry is sealed with.
        head: what ``meta`` says is the last.
    """
    previous, expected, last = beginning(registry_id), 1, ""
    for row in rows:
        subject = f"audit entry {row.id}"
        if row.id != expected:
            yield subject, f"entries {expected} to {row.id - 1} are missing before it"
        try:
            entry = entry_of(row)
            canonical_details = canonical(entry.details)
            holds = entry.sealed(previous) == entry.hash and canonical_details == row.details
        except (ValueError, TypeError, UserError):
            holds = False
        if not holds and row.id == expected:
            yield subject, "it, or the one before it, is not what was written: the chain of hashes breaks here"
        previous, expected, last = row.hash, row.id + 1, f"{row.id} {row.hash}"
    if last != head:
        where = head.partition(" ")[0] or "none"
        yield "audit log", f"its last entry is {last.partition(' ')[0] or 'none'}; it should be entry {where}"
