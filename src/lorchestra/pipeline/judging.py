"""The verdict of a run: every model scored on the sealed test, once, and entered in the ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.load import Base, load_base, positions
from lorchestra.data.example import Example
from lorchestra.evaluate.answer import Sampling, answers
from lorchestra.evaluate.ledger import Ledger, item_digest, sealed_digest
from lorchestra.evaluate.reasons import mixture
from lorchestra.evaluate.score import Domain, Scores, score
from lorchestra.evaluate.verdict import DELIVERED, UNREFIT, Verdict, judge
from lorchestra.events import Reporter, Task
from lorchestra.fusion.search import stack_of, weights_key
from lorchestra.pipeline.cache import SCRATCH, Step, StepCache, step_digest, write_json
from lorchestra.pipeline.choosing import Chosen, betas, domains_of, mounted
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared

VERSION = 2  # raise it when the same models would be scored otherwise
QUANTISED = (
    "The adapters were trained, and searched weights found, on the base in {}. They are delivered for the base itself, "
    "and it is the base itself that every model here stands on."
)


@dataclass(frozen=True)
class Judged:
    """The verdict, answers before and after, how often each sealed test was read, and the step.

    ``sealed`` is domain → :func:`sealed_digest`, ``scores`` domain → what the delivered model scored there.
    """

    verdict: Verdict
    samples: list[dict[str, str]]
    ledger: list[dict[str, Any]]
    step: Step
    sealed: Mapping[str, str]
    scores: Mapping[str, Scores]


def rivals(
    stages: Sequence[str],
    members: Sequence[str],
    stack: Mapping[str, float] | None,
    mixed: bool,
    unrefit: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Model → coefficients, for everything that is judged beside the delivered one.

    Args:
        stages: their names, in order.
        members: of the fusion.
        stack: the sum that the last stage was trained in, if it can be made up.
        mixed: there is a baseline trained on everything mixed.
        unrefit: the chosen coefficients, if what is delivered was trained again after they were chosen.
    """
    found: dict[str, dict[str, float]] = {"base": {}}
    if mixed:
        found["mixed"] = {"mixed": 1.0}
    for name in dict.fromkeys([*stages, *members]):
        found[name] = {name: 1.0}
    acting = {name: weight for name, weight in (stack or {}).items() if weight}
    if len(acting) > 1:
        found["stack"] = acting
    if len(members) > 1:
        found["uniform"] = {name: 1 / len(members) for name in members}
    if unrefit is not None:
        found[UNREFIT] = dict(unrefit)
    return found


@dataclass(frozen=True)
class EvaluateInputs:
    """What the verdict depends on: the sealed test, model → coefficients, and the step's digest."""

    domains: dict[str, Domain]
    models: dict[str, dict[str, float]]
    digest: str


def evaluate_inputs(
    prepared: Prepared,
    trained: Mapping[str, Adapter],
    members: Mapping[str, Adapter],
    fused: Adapter,
    dtype: str,
    unrefit: Mapping[str, float] | None = None,
) -> EvaluateInputs | None:
    """Everything that the scores depend on; ``None`` without a sealed test. ``dtype`` is the base's; ``unrefit`` see
    :func:`rivals`."""
    recipe = prepared.recipe
    domains = domains_of(prepared, "test", recipe.evaluate.test_limit, choices=True)
    if not domains:
        return None
    stages = [stage.name for stage in recipe.stages]
    models = rivals(stages, list(members), stack_of(stages[-1], trained), "mixed" in trained, unrefit)
    digest = step_digest(
        "evaluate",
        VERSION,
        {
            "models": models,
            "dtype": dtype,
            "samples": recipe.evaluate.samples,
            "tokens": recipe.evaluate.sample_tokens,
            "merged": recipe.deliver.dtype if recipe.deliver.merged else None,
        },
        {
            "base": prepared.base_digest,
            "adapters": {name: adapter.digest for name, adapter in trained.items()},
            "delivered": fused.digest,
            "domains": {name: domain.digest for name, domain in domains.items()},
        },
    )
    return EvaluateInputs(domains, models, digest)


