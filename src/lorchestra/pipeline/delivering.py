"""What is delivered: the fused adapter, and the base with it merged in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage
from lorchestra.errors import TrainingError
from lorchestra.evaluate.parity import merged_parity
from lorchestra.events import Reporter
from lorchestra.fusion.methods import compress, linear
from lorchestra.fusion.stream import MergeReport, merge
from lorchestra.pipeline.cache import SCRATCH, Step, StepCache, place, step_digest
from lorchestra.pipeline.choosing import Chosen
from lorchestra.pipeline.prepare import Prepared
from lorchestra.pipeline.prototyping import combine_prototypes

FUSE_VERSION = 2
MERGE_VERSION = 3  # the base's own rounding is told apart
PARITY_PROMPTS = 3


def fuse_digest(prepared: Prepared, members: Mapping[str, Adapter], weights: Mapping[str, float]) -> str:
    """Digest of the fusion step; names count, for they go into the lineage."""
    recipe = prepared.recipe
    digests = {name: adapter.digest for name, adapter in members.items()}
    settings = {"weights": dict(weights), "rank": recipe.fusion.rank, "name": recipe.name}
    return step_digest("fuse", FUSE_VERSION, settings, {"members": digests, "base": asdict(prepared.base)})


def merge_digest(prepared: Prepared, fused: Adapter) -> str:
    """Digest of the merge step."""
    settings = {"dtype": prepared.recipe.deliver.dtype}
    base = prepared.base
    companions = {"tokenizer": base.tokenizer, "template": base.template}
    needs = {"base": prepared.base_digest, "adapter": fused.digest, **companions}
    return step_digest("merge", MERGE_VERSION, settings, needs)


def fuse_step(
    prepared: Prepared,
    members: Mapping[str, Adapter],
    chosen: Chosen,
    cache: StepCache,
    reporter: Reporter,
    stages: Mapping[str, Path] | None = None,
) -> tuple[Adapter, Step]:
    """The fused adapter: the exact sum, recompressed if the recipe gives a rank.

    ``stages``: name → directory of the adapter, of members that were trained here: their prototypes become its own.
    """
    recipe = prepared.recipe
    digest = fuse_digest(prepared, members, chosen.weights)

    def make(work: Path) -> dict[str, Any]:
        fused = linear(members, chosen.weights, name=recipe.name)
        retained = 1.0
        if recipe.fusion.rank is not None:
            fused, retained = compress(fused, rank=recipe.fusion.rank)
        whole = replace(fused, base=prepared.base)
        whole.save(work / "adapter")
        combine_prototypes(whole, stages or {}, work / "adapter")
        return {
            "digest": whole.digest,
            "rank": max(update.rank for update in whole.modules.values()),
            "retained": retained,
            "norms": {name: adapter.norm() for name, adapter in members.items()},
        }

    step = cache.build("fuse", digest, make, reporter.say)
    return Adapter.load(step.directory / "adapter"), step


def merge_step(prepared: Prepared, fused: Adapter, cache: StepCache, reporter: Reporter) -> Step:
    """The merged model, checked against base + adapter (the parity law)."""
    dtype = prepared.recipe.deliver.dtype
    digest = merge_digest(prepared, fused)

    def make(work: Path) -> dict[str, Any]:
        prompts = _prompts(prepared)
        ratio = 0.0

        def check(model: Path, report: MergeReport) -> None:
            nonlocal ratio
            with reporter.task("check the merged model", len(prompts), "prompt") as task:
                # On the CPU: two models in float32 beside the base are more than a small card holds.
                found = merged_parity(prepared.directory, model, {"fused": fused}, {"fused": 1.0}, prompts, "cpu")
                task.advance(len(prompts))
            ratio = found.ratio
            if report.dtype == "float32" and not found.holds:
                raise TrainingError(
                    f"the merged model does not answer as base + adapter do: {found.ratio:.1%} of the adapter's effect "
                    "on the logits differs (5 % is allowed). The merge is not kept"
                )

        # In the scratch directory, where a killed merge finds again what it had finished.
        out = work / SCRATCH / "model"
        shutil.rmtree(out, ignore_errors=True)  # whole, but killed before it was moved
        report = merge(prepared.directory, fused, out, dtype=dtype, check=check, reporter=reporter)
        out.rename(work / "model")
        return {**report.as_dict(), "parity": ratio}

    return cache.build("merge", digest, make, reporter.say)


def place_with_lineage(source: Path, target: Path, lineage: Lineage) -> None:
    """Put a step's adapter or model at ``target``, with the lineage of this run: another recipe may have made it."""
    note = json.loads((source / "lorchestra.json").read_text(encoding="utf-8"))
    place(source, target, {"lorchestra.json": note | {"lineage": asdict(lineage)}})


def _prompts(prepared: Prepared) -> list[tuple[int, ...]]:
    prompts = []
    for data in prepared.data.values():
        for item in data.rendered["train"][:PARITY_PROMPTS]:
            prompts.append((item.prompt + item.branches[0].ids)[-256:])
    return prompts[:PARITY_PROMPTS]
