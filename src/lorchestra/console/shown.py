"""Values of a registry as the page is sent them: plain JSON, with nothing that a list does not show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lorchestra.registry.canary.guards import GUARDS

if TYPE_CHECKING:
    from lorchestra.registry.browsing import Pointed, Shelf
    from lorchestra.registry.canary.guards import Counts, Reading
    from lorchestra.registry.canary.watching import Status
    from lorchestra.registry.lineage import Graph
    from lorchestra.registry.sql.audit import Entry
    from lorchestra.registry.sql.catalog import Version

NODES = 120  # of a lineage


def pointed(one: Pointed) -> dict[str, Any]:
    """An alias."""
    return {**one._asdict(), "reference": f"{one.name}@v{one.number}"}


def shelf(one: Shelf) -> dict[str, Any]:
    """An adapter in a list."""
    return {**one._asdict(), "aliases": [pointed(alias) for alias in one.aliases]}


def version_line(version: Version, aliases: Sequence[str]) -> dict[str, Any]:
    """A version in a list."""
    manifest = version.manifest
    ranks = sorted(set(manifest.ranks.values()))
    return {
        "id": version.id,
        "name": manifest.name,
        "number": manifest.number,
        "reference": manifest.reference,
        "digest": manifest.digest,
        "state": version.state,
        "revoked": asdict(version.revoked) if version.revoked else None,
        "aliases": list(aliases),
        "tags": manifest.tags,
        "note": manifest.note,
        "made_by": manifest.made_by,
        "stage": manifest.stage,
        "task": manifest.task,
        "base": manifest.base.name,
        "ranks": ranks,
        "parameters": manifest.parameters,
        "metrics": {name: metric.model_dump() for name, metric in manifest.metrics.items()},
        "created": manifest.created,
        "created_by": manifest.created_by,
    }


def version_whole(version: Version, aliases: Sequence[str]) -> dict[str, Any]:
    """A version by itself."""
    manifest = version.manifest.model_dump(mode="json")
    ranks, scales = manifest.pop("ranks"), manifest.pop("scales")
    modules = [{"path": path, "rank": rank, "scale": scales.get(path, 1.0)} for path, rank in sorted(ranks.items())]
    bytes_ = sum(entry["size"] for entry in manifest["files"].values())
    whole = {"manifest": manifest, "manifest_digest": version.manifest.manifest_digest}
    return version_line(version, aliases) | whole | {"modules": modules, "bytes": bytes_}


def graph(found: Graph, centre: str) -> dict[str, Any]:
    """A lineage around ``centre``; of a large one the nearest :data:`NODES`, and how many there are in all."""
    near, waiting = {centre: None}, [centre]
    while waiting and len(near) < NODES:
        here = waiting.pop(0)
        around = [edge.parent for edge in found.parents.get(here, ())]
        around += [edge.child for edge in found.children.get(here, ())]
        for digest in around:
            if digest not in near and len(near) < NODES:
                near[digest] = None
                waiting.append(digest)
    told = found.as_dict()
    return {
        "centre": centre,
        "total": len(found.nodes),
        "nodes": [node for node in told["nodes"] if node["digest"] in near],
        "edges": [edge for edge in told["edges"] if edge["child"] in near and edge["parent"] in near],
    }


def entry(one: Entry) -> dict[str, Any]:
    """A line of the audit log."""
    return asdict(one) | {"details": dict(one.details)}


def status(seen: Status) -> dict[str, Any]:
    """A canary, and what is seen of it."""
    rollout = seen.rollout
    return {
        "id": rollout.id,
        "name": rollout.name,
        "alias": rollout.alias,
        "state": rollout.state,
        "stable": rollout.stable.reference,
        "candidate": rollout.candidate.reference,
        "share": rollout.share,
        "step": rollout.step,
        "plan": rollout.plan.to_json(),
        "guards": rollout.guards.to_json(),
        "started": rollout.started,
        "stepped": rollout.stepped,
        "ended": rollout.ended,
        "by": rollout.by,
        "why": rollout.why,
        "arms": {arm: _counts(counts) for arm, counts in seen.arms.items()},
        "readings": [_reading(reading) for reading in seen.readings],
        "action": seen.action,
        "next": seen.next,
        "steps": [
            {"share": step["share"], "from": step["from"], "to": step["to"],
             "arms": {arm: {"requests": counts["requests"], "errors": counts["errors"]}
                      for arm, counts in step["arms"].items()}}
            for step in rollout.evidence["steps"]
        ],
    }  # fmt: skip


def _counts(counts: Counts) -> dict[str, Any]:
    return {
        "requests": counts.requests,
        "errors": counts.errors,
        "error_rate": counts.errors / counts.requests if counts.requests else None,
        "latency": math.exp(counts.latency_sum / counts.latency_n) if counts.latency_n else None,
        "score": counts.score_sum / counts.score_n if counts.score_n else None,
        "scores": counts.score_n,
    }


def _reading(reading: Reading) -> dict[str, Any]:
    return asdict(reading) | {"form": GUARDS[reading.guard].form}