def evaluate_step(
    prepared: Prepared,
    trained: Mapping[str, Adapter],
    members: Mapping[str, Adapter],
    chosen: Chosen,
    fused: Adapter,
    merged: Step | None,
    base: LazyBase,
    cache: StepCache,
    reporter: Reporter,
    budget: str = "",
    refit: bool = False,
) -> Judged | None:
    """Score base, mixed, every stage, the stack, uniform and what is delivered; ``None`` without a sealed test.

    Args:
        prepared: the data.
        trained: every adapter at hand (stages, brought in, mixed).
        members: those that take part in the fusion.
        chosen: the coefficients.
        fused: the delivered adapter.
        merged: the step of the delivered model, if one was made; it is what the sealed test scores then, in its own
            number format.
        base: the base; released before the delivered model is loaded. A quantised one is for training: everything is
            scored on the base itself, which the adapter is delivered for.
        cache: of steps.
        reporter: progress.
        budget: what the mixed baseline and the stages were trained with, for the note on staging.
        refit: the delivered adapter is of members that were trained again; ``trained`` are those before.
    """
    recipe, trained_on = prepared.recipe, base.dtype.quantised
    base = base.plain()
    inputs = evaluate_inputs(prepared, trained, members, fused, str(base.dtype), chosen.weights if refit else None)
    if inputs is None:
        return None
    domains, models, digest = inputs.domains, inputs.models, inputs.digest
    asked = _questions(prepared, recipe.evaluate.samples)
    items = sealed_items(prepared)

    def make(work: Path) -> dict[str, Any]:
        for name, domain in domains.items():
            Ledger.here().enter(items[name], name, digest, domain.digest)
        return _evaluate(work, prepared, trained, models, domains, asked, fused, merged, base, reporter)

    step = cache.build("evaluate", digest, make, reporter.say)
    scores = read_scores(step.directory / "scores.json")
    tried = len(chosen.search["candidates"]) if chosen.search else 0
    verdict = judge(
        scores,
        stages=[stage.name for stage in recipe.stages if stage.name in domains],
        betas={name: beta for name, beta in betas(recipe).items() if name in domains},
        recipe_of=mixture(chosen.weights),
        same=[] if refit else _same(prepared, models, chosen, merged),
        singles=list(members),
        goal=recipe.fusion.aim(),
        budget=budget,
        candidates=tried,
        validation_items=int(chosen.search["validation_items"]) if chosen.search else 0,
    )
    if trained_on:
        verdict = replace(verdict, notes=(*verdict.notes, QUANTISED.format(trained_on)))
    ledger = [
        {"domain": name, "digest": domain.digest, "reads": Ledger.here().count(items[name], domain.digest)}
        for name, domain in domains.items()
    ]
    samples = json.loads((step.directory / "samples.json").read_text(encoding="utf-8"))
    sealed = {name: sealed_digest(found) for name, found in items.items()}
    return Judged(verdict, samples, ledger, step, sealed, scores[DELIVERED])


def sealed_items(prepared: Prepared) -> dict[str, list[str]]:
    """Domain → :func:`item_digest` of what the verdict reads of it; domains without a sealed test are left out."""
    limit = prepared.recipe.evaluate.test_limit
    tests = {name: data.splits.test[:limit] for name, data in prepared.data.items()}
    return {name: [item_digest(example) for example in test] for name, test in tests.items() if test}


def score_alone(
    prepared: Prepared, adapter: Adapter, base: LazyBase, cache: StepCache, reporter: Reporter
) -> dict[str, Scores]:
    """Domain → what base and ``adapter`` score on the sealed test, beside no rival; the reading is in the ledger."""
    base = base.plain()
    domains = domains_of(prepared, "test", prepared.recipe.evaluate.test_limit, choices=True)
    needs = {
        "base": prepared.base_digest,
        "adapter": adapter.digest,
        "domains": {name: domain.digest for name, domain in domains.items()},
    }
    digest, items = step_digest("alone", VERSION, {"dtype": str(base.dtype)}, needs), sealed_items(prepared)

    def make(work: Path) -> dict[str, Any]:
        for name, domain in domains.items():
            Ledger.here().enter(items[name], name, digest, domain.digest)
        count = sum(len(domain.items) for domain in domains.values())
        with reporter.task("sealed test", count, "item") as task, _delivered(base.load(), adapter) as model:
            write_scores(work / "scores.json", {DELIVERED: _score_all(model, domains, task)})
        base.release()
        return {"items": count}

    step = cache.build("alone", digest, make, reporter.say)
    return read_scores(step.directory / "scores.json")[DELIVERED]


def _same(
    prepared: Prepared, models: Mapping[str, Mapping[str, float]], chosen: Chosen, merged: Step | None
) -> list[str]:
    """Rivals that are the delivered sum itself, where nothing was truncated or rounded on the way."""
    recipe = prepared.recipe
    if recipe.fusion.rank is not None or (merged is not None and merged.info["dtype"] != "float32"):
        return []
    key = weights_key(chosen.weights)
    return [name for name, weights in models.items() if name != "base" and weights_key(weights) == key]


