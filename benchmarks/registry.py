"""A registry of 10,000 versions: how long a list, a resolution and a change take, over SQLite and PostgreSQL.

A hundred names of a hundred versions, each with the manifest of an adapter for 224 modules (a model of 32 layers),
metrics, tags and a parent; every name has an alias ``production``. The catalog is the real one, filled through the code
that a push uses; there are no blobs, which no question here asks for. Times are medians of many calls, a warm-up aside;
the goal is 50 ms for a list and for a resolution. What a command takes, as a person types it, is told apart: most of it
is Python's own start. Prints one table and writes ``benchmarks/results/registry.json``::

    python benchmarks/registry.py                                 # SQLite
    python benchmarks/registry.py --postgresql URL                # and PostgreSQL: postgresql://user@host/empty-db
    python benchmarks/registry.py --short                         # 300 versions, writes nothing: for CI
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "registry.json"
GOAL = 50.0  # milliseconds
LAYERS, MODULES = 32, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COMMANDS = {
    "command: list": [],
    "command: list a filtered page": ["--tag", "sft", "--metric", "loss<=0.5", "--limit", "50"],
    "command: list everything": ["--limit", "0"],
    "command: list everything, JSON": ["--json"],
}
BATCH = 500  # versions entered in one transaction


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--postgresql", metavar="URL", help="of an empty database, to be measured too")
    options.add_argument("--names", type=int, default=100)
    options.add_argument("--each", type=int, default=100, help="versions of a name")
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--short", action="store_true", help="10 names of 30 versions; writes nothing")
    asked = options.parse_args()
    if asked.short:
        asked.names, asked.each, asked.rounds = 10, 30, 5
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        urls = {"SQLite": f"{scratch}/registry"}
        if asked.postgresql:
            joined = "&" if "?" in asked.postgresql else "?"
            urls["PostgreSQL"] = f"{asked.postgresql}{joined}blobs={scratch}/blobs"
        for kind, url in urls.items():
            found[kind] = _measured(url, asked.names, asked.each, asked.rounds)
    told = {
        "versions": asked.names * asked.each,
        "names": asked.names,
        "rounds": asked.rounds,
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "milliseconds": {kind: {what: _spread(times) for what, times in rows.items()} for kind, rows in found.items()},
    }
    print(_table(told))
    if not asked.short:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _measured(url: str, names: int, each: int, rounds: int) -> dict[str, list[float]]:
    """Question → seconds of every call."""
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.snapshot import Snapshot

    with Registry.open(url, create=True, actor="benchmark") as registry:
        for batch in _batches(names, each):
            _enter(registry, batch)
        middle, last = f"adapter_{names // 2}", f"adapter_{names - 1}"
        digest = registry.resolve(f"{middle}@v{each // 2}").manifest.digest
        turns = iter(range(10**9))

        def reopened() -> None:
            Registry.open(url).close()

        def moved() -> None:
            registry.promote(f"{middle}@v{1 + next(turns) % 2}", "candidate")

        questions: dict[str, Callable[[], Any]] = {
            "resolve a name (its alias)": lambda: registry.resolve(middle),
            "resolve @v…": lambda: registry.resolve(f"{last}@v{each // 2}"),
            "resolve @sha256:…": lambda: registry.resolve(f"{middle}@{digest[:19]}"),
            "list everything": registry.summaries,
            "list a page of 50": lambda: registry.summaries(limit=50),
            "list a name": lambda: registry.summaries(middle),
            "list a filtered page": lambda: registry.summaries(tag="sft", metric="loss<=0.5", base="base-3", limit=50),
            "list by tag": lambda: registry.summaries(tag="sft", limit=50),
            "list by metric<=": lambda: registry.summaries(metric="loss<=0.01", limit=50),
            "list by base": lambda: registry.summaries(base="base-3", limit=50),
            "list by alias": lambda: registry.summaries(alias="production"),
            "metrics of everything": lambda: registry.measured([line.id for line in registry.summaries()], "loss"),
            "how many there are": registry.count,
            "20 versions with manifests": lambda: registry.versions(limit=20),
            "all aliases": registry.aliases,
            "names": registry.names,
            "history, 50 lines": lambda: registry.history(limit=50),
            "generation": registry.generation,
            "move an alias": moved,
            "open": reopened,
            "read what a server keeps in memory": lambda: Snapshot.read(registry.catalog),
            **_on_the_request_path(registry, middle, last, digest),
        }
        found = {what: _timed(ask, rounds) for what, ask in questions.items()}
    typed = [sys.executable, "-m", "lorchestra", "registry", "list", "--registry", url]
    for what, words in COMMANDS.items():
        found[what] = _timed(lambda words=words: _run([*typed, *words]), max(rounds // 10, 1))
    found["command: --help"] = _timed(lambda: _run([*typed[:-2], "--help"]), max(rounds // 10, 1))
    return found


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _on_the_request_path(registry: Any, middle: str, last: str, digest: str) -> dict[str, Callable[[], Any]]:
    """What a server does with a request's ``model``, all versions being there: the goal is 0.2 ms."""
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.registry.access import OPEN
    from lorchestra.registry.snapshot import Snapshot
    from lorchestra.serve.engine import Served
    from lorchestra.serve.routing import Router
    from lorchestra.serve.versions import Pointer, Versions, View

    snapshot = Snapshot.read(registry.catalog)
    versions = Versions(registry, BaseId(), Path())
    versions.view = View(snapshot, {Pointer(name, alias): line.id for name, alias, line in snapshot.pointers()})
    versions.here = {
        line.id: Served(line.name, line.digest, Path(), reference=line.reference, version=line.id)
        for line in snapshot.by_id.values()
    }
    router = Router("base", versions=versions)
    asked = {
        "a name": middle,
        "@v…": f"{last}@v2",
        "@sha256:…": f"{middle}@{digest}",
        "a mixture": f"{middle}=0.5+{last}=0.5",
    }
    return {
        f"request path: {what}": lambda model=model: router.resolve(OPEN, model, "u") for what, model in asked.items()
    }


