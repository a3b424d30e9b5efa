"""Bundles: what was exported is imported bit for bit; what does not hold together leaves no trace."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.registry.conftest import adapter

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import LorchestraError, UserError
from lorchestra.registry.manifest import Metric
from lorchestra.registry.mistakes import DamagedError, RegistryError, RevokedError, TakenError
from lorchestra.registry.registry import Registry
from lorchestra.registry.transport.archive import HEAD, SEAL, ArchiveError, Reader, canonical, writing
from lorchestra.registry.transport.bundle import export, import_bundle

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def there(tmp_path):
    """Another registry, empty."""
    with Registry.open(str(tmp_path / "there"), create=True, actor="other") as opened:
        yield opened


@pytest.fixture
def family(local, make):
    terms = local.push(make(1, name="terms"), "terms").manifest
    notes = local.push(make(2, name="notes", context=[terms]), "notes").manifest
    loss = Metric(value=1.2, low=1.1, high=1.3, sealed="sha256:" + "e" * 64, split="sealed", n=40)
    local.push(make(3, made_by="fusion", parents=[terms, notes]), "clinic", note="für die Klinik", tags=["sft"],
               metrics={"loss": loss})  # fmt: skip
    return local


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def blobs(registry: Registry) -> set[str]:
    return {stored.digest for stored in registry.blobs.all()}


def test_round_trip(family, new_url, tmp_path):
    path = tmp_path / "clinic.bundle"
    exported = export(family, ["clinic@v1"], path)
    assert [version.reference for version in exported] == ["clinic@v1"]
    for kind in ("sqlite", "postgresql"):
        with Registry.open(new_url(kind), create=True, actor="other") as there:
            (one,) = import_bundle(there, path, why="from the lab")
            assert (one.new, one.was, one.version.manifest) == (True, "clinic@v1", exported[0].manifest)
            assert there.verify() == []
            family.pull("clinic", tmp_path / kind / "a"), there.pull("clinic", tmp_path / kind / "b")
            assert files(tmp_path / kind / "a") == files(tmp_path / kind / "b")
            (entry,) = there.history()
            assert (entry.action, entry.actor, entry.after, entry.why) == (
                "import",
                "other",
                "clinic@v1",
                "from the lab",
            )
            assert entry.details["bundle"] == "clinic.bundle"


def test_with_lineage_and_twice(family, there, tmp_path):
    path = tmp_path / "clinic.bundle"
    assert len(export(family, ["clinic"], path, lineage=True)) == 3
    assert [one.new for one in import_bundle(there, path)] == [True] * 3
    before = there.generation()
    assert [one.new for one in import_bundle(there, path)] == [False] * 3
    assert there.generation() == before, "what is there already changes nothing"
    assert there.names() == ["clinic", "notes", "terms"]


def test_the_same_versions_make_the_same_bytes(family, tmp_path):
    export(family, ["clinic", "terms"], tmp_path / "a")
    export(family, ["terms@v1", "clinic@v1"], tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_revoked_versions_are_not_exported(family, tmp_path):
    family.revoke("terms@v1", "wrong data")
    with pytest.raises(RevokedError, match=r"terms@v1 is revoked, and a bundle cannot say so"):
        export(family, ["terms@v1"], tmp_path / "a")
    exported = export(family, ["clinic"], tmp_path / "b", lineage=True)
    assert [version.reference for version in exported] == ["notes@v1", "clinic@v1"], "nor as an ancestor"
    assert sorted(os.listdir(tmp_path))[-1] == "registry"
    with pytest.raises(UserError, match="no versions"):
        export(family, [], tmp_path / "c")


def test_a_damaged_blob_is_not_exported(family, tmp_path):
    entry = family.resolve("clinic").manifest.files["adapter_model.safetensors"]
    (blob,) = (tmp_path / "registry" / "blobs").rglob(entry.sha256.removeprefix("sha256:"))
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(DamagedError, match=entry.sha256[7:19]):
        export(family, ["clinic"], tmp_path / "out.bundle")
    assert not list(tmp_path.glob("*out.bundle*"))


def test_numbers_that_are_taken(family, there, make, tmp_path):
    path = tmp_path / "a.bundle"
    export(family, ["terms", "clinic"], path)
    there.push(make(9), "clinic")
    before, kept = there.generation(), blobs(there)
    with pytest.raises(TakenError, match=r"clinic@v1 of the bundle is another version.*--renumber"):
        import_bundle(there, path)
    assert (there.generation(), blobs(there)) == (before, kept), "all or none"
    found = import_bundle(there, path, renumber=True)
    assert [(one.was, one.version.reference) for one in found] == [("terms@v1", "terms@v1"), ("clinic@v1", "clinic@v2")]
    assert there.resolve("clinic@v2").manifest.digest == family.resolve("clinic").manifest.digest
    assert there.history("clinic")[0].details["was"] == "clinic@v1"
    assert there.verify() == []


# ---- hostile bundles


def rewritten(source: Path, target: Path, change: Callable[[dict[str, bytes], dict[str, Any]], None]) -> Path:
    """The bundle with other members; names and seal are made right again, so that the next check has to find it."""
    with Reader(source, "bundle", 1) as reader:
        members = {name: reader.text(name) for name in reader.members if name not in (HEAD, SEAL)}
        head = dict(reader.head)
    change(members, head)
    with writing(target, "bundle") as writer:
        writer.add_json(HEAD, head)
        for name, data in members.items():
            writer.add(name, data)
    return target


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def with_manifest(edit: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """A change of the one manifest, whose name and place in the head follow."""

    def change(members, head):
        (name,) = [name for name in members if name.startswith("manifests/")]
        value = json.loads(members.pop(name))
        edit(value)
        data = canonical(value)
        members[f"manifests/{sha(data)}.json"] = data
        head["versions"] = [{"reference": "x", "manifest": f"sha256:{sha(data)}"}]

    return change


def with_file(file: str, data: bytes, name: str = "") -> Callable[..., None]:
    """Another content for a file of the adapter (or a new file ``name``), with digests and sizes made right."""

    def change(members, head):
        def edit(value):
            old = value["files"].pop(file)
            members.pop(f"blobs/{old['sha256'][7:]}", None)
            value["files"][name or file] = {"sha256": f"sha256:{sha(data)}", "size": len(data)}
            members[f"blobs/{sha(data)}"] = data

        with_manifest(edit)(members, head)

    return change


def set_at(*path: Any) -> Callable[..., None]:
    *keys, last, new = path

    def edit(value):
        for key in keys:
            value = value[key]
        value[last] = new

    return with_manifest(edit)


def drop_blob(members, head):
    members.pop(max(name for name in members if name.startswith("blobs/")))


def swap_blobs(members, head):
    one, two = [name for name in members if name.startswith("blobs/")][:2]
    members[one], members[two] = members[two], members[one]


def flip_bit(members, head):
    name = max(name for name in members if name.startswith("blobs/"))
    members[name] = members[name][:-1] + bytes([members[name][-1] ^ 1])


def pretty_manifest(members, head):
    (name,) = [name for name in members if name.startswith("manifests/")]
    data = json.dumps(json.loads(members.pop(name)), indent=1).encode()
    members[f"manifests/{sha(data)}.json"] = data
    head["versions"][0]["manifest"] = f"sha256:{sha(data)}"


def renamed(name: str):
    def edit(value):
        value["files"][name] = value["files"].pop("lorchestra.json")

    return with_manifest(edit)


HUGE_HEADER = (200 << 20).to_bytes(8, "little") + b'{"a":'
DISAGREES = "tells other {} than its files do"
HOSTILE: dict[str, tuple[Callable[..., None], str]] = {
    "a manifest of a newer format": (set_at("format", 2), "Update lorchestra"),
    "a manifest of no format": (set_at("format", "x"), "no manifest of format 1"),
    "an unknown key": (set_at("surprise", 1), "no manifest of format 1: surprise"),
    "a name that is a path": (set_at("name", "../../clinic"), "no manifest of format 1"),
    "a manifest that is not canonical": (pretty_manifest, "is not what its name says"),
    "no versions": (lambda members, head: head.update(versions=[]), "should name 1 to 10,000 versions"),
    "versions that are no list": (lambda members, head: head.update(versions="all"), "should name 1 to"),
    "a version twice": (lambda members, head: head.update(versions=head["versions"] * 2), "or one twice"),
    "a version without manifest": (lambda members, head: head.update(versions=[{}]), "without its manifest"),
    "a manifest that is not there": (
        lambda members, head: head.update(versions=[{"manifest": "sha256:" + "0" * 64}]), "it has no manifests/"),
    "a member that nobody named": (lambda members, head: members.update(extra=b"x"), "holds extra, which no manifest"),
    "a blob that nobody named": (
        lambda members, head: members.update({f"blobs/{sha(b'x')}": b"x"}), "which no manifest names"),
    "a missing blob": (drop_blob, "which a manifest names"),
    "swapped blobs": (swap_blobs, "a manifest says"),
    "a flipped bit": (flip_bit, "is not what its name says"),
    "a wrong size": (set_at("files", "lorchestra.json", "size", 1), "and a manifest says 1"),
    "another digest of the weights": (set_at("digest", "sha256:" + "0" * 64), DISAGREES.format("digest")),
    "another rank": (set_at("ranks", {"model.layers.0.q_proj": 2, "model.layers.1.q_proj": 64}),
                     DISAGREES.format("ranks")),
    "fewer parameters": (set_at("parameters", 1), DISAGREES.format("parameters")),
    "another base": (set_at("base", "weights", "sha256:" + "0" * 64), DISAGREES.format("base")),
    "parents that were not": (set_at("parents", []), DISAGREES.format("parents")),
    "a scale that is not": (set_at("scales", {"model.layers.0.q_proj": 2.0, "model.layers.1.q_proj": 2.0}),
                            DISAGREES.format("scales")),
    "a file that climbs out": (renamed("../escape.json"), "is hidden"),
    "a file that is absolute": (renamed("/etc/cron.d/x.json"), "no file name that is taken"),
    "a file in a directory": (renamed("a/b.json"), "no file name that is taken"),
    "a hidden file": (renamed(".bashrc"), "is hidden"),
    "a very long name": (renamed("a" * 500 + ".json"), "at most 128"),
    "a name with a NUL": (renamed("a\0.json"), "NUL"),
    "a script": (renamed("setup.py"), "of no kind that an adapter's directory holds"),
    "names that differ in capitals": (with_manifest(
        lambda value: value["files"].update({"A.json": value["files"]["lorchestra.json"],
                                             "a.json": value["files"]["lorchestra.json"]})), "capitals"),
    "a pickle": (with_file("lorchestra.json", pickle.dumps({"a": 1}), "adapter_model.bin"), "may hold a pickle"),
    "a pickle called safetensors": (with_file("adapter_model.safetensors", pickle.dumps([1] * 400)), "header of"),
    "a pickle beside": (with_file("lorchestra.json", pickle.dumps({}), "training_args.bin"), "may hold a pickle"),
    "an oversized header": (with_file("adapter_model.safetensors", HUGE_HEADER), "has a header of 209,715,200 bytes"),
    "no adapter's weights": (with_file("adapter_model.safetensors", b""), "would not be taken from a directory either"),
    "a configuration that is none": (with_file("adapter_config.json", b"[]"), "would not be taken from a directory"),
    "DoRA": (with_file("adapter_config.json", b'{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": true}'),
             "would not be taken from a directory either"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A good one, of one version with a parent."""
    place = tmp_path_factory.mktemp("good")
    with Registry.open(str(place / "registry"), create=True) as registry:
        registry.push(adapter(1).save(place / "a"), "terms")
        parent = Parent("terms", registry.resolve("terms").manifest.digest, 0.5)
        registry.push(adapter(3, lineage=Lineage("fusion", parents=(parent,))).save(place / "b"), "clinic")
        export(registry, ["clinic"], place / "good.bundle")
    return place / "good.bundle"


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bundles_are_refused_and_leave_no_trace(bundle, there, tmp_path, monkeypatch, what):
    change, says = HOSTILE[what]
    path = rewritten(bundle, tmp_path / "bad.bundle", change)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    with pytest.raises(LorchestraError) as refused:
        import_bundle(there, path)
    assert says in str(refused.value), refused.value
    assert str(work) not in str(refused.value), "no name of a temporary place"
    assert isinstance(refused.value, UserError | RegistryError)
    assert (there.generation(), blobs(there), os.listdir(work)) == (0, set(), [])


