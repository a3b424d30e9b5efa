"""What the audit log says must be there: its entries followed from the first to the last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lorchestra.registry.sql.audit import MOVES, Entry, entry_of

ENTERS = ("push", "import")
_READY = {"state": "ready", "revoked_at": None, "revoked_by": None, "revoked_why": None}


@dataclass
class Logged:
    """A version by the log: the id of its entry, what that told of it, and its state."""

    id: int
    told: dict[str, Any]
    state: dict[str, Any]


@dataclass
class State:
    """What must be there."""

    versions: dict[str, Logged] = field(default_factory=dict)
    names: dict[tuple[str], dict[str, Any]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    accepts: dict[tuple[int], dict[str, Any]] = field(default_factory=dict)
    derivations: dict[tuple[int], dict[str, Any]] = field(default_factory=dict)


def replay(rows: Iterable[Any], state: State) -> Iterator[str]:
    """Follow the rows of the log, by id, into ``state``; yields those that cannot be followed."""
    for row in rows:
        try:
            _follow(entry_of(row), state)
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"audit entry {row.id}"


def _follow(entry: Entry, state: State) -> None:
    if entry.action in ENTERS:
        told = {key: entry.details[key] for key in ("manifest", "digest", "content")}
        state.versions[entry.after] = Logged(entry.id, told, dict(_READY))
        number = int(entry.after.rpartition("@v")[2])
        last = state.names.get((entry.name,), {"last": -1})["last"]
        state.names[entry.name,] = {"last": max(last, number)}
    elif entry.action == "gc":
        state.versions.pop(entry.before, None)
    elif entry.action == "revoke":
        revoked = {"state": "revoked", "revoked_at": entry.at, "revoked_by": entry.actor, "revoked_why": entry.why}
        state.versions[entry.details["version"]].state.update(revoked)
    elif entry.action == "restore":
        state.versions[entry.details["version"]].state.update(_READY)
    elif entry.action == "accept":
        told = {"kind": entry.details["kind"], "base_name": entry.details["base"], "digest": entry.details["digest"]}
        state.accepts[entry.id,] = {"name": entry.name, **told, "why": entry.why, "at": entry.at, "by": entry.actor}
    elif entry.action == "derive":
        state.derivations[entry.id,] = {**entry.details, "why": entry.why, "at": entry.at, "by": entry.actor}
    elif entry.action in MOVES:
        if entry.after:
            held = {"to": entry.after, "since": entry.at, "by": entry.actor, "generation": entry.id}
            state.aliases[entry.name, entry.alias] = held
        else:
            state.aliases.pop((entry.name, entry.alias), None)
