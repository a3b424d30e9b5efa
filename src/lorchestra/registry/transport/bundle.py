"""Versions in one file, to bring them to another registry: manifests and weights, whole, checked on arrival.

The file is an :mod:`~lorchestra.registry.transport.archive` with one member a manifest and one a blob, each named by
its SHA-256.
A bundle may come from anywhere. Before the first byte of it is kept, every blob is held to its name, every adapter is
loaded as a pushed directory is (:mod:`~lorchestra.registry.store.contents`), and every manifest is held to the adapter
that it tells of. Nobody signs a bundle: it says what was made, not by whom.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorchestra.adapter.peft_format import CONFIG
from lorchestra.errors import AdapterError, LorchestraError, UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.registry.describing import described
from lorchestra.registry.manifest import FileEntry, Manifest
from lorchestra.registry.mistakes import RevokedError, TakenError
from lorchestra.registry.store.contents import Contents, check_files
from lorchestra.registry.transport.archive import HEAD, ArchiveError, Reader, writing

if TYPE_CHECKING:
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.sql.catalog import Version

KIND, FORMAT = "bundle", 1
MOST = 10_000  # versions of a bundle
# Of a manifest, what the files themselves tell; the rest (note, tags, metrics …) is its writer's word.
TOLD_BY_FILES = ("digest", "files", "base", "ranks", "scales", "parameters", "made_by", "data", "parents", "context")


@dataclass(frozen=True)
class Imported:
    """A version of a bundle: where it is now, and whether it is new there."""

    version: Version
    new: bool
    was: str


def export(
    registry: Registry, references: Sequence[str], path: Path, *, lineage: bool = False, reporter: Reporter = SILENT
) -> list[Version]:
    """Write versions to a bundle. The same versions make the same bytes.

    Args:
        registry: they are in.
        references: to them.
        path: the new file.
        lineage: their ancestors too, as far as the registry holds them and they are not revoked.
        reporter: progress.

    Raises:
        UnknownReferenceError: one leads nowhere.
        RevokedError: one is revoked: elsewhere nobody would know.
        DamagedError: a blob is damaged or missing.
        StorageError: the disk is full or closed.
    """
    chosen = {version.id: version for version in map(registry.resolve, references)}
    if not chosen:
        raise UserError("a bundle of no versions; name some, as in clinic@v2")
    for version in chosen.values():
        if version.state == "revoked":
            raise RevokedError(
                f"{version.reference} is revoked, and a bundle cannot say so to whoever imports it; leave it out, or "
                f"reinstate it first (`lorchestra registry reinstate {version.reference} --why …`)"
            )
    if lineage:
        chosen |= _ancestors(registry, list(chosen.values()))
    versions = sorted(chosen.values(), key=lambda version: version.id)
    blobs = {entry.sha256: entry.size for version in versions for entry in version.manifest.files.values()}
    told = [{"reference": one.reference, "manifest": one.manifest.manifest_digest} for one in versions]
    with (
        registry.catalog.lease("export"),
        writing(path, KIND) as writer,
        reporter.task("export", sum(blobs.values()), "B") as task,
    ):
        writer.add_json(HEAD, {"kind": KIND, "format": FORMAT, "versions": told})
        for version in versions:
            writer.add(_manifest_member(version.manifest.manifest_digest), version.manifest.canonical())
        for digest, size in sorted(blobs.items()):
            with registry.blobs.open(digest) as stream:
                writer.add_stream(_blob_member(digest), size, stream)
            task.advance(size)
    return versions


def import_bundle(
    registry: Registry, path: Path, *, renumber: bool = False, why: str = "", reporter: Reporter = SILENT
) -> list[Imported]:
    """Bring the versions of a bundle into a registry: all, or none.

    Args:
        registry: to bring them to.
        path: the bundle, which may be anybody's.
        renumber: a version whose number is another's here gets the next free one; else that is refused.
        why: for the audit log.
        reporter: progress.

    Raises:
        ArchiveError: it is no bundle, of a newer format, damaged, or does not hold together. Nothing was written.
        AdapterError: an adapter in it would not be taken from a directory either. Nothing was written.
        TakenError: a number is another version's here.
    """
    with Reader(path, KIND, FORMAT) as reader:
        manifests = _manifests(reader)
        _check_members(reader, manifests)
        total = sum(member.size for member in reader.members.values())
        with reporter.task("check the bundle", len(manifests), "version") as task:
            for manifest in manifests:
                _check_version(reader, manifest)
                task.advance()
        if not renumber:
            _check_numbers(registry, manifests)
        with reporter.task("import", total, "B") as task:
            _put_blobs(reader, registry, task.advance)
        with registry.catalog.transaction() as held:
            _check_stored(registry, manifests)
            return [_enter(held, manifest, renumber, why, path.name) for manifest in manifests]


def _ancestors(registry: Registry, versions: Sequence[Version]) -> dict[int, Version]:
    from lorchestra.registry.lineage import related

    nodes = [node for version in versions for node in related(registry, version).nodes.values()]
    held = [node.version for node in nodes if node.version is not None]
    return {version.id: version for version in held if version.state == "ready"}


def _manifest_member(digest: str) -> str:
    return f"manifests/{digest.removeprefix('sha256:')}.json"


def _blob_member(digest: str) -> str:
    return f"blobs/{digest.removeprefix('sha256:')}"


# ---- what arrives


def _manifests(reader: Reader) -> list[Manifest]:
    """Those that the head names, in its order, each what its name says and canonical."""
    told = reader.head.get("versions")
    if not isinstance(told, list) or not 1 <= len(told) <= MOST:
        raise reader.refused(f"its head should name 1 to {MOST:,} versions")
    found: dict[str, Manifest] = {}
    for entry in told:
        digest = entry.get("manifest") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or not digest.startswith("sha256:") or digest in found:
            raise reader.refused("its head names a version without its manifest, or one twice")
        text = reader.text(_manifest_member(digest))
        try:
            manifest = Manifest.parse(text)
        except LorchestraError as error:
            raise reader.refused(f"{_manifest_member(digest)}: {error}") from error
        if text != manifest.canonical() or digest != manifest.manifest_digest:
            raise reader.refused(f"the manifest of {manifest.reference} is not what its name says")
        found[digest] = manifest
    references = [manifest.reference for manifest in found.values()]
    if len(set(references)) < len(references):
        raise reader.refused("it holds two versions of one name and number")
    return list(found.values())


def _check_members(reader: Reader, manifests: Sequence[Manifest]) -> None:
    """The archive holds what the manifests name, of the size they name, and nothing else."""
    files = [entry for manifest in manifests for entry in manifest.files.values()]
    expected = {_blob_member(entry.sha256): entry.size for entry in files}
    told = {HEAD, "seal.json", *(_manifest_member(manifest.manifest_digest) for manifest in manifests)}
    extra = reader.members.keys() - expected.keys() - told
    if extra:
        raise reader.refused(f"it holds {min(extra)}, which no manifest names")
    for name, size in expected.items():
        if name not in reader.members:
            raise reader.refused(f"it lacks {name}, which a manifest names")
        if reader.members[name].size != size:
            raise reader.refused(f"{name} has {reader.members[name].size:,} bytes, and a manifest says {size:,}")
    if any(entry.size != expected[_blob_member(entry.sha256)] for entry in files):
        raise reader.refused("two manifests name one blob with different sizes")


def _check_version(reader: Reader, manifest: Manifest) -> None:
    """Its files are what they are called, make an adapter that would be taken, and are what the manifest tells of."""
    try:
        check_files({name: entry.size for name, entry in manifest.files.items()})
    except AdapterError as error:
        raise reader.refused(f"{manifest.reference}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="lorchestra-import-") as temporary:
        place = Path(temporary)
        for name, entry in manifest.files.items():
            _extract(reader, entry, place / name)
        try:
            with Contents.of(place) as contents:
                config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
                found = described(contents.adapter, contents.files, config)
        except (AdapterError, ValueError) as error:  # ValueError: a lorchestra.json that no manifest could tell of
            why = str(error).replace(str(place), manifest.reference)
            raise reader.refused(f"{manifest.reference} would not be taken from a directory either: {why}") from error
    for field in TOLD_BY_FILES:
        if getattr(manifest, field) != found[field]:
            raise reader.refused(f"the manifest of {manifest.reference} tells other {field} than its files do")


def _extract(reader: Reader, entry: FileEntry, target: Path) -> None:
    name = _blob_member(entry.sha256)
    with target.open("xb") as out:
        if reader.copy(name, out) != entry.sha256:
            raise reader.refused(f"{name} is not what its name says")


def _check_numbers(registry: Registry, manifests: Sequence[Manifest]) -> None:
    for name in dict.fromkeys(manifest.name for manifest in manifests):
        there = {version.manifest.number: version.manifest.content for version in registry.versions(name)}
        for manifest in manifests:
            if manifest.name == name and there.get(manifest.number, manifest.content) != manifest.content:
                raise _taken(manifest)


def _taken(manifest: Manifest) -> TakenError:
    return TakenError(
        f"{manifest.reference} of the bundle is another version in this registry; nothing was imported. Import it with "
        "--renumber, which gives it the next free number"
    )


# ---- what is kept


def _put_blobs(reader: Reader, registry: Registry, advance: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="lorchestra-import-") as temporary:
        passing = Path(temporary) / "blob"
        for name, member in reader.members.items():
            if name.startswith("blobs/"):
                with passing.open("wb") as out:
                    reader.copy(name, out)
                digest, _ = registry.blobs.put_file(passing)
                if _blob_member(digest) != name:
                    raise reader.refused(f"{name} changed while it was read")
            advance(member.size)


def _check_stored(registry: Registry, manifests: Sequence[Manifest]) -> None:
    """All blobs are still there, now that nothing can be removed before the versions are."""
    needed: Mapping[str, int] = {
        entry.sha256: entry.size for manifest in manifests for entry in manifest.files.values()
    }
    if registry.blobs.sizes(needed) != needed:
        raise ArchiveError("blobs of the bundle were removed while it was imported (gc); import it again")


def _enter(held: Any, manifest: Manifest, renumber: bool, why: str, file: str) -> Imported:
    from lorchestra.registry.changing import enter, next_number, same_content

    there = same_content(held, manifest.name, manifest.content)
    if there is not None:
        return Imported(there, False, manifest.reference)
    details = {"bundle": file, "was": manifest.reference}
    try:
        return Imported(enter(held, manifest, action="import", why=why, details=details), True, manifest.reference)
    except TakenError as error:
        if not renumber:
            raise _taken(manifest) from error
    moved = manifest.model_copy(update={"number": next_number(held, manifest.name)})
    return Imported(enter(held, moved, action="import", why=why, details=details), True, manifest.reference)
