"""Archives: whole or not at all, and nothing but what the writer makes is read."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.errors import StorageError, UserError
from lorchestra.registry.mistakes import DamagedError
from lorchestra.registry.transport import archive
from lorchestra.registry.transport.archive import HEAD, SEAL, ArchiveError, Reader, writing


def make(path, members=(("blobs/one", b"1" * 1000), ("blobs/two", b"")), head=None):
    with writing(path, "bundle") as writer:
        writer.add_json(HEAD, head or {"kind": "bundle", "format": 1})
        for name, data in members:
            writer.add(name, data)
    return path


def by_hand(path, members):
    """A tar of (TarInfo or name, data), as anybody may make it."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = path.read_bytes().rstrip(b"\0")
    path.write_bytes(whole + b"\0" * (-len(whole) % 512 + 1024))
    return path


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


START = (HEAD, b'{"kind":"bundle","format":1}')


def test_what_was_written_is_read_and_any_tar_unpacks_it(tmp_path):
    path = make(tmp_path / "a.tar")
    with Reader(path, "bundle", 1) as reader:
        assert list(reader.members) == [HEAD, "blobs/one", "blobs/two", SEAL]
        reader.verify()
        assert reader.text("blobs/one") == b"1" * 1000
        assert reader.text("blobs/two") == b""
    with tarfile.open(path) as tar:
        assert tar.getnames() == [HEAD, "blobs/one", "blobs/two", SEAL]
        assert tar.extractfile("blobs/one").read() == b"1" * 1000
    assert os.listdir(tmp_path) == ["a.tar"]


def test_the_same_content_makes_the_same_bytes(tmp_path):
    assert make(tmp_path / "a.tar").read_bytes() == make(tmp_path / "b.tar").read_bytes()


@given(st.lists(st.binary(max_size=1600), max_size=5))
def test_round_trip(tmp_path_factory, parts):
    path = make(tmp_path_factory.mktemp("round") / "a.tar", [(f"p/{k}", data) for k, data in enumerate(parts)])
    with Reader(path, "bundle", 1) as reader:
        reader.verify()
        assert [reader.text(f"p/{k}") for k in range(len(parts))] == parts


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no new member"):
        make(tmp_path / "a.tar", [("twice", b""), ("twice", b"")])
    assert os.listdir(tmp_path) == []
    with (
        pytest.raises(DamagedError, match=r"should have 5 bytes and has 3"),
        writing(tmp_path / "a.tar", "b") as writer,
    ):
        writer.add_stream("x", 5, io.BytesIO(b"abc"))
    with pytest.raises(DamagedError, match=r"should have 2 bytes and has more"), writing(tmp_path / "a.tar", "b") as w:
        w.add_stream("x", 2, io.BytesIO(b"abc"))
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_not_replaced(tmp_path):
    (tmp_path / "a.tar").write_text("mine")
    with pytest.raises(UserError, match="something is there"):
        make(tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_text() == "mine"


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path):
    old, new = tmp_path / ".a.tar.0.partial", tmp_path / ".a.tar.1.partial"
    old.touch(), new.touch()
    os.utime(old, (1, 1))
    make(tmp_path / "a.tar")
    assert sorted(os.listdir(tmp_path)) == [".a.tar.1.partial", "a.tar"]


def test_a_full_disk(small_disk, tmp_path):
    with pytest.raises(StorageError, match="cannot write the bundle"):
        make(tmp_path / "small" / "a.tar", [("blobs/one", bytes(100_000))])
    assert os.listdir(tmp_path / "small") == []


