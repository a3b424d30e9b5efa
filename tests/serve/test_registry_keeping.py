"""What a server keeps on its disk: it starts without the registry for the rest of the grace, and stays in bounds."""

from __future__ import annotations

import os
import time

import pytest
from tests.serve.real_server import make_base
from tests.serve.registry_world import Gateway, until, write

from lorchestra.base.fingerprint import fingerprint
from lorchestra.cli.serve_registry import versions
from lorchestra.errors import UserError
from lorchestra.events import SILENT
from lorchestra.registry.mistakes import NoRegistryError, RegistryError
from lorchestra.registry.registry import Registry
from lorchestra.serve import versions as versions_module
from lorchestra.serve.config import ServeConfig

HOUR = 3600.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def server(tmp_path, base):
    """``server(…)`` starts one as the command line does; ``clinic`` has v1 in production, and v2."""
    identity, started = fingerprint(base), []
    with Registry.open(str(tmp_path / "registry"), create=True, actor="tester") as registry:
        for seed in (1, 2):
            registry.push(write(tmp_path / f"a{seed}", seed, identity), "clinic")
        registry.promote("clinic@v1")

    def start(**settings) -> Gateway:
        told = {"base": str(base), "registry": str(tmp_path / "registry"), "registry_cache": str(tmp_path / "cache")}
        gateway = Gateway(versions=versions(ServeConfig(**(told | settings)), SILENT))
        started.append(gateway)
        return gateway

    start.registry, start.away, start.identity = tmp_path / "registry", tmp_path / "away", identity
    yield start
    for gateway in started:
        gateway.stop()


def stopped(server, *models) -> None:
    """One has run, has answered for these models, and is over; then the registry goes away."""
    gateway = server()
    for model in ("clinic", *models):
        assert gateway.by(model).startswith("clinic@")
    gateway.stop()
    server.registry.rename(server.away)


def snapshot(tmp_path):
    (found,) = (tmp_path / "cache" / "registries").glob("*/snapshot.json")
    return found


def aged(tmp_path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(snapshot(tmp_path), (then, then))


# ---- a start while the registry is away


def test_a_server_starts_without_its_registry_and_follows_it_when_it_is_back(server, tmp_path, caplog):
    stopped(server)
    gateway = server()
    assert [r for r in caplog.records if "Serving without it" in r.getMessage()]
    assert gateway.by() == gateway.by("clinic@v1") == gateway.by("clinic@production") == "clinic@v1"
    assert gateway.by("clinic@v2") == "503 unavailable", "it was never brought here"
    until(lambda: gateway.report()["down"])
    assert gateway.get("/ready").json()["registry_stale_seconds"] >= 0
    server.away.rename(server.registry)
    with Registry.open(str(server.registry), actor="tester") as registry:
        registry.promote("clinic@v2")
    until(lambda: gateway.by() == "clinic@v2")
    until(lambda: gateway.report()["down"] is None)


def test_it_fails_closed_when_the_grace_is_over_that_began_when_the_registry_was_last_seen(server, tmp_path):
    stopped(server)
    aged(tmp_path, HOUR - 4)
    gateway = server()
    assert gateway.by() == "clinic@v1"
    until(lambda: gateway.by() == "503 unavailable", 10)
    assert gateway.by("base") == "base"
    gateway.stop()
    with pytest.raises(NoRegistryError, match=r"not believed for longer than 1h \(--registry-grace\)"):
        server()
    assert server(registry_grace="2h").by() == "clinic@v1", "whoever may say so may say longer"


def test_a_catalog_that_is_damaged_is_a_registry_that_is_away(server, tmp_path):
    stopped(server)
    server.away.rename(server.registry)
    for file in server.registry.glob("catalog.db*"):
        file.unlink()
    (server.registry / "catalog.db").write_bytes(b"no database" * 1000)
    gateway = server()
    assert gateway.by() == "clinic@v1"


def test_a_revocation_that_was_seen_is_not_forgotten(server):
    gateway = server()
    with Registry.open(str(server.registry), actor="tester") as registry:
        registry.revoke("clinic@v1", why="leaks")
        registry.promote("clinic@v2", "staging")
    until(lambda: gateway.by() == "404 model_revoked")
    until(lambda: gateway.by("clinic@staging") == "clinic@v2")
    gateway.stop()
    server.registry.rename(server.away)
    again = server()
    assert again.by() == again.by("clinic@v1") == "404 model_revoked"
    assert again.by("clinic@v2") == "clinic@v2"


def test_a_copy_that_was_changed_meanwhile_is_not_served(server, tmp_path):
    stopped(server)
    (weights,) = (tmp_path / "cache").glob("*/adapter_model.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert server().by() in ("503 unavailable", "400 adapter_unusable")


@pytest.mark.parametrize("damage", ["nothing", "garbage", "other format", "future", "no versions", "other base"])
def test_without_what_it_needs_it_does_not_start_and_says_what_is_missing(server, tmp_path, damage):
    stopped(server)
    kept, settings = snapshot(tmp_path), {}
    if damage == "nothing":
        kept.unlink()
    elif damage == "garbage":
        kept.write_text("[]")
    elif damage == "other format":
        kept.write_text(kept.read_text().replace('"format": 1', '"format": 2'))
    elif damage == "future":
        aged(tmp_path, -HOUR)
    elif damage == "no versions":
        for file in kept.parent.glob("[0-9]*.json"):
            file.unlink()
    else:
        other = make_base(tmp_path / "other")
        (other / "config.json").touch()
        (other / "chat_template.jinja").write_text("{{ 'another' }}")
        settings = {"base": str(other)}
    with pytest.raises((RegistryError, UserError), match="there is no registry at"):
        server(**settings)


# ---- the bound of the cache


def test_the_copies_stay_within_their_bound_and_what_is_served_stays(server, tmp_path, monkeypatch):
    monkeypatch.setattr(versions_module, "RECENT", 0.0)
    with Registry.open(str(server.registry), actor="tester") as registry:
        for seed in range(3, 9):
            registry.push(write(tmp_path / f"a{seed}", seed, server.identity), "clinic")
        size = sum(entry.size for entry in registry.resolve("clinic@v1").manifest.files.values())
    gateway = server()
    gateway.versions.copies.most = 3 * size + size // 2
    assert gateway.by() == "clinic@v1"
    (served,) = (path.name for path in (tmp_path / "cache").iterdir() if path.is_dir() and len(path.name) == 64)

    def copies():
        return {path.name for path in (tmp_path / "cache").iterdir() if len(path.name) == 64}

    for number in (*range(2, 9), *range(2, 9)):
        assert gateway.by(f"clinic@v{number}") == f"clinic@v{number}", "one that has gone is brought again"
        assert served in copies()
    until(lambda: len(copies()) <= 3)
    assert served in copies()
    assert gateway.by() == "clinic@v1"
    with Registry.open(str(server.registry), actor="tester") as registry:
        registry.promote("clinic@v8")
    until(lambda: gateway.by() == "clinic@v8")
    assert len(list((tmp_path / "cache" / "registries").glob("*/[0-9]*.json"))) <= 8
