"""Backups: one consistent state of a registry that is in use, restored in either database."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert, select
from tests.registry.conftest import Zygote
from tests.registry.test_blobs import aws, bucket, s3_server  # noqa: F401  # fixtures

from lorchestra.errors import StorageError, UserError
from lorchestra.registry.mistakes import DamagedError, NoRegistryError, RegistryError
from lorchestra.registry.registry import Registry
from lorchestra.registry.sql.schema import feedback, metadata
from lorchestra.registry.transport.archive import HEAD, SEAL, ArchiveError, Reader, canonical, writing
from lorchestra.registry.transport.backup import backup, restore

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("sqlite", "postgresql")
KILLS = int(os.environ.get("LORCHESTRA_TESTS_KILLS", "100"))


def fill(registry: Registry, make) -> None:
    terms = registry.push(make(1, name="terms"), "terms", note="für Ärzte", tags=["sft"]).manifest
    registry.push(make(2, made_by="fusion", parents=[terms]), "clinic")
    registry.promote("clinic@v1")
    registry.push(make(3), "clinic")
    registry.promote("clinic@v2", why="better")
    registry.revoke("terms@v1", "wrong data")
    with registry.catalog.writing() as connection:
        row = {"at": "t", "name": "clinic", "arm": "stable", "tenant_hash": "a", "user_hash": "b", "score": 0.1 + 0.2,
               "comment": "gut ✓", "version_id": 2}  # fmt: skip
        connection.execute(insert(feedback), [{**row, "request_id": str(k)} for k in range(3)])


def content(registry: Registry) -> dict[str, list]:
    """Every row of every table."""
    with registry.catalog.reading() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key.columns))]
            for table in metadata.sorted_tables
        }


def same_but_for_the_restoring(before, after) -> None:
    last = after["audit"].pop()
    assert last[3] == "restore-backup"
    head = next(row for row in after["meta"] if row[0] == "head")
    assert head[1].split()[0] == str(last[0])
    for found in (before, after):
        found["meta"] = [row for row in found["meta"] if row[0] != "head"]
        found.pop("leases")
    assert after == before


@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_everything_comes_back_in_either_database(new_url, make, tmp_path, source, target):
    path, url = tmp_path / "a.backup", new_url(target)
    with Registry.open(new_url(source), create=True, actor="one") as registry:
        fill(registry, make)
        made = backup(registry, path)
        before, history, identity = content(registry), registry.history(), registry.catalog.registry_id()
        registry.pull("clinic@v1", tmp_path / "before")
    assert (made.versions, made.generation, made.registry_id) == (3, len(history), identity)
    restored = restore(path, url, actor="two", why="the disk died")
    assert restored == made
    with Registry.open(url, actor="two") as registry:
        assert registry.verify() == []
        assert registry.catalog.registry_id() == identity
        assert registry.history()[1:] == history, "ids, hashes and all"
        assert (registry.history()[0].actor, registry.history()[0].why) == ("two", "the disk died")
        same_but_for_the_restoring(before, content(registry))
        registry.pull("clinic@v1", tmp_path / "after")
        assert {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "after").iterdir()
        }
        # and it goes on
        assert registry.rollback("clinic").version.reference == "clinic@v1"
        assert registry.push(make(9), "clinic").reference == "clinic@v3"
        with registry.catalog.writing() as connection:
            row = {"at": "t", "request_id": "new", "name": "x", "arm": "", "tenant_hash": "", "user_hash": "",
                   "score": 1.0, "comment": ""}  # fmt: skip
            connection.execute(insert(feedback), row)
            assert connection.execute(select(feedback.c.id).where(feedback.c.request_id == "new")).scalar_one() == 4
        assert registry.verify() == []


def test_from_a_directory_to_postgresql_and_s3_and_back(local, make, postgres, request, tmp_path):
    _, name = request.getfixturevalue("bucket")  # of moto's server
    fill(local, make)
    before = content(local)
    backup(local, tmp_path / "a.backup")
    there = f"postgresql://{postgres.user}@/{postgres.database()}?host={postgres.root}&blobs=s3://{name}/pre"
    restore(tmp_path / "a.backup", there)
    with Registry.open(there) as registry:
        assert registry.verify() == []
        same_but_for_the_restoring(before, content(registry))
        registry.push(make(7), "clinic")
        made = backup(registry, tmp_path / "b.backup")
    assert restore(tmp_path / "b.backup", str(tmp_path / "back")) == made
    with Registry.open(str(tmp_path / "back")) as registry:
        assert registry.verify() == []
        assert registry.resolve("clinic@v3")


WORK = """
import sys
from pathlib import Path
from lorchestra.registry.registry import Registry
with Registry.open(sys.argv[1], actor="worker") as registry:
    print("ready", flush=True)
    for k, directory in enumerate(sys.stdin):
        version = registry.push(Path(directory.strip()), "busy")
        registry.promote(version.reference)
        print(k, flush=True)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_while_another_process_pushes_and_promotes(new_url, make, tmp_path, kind):
    url = new_url(kind)
    directories = [make(100 + k) for k in range(12)]
    with Registry.open(url, create=True) as registry:
        fill(registry, make)
        worker = subprocess.Popen(
            [sys.executable, "-c", WORK, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert worker.stdout.readline() == "ready\n"
        done = threading.Event()

        def feed():
            for directory in directories:
                worker.stdin.write(f"{directory}\n")
                worker.stdout.readline()
            done.set()

        feeder = threading.Thread(target=feed)
        feeder.start()
        made = []
        while not done.is_set():
            made.append(backup(registry, tmp_path / f"{len(made)}.backup"))
        feeder.join()
        worker.stdin.close()
        assert worker.wait() == 0
        worker.stdout.close()
        whole = {entry.id: entry for entry in registry.history()}
    generations = [one.generation for one in made]
    assert len(set(generations)) > 1, "it was in use meanwhile"
    assert generations == sorted(generations)
    for k in {0, len(made) // 2, len(made) - 1}:
        with_it = tmp_path / f"restored-{k}"
        restore(tmp_path / f"{k}.backup", str(with_it))
        with Registry.open(str(with_it)) as registry:
            assert registry.verify() == []
            past = registry.history()[1:]
            assert past == [whole[entry.id] for entry in past], "a beginning of the history, and nothing else"
            assert len(past) == made[k].generation
            states = {(a.name, a.alias): a.version.reference for a in registry.aliases()}
            moved = [e for e in past if (e.name, e.alias) == ("busy", "production")]
            assert states.get(("busy", "production"), "") == (moved[0].after if moved else "")


def test_nothing_is_removed_while_a_backup_runs(local, make, tmp_path):
    fill(local, make)
    waiting, told = threading.Event(), threading.Event()

    class Slow:
        """A reporter that stops after the first blob."""

        def task(self, name, total=None, unit="it"):
            from contextlib import contextmanager

            @contextmanager
            def opened():
                class Task:
                    def advance(self, amount=1.0, **figures):
                        waiting.set()
                        assert told.wait(30)

                yield Task()

            return opened()

        def event(self, kind, /, **fields): ...

        def say(self, text): ...

    thread = threading.Thread(target=backup, args=(local, tmp_path / "a.backup", Slow()))
    thread.start()
    assert waiting.wait(30)
    with pytest.raises(RegistryError, match="a backup by tester is under way"):
        local.gc(dry_run=False, older_than=timedelta())
    told.set()
    thread.join()
    assert local.gc(dry_run=False, older_than=timedelta()).done
    with Reader(tmp_path / "a.backup", "backup", 1) as reader:
        reader.verify()


KILLED = """
from pathlib import Path
from lorchestra.registry.transport.backup import backup
from lorchestra.registry.registry import Registry
def run(path):
    with Registry.open(URL) as registry:
        backup(registry, Path(path))
"""


def killed_at_random(url: str, place: Path, times: int) -> int:
    """Start that many backups and kill each somewhere; how many were killed before their end."""
    script = place / "killed.py"
    script.write_text(KILLED.replace("URL", repr(url)))
    zygote = Zygote(script, sys.executable)
    chance, before_the_end = random.Random(6), 0
    try:
        started = time.monotonic()
        zygote.child(str(place / "whole.backup"))
        assert zygote.ended() == 0
        takes = time.monotonic() - started
        for k in range(times):
            path = place / f"{k}.backup"
            child, started = zygote.child(str(path)), time.monotonic()
            time.sleep(chance.random() * takes)
            with suppress(ProcessLookupError):  # it was quicker
                os.kill(child, signal.SIGKILL)
            if zygote.ended():
                before_the_end += 1
            else:
                takes = min(takes, time.monotonic() - started)
            if path.exists():
                with Reader(path, "backup", 1) as reader:
                    reader.verify()
    finally:
        zygote.stop()
    return before_the_end


def test_kill_9_leaves_no_file_that_looks_whole(local, make, tmp_path):
    fill(local, make)
    place = tmp_path / "backups"
    place.mkdir()
    assert killed_at_random(str(tmp_path / "registry"), place, 10) >= 3
    assert local.verify() == []
    assert {name for name in os.listdir(place) if name[0] != "." and not name.endswith(".backup")} == {"killed.py"}
    restore(place / "whole.backup", str(tmp_path / "again"))


@pytest.mark.slow
def test_kill_9_many_times(local, make, tmp_path):
    fill(local, make)
    place = tmp_path / "backups"
    place.mkdir()
    assert killed_at_random(str(tmp_path / "registry"), place, KILLS) >= KILLS / 3
    assert local.verify() == []


def read_all(path: Path) -> None:
    with Reader(path, "backup", 1) as reader:
        reader.verify()


def test_a_restore_that_was_killed_is_done_again(local, make, tmp_path):
    """Blobs come first: what is left is a registry without versions, and the same command ends it."""
    fill(local, make)
    backup(local, tmp_path / "a.backup")
    url = str(tmp_path / "new")
    with Registry.open(url, create=True) as registry:
        registry.blobs.put_bytes(b"left by the one that was killed")
    restore(tmp_path / "a.backup", url)
    with Registry.open(url) as registry:
        assert registry.verify() == []
        assert len(registry.gc(older_than=timedelta()).blobs) == 1


# ---- what is refused


def test_only_into_an_empty_registry(local, make, tmp_path):
    fill(local, make)
    backup(local, tmp_path / "a.backup")
    before = content(local)
    with pytest.raises(UserError, match="is not empty, and a backup is restored into an empty one alone"):
        restore(tmp_path / "a.backup", str(tmp_path / "registry"))
    assert content(local) == before


def test_a_damaged_blob_is_named_and_nothing_is_kept(local, make, tmp_path):
    fill(local, make)
    victim = local.resolve("clinic@v1").manifest.files["adapter_model.safetensors"].sha256
    local.blobs.delete(victim)
    with pytest.raises(DamagedError, match=victim[7:19]):
        backup(local, tmp_path / "out.backup")
    assert not list(tmp_path.glob("*out.backup*"))


def test_a_full_disk(local, make, small_disk, tmp_path):
    fill(local, make)
    with pytest.raises(StorageError, match="cannot write the backup"):
        backup(local, tmp_path / "small" / "a.backup")
    assert os.listdir(tmp_path / "small") == []
    assert local.verify() == []


def rewritten(source: Path, target: Path, change) -> Path:
    """The backup with other members, its seal made right again."""
    with Reader(source, "backup", 1) as reader:
        members = {name: reader.text(name) for name in reader.members if name not in (HEAD, SEAL)}
        head = dict(reader.head)
    change(members, head)
    with writing(target, "backup") as writer:
        writer.add_json(HEAD, head)
        for name, data in members.items():
            writer.add(name, data)
    return target


def edited(table: str, edit):
    def change(members, head):
        name = f"tables/{table}.jsonl"
        rows = [json.loads(line) for line in members[name].splitlines()]
        rows = edit(rows) or rows
        members[name] = b"".join(canonical(row) + b"\n" for row in rows)

    return change


def other_why(rows):
    rows[2]["why"] = "nobody said so"


def last_line_cut(rows):
    return rows[:-1]


def without_column(rows):
    del rows[0]["note" if "note" in rows[0] else "name"]


def first_blob(members):
    return next(name for name in members if name.startswith("blobs/"))


def other_bytes(members, head):
    members[first_blob(members)] = b"x" * len(members[first_blob(members)])


HOSTILE = {
    "a newer format": (lambda members, head: head.update(format=2), "reads 1 to 1; update lorchestra"),
    "a newer catalog": (lambda members, head: head.update(revision="9999"), "revision '9999'"),
    "a table more": (lambda members, head: members.update({"tables/extra.jsonl": b""}), r"tables/extra\.jsonl"),
    "a table less": (lambda members, head: members.pop("tables/names.jsonl"), r"tables/names\.jsonl"),
    "a blob less": (lambda members, head: members.pop(first_blob(members)), "its blobs are not those of its versions"),
    "a blob with other bytes": (other_bytes, "does not hold what its name says"),
    "a history that was edited": (edited("audit", other_why), "audit entry 3"),
    "a history that was cut": (edited("audit", last_line_cut), "its last entry is"),
    "a row without a column": (edited("versions", without_column), "does not have the columns of versions"),
    "no JSON": (lambda members, head: members.update({"tables/names.jsonl": b"x\n"}), "line 1: no JSON"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_does_not_hold_together_is_refused_before_anything_is_written(local, make, tmp_path, what):
    change, says = HOSTILE[what]
    fill(local, make)
    backup(local, tmp_path / "good.backup")
    path = rewritten(tmp_path / "good.backup", tmp_path / "bad.backup", change)
    with pytest.raises(ArchiveError, match=says):
        restore(path, str(tmp_path / "new"))
    with pytest.raises(NoRegistryError):
        Registry.open(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_every_flipped_bit_is_noticed(local, make, tmp_path):
    local.push(make(1), "a")
    backup(local, tmp_path / "good.backup")
    whole = (tmp_path / "good.backup").read_bytes()
    flipped = tmp_path / "bad.backup"
    for at in range(7, len(whole), 331):
        data = bytearray(whole)
        data[at] ^= 4
        flipped.write_bytes(data)
        with pytest.raises(ArchiveError):
            read_all(flipped)


def test_a_backup_of_format_1_keeps_loading(new_url):
    """Written by the first release; never made again."""
    for kind in KINDS:
        url = new_url(kind)
        made = restore(FIXTURES / "format-1.backup", url)
        assert (made.versions, made.generation) == (3, 7)
        with Registry.open(url) as registry:
            assert registry.verify() == []
            assert registry.history()[1].hash == (
                "sha256:af0e96d9fcb33990c79d40390163707c49c4e9f6e6f9d5be701d136987caa40f"
            )
            aliases = {f"{a.name}@{a.alias}": a.version.reference for a in registry.aliases()}
            assert aliases == {"clinic@production": "clinic@v1", "terms@staging": "terms@v1",
                               "terms@production": "terms@v2"}  # fmt: skip
            assert registry.resolve("terms@v2").revoked.why == "wrong"
