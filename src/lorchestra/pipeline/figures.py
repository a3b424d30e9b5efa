"""What is known of an adapter once it is judged, as its ``lorchestra.json`` and a registry tell it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage
from lorchestra.evaluate.ledger import sealed_digest
from lorchestra.evaluate.metrics import LOWER_IS_BETTER, finite_or_none
from lorchestra.evaluate.score import Scores
from lorchestra.evaluate.verdict import ALL, DELIVERED
from lorchestra.pipeline.judging import Judged
from lorchestra.pipeline.prepare import Prepared
from lorchestra.stats.intervals import Interval, ratio_interval
from lorchestra.train.context import final_weights

LOSS = "loss"  # nats a token; `nll` among the verdict's rows


def delivered_lineage(prepared: Prepared, fused: Adapter, members: Iterable[Adapter], judged: Judged | None) -> Lineage:
    """Where the fused adapter comes from, with the data of its stages, their contexts and the sealed test's figures.

    The tools are those that its members were made with, so that a run of finished steps tells the same again.
    """
    lineage = fused.lineage
    contexts = {stage.name: final_weights(stage.context) for stage in prepared.recipe.stages if stage.context}
    return replace(
        lineage,
        data=data_digests(prepared),
        settings={**lineage.settings, **({"contexts": contexts} if contexts else {})},
        metrics=run_figures(judged) if judged else {},
        tools=tools_of(members),
    )


def tools_of(members: Iterable[Adapter]) -> dict[str, str]:
    """Name → version of what ``members`` were made with; where they differ, the last one's."""
    return {tool: version for member in members for tool, version in member.lineage.tools.items()}


def data_digests(prepared: Prepared) -> dict[str, str]:
    """Source → digest of its examples, for all stages; of a source that two stages read differently, both."""
    found: dict[str, str] = {}
    for stage in prepared.recipe.stages:
        for loaded in prepared.data[stage.name].loaded:
            same = found.get(loaded.source, loaded.digest) == loaded.digest
            found[loaded.source if same else f"{stage.name}:{loaded.source}"] = loaded.digest
    return found


def run_figures(judged: Judged) -> dict[str, dict[str, Any]]:
    """``clinic.loss``, ``clinic.accuracy`` … of each domain; ``loss_ratio`` and ``loss`` of all together.

    ``loss`` is Σ −log p over Σ tokens of every domain's gold answers. Where there is one domain, its figures stand
    without its name too.
    """
    rows = [row for row in judged.verdict.rows if row.model == DELIVERED]
    digests = list(judged.sealed.values())
    alone = len(digests) == 1
    whole = digests[0] if alone else sealed_digest(digests)
    found = {LOSS: figure("nll", pooled_loss(judged.scores.values()), whole)}
    for row in rows:
        if row.domain == ALL:
            found[row.metric] = figure(row.metric, row.interval, whole)
            continue
        told = figure(row.metric, row.interval, judged.sealed[row.domain])
        found[f"{row.domain}.{called(row.metric)}"] = told
        if alone:
            found[called(row.metric)] = told
    return found


def pooled_loss(scores: Iterable[Scores]) -> Interval:
    """Nats a token of the gold answers, over the items of all ``scores``."""
    every = list(scores)
    return ratio_interval(
        [value for found in every for value in found.nll],
        [count for found in every for count in found.gold_tokens],
        [group for found in every for group in found.groups],
    )


def called(metric: str) -> str:
    """What a registry calls a metric of the verdict."""
    return LOSS if metric == "nll" else metric


def figure(metric: str, interval: Interval, sealed: str) -> dict[str, Any]:
    """A metric of a sealed test, as a registry's ``Metric`` in JSON."""
    return {
        "value": interval.estimate,
        "low": finite_or_none(interval.low),
        "high": finite_or_none(interval.high),
        "n": interval.n,
        "better": "lower" if metric in LOWER_IS_BETTER else "higher",
        "split": "sealed",
        "sealed": sealed,
    }
