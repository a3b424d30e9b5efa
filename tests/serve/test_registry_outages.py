"""The registry goes away: what is here goes on for the grace, then nothing; and it comes back by itself."""

from __future__ import annotations

import shutil

import pytest
from tests.registry.conftest import postgres  # noqa: F401  # a fixture
from tests.serve.registry_world import Gateway, until, write

from lorchestra.registry.registry import Registry


@pytest.fixture
def gateways(tmp_path):
    """``gateways(url, …)`` starts one more on a registry; the first time that is made, with two versions of clinic."""
    started = []

    def start(url, **settings) -> Gateway:
        if not started:
            with Registry.open(url, create=True, actor="tester") as registry:
                for seed in (1, 2):
                    registry.push(write(tmp_path / f"a{seed}", seed), "clinic")
                registry.promote("clinic@v1")
        gateway = Gateway(url, tmp_path / f"cache{len(started)}", **settings)
        started.append(gateway)
        assert gateway.by() == "clinic@v1"
        return gateway

    yield start
    for gateway in started:
        gateway.stop()


def goes_on_then_fails_closed(gateway):
    """Within a grace of 5 seconds."""
    until(lambda: gateway.report()["down"])
    assert gateway.by() == "clinic@v1", "what is verified here goes on"
    assert gateway.counted("lorchestra_registry_stale_seconds") > 0
    ready = gateway.get("/ready")
    assert (ready.status_code, "registry_stale_seconds" in ready.json()) == (200, True)
    until(lambda: gateway.get("/ready").status_code == 503)
    assert gateway.by() in ("clinic@v1", "503 unavailable"), "balancers hear of it first"
    until(lambda: gateway.by() == "503 unavailable")
    assert gateway.get("/ready").json()["error"]["code"] == "registry_stale"
    assert gateway.by("base") == "base", "what is not the registry's is served as before"
    assert gateway.get("/health").status_code == 200


def is_back(gateway):
    until(lambda: gateway.by() == "clinic@v1")
    until(lambda: gateway.get("/ready").json() == {"status": "ready"})
    assert gateway.report()["down"] is None


@pytest.mark.slow
def test_a_directory_that_is_removed_and_comes_back(gateways, tmp_path):
    place, away = tmp_path / "registry", tmp_path / "away"
    gateway = gateways(str(place), grace=5)
    place.rename(away)
    goes_on_then_fails_closed(gateway)
    shutil.copytree(away, place)  # restored: other files by the same names
    is_back(gateway)
    with Registry.open(str(place), actor="tester") as registry:
        registry.promote("clinic@v2")
    until(lambda: gateway.by() == "clinic@v2")


@pytest.mark.slow
def test_a_store_that_is_removed_and_comes_back(gateways, tmp_path):
    blobs, away = tmp_path / "registry" / "blobs", tmp_path / "away"
    gateway = gateways(str(tmp_path / "registry"), grace=5)
    blobs.rename(away)
    goes_on_then_fails_closed(gateway)
    away.rename(blobs)
    is_back(gateway)


def test_which_part_of_the_registry_is_away_is_told(gateways, tmp_path):
    gateway = gateways(str(tmp_path / "registry"))
    for part, place in (("store", tmp_path / "registry" / "blobs"), ("database", tmp_path / "registry" / "catalog.db")):
        away = tmp_path / "away"
        place.rename(away)
        until(lambda: gateway.report()["down"], 15)
        assert list(gateway.report()["failing"]) == [part]
        other = {"store": "database", "database": "store"}[part]
        assert gateway.counted("lorchestra_registry_failing", kind=part) == 1
        assert gateway.counted("lorchestra_registry_failing", kind=other) == 0
        away.rename(place)
        until(lambda: not gateway.report()["down"], 15)
        assert gateway.counted("lorchestra_registry_failing", kind=part) == 0


def test_a_version_that_is_not_here_yet_waits_for_the_store(gateways, tmp_path):
    gateway = gateways(str(tmp_path / "registry"))
    blobs, away = tmp_path / "registry" / "blobs", tmp_path / "away"
    blobs.rename(away)
    assert gateway.by("clinic@v2") in ("503 unavailable", "400 adapter_unusable")
    with Registry.open(str(tmp_path / "registry"), actor="tester") as registry:
        registry.promote("clinic@v2")
    until(lambda: gateway.report()["names"]["clinic"]["production"].get("wanted") == "clinic@v2")
    assert gateway.by() == "clinic@v1"
    away.rename(blobs)
    until(lambda: gateway.by() == "clinic@v2")


@pytest.mark.slow
def test_two_gateways_over_one_postgresql_follow_and_survive_its_restart(gateways, tmp_path, postgres):  # noqa: F811
    name = postgres.database()
    url = postgres.url(name, tmp_path / "blobs")
    pair = [gateways(url, grace=5), gateways(url, grace=3600)]
    with Registry.open(url, actor="tester") as registry:
        registry.promote("clinic@v2")
        took = [until(lambda g=gateway: g.by() == "clinic@v2") for gateway in pair]
        registry.rollback("clinic")
        took += [until(lambda g=gateway: g.by() == "clinic@v1") for gateway in pair]
    assert min(took) < 5
    postgres.stop()
    try:
        goes_on_then_fails_closed(pair[0])
        assert pair[1].by() == "clinic@v1", "its grace is longer"
    finally:
        postgres.start()
    for gateway in pair:
        is_back(gateway)
    with Registry.open(url, actor="tester") as registry:
        registry.revoke("clinic@v1", why="leaks")
        for gateway in pair:
            until(lambda g=gateway: g.by() == "404 model_revoked")