def test_a_bundle_that_is_another_kind(there, bundle, tmp_path):
    with writing(tmp_path / "a", "backup") as writer:
        writer.add_json(HEAD, {"kind": "backup", "format": 1})
    with pytest.raises(ArchiveError, match="it is a 'backup' and not a 'bundle'"):
        import_bundle(there, tmp_path / "a")
    rewritten(bundle, tmp_path / "b", lambda members, head: head.update(format=2))
    with pytest.raises(ArchiveError, match="bundle of format 2, and this version of lorchestra reads 1 to 1; update"):
        import_bundle(there, tmp_path / "b")


def test_not_finite_weights(there, local, make, tmp_path):
    """A manifest and digests that are right do not make NaN an adapter."""
    from safetensors.torch import load, save

    export_from = tmp_path / "good.bundle"
    local.push(make(1), "a")
    export(local, ["a"], export_from)
    tensors = load((make(1) / "adapter_model.safetensors").read_bytes())
    next(iter(tensors.values()))[0, 0] = float("nan")
    path = rewritten(export_from, tmp_path / "bad", with_file("adapter_model.safetensors", save(tensors)))
    with pytest.raises(ArchiveError, match="NaN or infinity"):
        import_bundle(there, path)


def test_large_blobs_take_little_memory(there, local, tmp_path):
    """What Python holds is a chunk, and the file of one adapter where it is loaded (torch's own is not counted)."""
    size = 3_000_000  # numbers of one factor: 12 MB
    B, A = torch.zeros(size, 1), torch.zeros(1, 3)
    for k in range(4):
        B[k] = 1.0
        Adapter({"a": LowRank(B, A + 1)}).save(tmp_path / "adapter")
        local.push(tmp_path / "adapter", f"a{k}")
    path = tmp_path / "big.bundle"
    tracemalloc.start()
    export(local, [f"a{k}" for k in range(4)], path)
    exported = tracemalloc.get_traced_memory()[1]
    assert path.stat().st_size > 4 * 4 * size
    assert exported < 8_000_000
    tracemalloc.reset_peak()
    import_bundle(there, path)
    imported = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert imported < 3 * 4 * size, "one adapter at a time"
    assert len(there.names()) == 4


def test_a_bundle_of_format_1_keeps_loading(there):
    """Written by the first release; never made again."""
    found = import_bundle(there, FIXTURES / "format-1.bundle")
    assert [one.version.reference for one in found] == ["terms@v1", "clinic@v1"]
    clinic = found[1].version.manifest
    assert clinic.manifest_digest == "sha256:47f2cec65ddd85d0a29f02a30039e4ff19912864d2642cba0541a5cfe2e1a471"
    assert clinic.metrics["loss"] == Metric(
        value=1.2, low=1.1, high=1.3, n=40, split="sealed", sealed="sha256:" + "e" * 64
    )
    assert there.verify() == []
