"""Metrics: of adapters, bounded in number, nothing of other libraries."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from lorchestra.serve.engine import Served, Target
from lorchestra.serve.metrics import MIXTURE, OTHER, Metrics


def adapter(name: str) -> Served:
    return Served(name, "sha256:" + "0" * 64, Path("/nowhere"))


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.page().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_who_answers_is_a_label():
    metrics = Metrics("base")
    assert metrics.name(Target("x")) == "base"
    assert metrics.name(Target("x", ((adapter("a"), 1.0),))) == "a"
    assert metrics.name(Target("x", ((adapter("a"), 0.5),))) == MIXTURE
    assert metrics.name(Target("x", ((adapter("a"), 1.0), (adapter("b"), 1.0)))) == MIXTURE


def test_a_thousand_adapters_have_no_thousand_series():
    metrics = Metrics("base", most=3)
    for i in range(1000):
        metrics.requests.labels(metrics.name(Target("", ((adapter(f"a{i}"), 1.0),))), "200").inc()
        metrics.loaded(adapter(f"a{i}"), 0.01)
    found = read(metrics)
    labels = {dict(labels)["adapter"] for name, labels in found if name == "lorchestra_requests_total"}
    assert labels == {"a0", "a1", "a2", OTHER}
    assert found["lorchestra_requests_total", (("adapter", OTHER), ("status", "200"))] == 997
    assert found["lorchestra_adapter_loads_total", (("adapter", OTHER),)] == 997


def test_an_engine_reports_waits_loads_and_evictions_and_residency_is_asked_for():
    keys = ["a@1234", "a@5678", "b@1234"]
    metrics = Metrics("base", resident=lambda: keys)
    metrics.loaded(adapter("a"), 0.02)
    metrics.evicted(adapter("a"))
    metrics.waited([], 0.3)
    found = read(metrics)
    assert found["lorchestra_adapters_resident", ()] == 3
    assert found["lorchestra_adapter_resident", (("adapter", "a"),)] == 2
    assert found["lorchestra_adapter_evictions_total", (("adapter", "a"),)] == 1
    assert found["lorchestra_adapter_load_seconds_count", ()] == 1
    assert found["lorchestra_queue_seconds_sum", (("adapter", "base"),)] == 0.3
    keys.clear()
    assert read(metrics)["lorchestra_adapters_resident", ()] == 0


def test_whether_requests_are_taken_is_asked_for():
    metrics, ready = Metrics("base"), [True]
    metrics.watch(lambda: ready[0])
    assert read(metrics)["lorchestra_ready", ()] == 1
    ready[0] = False
    assert read(metrics)["lorchestra_ready", ()] == 0


def test_two_servers_in_one_process_do_not_share_counts_and_nothing_else_is_there():
    one, two = Metrics("base"), Metrics("base")
    one.in_flight.inc()
    assert read(two)["lorchestra_requests_in_flight", ()] == 0
    assert {name.split("_")[0] for name, _ in read(one)} == {"lorchestra"}
