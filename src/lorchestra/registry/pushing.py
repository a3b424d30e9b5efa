"""A new version: blobs first, then one transaction."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lorchestra.adapter.peft_format import CONFIG
from lorchestra.errors import AdapterError, UserError
from lorchestra.registry.changing import check_alias, check_ready, enter, move, next_number, same_content
from lorchestra.registry.describing import described
from lorchestra.registry.manifest import FileEntry, Manifest, Metric, content_digest
from lorchestra.registry.mistakes import DamagedError, RegistryError, TakenError
from lorchestra.registry.reference import check_name
from lorchestra.registry.sql.audit import plain_text
from lorchestra.registry.sql.catalog import Catalog, Transaction, Version
from lorchestra.registry.store.contents import Contents

if TYPE_CHECKING:
    from lorchestra.registry.store.blobs import Blobs

TRIES = 3
SERVING, TEMPLATE = "serve.yaml", "chat_template.jinja"
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Wanted:
    """What is asked for with a push; see :meth:`lorchestra.registry.registry.Registry.push`."""

    name: str
    note: str
    tags: tuple[str, ...]
    metrics: Mapping[str, Metric]
    recipe: Mapping[str, Any]
    number: int | None
    alias: str
    why: str

    def check(self) -> None:
        """Whether it can be had at all, before anything is stored.

        Raises:
            UserError: it cannot.
        """
        check_name(self.name)
        if self.alias:
            check_alias(self.name, self.alias)
        for tag in self.tags:
            if not _TAG.fullmatch(tag):
                raise UserError(
                    f"{tag[:70]!r} is no tag: small letters, digits, '_', '-' and '.', at most 64, as in dpo_tuned"
                )
        if self.number is not None and not 0 <= self.number < 10**9:
            raise UserError(f"{self.number} is no number of a version; it is 0 to 999999999")
        plain_text(self.note, "note")
        plain_text(self.why, "reason")

    def check_same(self, there: Version) -> None:
        """Whether the version that is there is what was asked for.

        Raises:
            TakenError: something else was.
        """
        own = there.manifest
        other = [
            what
            for what, differs in (
                ("another number", self.number is not None and self.number != own.number),
                ("other metrics", any(own.metrics.get(name) != metric for name, metric in self.metrics.items())),
                ("other tags", bool(self.tags) and sorted(set(self.tags)) != own.tags),
                ("another note", bool(self.note) and self.note != own.note),
            )
            if differs
        ]
        if other:
            raise TakenError(
                f"these very files are {there.reference} already, and a version never changes: {' and '.join(other)} "
                "cannot be given to it. Push without, or push under another name"
            )


def push(catalog: Catalog, blobs: Blobs, directory: Path, wanted: Wanted) -> Version:
    """See :meth:`lorchestra.registry.registry.Registry.push`."""
    wanted.check()
    with Contents.of(directory) as contents:
        for _ in range(TRIES):
            files = contents.store(blobs)
            try:
                told = _told(contents, files, blobs, wanted)
            except DamagedError:  # taken away this moment
                continue
            with catalog.transaction() as held:
                # Looked at while the catalog is held: gc takes blobs away only while it holds it.
                if _missing(files, blobs):
                    continue
                return _enter(held, files, told, wanted)
    raise RegistryError(
        f"the blobs of {wanted.name} went {TRIES} times while it was pushed; see who deletes from the store"
    )


def admit(
    catalog: Catalog, blobs: Blobs, manifest: Manifest, *, action: str, why: str, details: Mapping[str, Any]
) -> Version:
    """See :meth:`lorchestra.registry.registry.Registry.admit`."""
    with catalog.transaction() as held:
        there = same_content(held, manifest.name, manifest.content)
        if there is not None:
            return there
        missing = _missing(manifest.files, blobs)
        if missing:
            raise DamagedError(
                f"{manifest.reference} cannot be entered: blob {missing[0]} is not in the store, or not as long as it "
                "should be. Import it again",
                missing[0],
            )
        return enter(held, manifest, action=action, why=why, details=details)


def _enter(held: Transaction, files: Mapping[str, FileEntry], told: Mapping[str, Any], wanted: Wanted) -> Version:
    version = same_content(held, wanted.name, content_digest(dict(files)))
    if version is not None:
        wanted.check_same(version)
    else:
        number = wanted.number if wanted.number is not None else next_number(held, wanted.name)
        manifest = _manifest({**told, "number": number, "created": held.at, "created_by": held.actor})
        version = enter(held, manifest, action="push", why=wanted.why)
    if wanted.alias:
        check_ready(version)
        move(held, version, wanted.alias, action="alias", why=wanted.why)
    return version


def _missing(files: Mapping[str, FileEntry], blobs: Blobs) -> list[str]:
    sizes = blobs.sizes([entry.sha256 for entry in files.values()])
    return [entry.sha256 for entry in files.values() if sizes.get(entry.sha256) != entry.size]


def _told(contents: Contents, files: Mapping[str, FileEntry], blobs: Blobs, wanted: Wanted) -> dict[str, Any]:
    """The manifest's fields but number, time and who."""
    config = json.loads(blobs.read(files[CONFIG].sha256))
    try:
        told = described(contents.adapter, files, config)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise AdapterError(f"what lorchestra.json tells cannot be kept: {where}: {first['msg']}") from None
    told["metrics"] = {**told["metrics"], **wanted.metrics}
    told |= {"name": wanted.name, "note": wanted.note, "tags": sorted(set(wanted.tags)), "recipe": dict(wanted.recipe)}
    told["serving"] = {"has_template": TEMPLATE in files}
    if SERVING in files:
        text = blobs.read(files[SERVING].sha256).decode("utf-8", "replace")
        told["serving"][SERVING] = text
    return told


def _manifest(told: Mapping[str, Any]) -> Manifest:
    try:
        manifest = Manifest(**told)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{told['name']} cannot be pushed: {where}: {first['msg']}") from None
    return Manifest.parse(manifest.canonical())  # as it will be read: lists for tuples, and no larger than may be
