"""What the processes of test_concurrency and test_kill do; run by ``conftest.Zygote``."""

from __future__ import annotations

import json
import os
import random
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import alembic.command
import psycopg
import safetensors.torch
import sqlalchemy.dialects.postgresql.psycopg
import sqlalchemy.dialects.sqlite

import lorchestra.registry.bases
import lorchestra.registry.checking
import lorchestra.registry.collecting
import lorchestra.registry.pushing
import lorchestra.registry.rolling
import lorchestra.registry.store.copies
from lorchestra.errors import UserError
from lorchestra.registry.mistakes import NeededError, RegistryError
from lorchestra.registry.registry import Registry

NOW = timedelta(0)
# What is imported when it is first used, before anything is forked: children are to work, not to import.
WARM = (alembic.command, psycopg, safetensors.torch, sqlalchemy.dialects, lorchestra.registry)


def run(line: str) -> None:
    """``{"what": "together" | "forever", …}``."""
    told = json.loads(line)
    {"together": together, "forever": forever}[told.pop("what")](**told)


def together(url: str, directories: list[list[str]], same: str) -> None:
    """One process for each list of directories pushes and promotes them; one more collects garbage meanwhile."""
    children = []
    for number, mine in enumerate([*directories, []]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                push_all(url, mine, same, f"worker-{number}") if mine else collect(url)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    assert not failed


def push_all(url: str, directories: list[str], same: str, actor: str) -> None:
    with Registry.open(url, create=True, actor=actor) as registry:
        push(registry, same, "same")
        for directory in directories:
            registry.promote(push(registry, directory, "clinic").reference, why=actor)


def push(registry: Registry, directory: str, name: str):
    """Whoever collects with so short a grace may take from under a push what it writes, and it says so."""
    for _ in range(20):
        try:
            return registry.push(Path(directory), name)
        except RegistryError as error:
            if not ("went 3 times" in str(error) or "No such file" in str(error)):
                raise
    raise AssertionError("its blobs were taken away 20 times")


def collect(url: str) -> None:
    with Registry.open(url, create=True, actor="collector") as registry:
        for _ in range(20):
            registry.gc(dry_run=False, older_than=timedelta(seconds=0.1))
            time.sleep(0.05)


def forever(url: str, directories: list[str], seed: int, rounds: str) -> None:
    """Push, promote, roll back, remove and collect, until somebody ends it; a byte in ``rounds`` for each round."""
    chance = random.Random(seed)
    with Registry.open(url, create=True, actor=f"worker-{seed}") as registry:
        while True:
            version = registry.push(Path(chance.choice(directories)), chance.choice(["clinic", "ward"]))
            registry.promote(version.reference, chance.choice(["production", "candidate"]))
            old = [found.reference for found in registry.versions() if found.id != version.id]
            if old and chance.random() < 0.5:
                with suppress(NeededError):
                    registry.gc(dry_run=False, older_than=NOW, versions=[chance.choice(old)])
            else:
                registry.gc(dry_run=False, older_than=NOW)
            with registry.catalog.transaction() as held:
                held.audit("access", why="a round")
            with suppress(UserError):
                registry.rollback("clinic")
            with Path(rounds).open("ab") as out:
                out.write(b".")