def _timed(ask: Callable[[], Any], rounds: int) -> list[float]:
    ask()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        ask()
        times.append(time.perf_counter() - began)
    return times


def _batches(names: int, each: int) -> Iterator[list[Any]]:
    """Manifests, in the order in which they would have been pushed."""
    from lorchestra.registry.manifest import BaseEntry, FileEntry, Manifest, Metric, ParentEntry

    paths = [f"model.layers.{layer}.{module}" for layer in range(LAYERS) for module in MODULES]
    common = Manifest(
        name="adapter_0",
        number=1,
        digest=_digest(0),
        files={"adapter_config.json": FileEntry(sha256=_digest(1), size=900)},
        base=BaseEntry(name="base", weights=_digest(2)),
        ranks=dict.fromkeys(paths, 16),
        scales=dict.fromkeys(paths, 1.0),
        parameters=40_000_000,
        made_by="stage",
        stage="sft",
        task="sft",
        recipe={},
        settings={"train": {"lr": 1e-4, "epochs": 3}},
        data={"notes": _digest(3)},
        parents=[],
        context=[],
        metrics={},
        tools={"lorchestra": "0.1.0", "torch": "2.8.0"},
        created="",
        created_by="benchmark",
    )
    batch = []
    for number in range(each):
        for name in range(names):
            k = number * names + name
            files = {
                path: FileEntry(sha256=_digest(f"{k} {path}"), size=size)
                for path, size in [("adapter_config.json", 9_000), ("adapter_model.safetensors", 160_000_000)]
            }
            changes = {
                "name": f"adapter_{name}",
                "number": number + 1,
                "digest": _digest(k),
                "files": files,
                "base": BaseEntry(name=f"base-{name % 7}", weights=_digest(f"base {name % 7}")),
                "parents": [ParentEntry(name="p", digest=_digest(k - names), coefficient=0.5)] if number else [],
                "metrics": {"loss": Metric(value=k % 997 / 997), "accuracy": Metric(value=0.5, better="higher")},
                "tags": ["sft"] if k % 10 else ["dpo_tuned", "sft"],
                "created": f"2026-01-01T{k // 3600 % 24:02}:{k // 60 % 60:02}:{k % 60:02}.000+00:00",
            }
            batch.append(common.model_copy(update=changes))
            if len(batch) == BATCH:
                yield batch
                batch = []
    yield batch


def _enter(registry: Any, manifests: list[Any]) -> None:
    from lorchestra.registry.changing import enter, move

    with registry.catalog.transaction() as held:
        for manifest in manifests:
            version = enter(held, manifest, action="push", why="")
            if manifest.number == 1:
                move(held, version, "production", action="alias", why="")


def _digest(of: object) -> str:
    import hashlib

    return "sha256:" + hashlib.sha256(str(of).encode()).hexdigest()


def _spread(times: list[float]) -> dict[str, float]:
    """Milliseconds: on a machine that is busy with other things, the best of them says what the work itself takes."""
    ordered = sorted(1000 * seconds for seconds in times)
    found = {"best": ordered[0], "median": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))]}
    return {what: round(value, 3) for what, value in found.items()}


def _table(told: dict[str, Any]) -> str:
    kinds = list(told["milliseconds"])
    lines = [
        f"{told['versions']:,} versions of {told['names']} names; milliseconds, median (best, 95th percentile); "
        f"the goal is {GOAL:g}",
        "",
        f"| | {' | '.join(kinds)} |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for what in told["milliseconds"][kinds[0]]:
        cells = [told["milliseconds"][kind][what] for kind in kinds]
        shown = [f"{cell['median']:.2f} ({cell['best']:.2f}, {cell['p95']:.2f})" for cell in cells]
        lines.append(f"| {what} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