def _evaluate(
    work: Path,
    prepared: Prepared,
    trained: Mapping[str, Adapter],
    models: Mapping[str, Mapping[str, float]],
    domains: Mapping[str, Domain],
    asked: list[tuple[str, Example]],
    fused: Adapter,
    merged: Step | None,
    base: LazyBase,
    reporter: Reporter,
) -> dict[str, Any]:
    kept = work / SCRATCH / "scores.json"
    scores = read_scores(kept) if kept.exists() else {}
    items = sum(len(domain.items) for domain in domains.values())
    with reporter.task("sealed test", items * (len(models) + 1), "item") as task:
        _score_rivals(base.load(), trained, models, domains, scores, kept, task)
        before = _answers(prepared, base.load(), asked, reporter)
        if merged is None:
            with _delivered(base.load(), fused) as model:
                scores[DELIVERED], after = _score_all(model, domains, task), _answers(prepared, model, asked, reporter)
        else:
            base.release()
            model = load_base(merged.directory / "model", device=str(base.device), dtype=merged.info["dtype"])
            scores[DELIVERED], after = _score_all(model, domains, task), _answers(prepared, model, asked, reporter)
    samples = [
        {
            "domain": domain,
            "prompt": "\n".join(turn.content for turn in example.prompt if turn.role != "system"),
            "gold": example.gold,
            "before": first,
            "after": second,
        }
        for (domain, example), first, second in zip(asked, before, after, strict=True)
    ]
    write_scores(work / "scores.json", scores)
    write_json(work / "samples.json", samples)
    return {"models": list(scores), "items": items}


def _score_rivals(
    base: Base,
    trained: Mapping[str, Adapter],
    models: Mapping[str, Mapping[str, float]],
    domains: Mapping[str, Domain],
    scores: dict[str, dict[str, Scores]],
    kept: Path,
    task: Task,
) -> None:
    """Fill ``scores`` with the models that are sums on the base, and keep them in ``kept`` as they come."""
    items = sum(len(domain.items) for domain in domains.values())
    by_key: dict[str, dict[str, Scores]] = {}
    bank = mounted(base, trained)
    try:
        for model, weights in models.items():
            key = weights_key(weights)
            if model in scores or key in by_key:
                scores.setdefault(model, by_key.get(key, {}))
                task.advance(items)
            else:
                with bank.using(dict(weights)):
                    scores[model] = _score_all(base, domains, task)
            write_scores(kept, scores)
            by_key[key] = scores[model]
    finally:
        bank.unmount()


@contextmanager
def _delivered(base: Base, fused: Adapter) -> Iterator[Base]:
    """The base with the fused adapter acting: what is delivered where no merged model is."""
    bank = mounted(base, {"fused": fused})
    try:
        with bank.using({"fused": 1.0}):
            yield base
    finally:
        bank.unmount()


def _score_all(base: Base, domains: Mapping[str, Domain], task: Task) -> dict[str, Scores]:
    return {name: score(base.model, domain, base.pad_id, task.advance) for name, domain in domains.items()}


def _questions(prepared: Prepared, count: int) -> list[tuple[str, Example]]:
    """The first sealed-test questions of each domain in turn."""
    found: list[tuple[str, Example]] = []
    for rank in range(count):
        for name, data in prepared.data.items():
            if rank < len(data.splits.test):
                found.append((name, data.splits.test[rank]))
    return found[:count]


def _answers(prepared: Prepared, base: Base, asked: list[tuple[str, Example]], reporter: Reporter) -> list[str]:
    if not asked:
        return []
    wanted, longest = prepared.recipe.evaluate.sample_tokens, prepared.recipe.max_length
    longest = max(1, min(longest, (positions(base.model.config) or longest + wanted) - wanted))
    prompts = [prepared.renderer.prompt(example.prompt)[-longest:] for _, example in asked]
    sampling = Sampling(max_new_tokens=wanted, repetition_penalty=1.1)
    with reporter.task("sample answers"):
        return answers(base.model, prepared.tokenizer, prompts, sampling, stop=prepared.renderer.end_of_turn)


def write_scores(path: Path, scores: Mapping[str, Mapping[str, Scores]]) -> None:
    """Keep scores for :func:`read_scores`."""
    write_json(path, {model: {name: asdict(found) for name, found in by.items()} for model, by in scores.items()})


def read_scores(path: Path) -> dict[str, dict[str, Scores]]:
    """Model → domain → scores, as a verdict keeps them."""
    value = json.loads(path.read_text(encoding="utf-8"))
    return {model: {name: Scores.from_dict(found) for name, found in by.items()} for model, by in value.items()}
