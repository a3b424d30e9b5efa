"""Blobs: whole or not at all, once, and checked as they are read; on a disk, on S3 (moto's server), elsewhere."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorchestra.errors import UserError
from lorchestra.registry.mistakes import DamagedError, RegistryError
from lorchestra.registry.store.blobs import Blobs
from lorchestra.registry.store.stored import CHUNK

NOW = timedelta(0)


class Elsewhere(LocalFileSystem):
    """A file system with names and moves that is neither the local disk nor an object store, as SFTP is."""

    protocol = ("elsewhere",)


fsspec.register_implementation("elsewhere", Elsewhere)


@pytest.fixture(scope="module")
def s3_server():
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(monkeypatch):
    def point(endpoint):
        for key, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "Geheim9",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(key, value)

    return point


@pytest.fixture
def bucket(s3_server, aws):
    import boto3

    aws(s3_server)
    name = f"b{random.Random().getrandbits(48):x}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=name)
    return client, name


class Behind:
    """What a test does to a store behind its back."""

    def __init__(self, kind, root, client=None):
        self.kind, self.root, self.client = kind, root, client

    def path(self, digest):
        name = digest.removeprefix("sha256:")
        return f"sha256/{name[:2]}/{name}"

    def write(self, digest, data):
        if self.client:
            self.client.put_object(Bucket=self.root, Key=f"pre/{self.path(digest)}", Body=data)
        else:
            (self.root / self.path(digest)).write_bytes(data)

    def names(self):
        if self.client:
            return sorted(o["Key"][4:] for o in self.client.list_objects_v2(Bucket=self.root).get("Contents", ()))
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if not path.is_dir())


@pytest.fixture(params=["disk", "elsewhere", "s3"])
def store(request, tmp_path):
    if request.param == "s3":
        client, name = request.getfixturevalue("bucket")
        return Blobs(f"s3://{name}/pre"), Behind("s3", name, client)
    root = tmp_path / "blobs"
    return Blobs(str(root) if request.param == "disk" else f"elsewhere://{root}"), Behind(request.param, root)


def digest_of(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


SOME = [b"", b"x", b"one\n" * 1000, random.Random(1).randbytes(3 * CHUNK + 17)]


def test_what_is_put_is_read_back(store, tmp_path):
    blobs, behind = store
    assert list(blobs.all()) == []
    assert blobs.leftovers(NOW) == []
    for data in SOME:
        (tmp_path / "file").write_bytes(data)
        assert not blobs.has(digest_of(data))
        assert blobs.put_file(tmp_path / "file") == (digest_of(data), len(data))
        assert blobs.put_bytes(data) == (digest_of(data), len(data))
        assert blobs.has(digest_of(data))
        assert blobs.read(digest_of(data)) == data
        assert blobs.read(digest_of(data), limit=len(data)) == data
        assert blobs.fetch(digest_of(data), tmp_path / "out") == len(data)
        assert (tmp_path / "out").read_bytes() == data
        with blobs.open(digest_of(data)) as stream:
            assert stream.read(5) == data[:5]
            assert stream.read() == data[5:]
            assert stream.read() == b""
    assert behind.names() == sorted(behind.path(digest_of(data)) for data in SOME), "kept once, under its digest"
    assert {blob.digest: blob.size for blob in blobs.all()} == {digest_of(data): len(data) for data in SOME}
    assert [blob.digest for blob in blobs.all()] == sorted(digest_of(data) for data in SOME)
    assert all(abs(datetime.now(UTC) - blob.modified) < timedelta(minutes=1) for blob in blobs.all())
    assert blobs.leftovers(NOW) == []
    assert sorted(os.listdir(tmp_path)) == sorted({"file", "out", "blobs"} & set(os.listdir(tmp_path)))


def test_sizes_are_of_what_is_there(store):
    blobs, _ = store
    there = {blobs.put_bytes(bytes([i]) * i)[0]: i for i in range(4)}
    asked = [*there, *there, digest_of(b"not there")]
    assert blobs.sizes(asked) == there
    many = [digest_of(b"%d" % i) for i in range(100)]
    assert blobs.sizes([*asked, *many]) == there
    assert blobs.sizes([]) == {}


def test_deleted_is_gone_and_twice_is_no_mistake(store):
    blobs, behind = store
    digest, _ = blobs.put_bytes(b"data")
    blobs.delete(digest)
    blobs.delete(digest)
    assert not blobs.has(digest)
    assert behind.names() == []
    with pytest.raises(DamagedError, match="is missing") as caught:
        blobs.read(digest)
    assert caught.value.subject == digest


DATA = b"0123456789" * 1000


DAMAGES = [DATA[:-1], DATA + b"x", b"", b"1" + DATA[1:], DATA[:5000] + b"x" + DATA[5001:], DATA[::-1]]


def test_damage_is_found_while_reading_and_mended_by_putting(store, tmp_path):
    blobs, behind = store
    digest, _ = blobs.put_bytes(DATA)
    (tmp_path / "again").write_bytes(DATA)
    reads = (lambda: blobs.read(digest), lambda: blobs.fetch(digest, tmp_path / "out"), lambda: drained(blobs, digest))
    for damaged in DAMAGES:
        behind.write(digest, damaged)
        (tmp_path / "out").write_text("before")
        for read in reads:
            with pytest.raises(DamagedError, match=f"{digest}.*is damaged") as caught:
                read()
            assert caught.value.subject == digest
        assert (tmp_path / "out").read_text() == "before"
        assert not list(tmp_path.glob(".*"))
        assert blobs.sizes([digest]) == {digest: len(damaged)}
        assert blobs.put_file(tmp_path / "again") == (digest, len(DATA))
        assert blobs.read(digest) == DATA
        behind.write(digest, damaged)
        blobs.put_bytes(DATA)
        assert blobs.read(digest) == DATA
        assert behind.names() == [behind.path(digest)]


def drained(blobs, digest):
    with blobs.open(digest) as stream:
        while stream.read(777):
            pass


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(min_size=1, max_size=3000), st.data())
def test_any_flipped_bit_is_found(tmp_path, data, draw):
    blobs = Blobs(str(tmp_path / "blobs"))
    digest, _ = blobs.put_bytes(data)
    place = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[place // 8] ^= 1 << place % 8
    Behind("disk", tmp_path / "blobs").write(digest, flipped)
    with pytest.raises(DamagedError):
        blobs.read(digest)


def test_more_than_the_limit_is_not_read(store):
    blobs, _ = store
    digest, _ = blobs.put_bytes(b"x" * 11)
    with pytest.raises(RegistryError, match="larger than 10 bytes"):
        blobs.read(digest, limit=10)


@pytest.mark.parametrize(
    "digest",
    ["", "sha256:", "abc", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "sha256:" + "a" * 65, "sha256:" + "٣" * 64,
     "sha256:../../../../etc/passwd", "sha256:/etc/passwd", "a" * 64, "sha256:" + "a" * 64 + "\n", "md5:" + "a" * 64],
)  # fmt: skip
def test_what_is_no_digest_reaches_no_file(store, digest, tmp_path):
    blobs, _ = store
    calls = [
        blobs.open,
        blobs.read,
        blobs.has,
        blobs.delete,
        lambda d: blobs.sizes([d]),
        lambda d: blobs.fetch(d, tmp_path / "o"),
    ]
    for call in calls:
        with pytest.raises(RegistryError, match="is no digest of a blob"):
            call(digest)


def test_put_again_counts_as_put_now(store, tmp_path):
    blobs, behind = store
    digest, _ = blobs.put_bytes(b"data")
    if behind.kind == "s3":
        before = next(blobs.all()).modified
        time.sleep(1.1)  # S3 counts seconds
        blobs.put_bytes(b"data")
        assert next(blobs.all()).modified > before
        return
    path = behind.root / behind.path(digest)
    for put in (lambda: blobs.put_bytes(b"data"), lambda: blobs.put_file(tmp_path / "data")):
        (tmp_path / "data").write_bytes(b"data")
        os.utime(path, (0, 0))
        assert next(blobs.all()).modified.year == 1970
        put()
        assert abs(datetime.now(UTC) - next(blobs.all()).modified) < timedelta(minutes=1)


def test_strange_names_in_the_store_are_no_blobs(tmp_path):
    blobs = Blobs(str(tmp_path / "blobs"))
    digest, _ = blobs.put_bytes(b"data")
    root = tmp_path / "blobs" / "sha256"
    name = digest_of(b"other")[7:]
    wrong = "00" if name[:2] != "00" else "11"
    for path in (root / "note.txt", root / wrong / name, root / "abc" / name, root / digest[7:9] / "note", root / name):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"other")
    assert [blob.digest for blob in blobs.all()] == [digest]


def test_a_file_that_changes_meanwhile_is_recorded_as_what_was_kept(store, tmp_path, monkeypatch):
    blobs, _ = store
    file = tmp_path / "file"
    file.write_bytes(b"before" * 1000)
    keep = blobs._store.keep

    def meanwhile(name):
        file.write_bytes(b"after" * 500)
        return keep(name)

    monkeypatch.setattr(blobs._store, "keep", meanwhile)
    digest, size = blobs.put_file(file)
    assert (digest, size) == (digest_of(b"after" * 500), 2500)
    assert blobs.read(digest) == b"after" * 500
    assert [blob.digest for blob in blobs.all()] == [digest]


@pytest.mark.parametrize("what", ["missing", "directory", "fifo", "device"])
def test_what_is_no_file_is_not_put(tmp_path, what):
    blobs = Blobs(str(tmp_path / "blobs"))
    path = tmp_path / "it"
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path = Path("/dev/zero")
    with pytest.raises(RegistryError):
        blobs.put_file(path)
    assert list(blobs.all()) == []


# Links and special files inside the store


def outside(tmp_path, data):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(data)
    return tmp_path / "outside"


@pytest.mark.parametrize("what", ["link", "dangling", "fifo", "directory", "socket"])
def test_what_stands_in_a_blobs_place_is_not_followed(tmp_path, what, monkeypatch):
    blobs, data = Blobs(str(tmp_path / "blobs")), b"secret"
    digest, _ = blobs.put_bytes(data)
    place = tmp_path / "blobs" / "sha256" / digest[7:9] / digest[7:]
    place.unlink()
    target = outside(tmp_path, data) / ("secret" if what == "link" else "nothing")
    with socket.socket(socket.AF_UNIX) as listener:
        if what in ("link", "dangling"):
            place.symlink_to(target)
        elif what == "fifo":
            os.mkfifo(place)
        elif what == "socket":
            monkeypatch.chdir(place.parent)
            listener.bind("s")  # the name of a socket is short
            Path("s").rename(place)
        else:
            place.mkdir()
        assert not blobs.has(digest)
        assert list(blobs.all()) == []
        with pytest.raises(DamagedError, match="a link or special file") as caught:
            blobs.read(digest)
        assert caught.value.subject == digest
        if what == "directory":
            with pytest.raises(RegistryError, match="Is a directory"):
                blobs.put_bytes(data)
            assert blobs.leftovers(NOW) == []
            return
        blobs.put_bytes(data)
    assert blobs.read(digest) == data
    assert stat.S_ISREG(os.lstat(place).st_mode)
    assert os.listdir(tmp_path / "outside") == ["secret"]


@pytest.mark.parametrize("part", ["sha256", "shard", "partial"])
def test_a_directory_that_is_a_link_is_not_followed(tmp_path, part):
    blobs, data = Blobs(str(tmp_path / "blobs")), b"secret"
    digest, _ = blobs.put_bytes(data)
    root = tmp_path / "blobs"
    place = {"sha256": root / "sha256", "shard": root / "sha256" / digest[7:9], "partial": root / "partial"}[part]
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    before = sorted(str(path) for path in (tmp_path / "moved").rglob("*"))
    with pytest.raises(RegistryError, match="is a link or a file"):
        blobs.put_bytes(b"new" if part == "partial" else data)
    if part != "partial":
        assert not blobs.has(digest)
        assert list(blobs.all()) == []
        with pytest.raises(DamagedError):
            blobs.read(digest)
        blobs.delete(digest)
    assert blobs.leftovers(NOW) == []
    assert sorted(str(path) for path in (tmp_path / "moved").rglob("*")) == before


def test_the_store_itself_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "blobs").symlink_to(tmp_path / "real")
    blobs = Blobs(str(tmp_path / "blobs"))
    digest, _ = blobs.put_bytes(b"data")
    assert Blobs(f"file://{tmp_path}/real").read(digest) == b"data"


# Leftovers, kills, full disks, many at once


def test_leftovers_are_told_of_by_age_and_taken_away(tmp_path):
    blobs = Blobs(str(tmp_path / "blobs"))
    digest, _ = blobs.put_bytes(b"data")
    for name, age in (("old", 7200), ("new", 60)):
        (tmp_path / "blobs" / "partial" / name).write_bytes(b"half")
        then = time.time() - age
        os.utime(tmp_path / "blobs" / "partial" / name, (then, then))
    assert {left.name for left in blobs.leftovers(NOW)} == {"old", "new"}
    old = blobs.leftovers(timedelta(hours=1))
    assert [(left.name, left.size) for left in old] == [("old", 4)]
    for left in old * 2:
        blobs.discard(left)
    assert [left.name for left in blobs.leftovers(NOW)] == ["new"]
    assert blobs.read(digest) == b"data"


def test_an_upload_to_s3_that_was_not_completed_is_a_leftover(bucket):
    client, name = bucket
    blobs = Blobs(f"s3://{name}/pre")
    key = Behind("s3", name).path(digest_of(b"x"))
    upload = client.create_multipart_upload(Bucket=name, Key=f"pre/{key}")["UploadId"]
    client.upload_part(Bucket=name, Key=f"pre/{key}", UploadId=upload, PartNumber=1, Body=b"half")
    client.create_multipart_upload(Bucket=name, Key="somebody/elses")
    assert not blobs.has(digest_of(b"x"))
    assert list(blobs.all()) == []
    found = blobs.leftovers(NOW)
    assert len(found) == 1
    assert blobs.leftovers(timedelta(days=10_000)) == []
    blobs.discard(found[0])
    assert blobs.leftovers(NOW) == []
    assert [u["Key"] for u in client.list_multipart_uploads(Bucket=name)["Uploads"]] == ["somebody/elses"]


def test_a_large_blob_goes_to_s3_in_parts(bucket, tmp_path, monkeypatch):
    import s3fs.core

    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    blobs, data = Blobs(f"s3://{bucket[1]}"), random.Random(2).randbytes(11 << 20)
    (tmp_path / "large").write_bytes(data)
    digest, size = blobs.put_file(tmp_path / "large")
    assert size == len(data)
    etag = bucket[0].head_object(Bucket=bucket[1], Key=Behind("s3", "").path(digest))["ETag"]
    assert etag.endswith('-3"'), "three parts"
    assert blobs.fetch(digest, tmp_path / "out") == size
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from /proc")
def test_a_blob_is_flushed_before_it_has_its_name_and_its_directory_after(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, Path.replace

    def flushed(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).parts)
        fsync(descriptor)

    def renamed(path, target):
        done.append("renamed")
        return replace(path, target)

    blobs, shard = Blobs(str(tmp_path / "blobs")), ("blobs", "sha256", digest_of(b"data")[7:9])
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    blobs.put_bytes(b"data")
    at = done.index("renamed")
    assert any(part[:2] == ("blobs", "partial") and len(part) == 3 for part in done[:at]), "the file"
    assert {(), ("blobs",), shard[:2]} <= set(done[:at]), "the directories that were made"
    assert done[at + 1 :] == [shard]
    done.clear()
    blobs.put_bytes(b"data")
    assert done == [shard], "whoever put it may not have come so far"


PUTTING = """
import sys, random
from pathlib import Path
from lorchestra.registry.store.blobs import Blobs
blobs, chance = Blobs(sys.argv[1]), random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    blobs.put_bytes(chance.randbytes(chance.choice((10, 100_000, 3_000_000))))
"""


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.slow)], ids=["ten times", "a hundred times"])
def test_a_killed_put_leaves_no_half_blob(tmp_path, times):
    chance = random.Random(times)
    for turn in range(times):
        with subprocess.Popen(
            [sys.executable, "-c", PUTTING, str(tmp_path / "blobs"), str(turn)], stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            time.sleep(chance.uniform(0.005, 0.06))
            while turn % 2 and not os.listdir(tmp_path / "blobs" / "partial"):
                time.sleep(0.0002)
            process.send_signal(signal.SIGKILL)
    blobs = Blobs(str(tmp_path / "blobs"))
    found = list(blobs.all())
    assert found, "it was killed at work"
    for blob in found:
        assert len(blobs.read(blob.digest)) == blob.size
    left = blobs.leftovers(NOW)
    assert left, "some were killed while writing"
    for leftover in left:
        blobs.discard(leftover)
    names = [path.name for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    assert sorted(names) == sorted(blob.digest[7:] for blob in found)


def test_a_full_disk(small_disk, tmp_path):
    small_disk(2000)
    root = tmp_path / "small" / "blobs"
    blobs, chance, kept, stops = Blobs(str(root)), random.Random(4), {}, 0
    while stops < 5:
        data = chance.randbytes(chance.choice((1_000, 200_000, 700_000)))
        try:
            kept[blobs.put_bytes(data)[0]] = data
        except RegistryError as error:
            says = str(error)
            stops += "No space left" in says and "Free some space" in says
        assert len(kept) < 4000
    assert kept
    assert {blob.digest for blob in blobs.all()} == set(kept)
    assert blobs.leftovers(NOW) == []
    for digest, data in kept.items():
        assert blobs.read(digest) == data
        assert blobs.put_bytes(data)[0] == digest, "what is there needs no room"
    other = Blobs(str(tmp_path / "large"))
    large, _ = other.put_bytes(bytes(3_000_000))
    with pytest.raises(RegistryError, match="No space left"):
        other.fetch(large, tmp_path / "small" / "out")
    assert os.listdir(tmp_path / "small") == ["blobs"]


def _put_all(blobs, seed, count):
    chance = random.Random(seed)
    order = list(range(count))
    chance.shuffle(order)
    for i in order:
        assert blobs.put_bytes(_data(i)) == (digest_of(_data(i)), len(_data(i)))
        assert blobs.read(digest_of(_data(i))) == _data(i)
    blobs.put_bytes(b"own %d" % seed)


def _data(i):
    return random.Random(i).randbytes(1 + 4000 * i)


def check_all_is_there(url, count):
    blobs = Blobs(url)
    expected = {digest_of(data) for data in [*map(_data, range(count)), *(b"own %d" % i for i in range(8))]}
    assert {blob.digest for blob in blobs.all()} == expected
    assert all(len(blobs.read(blob.digest)) == blob.size for blob in blobs.all())
    assert blobs.leftovers(NOW) == []


def test_eight_processes_put_the_same_and_others_at_once(tmp_path):
    url = str(tmp_path / "blobs")
    workers = [multiprocessing.get_context("fork").Process(target=_put_all, args=(Blobs(url), i, 30)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    check_all_is_there(url, 30)


@pytest.mark.parametrize(
    ("count", "clients"), [(4, 1), pytest.param(30, 8, marks=pytest.mark.slow)], ids=["one client", "eight clients"]
)
def test_eight_threads_put_into_s3_at_once(bucket, count, clients):
    url = f"s3://{bucket[1]}/x"
    blobs = [Blobs(url) for _ in range(clients)]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(_put_all, blobs[i % clients], i, count) for i in range(8)]:
            done.result()
    check_all_is_there(url, count)


# Stores that are not there


def all_calls(blobs, tmp_path):
    (tmp_path / "file").write_bytes(b"data")
    digest = digest_of(b"data")
    return [
        lambda: blobs.put_file(tmp_path / "file"), lambda: blobs.put_bytes(b"data"), lambda: blobs.open(digest),
        lambda: blobs.read(digest), lambda: blobs.fetch(digest, tmp_path / "out"), lambda: blobs.has(digest),
        lambda: blobs.sizes([digest] * 3), lambda: list(blobs.all()), lambda: blobs.delete(digest),
        lambda: blobs.leftovers(NOW),
    ]  # fmt: skip


def test_a_store_that_is_down_is_told_of_soon_and_without_secrets(aws, tmp_path):
    pytest.importorskip("s3fs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        aws(f"http://127.0.0.1:{taken.getsockname()[1]}")
        blobs = Blobs("s3://bucket/pre")
        for call in all_calls(blobs, tmp_path):
            begun = time.monotonic()
            with pytest.raises(RegistryError, match="the store s3://bucket/pre says") as caught:
                call()
            assert time.monotonic() - begun < 10
            assert not isinstance(caught.value, DamagedError), "down is not damaged"
            assert "Geheim9" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_store_that_never_answers_is_told_of_within_a_minute(aws):
    pytest.importorskip("s3fs")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        aws(f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(RegistryError, match="the store s3://bucket/pre says"):
            Blobs("s3://bucket/pre").has(digest_of(b"x"))
        assert time.monotonic() - begun < 60


def test_without_s3fs_the_extra_is_named():
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from lorchestra.registry.store.blobs import Blobs\n"
        "try: Blobs('s3://bucket/x')\nexcept Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("UserError the store s3://bucket/x needs a package")
    assert "pip install 'lorchestra[s3]'" in said


def test_the_store_needs_neither_torch_nor_s3fs_to_be_imported():
    seen = "sorted({'torch', 's3fs', 'fsspec', 'boto3'} & set(sys.modules))"
    code = f"import sys, lorchestra.registry.store.blobs; print({seen})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_bucket_that_is_not_there_is_not_an_empty_one(s3_server, aws, tmp_path):
    aws(s3_server)
    blobs = Blobs("s3://no-such-bucket/pre")
    for number, call in enumerate(all_calls(blobs, tmp_path)):
        if number == 8:
            continue  # nothing to delete is no mistake
        with pytest.raises(RegistryError, match="no-such-bucket") as caught:
            call()
        assert not isinstance(caught.value, DamagedError)


def test_a_store_that_goes_away_while_it_is_read(tmp_path, monkeypatch):
    blobs = Blobs(str(tmp_path / "blobs"))
    digest, _ = blobs.put_bytes(b"x" * 3 * CHUNK)
    with blobs.open(digest) as stream:
        stream.read(10)
        monkeypatch.setattr(stream.raw, "_source", Broken())
        with pytest.raises(RegistryError, match=r"cannot read sha256.*Input/output error") as caught:
            stream.read()
    assert not isinstance(caught.value, DamagedError)


class Broken:
    def read(self, size):
        raise OSError(5, "Input/output error")

    def close(self):
        pass


def test_a_place_that_cannot_be_a_store(tmp_path):
    (tmp_path / "file").write_text("in the way")
    blobs = Blobs(str(tmp_path / "file" / "blobs"))
    with pytest.raises(RegistryError, match="Not a directory"):
        blobs.put_bytes(b"x")
    assert not blobs.has(digest_of(b"x"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense://x/y", "is no store of blobs"),
        ("s3://me:Geheim9@bucket/x", "keys come from the environment"),
        ("s3://", "no bucket"),
        ("file://machine/x", "taken for a machine"),
    ],
)
def test_what_is_no_store(url, says):
    with pytest.raises(UserError, match=says) as caught:
        Blobs(url)
    assert "Geheim9" not in str(caught.value)


def test_nothing_is_made_by_looking(tmp_path):
    blobs = Blobs(str(tmp_path / "blobs"))
    assert not blobs.has(digest_of(b"x"))
    assert blobs.leftovers(NOW) == []
    assert os.listdir(tmp_path) == []
    assert repr(blobs) == f"<Blobs {tmp_path}/blobs>"
