"""Back to where an alias was before, by what the audit log tells of it."""

from __future__ import annotations

from lorchestra.errors import UserError
from lorchestra.registry.changing import alias_of, check_alias, move, moves, trail
from lorchestra.registry.mistakes import RevokedError, UnknownReferenceError
from lorchestra.registry.reference import parse_reference
from lorchestra.registry.sql.catalog import AliasState, Transaction, Version
from lorchestra.registry.sql.finding import resolved


def rollback(held: Transaction, name: str, alias: str, *, why: str, to: str) -> AliasState:
    """See :meth:`lorchestra.registry.registry.Registry.rollback`."""
    check_alias(name, alias)
    known = moves(held, name, alias)
    present = alias_of(held, name, alias)
    if present is None:
        # An unknown name is told as one, with the nearest.
        resolved(held.connection, parse_reference(f"{name}@{alias}"))
    behind = trail(known)[:-1]
    if to:
        target = _wanted(held, name, alias, to, {entry.after for entry in known})
    elif not behind:
        where = present.version.reference if present else "nowhere"
        raise UserError(f"{name}@{alias} has been at {where} from the beginning: there is nothing to roll back to")
    else:
        target = _there(held, behind[-1], name, alias)
    if target.revoked is not None:
        raise RevokedError(_revoked(held, target, name, alias, behind))
    return move(held, target, alias, action="rollback", why=why)


def _wanted(held: Transaction, name: str, alias: str, to: str, been: set[str]) -> Version:
    target = resolved(held.connection, parse_reference(to if "@" in to else f"{name}@{to}"))
    if target.reference not in been:
        raise UserError(
            f"{name}@{alias} has never been at {target.reference}; a rollback goes back. To go there, promote it"
        )
    return target


def _there(held: Transaction, reference: str, name: str, alias: str) -> Version:
    try:
        return resolved(held.connection, parse_reference(reference))
    except UnknownReferenceError:
        raise UserError(
            f"{name}@{alias} was at {reference} before, and that version was removed; choose one with --to"
        ) from None


def _revoked(held: Transaction, target: Version, name: str, alias: str, behind: list[str]) -> str:
    good = ""
    for reference in reversed(behind):
        try:
            if resolved(held.connection, parse_reference(reference)).revoked is None:
                good = reference
                break
        except UnknownReferenceError:
            continue
    assert target.revoked is not None
    what = f"{name}@{alias} is not moved: {target.reference} was revoked ({target.revoked.why})"
    return what + (f". The last one before that was not: --to {good}" if good else ", and so was every one before it")
