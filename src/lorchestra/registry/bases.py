"""Which bases a version may be served on: its own, and those that somebody has answered for on the record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select

from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import UserError
from lorchestra.registry.reference import check_name
from lorchestra.registry.sql.audit import canonical
from lorchestra.registry.sql.catalog import Transaction
from lorchestra.registry.sql.schema import accepts, derivations

if TYPE_CHECKING:
    from lorchestra.registry.manifest import Manifest

KINDS = ("tokenizer", "template")


@dataclass(frozen=True)
class BaseCheck:
    """Whether a version may be served on a base.

    Args:
        ok: it may.
        why: or why not, and what to do; for one that may, what was relied on beyond equality (empty: nothing).
        drift: measured differences of the sibling that the base is (metric → number); empty for its own base.
    """

    ok: bool
    why: str = ""
    drift: Mapping[str, Any] = field(default_factory=dict)


def accept(held: Transaction, name: str, kind: str, base: BaseId, why: str) -> None:
    """Record that adapters called ``name`` (all, if empty) may be used with the tokenizer or template of ``base``.

    Raises:
        UserError: no reason, a kind that is none, or a base without that digest.
    """
    if name:
        check_name(name)
    if kind not in KINDS:
        raise UserError(f"{kind!r} cannot be accepted; tokenizer and template can. Weights are derived (`derive`)")
    _check_reason(why, "accepting a changed " + kind)
    digest = str(getattr(base, kind))
    if not digest:
        raise UserError(f"the base {base.name or 'given'} has no digest of its {kind}, so there is nothing to accept")
    there = select(accepts.c.id).where(accepts.c.name == name, accepts.c.kind == kind, accepts.c.digest == digest)
    if held.execute(there).first() is not None:
        return
    told = {"kind": kind, "base": base.name, "digest": digest}
    entry = held.audit("accept", name=name, after=digest, why=why, details=told)
    row = {"id": entry.id, "name": name, "kind": kind, "base_name": base.name, "digest": digest, "why": why}
    held.execute(accepts.insert(), {**row, "at": held.at, "by": held.actor})


def derive(
    held: Transaction, base_weights: str, derived: BaseId, method: str, drift: Mapping[str, Any], why: str
) -> None:
    """Record that ``derived`` was made from the base with the weights ``base_weights`` (quantised, say), and how far it
    is from it.

    Raises:
        UserError: no reason, no method, no measured drift, a digest that is missing, or other words on it already.
    """
    _check_reason(why, "a derived base")
    if not method or not drift:
        raise UserError(
            "a derived base needs the method (awq, fp8, nf4, gguf …) and its measured drift (metric=number)"
        )
    if not base_weights or not derived.weights or base_weights == derived.weights:
        raise UserError(
            "a derived base needs two digests of weights that differ: the base's, and its own (`lorchestra inspect` "
            "and `lorchestra doctor` show them)"
        )
    told = {
        "base_weights": base_weights, "name": derived.name, "weights": derived.weights, "tokenizer": derived.tokenizer,
        "template": derived.template, "method": method, "drift": canonical(dict(drift)),
    }  # fmt: skip
    column = derivations.c
    there = held.execute(
        select(derivations).where(column.base_weights == base_weights, column.weights == derived.weights)
    ).first()
    if there is not None:
        if {key: getattr(there, key) for key in told} == told:
            return
        raise UserError(f"{derived.weights[:19]}… is derived from {base_weights[:19]}… already, in other words")
    entry = held.audit("derive", before=base_weights, after=derived.weights, why=why, details=told)
    held.execute(derivations.insert(), {"id": entry.id, **told, "why": why, "at": held.at, "by": held.actor})


def allowed(connection: Connection, manifest: Manifest, base: BaseId) -> BaseCheck:
    """Whether a version may be served on ``base``.

    Weights: the same, or a base derived from them. Tokenizer and template: the same as of the version's base, or
    accepted. What one side does not tell cannot differ, and ``why`` says that it was not checked.
    """
    own = manifest.base
    relied, drift = [], {}
    if not own.weights or not base.weights:
        which = manifest.reference if not own.weights else f"the base {base.name}"
        relied.append(f"{which} has no digest of the base's weights; shapes alone are checked")
    elif own.weights != base.weights:
        column = derivations.c
        query = select(column.method, column.drift).where(column.base_weights == own.weights)
        found = connection.execute(query.where(column.weights == base.weights)).first()
        if found is None:
            return BaseCheck(
                False,
                f"{manifest.reference} was trained on {own.name or 'a base'} with the weights {own.weights[:19]}…; "
                f"this base, {base.name or 'unnamed'}, has {base.weights[:19]}…. Serve it on its own base, or record "
                "that this one was derived from it (`lorchestra registry derive`)",
            )
        drift = json.loads(found.drift)
        relied.append(f"derived from its base by {found.method}")
    for kind in KINDS:
        ours, theirs = getattr(own, kind), getattr(base, kind)
        if not ours or not theirs or ours == theirs:
            continue
        accepted = select(accepts.c.why).where(accepts.c.kind == kind, accepts.c.digest == theirs)
        reason = connection.execute(accepted.where(accepts.c.name.in_((manifest.name, "")))).scalar()
        if reason is None:
            return BaseCheck(
                False,
                f"{manifest.reference} was trained with another {kind} ({ours[:19]}…, this base has {theirs[:19]}…). "
                f"If that is meant, record it: `lorchestra registry accept {manifest.name} --kind {kind} --why …`",
            )
        relied.append(f"another {kind}, accepted: {reason}")
    return BaseCheck(True, "; ".join(relied), drift)


def _check_reason(why: str, what: str) -> None:
    if not why.strip():
        raise UserError(f"{what} needs a reason, for the audit log (--why)")
