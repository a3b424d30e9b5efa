"""Choosing coefficients on λ-validation: the step between training and delivery."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank import Bank
from lorchestra.base.load import Base
from lorchestra.evaluate.reasons import called, reasons
from lorchestra.evaluate.score import Domain, Kind, make_domain
from lorchestra.evaluate.selection import select
from lorchestra.events import Reporter
from lorchestra.fusion.search import context_warnings, heuristic
from lorchestra.pipeline.cache import Step, StepCache, step_digest, write_json
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared
from lorchestra.pipeline.searching import Searched, SearchPlan, search_weights
from lorchestra.recipe.recipe import Recipe

SEARCH_VERSION = 2  # fixed points, then a strategy


@dataclass(frozen=True)
class Chosen:
    """The coefficients, how they were found (the report's ``search``; ``None`` if they were given), and remarks."""

    weights: dict[str, float]
    search: dict[str, Any] | None
    warnings: tuple[str, ...]
    step: Step | None


def domains_of(prepared: Prepared, part: str, limit: int | None, choices: bool) -> dict[str, Domain]:
    """Held-out items of every domain that has some."""
    found = {}
    for name, data in prepared.data.items():
        examples = dict(data.splits.parts())[part]
        if examples:
            kind: Kind = "dpo" if data.task == "dpo" else "sft"
            found[name] = make_domain(name, kind, examples[:limit], prepared.renderer, choices)
    return found


def betas(recipe: Recipe) -> dict[str, float]:
    """β of every preference stage."""
    return {stage.name: stage.beta for stage in recipe.stages if stage.task == "dpo"}


@dataclass(frozen=True)
class SearchInputs:
    """What a search depends on: how it searches, the domains it tries points on, and the step's digest."""

    plan: SearchPlan
    domains: dict[str, Domain]
    digest: str


def choose(
    prepared: Prepared, members: Mapping[str, Adapter], base: LazyBase, cache: StepCache, reporter: Reporter
) -> Chosen:
    """Coefficients as the recipe asks: given, by a heuristic, or searched on λ-validation."""
    recipe = prepared.recipe
    if (given := settled(recipe, members)) is not None:
        return given
    inputs = search_inputs(prepared, members, str(base.dtype))

    def make(work: Path) -> dict[str, Any]:
        found = search_weights(base.load(), members, inputs.domains, betas(recipe), inputs.plan, work, reporter)
        write_json(work / "searched.json", found.as_dict())
        return {"candidates": len(found.candidates), "slopes": found.slopes}

    return concluded(recipe, members, inputs, cache.build("search", inputs.digest, make, reporter.say))


def settled(recipe: Recipe, members: Mapping[str, Adapter]) -> Chosen | None:
    """Coefficients that need no search: given, or by a heuristic."""
    asked = recipe.fusion.weights
    if asked == "search":
        return None
    if isinstance(asked, dict):
        weights = {name: float(asked.get(name, 0.0)) for name in members}
    else:
        weights = heuristic(asked, members)
    return Chosen(weights, None, tuple(context_warnings(members, weights)), None)


def search_inputs(prepared: Prepared, members: Mapping[str, Adapter], dtype: str) -> SearchInputs:
    """Everything that the outcome of a search depends on; ``dtype`` is the base's (``torch.float32``, ``nf4 (…)``)."""
    recipe = prepared.recipe
    # The search works on the stages' own domains: extra domains are for the verdict alone.
    stages = {stage.name for stage in recipe.stages}
    found = domains_of(prepared, "validation", recipe.fusion.validation_limit, choices=False)
    domains = {name: domain for name, domain in found.items() if name in stages}
    fusion = recipe.fusion
    plan = SearchPlan(fusion.strategy, fusion.candidates, fusion.aim(), recipe.seeds.data)
    digest = step_digest(
        "search",
        SEARCH_VERSION,
        {"plan": plan.as_dict(), "betas": betas(recipe), "dtype": dtype},
        {
            "base": prepared.base_digest,
            "members": {name: adapter.digest for name, adapter in members.items()},
            "domains": {name: domain.digest for name, domain in domains.items()},
        },
    )
    return SearchInputs(plan, domains, digest)


def concluded(recipe: Recipe, members: Mapping[str, Adapter], inputs: SearchInputs, step: Step) -> Chosen:
    """The coefficients that are taken of all that a finished search tried; nothing is scored anew for this."""
    found = Searched.from_dict(json.loads((step.directory / "searched.json").read_text(encoding="utf-8")))
    fusion = recipe.fusion
    selection = select(
        found.candidates,
        found.scores,
        found.reference,
        inputs.plan.goal,
        betas(recipe),
        folds=fusion.folds,
        repeats=fusion.repeats,
        seed=recipe.seeds.data,
        rule=fusion.rule,
    )
    delivered = selection.standings[selection.adapters]
    warnings = []
    if selection.chosen != selection.adapters and selection.standings[selection.chosen].candidate.origin == "base":
        warnings.append(
            "On λ-validation the choice falls on the base alone: the adapters are not seen to help there. Delivered "
            f"all the same is {called(delivered.candidate)}, {delivered.value}, to be judged below."
        )
    weights = dict(delivered.candidate.weights)  # measured as they stand: no word on the contexts is needed
    told = {
        "strategy": inputs.plan.strategy,
        "slopes": found.slopes,
        "members": list(members),
        "chosen": weights,
        "candidates": [standing.as_dict() for standing in selection.standings],
        "validation_items": selection.items,
        "selection": {**selection.as_dict(), "reasons": reasons(selection)},
    }
    return Chosen(weights, told, tuple(warnings), step)


def mounted(base: Base, members: Mapping[str, Adapter]) -> Bank:
    """A bank with all ``members``."""
    bank = Bank(base.model, base.id)
    for name, adapter in members.items():
        bank.load(name, adapter)
    return bank