HOSTILE = {
    "a symbolic link": [START, (special("blobs/a", tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "a link": [START, (special("blobs/a", tarfile.LNKTYPE, "/etc/passwd"), b"")],
    "a device": [START, (special("blobs/a", tarfile.CHRTYPE), b"")],
    "a pipe": [START, (special("blobs/a", tarfile.FIFOTYPE), b"")],
    "a directory": [START, (special("blobs", tarfile.DIRTYPE), b"")],
    "a special record": [START, ("blobs/" + "a" * 200, b"long names have a record of their own")],
    "no name of a member": [START, ("../escape", b"")],
    "which is no name of a member": [START, ("/absolute", b"")],
    "'blobs/UPPER', which": [START, ("blobs/UPPER", b"")],
    "'blobs/../../x', which": [START, ("blobs/../../x", b"")],
    "twice": [START, ("blobs/a", b"1"), ("blobs/a", b"2"), (SEAL, b"{}")],
    "should begin with head.json and end with seal.json": [START, ("blobs/a", b"1")],
    "no JSON": [(HEAD, b"not"), (SEAL, b"{}")],
    "should hold a JSON object; it holds list": [(HEAD, b"[]"), (SEAL, b"{}")],
    "is no JSON (": [(HEAD, b"[" * 100_000), (SEAL, b"{}")],
    "it is a 'backup' and not a 'bundle'": [(HEAD, b'{"kind":"backup","format":1}'), (SEAL, b"{}")],
    "of format 2, and this version of lorchestra reads 1 to 1; update": [
        (HEAD, b'{"kind":"bundle","format":2}'), (SEAL, b"{}")
    ],
    "of format True": [(HEAD, b'{"kind":"bundle","format":true}'), (SEAL, b"{}")],
    "its seal names other members": [START, ("blobs/a", b"1"), (SEAL, b'{"members":{}}')],
}  # fmt: skip


@pytest.mark.parametrize("says", HOSTILE)
def test_hostile_members_are_refused(tmp_path, says):
    path = by_hand(tmp_path / "a.tar", HOSTILE[says])
    with pytest.raises(ArchiveError) as refused:
        Reader(path, "bundle", 1)
    assert says in str(refused.value)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_sparse_and_pax_members_are_refused_before_they_are_interpreted(tmp_path):
    """A few hundred bytes may declare terabytes there."""
    for kind in (b"S", tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, b"K"):
        info = special("blobs/a", kind)
        info.size = 1 << 40
        block = info.tobuf(tarfile.GNU_FORMAT)
        path = tmp_path / "a.tar"
        path.write_bytes(make(tmp_path / "b.tar").read_bytes()[:1024] + block + bytes(1024))
        (tmp_path / "b.tar").unlink()
        with pytest.raises(ArchiveError, match="a special record"):
            Reader(path, "bundle", 1)


def test_a_declared_size_beyond_the_file_is_refused(tmp_path):
    info = tarfile.TarInfo("blobs/a")
    info.size = 1 << 50
    path = tmp_path / "a.tar"
    path.write_bytes(make(tmp_path / "b.tar").read_bytes()[:1024] + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ArchiveError, match=r"1,125,899,906,842,624 bytes are declared: it was cut off"):
        Reader(path, "bundle", 1)


def test_packed_archives_are_refused_unread(tmp_path):
    plain = make(tmp_path / "a.tar").read_bytes()
    bomb = gzip.compress(plain + bytes(50_000_000))
    (tmp_path / "b.tar").write_bytes(bomb)
    with pytest.raises(ArchiveError, match=r"packed \(gzip\)"):
        Reader(tmp_path / "b.tar", "bundle", 1)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as out:
        out.writestr("head.json", "{}")
    with pytest.raises(ArchiveError, match=r"packed \(zip\)"):
        Reader(tmp_path / "c.zip", "bundle", 1)


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_MEMBERS", 3)
    path = make(tmp_path / "a.tar")
    with Reader(make(tmp_path / "b.tar", [("one", b"")]), "bundle", 1):
        pass
    with pytest.raises(ArchiveError, match="more than 3 members"):
        Reader(path, "bundle", 1)


def test_texts_and_lines_are_bounded(tmp_path, monkeypatch):
    path = make(tmp_path / "a.tar", [("rows", b"x" * 300), ("good", b"a\nb\n")])
    monkeypatch.setattr(archive, "LARGEST_TEXT", 290)
    with Reader(path, "bundle", 1) as reader:
        assert list(reader.lines("good")) == [b"a\n", b"b\n"]
        with pytest.raises(ArchiveError, match="at most 290"):
            reader.text("rows")
        with pytest.raises(ArchiveError, match="does not end"):
            list(reader.lines("rows"))


def test_every_cut_is_noticed(tmp_path):
    whole = make(tmp_path / "a.tar", [("blobs/one", b"1" * 700)]).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in (0, 1, 511, 512, *range(513, len(whole), 97), len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ArchiveError):
            Reader(cut, "bundle", 1)
    cut.write_bytes(whole + b"\0" * 512)
    with pytest.raises(ArchiveError, match="something follows"):
        Reader(cut, "bundle", 1)


def test_every_flipped_bit_is_noticed(tmp_path):
    """Headers carry a checksum, members the seal's digest, and between them are zeros."""
    whole = make(tmp_path / "a.tar", [("blobs/one", b"1" * 700)]).read_bytes()
    flipped = tmp_path / "flipped.tar"
    for at in range(0, len(whole), 19):
        data = bytearray(whole)
        data[at] ^= 0x10
        flipped.write_bytes(data)
        with pytest.raises(ArchiveError):
            read_all(flipped)


def read_all(path):
    with Reader(path, "bundle", 1) as reader:
        reader.verify()


def test_no_files_at_all(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe"):
        with pytest.raises(ArchiveError, match="is no file"):
            Reader(path, "bundle", 1)
    shutil.copy(make(tmp_path / "a.tar"), tmp_path / "b.tar")
    (tmp_path / "text").write_text("hello " * 200)
    with pytest.raises(ArchiveError, match="it is no bundle"):
        Reader(tmp_path / "text", "bundle", 1)
