"""What Prometheus is told. A registry of its own, so that nothing of another library in this process is among it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorchestra.serve.engine import Served, Target

MIXTURE, OTHER = "(mixture)", "(other)"  # no adapter may be called so
UNKNOWN = "(unknown)"  # of requests that were refused before it was known who should answer
PARTS = ("database", "store")  # of a registry
_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_LOADS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """Counts and times, by adapter.

    Args:
        base: what the base is called.
        most: so many adapters have series of their own, those that were asked for first; the others share ``(other)``.
            Mixtures share ``(mixture)``, whatever is in them.
        resident: keys of the adapters in memory, now.
    """

    def __init__(self, base: str, most: int = 256, resident: Callable[[], Sequence[str]] = tuple) -> None:
        self.registry = CollectorRegistry()
        self._base, self._most = base, most
        self._known: set[str] = set()
        self._lock = threading.Lock()
        by, one = ("adapter",), self.registry
        self.requests = Counter(
            "lorchestra_requests", "Requests that ended, by HTTP status.", ("adapter", "status"), registry=one
        )
        self.rejected = Counter(
            "lorchestra_rejected",
            "Requests refused: key, unknown, request, limit, stopping.",
            ("reason",),
            registry=one,
        )
        self.in_flight = Gauge("lorchestra_requests_in_flight", "Requests being answered or waiting.", registry=one)
        self.prompt_tokens = Counter("lorchestra_prompt_tokens", "Tokens of prompts.", by, registry=one)
        self.generated_tokens = Counter("lorchestra_generated_tokens", "Generated tokens.", by, registry=one)
        self.queue = Histogram(
            "lorchestra_queue_seconds", "Waiting before a prompt is taken up.", by, buckets=_WAITS, registry=one
        )
        self.first_token = Histogram(
            "lorchestra_first_token_seconds", "From a request to its first token.", by, buckets=_WAITS, registry=one
        )
        self.inter_token = Histogram(
            "lorchestra_inter_token_seconds", "From a token to the next.", by, buckets=_STEPS, registry=one
        )
        self.duration = Histogram(
            "lorchestra_request_seconds", "From a request to the end of its answer.", by, buckets=_WAITS, registry=one
        )
        self.loads = Counter("lorchestra_adapter_loads", "Adapters read into memory.", by, registry=one)
        self.load_seconds = Histogram(
            "lorchestra_adapter_load_seconds", "Reading an adapter into memory.", buckets=_LOADS, registry=one
        )
        self.evictions = Counter("lorchestra_adapter_evictions", "Adapters put out of memory.", by, registry=one)
        self.choices = Counter(
            "lorchestra_gate_choices",
            "Answers that a gate, or auto, gave an adapter a part in, or the base where none has one.",
            ("gate", "adapter"),
            registry=one,
        )
        self.registry.register(_Residency(resident, self.label))

    def watch(self, ready: Callable[[], bool]) -> None:
        """What to ask at each scrape: whether requests are taken."""
        gauge = Gauge("lorchestra_ready", "1 while requests are taken, as /ready says it.", registry=self.registry)
        gauge.set_function(lambda: float(ready()))

    def chosen(self, target: Target) -> None:
        """A gate, or ``auto``, has chosen who answers."""
        assert target.choice is not None  # it has
        for label in [self.label(adapter.name) for adapter, _ in target.members] or [self._base]:
            self.choices.labels(target.choice.gate, label).inc()

    def name(self, target: Target) -> str:
        """The label of who answers."""
        if not target.members:
            return self._base
        return MIXTURE if target.single is None else self.label(target.members[0][0].name)

    def label(self, adapter: str) -> str:
        """``adapter``, or ``(other)`` when there are too many."""
        with self._lock:
            if adapter not in self._known:
                if len(self._known) >= self._most:
                    return OTHER
                self._known.add(adapter)
            return adapter

    # What an engine reports (serve/engine.py: Observer).

    def waited(self, members: Sequence[tuple[Served, float]], seconds: float) -> None:
        """A request's prompt was taken up after so long."""
        self.queue.labels(self.name(Target("", tuple(members)))).observe(seconds)

    def loaded(self, adapter: Served, seconds: float) -> None:
        """An adapter was read into memory."""
        self.loads.labels(self.label(adapter.name)).inc()
        self.load_seconds.observe(seconds)

    def evicted(self, adapter: Served) -> None:
        """An adapter was put out of memory."""
        self.evictions.labels(self.label(adapter.name)).inc()

    def page(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class RegistryMetrics:
    """What is told of the registry that a server follows.

    Args:
        metrics: whose page it is on.
    """

    def __init__(self, metrics: Metrics) -> None:
        one = self._registry = metrics.registry
        self.failures = Counter(
            "lorchestra_registry_failures",
            "Times that a version turned out not to be servable here.",
            ("kind",),
            registry=one,
        )
        self.switches = Counter(
            "lorchestra_registry_switches", "Times that a name or alias changed its version here.", registry=one
        )
        self.arms = Counter(
            "lorchestra_canary_requests",
            "Requests that a canary counted, by arm and outcome.",
            ("adapter", "arm", "outcome"),
            registry=one,
        )
        # Without labels: a series that is there from the start, so that the first time is an increase too.
        self.rolled_back = Counter(
            "lorchestra_canary_rollbacks", "Canaries that this server took back by itself.", registry=one
        )
        self.lost = Counter(
            "lorchestra_registry_lost_rows",
            "Answers that nobody can give feedback on, since the registry was away for too long.",
            registry=one,
        )

    def watch(
        self,
        stale: Callable[[], float],
        generation: Callable[[], float],
        failing: Callable[[], Collection[str]],
        unservable: Callable[[], Mapping[str, int]],
    ) -> None:
        """What to ask at each scrape.

        Args:
            stale: seconds since the registry was seen.
            generation: of its catalog.
            failing: which of :data:`PARTS` cannot be used.
            unservable: kind of failure → versions that cannot be served; every kind is there.
        """
        for name, said, ask in (
            ("lorchestra_registry_stale_seconds", "Seconds since the registry was last seen whole.", stale),
            ("lorchestra_registry_generation", "Of the catalog, as it was read last.", generation),
        ):
            Gauge(name, said, registry=self._registry).set_function(ask)
        failures = Gauge(
            "lorchestra_registry_failing", "1 while this part of it cannot be used.", ("kind",), registry=self._registry
        )
        for part in PARTS:
            failures.labels(part).set_function(partial(_among, part, failing))
        versions = Gauge(
            "lorchestra_registry_unservable",
            "Versions that cannot be served now.",
            ("kind",),
            registry=self._registry,
        )
        for kind in unservable():
            versions.labels(kind).set_function(partial(_of, kind, unservable))


def _among(part: str, failing: Callable[[], Collection[str]]) -> float:
    return float(part in failing())


def _of(kind: str, counts: Callable[[], Mapping[str, int]]) -> float:
    return float(counts()[kind])


class _Residency(Collector):
    """Which adapters are in memory, asked at each scrape."""

    def __init__(self, resident: Callable[[], Sequence[str]], label: Callable[[str], str]) -> None:
        self._resident, self._label = resident, label

    def collect(self) -> Iterator[Metric]:
        keys = self._resident()
        counts: dict[str, int] = {}
        for key in keys:
            name = self._label(key.partition("@")[0])
            counts[name] = counts.get(name, 0) + 1
        by_name = GaugeMetricFamily("lorchestra_adapter_resident", "Versions of it in memory.", labels=("adapter",))
        for name, count in sorted(counts.items()):
            by_name.add_metric((name,), count)
        yield by_name
        yield GaugeMetricFamily("lorchestra_adapters_resident", "Adapters in memory.", value=len(keys))
