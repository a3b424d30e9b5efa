"""Archives that are not fit to be unpacked are refused before anything is written."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections import namedtuple

import pytest

from lorchestra.base import archive as archives
from lorchestra.base.archive import survey
from lorchestra.base.locate import locate
from lorchestra.base.source import parse_source
from lorchestra.errors import SourceError, StorageError

SOURCE = parse_source("pip:some-data==1.0")


def zipped(path, members, deflated=True):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as bundle:
        for name, data in members:
            bundle.writestr(name, data)
    return path


def header(name, size=0, kind=tarfile.REGTYPE, link=""):
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.linkname = size, kind, link
    return entry.tobuf()


def tarred(path, blocks, zeros=0):
    """A .tar.gz of raw blocks, and then as many zero bytes; not always a whole archive."""
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for block in blocks:
            stream.write(block)
        for _ in range(zeros >> 20):
            stream.write(bytes(1 << 20))
    return path


def nothing_unpacked(tmp_path):
    sources = tmp_path / "home" / "sources"
    return not sources.exists() or not [p for p in sources.rglob("*") if p.is_dir() and p.suffix != ".download"]


def test_a_zip_bomb_is_refused_before_it_is_unpacked(links, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 1_000_000)
    zipped(links / "some_data-1.0-py3-none-any.whl", [("some_data/a", bytes(3_000_000))])
    with pytest.raises(SourceError, match=r"bytes would unpack to more than 1,000,000.*refused.*write the path"):
        locate("pip:some-data==1.0")
    assert nothing_unpacked(tmp_path)


def test_a_tar_bomb_is_refused_by_its_header_alone(tmp_path):
    """The header says two gigabytes; the bytes themselves are never read (there are none)."""
    bomb = tarred(tmp_path / "some-data-1.0.tar.gz", [header("some-data-1.0/a", 1 << 31)])
    with pytest.raises(SourceError, match="would unpack to more than 1,073,741,824"):
        survey(bomb, tmp_path, SOURCE)


def test_many_files_of_a_tar_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 50_000)
    monkeypatch.setattr(archives, "MAX_RATIO", 1)
    member = header("some-data-1.0/a", 10_000) + bytes(10_240)
    bomb = tarred(tmp_path / "some-data-1.0.tar.gz", [member] * 6, 1 << 20)
    with pytest.raises(SourceError, match="would unpack to more than 50,000"):
        survey(bomb, tmp_path, SOURCE)
    survey(tarred(tmp_path / "b.tar.gz", [member] * 5, 1 << 20), tmp_path, SOURCE)


def test_what_packs_as_text_does_is_not_taken_for_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 1_000)
    rows = "".join(f'{{"prompt": "question {i * 7919 % 100003}", "completion": "answer {i}"}}\n' for i in range(9_000))
    survey(zipped(tmp_path / "a.whl", [("rows.jsonl", rows)]), tmp_path, SOURCE)


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_too_many_files(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 20)

    def made(n):
        path = tmp_path / f"{n}.{kind}"
        if kind == "whl":
            return zipped(path, [(f"d/{i}", b"") for i in range(n)])
        return tarred(path, [header(f"d/{i}") for i in range(n)], 1 << 20)

    survey(made(20), tmp_path, SOURCE)
    with pytest.raises(SourceError, match="holds more than 20 files; refused"):
        survey(made(21), tmp_path, SOURCE)


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
@pytest.mark.parametrize("name", ["../evil", "d/../../evil", "d/../evil", "/evil", "C:\\evil", "..\\evil", "C:evil"])
def test_names_that_climb_out(tmp_path, kind, name):
    path = tmp_path / f"a.{kind}"
    if kind == "whl":
        zipped(path, [("d/fine", b""), (name, b"evil")])
    else:
        tarred(path, [header("d/fine"), header(name)], 1 << 20)
    with pytest.raises(SourceError, match="climbs out of it; refused"):
        survey(path, tmp_path, SOURCE)


@pytest.mark.parametrize("target", ["/etc/passwd", "../../evil", "rows.jsonl"])
def test_links_are_refused_wherever_they_lead(tmp_path, target):
    link = zipfile.ZipInfo("d/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(SourceError, match="'d/link', a link; refused"):
        survey(zipped(tmp_path / "a.whl", [(link, target)]), tmp_path, SOURCE)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with pytest.raises(SourceError, match="'d/link', a link; refused"):
            survey(tarred(tmp_path / "a.tar.gz", [header("d/link", 0, kind, target)], 1 << 20), tmp_path, SOURCE)


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_devices_are_refused(tmp_path, kind):
    with pytest.raises(SourceError, match="'d/x', a special file; refused"):
        survey(tarred(tmp_path / "a.tar.gz", [header("d/x", 0, kind)], 1 << 20), tmp_path, SOURCE)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_that_would_fill_the_memory(tmp_path, kind):
    """tarfile would read it whole, 200 MB here, before it hands out a member."""
    import tracemalloc

    bomb = tarred(tmp_path / "a.tar.gz", [header("d/x", 200 << 20, kind)], 200 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(tarfile.ReadError, match="a header of 209,715,200 bytes"):
            survey(bomb, tmp_path, SOURCE)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_long_names_as_they_are_are_fine(tmp_path):
    path = tmp_path / "a.tar.gz"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w:gz", format=form) as bundle:
            entry = tarfile.TarInfo("/".join(["directory"] * 40))
            entry.size = 3
            bundle.addfile(entry, io.BytesIO(b"abc"))
        survey(path, tmp_path, SOURCE)


def test_a_disk_without_room_is_told_before(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")  # the disk's own number cannot be made small here
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage(10, 10, 1_000_000))
    with pytest.raises(StorageError, match=r"unpacks to 2 MB, and .* has 1 MB left.*LORCHESTRA_HOME"):
        survey(zipped(tmp_path / "a.whl", [("d/a", bytes(2_000_000))]), tmp_path, SOURCE)


def test_a_refused_archive_is_fetched_anew_when_it_is_mended(links, tmp_path):
    path = links / "some_data-1.0-py3-none-any.whl"
    zipped(path, [("../evil", b"evil")])
    with pytest.raises(SourceError, match="climbs out"):
        locate("pip:some-data==1.0")
    zipped(path, [("some_data/a", b"fine")])
    assert (locate("pip:some-data==1.0") / "some_data" / "a").read_bytes() == b"fine"
