"""A registry's names in memory lead where the registry itself says, and split traffic as its canaries do."""

from __future__ import annotations

import json
import random
from datetime import timedelta

import pytest

from lorchestra.errors import LorchestraError
from lorchestra.registry.canary import rollout
from lorchestra.registry.canary.plan import Plan
from lorchestra.registry.mistakes import UnknownReferenceError
from lorchestra.registry.reference import Reference
from lorchestra.registry.snapshot import Snapshot

ALIASES = ("production", "staging", "beta")


def asked(snapshot: Snapshot, text: str) -> str | None:
    """The version that a reference leads to, by the snapshot."""
    name, _, selector = text.partition("@")
    reference, found = Reference(name, selector), snapshot.names.get(name)
    if found is None:
        return None
    exact = bool(reference.selector) and not reference.alias
    line = found.exact(reference) if exact else found.pointers.get(reference.alias)
    return f"{line.reference} {'revoked' if line.revoked else 'ready'}" if line else None


def oracle(registry, text: str) -> str | None:
    try:
        version = registry.resolve(text)
    except UnknownReferenceError:
        return None
    return f"{version.reference} {version.state}"


@pytest.mark.parametrize("seed", range(4))
def test_every_reference_leads_where_the_registry_resolves_it(local, make, seed):
    draw, before = random.Random(seed), None
    made = {(name, k): make(10 * j + k) for j, name in enumerate(("clinic", "audit")) for k in range(3)}
    for _ in range(40):
        name, alias = draw.choice(["clinic", "audit"]), draw.choice(ALIASES)
        number = draw.randint(1, 3)
        step = draw.choice([
            lambda n=name, k=number: local.push(made[n, k - 1], n),
            lambda n=name, a=alias, k=number: local.alias(n, a, f"{n}@v{k}"),
            lambda n=name, a=alias: local.unalias(n, a),
            lambda n=name, k=number: local.revoke(f"{n}@v{k}", why="drawn"),
            lambda n=name, k=number: local.reinstate(f"{n}@v{k}", why="drawn"),
            lambda n=name, k=number: local.gc(False, timedelta(0), versions=[f"{n}@v{k}"]),
        ])  # fmt: skip
        try:
            step()
        except LorchestraError:
            continue
        snapshot, before = Snapshot.read(local.catalog), Snapshot.read(local.catalog, before)
        assert before == snapshot, "what is read of the changes alone is the whole"
        assert Snapshot.from_dict(json.loads(json.dumps(snapshot.as_dict()))) == snapshot
        assert snapshot.generation == local.generation()
        digests = [version.manifest.digest for version in local.versions()]
        selectors = ["", *(f"@v{k}" for k in range(1, 5)), *(f"@{a}" for a in ALIASES)]
        selectors += [f"@{d}" for d in digests] + [f"@{d[:19]}" for d in digests]
        for which in ("clinic", "audit", "nobody"):
            for selector in selectors:
                assert asked(snapshot, which + selector) == oracle(local, which + selector), which + selector


def test_a_short_digest_of_two_versions_names_neither():
    from lorchestra.registry.snapshot import Line, Name

    def line(number, digest, revoked=None):
        return Line(number, "clinic", number, "sha256:" + digest, "", revoked, "")

    digest = Reference("clinic", "sha256:" + "a" * 12)
    two = Name({1: line(1, "a" * 63 + "0"), 2: line(2, "a" * 63 + "1")}, {})
    assert two.exact(digest) is None
    same = Name({1: line(1, "a" * 64), 2: line(2, "a" * 64), 3: line(3, "a" * 64, "leaks"), 4: line(4, "b" * 64)}, {})
    assert same.exact(digest).number == 2, "the newest that is not revoked"


def test_a_canary_splits_until_its_alias_or_a_version_is_no_more_what_it_was(registry, make):
    for seed in (1, 2, 3):
        registry.push(make(seed), "clinic")
    registry.promote("clinic@v1")
    started = rollout.start(registry, "clinic", "clinic@v2", plan=Plan((0.3,), timedelta(hours=1)))
    name = Snapshot.read(registry.catalog).names["clinic"]
    for alias in ("", "production"):
        split = name.splits[alias]
        users = [f"u{k}" for k in range(200)]
        assert [split.arm("t", u) for u in users] == [started.arm("t", u) for u in users]
        assert (split.stable, split.candidate) == (started.stable.id, started.candidate.id)

    def splits():
        snapshot = Snapshot.read(registry.catalog)
        running = [found.id for found in rollout.running(registry)]
        assert [s.rollout for a, s in snapshot.names["clinic"].splits.items() if a] == running
        assert snapshot.canaries == 1
        return bool(running)

    assert splits()
    registry.revoke("clinic@v2", why="leaks")
    assert not splits()
    registry.reinstate("clinic@v2", why="no")
    assert splits()
    registry.promote("clinic@v3")
    assert not splits()
