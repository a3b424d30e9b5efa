"""A merge that is killed, stopped or runs out of disk goes on, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import Interrupted, StorageError
from lorchestra.fusion import stream
from lorchestra.fusion.merge_journal import NAME, file_digest
from lorchestra.fusion.stream import merge

FILES, SIZE = 4, 96
MERGE = """
import sys
from lorchestra import Adapter, merge
print("ready", flush=True)
sys.stdin.readline()
merge("base", Adapter.load("adapter"), "out", dtype="bfloat16")
"""


def make_base(directory: Path, size: int = SIZE) -> Adapter:
    """``FILES`` files of two square matrices each, and an adapter of all of them."""
    directory.mkdir(parents=True)
    noise = torch.Generator().manual_seed(0)
    weight_map, updates = {}, {}
    for i in range(FILES):
        file = f"model-{i + 1}-of-{FILES}.safetensors"
        weights = {f"layers.{i}.{p}.weight": torch.randn(size, size, generator=noise) for p in "ab"}
        save_file(weights, directory / file)
        weight_map |= dict.fromkeys(weights, file)
        for name in weights:
            B, A = torch.randn(size, 3, generator=noise), torch.randn(3, size, generator=noise)
            updates[name.removesuffix(".weight")] = LowRank(B * 0.01, A * 0.1)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "toy"}')
    return Adapter(updates)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def shards(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.safetensors"))


class Killed(BaseException):
    """As abrupt as an exception can be."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stops_after(monkeypatch):
    """``stops_after(n, error)``: the merge ends with ``error`` when it begins file n + 1."""
    start = stream._start

    def arrange(count: int, error: BaseException) -> None:
        seen = []

        def counting(*arguments):
            seen.append(1)
            if len(seen) > count:
                raise error
            return start(*arguments)

        monkeypatch.setattr(stream, "_start", counting)

    yield arrange
    monkeypatch.setattr(stream, "_start", start)


def test_finished_files_are_taken_over(place, stops_after, monkeypatch):
    adapter = make_base(place / "base")
    whole = merge("base", adapter, "whole", dtype="bfloat16")
    stops_after(3, Killed())
    with pytest.raises(Killed):
        merge("base", adapter, "out", dtype="bfloat16")
    assert not Path("out").exists()
    kept = shards(Path(".out.partial"))[:2]  # the third may be whole under its name; it was not yet noted
    assert len(kept) == 2
    times = {name: os.stat(f".out.partial/{name}").st_mtime_ns for name in kept}
    stops_after(99, Killed())
    again = merge("base", adapter, "out", dtype="bfloat16")
    assert again.resumed == 2
    assert {name: os.stat(f"out/{name}").st_mtime_ns for name in kept} == times, "not written again"
    assert contents(Path("out")) == contents(Path("whole"))
    told, expected = again.as_dict(), {**whole.as_dict(), "seconds": pytest.approx(0, abs=60), "resumed": 2}
    for sum_of_tiles in ("base_rounding", "update_ratio"):  # summed in the order in which threads ended
        expected[sum_of_tiles] = pytest.approx(expected[sum_of_tiles], rel=1e-6)
    assert told == expected, "the report is about all files"
    assert not Path(".out.partial").exists()


@pytest.mark.parametrize("change", ["adapter", "dtype", "base", "damage", "cut", "journal", "schema"])
def test_only_what_belongs_to_this_merge_is_taken_over(place, stops_after, change):
    adapter = make_base(place / "base")
    stops_after(3, Killed())
    with pytest.raises(Killed):
        merge("base", adapter, "out", dtype="bfloat16")
    stops_after(99, Killed())
    partial, dtype = Path(".out.partial"), "bfloat16"
    first = partial / shards(partial)[0]
    journal = partial / NAME
    if change == "adapter":
        adapter = adapter * 2.0
    elif change == "dtype":
        dtype = "float16"
    elif change == "base":
        shutil.rmtree("base")
        make_base(place / "base")
    elif change == "damage":
        data = bytearray(first.read_bytes())
        data[-1] ^= 1
        first.write_bytes(data)
    elif change == "cut":
        first.write_bytes(first.read_bytes()[:-1])
    elif change == "journal":
        journal.write_text(journal.read_text()[:-9])
    else:
        journal.write_text(json.dumps({**json.loads(journal.read_text()), "schema": 99}))
    report = merge("base", adapter, "out", dtype=dtype)
    assert report.resumed == (1 if change in ("damage", "cut") else 0)
    merge("base", adapter, "whole", dtype=dtype)
    assert contents(Path("out")) == contents(Path("whole"))


