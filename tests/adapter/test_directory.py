"""A directory appears whole or not at all, on real file systems and under real errors."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorchestra.adapter import directory
from lorchestra.adapter.directory import whole_directory
from lorchestra.errors import StorageError


@contextmanager
def as_nobody():
    """Permissions do not bind root; they bind nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def fill(target, replaces=None, error=None, more=lambda partial: None):
    with whole_directory(target, "it", replaces) as partial:
        (partial / "a").write_text("new")
        more(partial)
        if error is not None:
            raise error


def everything(place):
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))


def test_it_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "down" / "out"
    with whole_directory(target, "it") as partial:
        (partial / "a").write_text("1")
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("2")
        assert not target.exists()
        assert partial.parent == target.parent, "a rename needs the same file system"
    assert everything(tmp_path / "deep" / "down") == ["out", "out/a", "out/sub", "out/sub/b"]
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert target.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_nothing_appears_when_the_block_fails(tmp_path, error):
    with pytest.raises(type(error)):
        fill(tmp_path / "out", error=error)
    assert everything(tmp_path) == []


def test_what_was_there_stays_when_the_block_fails(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(ValueError, match="mine"):
        fill(target, "a", error=ValueError("mine"))
    assert everything(tmp_path) == ["out", "out/a"]
    assert (target / "a").read_text() == "old"


def test_an_earlier_one_is_replaced_and_foreign_entries_are_kept(tmp_path):
    target = tmp_path / "out"
    (target / "checkpoints").mkdir(parents=True)
    (target / "checkpoints" / "1").write_text("kept")
    (target / "marker").write_text("old")
    with whole_directory(target, "it", replaces="marker") as partial:
        (partial / "marker").write_text("new")
    assert everything(tmp_path) == ["out", "out/checkpoints", "out/checkpoints/1", "out/marker"]
    assert (target / "marker").read_text() == "new"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_directory(tmp_path / "link", "it") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "1"


def test_what_was_there_comes_back_when_the_new_one_cannot_take_its_name(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(FileNotFoundError):
        directory._swap(tmp_path / "vanished", target)
    assert everything(tmp_path) == ["out", "out/a"]


def test_a_killed_process_leaves_nothing_under_the_name(tmp_path):
    program = (
        "import os, sys, pathlib\n"
        "from lorchestra.adapter.directory import whole_directory\n"
        "with whole_directory(pathlib.Path(sys.argv[1]), 'it') as partial:\n"
        "    (partial / 'a').write_text('1')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    with whole_directory(tmp_path / "out", "it") as partial:
        (partial / "a").write_text("2")
    assert (tmp_path / "out" / "a").read_text() == "2"


class TestKept:
    """A sibling that is kept for the next try is known for what it is, whenever its maker was killed."""

    KILLED = """
import os, sys
from pathlib import Path
from lorchestra.adapter.directory import discard, whole_directory

target, last = Path(sys.argv[1]), int(sys.argv[2])
seen = 0

def struck(event, arguments):
    global seen
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open") and str(target.parent) in str(arguments[0]):
        seen += 1
        if seen == last:
            os._exit(9)

sys.addaudithook(struck)
with whole_directory(target, "it", keeps="notes.json") as partial:
    (partial / "notes.new").write_text("{}")
    os.replace(partial / "notes.new", partial / "notes.json")
    (partial / "part").mkdir(exist_ok=True)
    (partial / "part" / "a").write_text("new")
    if sys.argv[3] == "discards":
        discard(partial, "notes.json")
        sys.exit("nothing worth keeping")
"""

    @pytest.mark.parametrize("how", ["finishes", "discards"])
    def test_a_kill_before_any_change_of_the_file_system(self, tmp_path, how):
        for last in range(1, 60):
            target = tmp_path / str(last) / "out"
            target.parent.mkdir()
            command = [sys.executable, "-c", self.KILLED, str(target), str(last), how]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not target.exists():
                with whole_directory(target, "it", keeps="notes.json") as partial:
                    (partial / "notes.new").write_text("{}")
                    os.replace(partial / "notes.new", partial / "notes.json")
                    (partial / "part").mkdir(exist_ok=True)
                    (partial / "part" / "a").write_text("new")
            else:
                with pytest.raises(StorageError, match="not empty"), whole_directory(target, "it", keeps="notes.json"):
                    pass
            assert (target / "part" / "a").read_text() == "new"
            assert [path.name for path in target.rglob("*")] == ["part", "a"]
            assert list(target.parent.iterdir()) == [target]
            if done.returncode != 9:
                assert last > 8
                return
        raise AssertionError("it was killed every time")


class TestRefusals:
    def test_a_file_is_there(self, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(StorageError, match=r"cannot write it to .*: a file is there"):
            fill(tmp_path / "out")
        assert (tmp_path / "out").read_text() == "mine"

    def test_a_part_of_the_path_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(StorageError, match="part of the path is a file"):
            fill(tmp_path / "file" / "x" / "out")
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("replaces", [None, "marker"])
    def test_something_else_is_there(self, tmp_path, replaces):
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(StorageError, match="it is not empty; choose another directory"):
            fill(tmp_path, replaces)
        assert everything(tmp_path) == ["thesis.tex"]

    @pytest.mark.parametrize("mode", [0o555, 0o000])
    def test_no_permission(self, mode):
        with tempfile.TemporaryDirectory() as name:
            os.chmod(name, mode)
            with as_nobody(), pytest.raises(StorageError, match="no permission"):
                fill(Path(name) / "a" / "out")
            os.chmod(name, 0o755)
            assert os.listdir(name) == []

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
    def test_full_disk(self, tmp_path):
        def more(partial):
            with open("/dev/full", "w") as full:
                full.write("x" * 100_000)

        with pytest.raises(StorageError, match="disk is full; free some space"):
            fill(tmp_path / "out", more=more)
        assert everything(tmp_path) == []

    def test_file_size_limit(self, tmp_path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def more(partial):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            (partial / "b").write_bytes(b"x" * 2000)

        try:
            with pytest.raises(StorageError, match="larger than allowed"):
                fill(tmp_path / "out", more=more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert everything(tmp_path) == []

    def test_an_error_without_a_sentence_of_its_own_keeps_the_systems(self, tmp_path):
        with pytest.raises(StorageError, match=r"Input/output error \(shard\)"):
            fill(tmp_path / "out", error=OSError(errno.EIO, os.strerror(errno.EIO), "shard"))
