"""Adapters' directories: what is taken goes in and out bit for bit, everything else is refused with what to do."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import struct
import tempfile
import threading
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, StorageError
from lorchestra.registry.manifest import FileEntry
from lorchestra.registry.mistakes import DamagedError, RegistryError
from lorchestra.registry.store import contents as module
from lorchestra.registry.store.blobs import Blobs
from lorchestra.registry.store.contents import MOST_FILES, Contents, check_files, write

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "lorchestra.json"


@pytest.fixture(autouse=True)
def copies(tmp_path_factory, monkeypatch):
    """Where copies are made; none may be left."""
    place = tmp_path_factory.mktemp("copies")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert os.listdir(place) == []


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    update = LowRank(torch.randn(6, 2), torch.randn(2, 5))
    return Adapter({"model.layers.0.self_attn.q_proj": update}).save(tmp_path / "adapter")


@pytest.fixture
def blobs(tmp_path):
    return Blobs(str(tmp_path / "blobs"))


def read(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(directory, says):
    before = sorted(os.listdir(directory))
    with pytest.raises(AdapterError) as caught:
        Contents.of(directory)
    assert says in str(caught.value)
    assert str(directory) in str(caught.value)
    assert "lorchestra-push" not in str(caught.value), "the copy is nobody's business"
    assert sorted(os.listdir(directory)) == before


def test_a_directory_goes_through_the_registry_bit_for_bit(directory, blobs, tmp_path):
    (directory / "README.md").write_bytes("# Клиника\r\n".encode())
    (directory / "serve.yaml").write_text("system_prompt: Be brief.\n")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "merges.txt").write_bytes(b"")
    (directory / "spiece.model").write_bytes(bytes(range(256)))
    before = read(directory)
    with Contents.of(directory) as contents:
        assert contents.adapter.digest == Adapter.load(directory).digest
        files = contents.store(blobs)
    assert files == {
        name: FileEntry(sha256=f"sha256:{hashlib.sha256(data).hexdigest()}", size=len(data))
        for name, data in before.items()
    }
    assert write(files, blobs, tmp_path / "new" / "out") == tmp_path / "new" / "out"
    assert read(tmp_path / "new" / "out") == before
    assert read(directory) == before
    assert os.listdir(tmp_path / "new") == ["out"]


def test_another_tools_directory_is_taken(directory, blobs):
    (directory / SIDECAR).unlink()
    with Contents.of(directory) as contents:
        assert set(contents.files) == {CONFIG, WEIGHTS}
        assert contents.adapter.lineage.made_by == "foreign"


def test_what_tools_leave_beside_is_left_out(directory, blobs):
    (directory / ".cache" / "huggingface").mkdir(parents=True)
    (directory / ".gitattributes").write_text("* binary")
    with Contents.of(directory) as contents:
        assert set(contents.files) == {CONFIG, WEIGHTS, SIDECAR}


def test_the_directory_may_be_a_link_and_its_files_may_not(directory, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    Contents.of(tmp_path / "link").close()
    (directory / WEIGHTS).rename(tmp_path / "elsewhere")
    (directory / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    refused(directory, "a link, and links are not followed; push a copy with the files themselves (cp -rL")


@pytest.mark.parametrize("target", ["/etc/hostname", "../blobs", "nowhere", "README.md"])
def test_no_link_is_followed(directory, target):
    (directory / "README.md").symlink_to(target)
    refused(directory, "links are not followed")


def test_no_pipe_socket_device_or_directory_is_read(directory, monkeypatch):
    os.mkfifo(directory / "vocab.txt")
    refused(directory, "a pipe, socket or device")
    (directory / "vocab.txt").unlink()
    (directory / "vocab.txt").mkdir()
    refused(directory, "an adapter's files lie side by side")
    (directory / "vocab.txt").rmdir()
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(directory)
        listener.bind("vocab.txt")  # the name of a socket is short
        refused(directory, "a pipe, socket or device")
    (directory / "vocab.txt").unlink()
    if os.geteuid() == 0:
        os.mknod(directory / "vocab.txt", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
        refused(directory, "a pipe, socket or device")


HOSTILE = [
    "../x.json", "/etc/x.json", "a/b.json", "a\\b.json", "x\0.json", "", ".", "..", "x.json\n", "C:x.json", "-rf.json",
    "tokenizer.json.", "con.json", "NUL.txt", "com1.model", "x" * 200 + ".json", "аdapter_config.json",
    "adapter_config．json", "tokenizer\u200b.json", "tokenizer\u202enosj.json", "ﬁle.json", "x y.json", "%2e%2e.json",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_in_a_list_of_files(name, directory, blobs, tmp_path):
    with Contents.of(directory) as contents:
        files = contents.store(blobs)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(AdapterError):
        write({**files, name: files[CONFIG]}, blobs, tmp_path / "out")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [n for n in HOSTILE if n not in ("", ".", "..") and not set(n) & set("/\0")])
def test_a_hostile_name_is_refused_in_a_directory(name, directory):
    (directory / name).write_text("{}")
    refused(directory, "name")


@pytest.mark.parametrize("name", [b"\xff.json", b"\xed\xa0\x80.json"])
def test_a_name_that_is_no_text_is_refused(name, directory):
    (Path(os.fsdecode(os.fsencode(directory) + b"/" + name))).write_text("{}")
    refused(directory, "is no file name that is taken")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30) | st.from_regex(r"[A-Za-z./_-]{0,12}(\.json|\.txt|\.bin|/x\.json)", fullmatch=True))
def test_a_name_that_is_taken_stays_in_its_directory(name):
    try:
        check_files({CONFIG: 1, WEIGHTS: 1, name: 1})
    except AdapterError:
        return
    assert os.path.normpath(os.path.join("/d", name)) == f"/d/{name}"
    assert os.path.dirname(f"/d/{name}") == "/d"
    assert name.isascii()
    assert name.isprintable()
    assert not name.startswith(".")
    assert name.rpartition(".")[2] in ("json", "txt", "model", "safetensors", "yaml", "jinja", "md")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adapter_model.bin", "may hold a pickle, which runs code when it is loaded"),
        ("training_args.bin", "lorchestra export ADAPTER -o DIR"),
        ("optimizer.pt", "may hold a pickle"),
        ("rng_state.pth", "may hold a pickle"),
        ("X.PKL", "may hold a pickle"),
        ("model.safetensors", "is of no kind that an adapter's directory holds"),
        ("run.py", "is of no kind"),
        ("serve.yml", "is of no kind"),
        ("Makefile", "is of no kind"),
        (".adapter_model.safetensors.partial", "is hidden, perhaps half a download"),
        (".env", "is hidden"),
        ("Adapter_Config.json", "should be written adapter_config.json"),
        ("readme.md", "should be written README.md"),
    ],
)
def test_other_kinds_are_refused_with_what_to_do(directory, name, says):
    (directory / name).write_bytes(b"x")
    refused(directory, says)


def test_names_that_differ_in_capitals_alone_are_refused(directory):
    (directory / "Vocab.json").write_text("{}")
    (directory / "vocab.json").write_text("{}")
    refused(directory, "differ in capitals alone")


def test_what_is_missing_is_named(directory, tmp_path):
    (directory / WEIGHTS).unlink()
    refused(directory, f"there is no {WEIGHTS}")
    with pytest.raises(AdapterError, match="no directory; an adapter is one"):
        Contents.of(tmp_path / "nothing")
    with pytest.raises(AdapterError, match="no directory"):
        Contents.of(directory / CONFIG)


# Limits


def test_too_many_files(directory):
    for i in range(MOST_FILES):
        (directory / f"x{i}.json").touch()
    refused(directory, f"{MOST_FILES + 3} files; at most {MOST_FILES}")


@pytest.mark.parametrize(
    ("name", "size"), [(CONFIG, 16), ("serve.yaml", 1), ("README.md", 1), ("tokenizer.json", 128), (WEIGHTS, 32 << 10)]
)
def test_too_large_files_are_refused_before_they_are_read(directory, name, size):
    with (directory / name).open("wb") as stream:
        stream.truncate((size << 20) + 1)  # a hole: no bytes on the disk
    refused(directory, f"{name} has {(size << 20) + 1:,} bytes; at most {size << 20:,} may be")


def test_too_large_together(directory, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 10_000)
    (directory / "vocab.txt").write_bytes(b"x" * 9_900)
    refused(directory, "bytes together; at most 10,000")


def header(value, body=b""):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"", b"1234567", struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", (16 << 20) + 1) + b"{}",
        header(b"{"), header(b"[]"), header(b"{" * 100_000), header({"x": 1}), header({}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"123"),
        header({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"\x80\x04N."),
    ],
    ids=range(15),
)  # fmt: skip
def test_hostile_weights(directory, data):
    (directory / WEIGHTS).write_bytes(data)
    refused(directory, WEIGHTS)


def test_an_oversized_header_is_refused_before_it_is_parsed(directory, monkeypatch):
    monkeypatch.setattr(module, "HEADER", 50)
    refused(directory, "at most 50 may be")


def test_nan_and_weights_of_another_sidecar_are_refused(directory):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / WEIGHTS)
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] + 1}, directory / WEIGHTS)
    refused(directory, "changed or damaged")
    save_file({**tensors, first: tensors[first] * numpy.float32("nan")}, directory / WEIGHTS)
    refused(directory, "NaN")


# What changes meanwhile


def test_what_is_stored_is_what_was_loaded_whatever_happens_to_the_directory(directory, blobs, tmp_path):
    before, digest = read(directory), Adapter.load(directory).digest
    with Contents.of(directory) as contents:
        for path in directory.iterdir():
            path.write_bytes(b"changed")
        files = contents.store(blobs)
        assert contents.adapter.digest == digest
    write(files, blobs, tmp_path / "out")
    assert read(tmp_path / "out") == before


def test_a_file_that_grows_shrinks_or_is_replaced_while_it_is_read_is_noticed(directory, monkeypatch, tmp_path):
    whole = (directory / WEIGHTS).read_bytes()
    copy = module._copy

    def replaced(path, target, size):
        if path.name == WEIGHTS:
            act(path)
        return copy(path, target, size)

    monkeypatch.setattr(module, "_copy", replaced)
    (tmp_path / "other").write_bytes(b"x")
    acts = {
        "changed": [lambda p: p.write_bytes(whole + b"x"), lambda p: p.write_bytes(whole[:-1])],
        "replaced": [lambda p: (p.unlink(), os.mkfifo(p))],
        "Too many levels": [lambda p: (p.unlink(), p.symlink_to(tmp_path / "other"))],
        "No such file": [lambda p: p.unlink()],
    }
    for says, kinds in acts.items():
        for act in kinds:  # noqa: B007  # `replaced` does it
            (directory / WEIGHTS).unlink(missing_ok=True)
            (directory / WEIGHTS).write_bytes(whole)
            with pytest.raises(AdapterError, match=says):
                Contents.of(directory)


def test_a_file_that_comes_meanwhile_is_noticed(directory, monkeypatch):
    copy = module._copy

    def joined(path, target, size):
        (directory / "late.json").write_text("{}")
        return copy(path, target, size)

    monkeypatch.setattr(module, "_copy", joined)
    with pytest.raises(AdapterError, match="files came or went"):
        Contents.of(directory)


def test_under_a_writer_that_never_rests_what_is_recorded_is_what_is_kept(directory, blobs):
    stop, seen = threading.Event(), set()
    texts = [f"{i}" * 2000 for i in range(10)]

    def write_on():
        while not stop.wait(0.0005):
            (directory / "README.md").write_text(texts[len(seen) % 10])
            seen.add(len(seen))

    writer = threading.Thread(target=write_on)
    writer.start()
    outcomes = set()
    try:
        for _ in range(40):
            try:
                with Contents.of(directory) as contents:
                    entry = contents.store(blobs)["README.md"] if "README.md" in contents.files else None
            except AdapterError as error:
                outcomes.add(str(error).partition("; push again")[0].partition(": ")[2])
                continue
            if entry:
                assert len(blobs.read(entry.sha256)) == entry.size
                outcomes.add("kept")
    finally:
        stop.set()
        writer.join()
    assert outcomes
    assert outcomes <= {"kept", "it changed while it was read", "files came or went while it was read"}


def test_a_changed_copy_is_noticed(directory, blobs, copies):
    with Contents.of(directory) as contents:
        (copies / os.listdir(copies)[0] / CONFIG).write_text("{}")
        with pytest.raises(RegistryError, match=f"copy of {CONFIG}"):
            contents.store(blobs)


def test_a_copy_goes_with_its_contents(directory, copies):
    contents = Contents.of(directory)
    assert len(os.listdir(copies)) == 1
    del contents
    assert os.listdir(copies) == []


def test_no_room_for_the_copy(directory, small_disk, tmp_path, monkeypatch):
    small_disk(16)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "small"))
    (directory / "vocab.txt").write_bytes(b"x" * 100_000)
    with pytest.raises(RegistryError, match=r"No space left.*TMPDIR"):
        Contents.of(directory)
    assert os.listdir(tmp_path / "small") == []


# Writing


@pytest.fixture
def files(directory, blobs):
    with Contents.of(directory) as contents:
        return contents.store(blobs)


def nothing_at(place):
    return not place.exists() and os.listdir(place.parent) == []


def test_a_damaged_or_missing_blob_writes_nothing(files, blobs, tmp_path):
    (tmp_path / "place").mkdir()
    digest = files[WEIGHTS].sha256
    path = tmp_path / "blobs" / "sha256" / digest[7:9] / digest[7:]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="is damaged") as caught:
        write(files, blobs, tmp_path / "place" / "out")
    assert caught.value.subject == digest
    assert nothing_at(tmp_path / "place" / "out")
    blobs.delete(digest)
    with pytest.raises(DamagedError, match="is missing"):
        write(files, blobs, tmp_path / "place" / "out")
    assert nothing_at(tmp_path / "place" / "out")


def test_a_list_with_a_wrong_size_writes_nothing(files, blobs, tmp_path):
    (tmp_path / "place").mkdir()
    wrong = {**files, CONFIG: FileEntry(sha256=files[CONFIG].sha256, size=files[CONFIG].size + 1)}
    with pytest.raises(DamagedError, match="list of files is damaged"):
        write(wrong, blobs, tmp_path / "place" / "out")
    assert nothing_at(tmp_path / "place" / "out")


def test_a_list_that_is_no_adapter_writes_nothing(files, blobs, tmp_path):
    (tmp_path / "place").mkdir()
    for wrong in ({}, {CONFIG: files[CONFIG]}, {f"x{i}.json": files[CONFIG] for i in range(1000)}):
        with pytest.raises(AdapterError):
            write(wrong, blobs, tmp_path / "place" / "out")
        assert nothing_at(tmp_path / "place" / "out")


def test_what_is_there_is_not_overwritten(files, blobs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(StorageError, match="not empty"):
        write(files, blobs, tmp_path / "out")
    assert read(tmp_path / "out") == {"mine": b"mine"}
    (tmp_path / "out" / "mine").unlink()
    write(files, blobs, tmp_path / "out")
    assert set(read(tmp_path / "out")) == set(files)


def test_a_full_disk_writes_nothing(directory, blobs, small_disk, tmp_path):
    (directory / "vocab.txt").write_bytes(b"x" * 100_000)
    with Contents.of(directory) as contents:
        files = contents.store(blobs)
    small_disk(40)
    with pytest.raises(RegistryError, match="No space left"):
        write(files, blobs, tmp_path / "small" / "out")
    assert os.listdir(tmp_path / "small") == []