def test_what_is_in_the_way_and_not_ours_is_left_alone(place):
    adapter = make_base(place / "base")
    (place / ".out.partial").mkdir()
    (place / ".out.partial" / "thesis.txt").write_text("mine")
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / NAME).write_text("{}")
    (place / "elsewhere" / "thesis.txt").write_text("mine")
    (place / ".linked.partial").symlink_to(place / "elsewhere")
    (place / ".file.partial").write_text("mine")
    for out in ("out", "linked", "file"):
        with pytest.raises(StorageError, match=rf"\.{out}\.partial is in the way and was not left by an earlier try"):
            merge("base", adapter, out)
        assert not Path(out).exists()
    assert Path(".out.partial/thesis.txt").read_text() == "mine"
    assert Path("elsewhere/thesis.txt").read_text() == "mine"
    assert Path(".file.partial").read_text() == "mine"


def test_ctrl_c_says_what_is_kept(place, stops_after):
    adapter = make_base(place / "base")
    stops_after(3, KeyboardInterrupt())
    with pytest.raises(Interrupted, match=r"2 of 4 files are kept in .*\.out\.partial: the same command goes on there"):
        merge("base", adapter, "out")
    stops_after(0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as stopped:
        merge("base", adapter, "other")
    assert not isinstance(stopped.value, Interrupted)
    assert not Path(".other.partial").exists(), "nothing was finished, nothing is kept"


def test_what_the_check_finds_undoes_the_merge(place):
    adapter = make_base(place / "base")

    def check(directory, report):
        assert report.modules == 2 * FILES
        assert shards(directory) == shards(place / "base")
        raise StorageError("not right")

    with pytest.raises(StorageError, match="not right"):
        merge("base", adapter, "out", check=check)
    assert not [path for path in place.iterdir() if "out" in path.name]


def test_the_names_of_files_say_what_they_hold(place):
    adapter = make_base(place / "base")
    merge("base", adapter, "out")
    note = json.loads(Path("out/lorchestra.json").read_text())
    assert note["files"] == {name: file_digest(Path("out", name)) for name in shards(Path("out"))}
    assert NAME not in contents(Path("out"))


def run(*more) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", MERGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    return process


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(place):
    """kill -9 at random moments, until one try gets through."""
    adapter = make_base(place / "base", 2500)
    adapter.save(place / "adapter")
    merge("base", adapter, "whole", dtype="bfloat16")
    partial, chance, most = Path(".out.partial"), random.Random(5), 0
    # As soon as a file is begun, as soon as one is finished, and some time after that.
    for begun, finished, later in [(1, 0, 0.0), (0, 1, 0.0), (0, 1, 0.05), (1, 1, 0.02), (0, 2, 0.01), (0, 3, 0.0)]:
        process = run()
        while not (len(list(partial.glob("*.part"))) >= begun and len(shards(partial)) >= finished):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        time.sleep(later * chance.random())
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break  # it was faster: what matters is said below
        assert not Path("out").exists()
        found = contents(partial)
        whole = contents(Path("whole"))
        assert all(found[name] == whole[name] for name in shards(partial)), "no half file has a file's name"
        most = max(most, len(shards(partial)))
    assert most, "a finished file was there after a kill"
    if not Path("out").exists():
        process = run()
        assert process.wait() == 0, process.stderr.read()
    assert contents(Path("out")) == contents(Path("whole"))
    assert not partial.exists()


@pytest.mark.slow
def test_two_at_once_wait_for_each_other(place):
    make_base(place / "base", 1000).save(place / "adapter")
    first, second = run(), run()
    codes = sorted(process.wait() for process in (first, second))
    assert codes == [0, 1]
    told = first.stderr.read() + second.stderr.read()
    assert "it is not empty" in told
    merge("base", Adapter.load("adapter"), "whole", dtype="bfloat16")
    assert contents(Path("out")) == contents(Path("whole"))


def test_room_is_counted_before_anything_is_written(place, small_disk):
    adapter = make_base(place / "base")
    out = place / "small" / "out"
    with pytest.raises(StorageError, match=r"the disk is full: 0\.00 GB are needed and"):
        merge("base", adapter, out)
    assert list(out.parent.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(place, small_disk, monkeypatch):
    """Somebody else takes the room after it was counted: finished files are kept, and go into the count next time."""
    adapter = make_base(place / "base")
    out = place / "small" / "out"
    merge("base", adapter, "whole")
    small_disk(230)  # two files and a bit; a file is 72 KiB
    with monkeypatch.context() as uncounted:
        uncounted.setattr(stream, "_check_room", lambda *arguments: None)
        with pytest.raises(StorageError, match=r"cannot write the merged model to .*: the disk is full"):
            merge("base", adapter, out)
    assert shards(out.parent / ".out.partial")
    assert not out.exists()
    small_disk(360)  # 4 · 72 and the small files, but not six
    assert merge("base", adapter, out).resumed >= 1
    assert contents(out) == contents(Path("whole"))
