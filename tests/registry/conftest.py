"""Registries over SQLite and over a real PostgreSQL, and small adapters made on the spot."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.registry.registry import Registry

BASE = BaseId("tiny", "sha256:" + "a" * 64, "sha256:" + "b" * 64, "sha256:" + "c" * 64)


def _binaries() -> Path | None:
    """Where PostgreSQL's server programs are: on the path, or where Debian puts them."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return places[-1].parent if places else None


class Postgres:
    """A server of our own in a temporary directory, on a socket there."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        self.root = Path(tempfile.mkdtemp(prefix="lorchestra-pg-"))
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        if os.geteuid() == 0:  # the server refuses to run as root
            self.user = "postgres"
            owner = pwd.getpwnam(self.user)
            os.chown(self.root, owner.pw_uid, owner.pw_gid)
        self.data, self.free = self.root / "data", []
        self._run("initdb", "-D", str(self.data), "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        self.start()

    def start(self) -> None:
        """It ends with this process, however that ends: a shell waits for a word from here, or for the end of them."""
        server = str(self.binaries / "postgres")
        # Without TCP; the disk is not waited for: what is tested is what clients do, not a power cut.
        options = ["-k", str(self.root), "-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=60"]
        script = (
            'root=$1; shift; exec 3<&0; "$@" </dev/null & server=$!; '
            'read -r word <&3; kill -QUIT $server; wait $server; [ -n "$word" ] || rm -rf "$root"'
        )
        command = ["sh", "-c", script, "sh", str(self.root), server, "-D", str(self.data), *options]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._owned(command), cwd="/", stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.execute("postgres", "SELECT 1")
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError((self.root / "log").read_text()) from error
                time.sleep(0.05)

    def stop(self) -> None:
        self.process.communicate(b"stop\n", timeout=60)

    def remove(self) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)

    def database(self) -> str:
        """The name of an empty database that nobody else uses."""
        if self.free:
            return self.free.pop()
        name = f"r{uuid.uuid4().hex[:12]}"
        self.execute("postgres", f"CREATE DATABASE {name}")
        return name

    def done(self, name: str) -> None:
        """It is not used any more: emptied, it is the next one's (to make one takes ten times as long)."""
        self.execute(name, "DROP SCHEMA public CASCADE")
        self.execute(name, "CREATE SCHEMA public")
        self.free.append(name)

    def execute(self, database: str, statement: str) -> None:
        import psycopg

        try:
            with psycopg.connect(host=str(self.root), user=self.user, dbname=database, autocommit=True) as connection:
                connection.execute(statement)
        except psycopg.OperationalError as error:
            raise OSError(str(error)) from error

    def url(self, database: str, blobs: Path) -> str:
        return f"postgresql://{self.user}@/{database}?host={self.root}&blobs={blobs}"

    def _run(self, program: str, *arguments: str) -> None:
        command = self._owned([str(self.binaries / program), *arguments])
        done = subprocess.run(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 0, done.stdout.decode("utf-8", "replace")

    def _owned(self, command: list[str]) -> list[str]:
        return ["runuser", "-u", self.user, "--", *command] if os.geteuid() == 0 else command


@pytest.fixture(scope="session")
def postgres():
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    if os.geteuid() == 0 and not shutil.which("runuser"):
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    server = Postgres(binaries)
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(request, tmp_path):
    """The URL of a registry that is not there yet, for each kind of database."""
    return _new_url(request, tmp_path / "registry")


@pytest.fixture
def new_url(request, tmp_path):
    """``new_url(kind)``: the URL of one more registry that is not there yet."""
    return lambda kind: _new_url(request, tmp_path / uuid.uuid4().hex[:8], kind)


def _new_url(request, root: Path, kind: str = "") -> str:
    if (kind or request.param) == "sqlite":
        return str(root)
    server = request.getfixturevalue("postgres")
    name = server.database()
    request.addfinalizer(lambda: server.done(name))
    return server.url(name, root / "blobs")


@pytest.fixture
def registry(registry_url):
    """An empty registry, over each kind of database."""
    with Registry.open(registry_url, create=True, actor="tester") as opened:
        yield opened


@pytest.fixture
def local(tmp_path):
    """An empty registry over SQLite, for what does not depend on the database."""
    with Registry.open(str(tmp_path / "registry"), create=True, actor="tester") as opened:
        yield opened


def adapter(seed: int = 0, rank: int = 2, lineage: Lineage | None = None, base: BaseId = BASE) -> Adapter:
    """Two small modules of random factors."""
    made = torch.Generator().manual_seed(seed)
    modules = {
        f"model.layers.{k}.q_proj": LowRank(torch.randn(6, rank, generator=made), torch.randn(rank, 5, generator=made))
        for k in range(2)
    }
    told = lineage or Lineage(
        made_by="stage", name="sft", task="sft", data={"notes": "sha256:" + "d" * 64}, metrics={"validation_loss": 1.5}
    )
    return Adapter(modules, base, told)


@pytest.fixture
def make(tmp_path):
    """``make(seed, …)``: the directory of a small adapter, saved for real."""

    def saved(seed: int = 0, *, rank: int = 2, parents=(), context=(), base: BaseId = BASE, **lineage) -> Path:
        told = adapter(seed).lineage
        told = replace(told, **lineage, parents=_parents(parents), context=_parents(context))
        directory = tmp_path / f"adapter-{seed}-{uuid.uuid4().hex[:6]}"
        return adapter(seed, rank, told, base).save(directory)

    return saved


def _parents(manifests) -> tuple[Parent, ...]:
    return tuple(Parent(manifest.name, manifest.digest, 0.5) for manifest in manifests)


class Zygote:
    """Children that are there at once, with everything imported: one process forks them from a script.

    Args:
        script: a file with ``run(line)``; a child calls it with what :meth:`child` was given.
    """

    def __init__(self, script: Path, python: str) -> None:
        loop = (
            "import os, runpy, sys\n"
            "import torch\n"
            "torch.set_num_threads(1)\n"
            f"run = runpy.run_path({str(script)!r})['run']\n"
            "print('ready', flush=True)\n"
            "for line in sys.stdin:\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        code = 1\n"
            "        try:\n"
            "            run(line.strip())\n"
            "            code = 0\n"
            "        except BaseException:\n"
            "            import traceback\n"
            "            traceback.print_exc()\n"
            "        os._exit(code)\n"
            "    print(child, flush=True)\n"
            "    print(os.waitpid(child, 0)[1], flush=True)\n"
        )
        self.process = subprocess.Popen(
            [python, "-c", loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout.readline() == "ready\n"

    def child(self, line: str) -> int:
        """Start one; its process id."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self) -> int:
        """Wait for it; the status of ``waitpid``."""
        return int(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def zygote():
    """``zygote(script, python)``: a :class:`Zygote`, ended with the test."""
    started = []

    def start(script, python):
        started.append(Zygote(script, python))
        return started[-1]

    yield start
    for process in started:
        process.stop()
