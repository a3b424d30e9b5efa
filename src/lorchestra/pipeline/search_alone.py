"""A search on its own, as ``lorchestra search`` asks for it: λ-validation, the choice, the sealed test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.digest import json_digest
from lorchestra.adapter.lineage import BaseId, Parent
from lorchestra.bank import Bank
from lorchestra.base.fingerprint import config_digest
from lorchestra.data.example import Example
from lorchestra.data.load import DataSpec, Loaded, digests, load_examples
from lorchestra.data.render import Renderer
from lorchestra.data.split import SplitSpec, split
from lorchestra.errors import UserError
from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.ledger import Ledger, item_digest
from lorchestra.evaluate.reasons import mixture
from lorchestra.evaluate.score import Domain, Kind, Scores, make_domain, score
from lorchestra.evaluate.selection import Rule, Selection, select
from lorchestra.evaluate.verdict import DELIVERED, Verdict, judge
from lorchestra.events import Reporter
from lorchestra.fusion.methods import compress, linear
from lorchestra.fusion.search import stack_of, weights_key
from lorchestra.pipeline.cache import StepCache, step_digest, write_json
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.searching import Searched, SearchPlan, parts_of, search_weights, space_of

VERSION = 1
FEWEST = 2  # groups of a domain that λ-validation needs at least
FEW = 20  # below which a remark is due
Task = str  # auto, sft or dpo
_TAKEN = ("base", "stack", "uniform")  # what models are called beside the adapters


@dataclass(frozen=True)
class SearchData:
    """Every domain's examples, split by group.

    Args:
        validation: name → λ-validation.
        test: name → sealed test; empty without one.
        items: name → what the sealed items are known by in the ledger.
        duplicates: examples that were left out as repeated.
        truncated: that were cut to the maximum length.
        digests: name → what adapters trained on the same source, or its first examples, have in their lineage.
    """

    validation: dict[str, Domain]
    test: dict[str, Domain]
    items: dict[str, list[str]]
    duplicates: int
    truncated: int
    digests: dict[str, set[str]]

    def remarks(self, members: Mapping[str, Adapter]) -> list[str]:
        """What the data lacks: adapters that were trained on it, small parts, cut examples."""
        out = []
        for name, known in self.digests.items():
            for member, adapter in members.items():
                if known & set(adapter.lineage.data.values()):
                    out.append(
                        f"{member} was trained on the source of {name}: unless those examples were held back, its "
                        "weight is chosen on what it has seen; give held-out examples"
                    )
        for part, domains in (("λ-validation", self.validation), ("the sealed test", self.test)):
            for name, domain in domains.items():
                groups = len(set(domain.groups))
                if groups < FEW:
                    out.append(f"{part} of {name} has {groups} groups: differences of a few per cent cannot be seen")
        if self.truncated:
            out.append(f"{self.truncated} examples of λ-validation are cut to the maximum length")
        return out


@dataclass(frozen=True)
class Verified:
    """The verdict on the sealed test, and how often each domain's test has been read by now."""

    verdict: Verdict
    ledger: list[dict[str, Any]]


def search_data(
    sources: Mapping[str, Sequence[DataSpec]],
    renderer: Renderer,
    *,
    test_share: float,
    seed: int,
    task: Task = "auto",
    limit: int | None = None,
    relative_to: Path,
    reporter: Reporter,
) -> SearchData:
    """Read and split. A group is in one part, in all domains.

    Args:
        sources: domain → what it is read from.
        renderer: of the base.
        test_share: share of the groups that is sealed.
        seed: of the split.
        task: ``auto`` is ``dpo`` for preference pairs, else ``sft``.
        limit: λ-validation items a domain; the test is not limited.
        relative_to: of paths.
        reporter: says how each source was read.

    Raises:
        DataError, SourceError: what cannot be found or read.
        UserError: a domain that mixes pairs with other examples, or has too few groups in a part.
    """
    validation, test, items = {}, {}, {}
    known: dict[str, set[str]] = {}
    duplicates = truncated = 0
    for name, specs in sources.items():
        read: list[Loaded] = [
            load_examples(spec, "dpo" if task == "dpo" else "sft", relative_to=relative_to, reporter=reporter)
            for spec in specs
        ]
        examples = [example for loaded in read for example in loaded.examples]
        kind = kind_of(name, examples, task)
        parts = split(examples, SplitSpec(0.0, 1.0 - test_share, test_share, seed))
        _enough(name, parts.validation, parts.test, test_share)
        validation[name] = make_domain(name, kind, parts.validation[:limit], renderer, choices=False)
        if parts.test:
            test[name] = make_domain(name, kind, parts.test, renderer)
            items[name] = [item_digest(example) for example in parts.test]
        duplicates += parts.duplicates
        truncated += sum(item.truncated > 0 for item in validation[name].items)
        known[name] = {digest for loaded in read for digest in digests(loaded.examples)}
    return SearchData(validation, test, items, duplicates, truncated, known)


def kind_of(name: str, examples: Sequence[Example], task: Task) -> Kind:
    """What a domain's examples are scored as: as asked, or as they look.

    Raises:
        UserError: preference pairs and other examples in one domain.
    """
    if task != "auto":
        return "dpo" if task == "dpo" else "sft"
    pairs = sum(example.rejected is not None for example in examples)
    if 0 < pairs < len(examples):
        raise UserError(f"--data {name} mixes preference pairs with other examples; give them as two domains")
    return "dpo" if pairs else "sft"


def _enough(name: str, validation: Sequence[Example], test: Sequence[Example], share: float) -> None:
    groups = len({example.group for example in validation})
    if groups < FEWEST:
        raise UserError(
            f"--data {name} leaves {groups} group{'' if groups == 1 else 's'} of examples for λ-validation; "
            f"{FEWEST} at least are needed" + ("; lower --test_share, or give more data" if share else "")
        )
    if share and not test:
        raise UserError(
            f"--data {name} is too small for a sealed test of {share:g}; raise --test-share, or leave it out"
        )


def search_step(
    base: LazyBase,
    identity: BaseId,
    members: Mapping[str, Adapter],
    domains: Mapping[str, Domain],
    betas: Mapping[str, float],
    plan: SearchPlan,
    cache: StepCache,
    reporter: Reporter,
) -> Searched:
    """:func:`search_weights` as a step: killed, it goes on where it was; repeated, it is answered from the cache."""
    digest = step_digest(
        "search",
        VERSION,
        {"alone": True, "plan": plan.as_dict(), "betas": dict(betas), "dtype": str(base.dtype)},
        {
            "base": json_digest([identity.weights, config_digest(base.directory)]),
            "members": {name: adapter.digest for name, adapter in members.items()},
            "domains": {name: domain.digest for name, domain in domains.items()},
        },
    )

    def make(work: Path) -> dict[str, Any]:
        found = search_weights(base.load(), members, domains, betas, plan, work, reporter)
        write_json(work / "searched.json", found.as_dict())
        return {"candidates": len(found.candidates), "slopes": found.slopes}

    step = cache.build("search", digest, make, reporter.say)
    return Searched.from_dict(json.loads((step.directory / "searched.json").read_text(encoding="utf-8")))


def choose_from(
    searched: Searched, plan: SearchPlan, betas: Mapping[str, float], rule: Rule, folds: int, repeats: int
) -> Selection:
    """See :func:`lorchestra.evaluate.selection.select`."""
    return select(
        searched.candidates, searched.scores, searched.reference, plan.goal, betas,
        folds=folds, repeats=repeats, seed=plan.seed, rule=rule,
    )  # fmt: skip


def fused_by(
    members: Mapping[str, Adapter], plan: SearchPlan, weights: Mapping[str, float], name: str, rank: int | None
) -> tuple[Adapter, float]:
    """The sum that a candidate's weights stand for, recompressed if a rank is given, and the energy that was kept.

    With layer groups the parents are the whole members (at their mean λ), and each group's λ is in the settings.
    """
    fused = linear(parts_of(members, plan), weights, name=name)
    space = space_of(members, plan)
    if space.divided:
        by_group = {member: {p: float(weights[p]) for p in space.parts_of(member)} for member in members}
        parents = tuple(
            Parent(member, members[member].digest, sum(found.values()) / len(found))
            for member, found in by_group.items()
            if any(found.values())
        )
        settings = {**fused.lineage.settings, "layer_groups": by_group}
        fused = replace(fused, lineage=replace(fused.lineage, parents=parents, settings=settings))
    return (fused, 1.0) if rank is None else compress(fused, rank=rank)


def verify(
    base: LazyBase,
    members: Mapping[str, Adapter],
    data: SearchData,
    betas: Mapping[str, float],
    fused: Adapter,
    weights: Mapping[str, float],
    tried: int,
    rank: int | None,
    goal: Goal,
    reporter: Reporter,
) -> Verified | None:
    """Score base, singles, stack, uniform and what is delivered on the sealed test; ``None`` without one.

    Args:
        base: the base.
        members: name → adapter.
        data: with the sealed test.
        betas: β of the preference domains.
        fused: as it is delivered.
        weights: of the chosen candidate.
        tried: candidates that were scored on λ-validation.
        rank: the fused adapter was truncated to; ``None`` if it is the exact sum.
        goal: that was pursued; the sealed test is judged by it, its limit included.
        reporter: progress.
    """
    if not data.test:
        return None
    models = _rivals(members)
    reader = json_digest([fused.digest, models, {name: domain.digest for name, domain in data.test.items()}])
    reads = {
        name: Ledger.here().enter(data.items[name], name, reader, domain.digest) for name, domain in data.test.items()
    }
    scores: dict[str, dict[str, Scores]] = {}
    items = sum(len(domain.items) for domain in data.test.values())
    with reporter.task("sealed test", items * (len(models) + 1), "item") as task:

        def measured(bank: Bank, mixed: Mapping[str, float]) -> dict[str, Scores]:
            with bank.using(mixed):
                return {
                    name: score(bank.model, domain, base.load().pad_id, task.advance)
                    for name, domain in data.test.items()
                }

        bank = Bank(base.load().model, base.load().id)
        try:
            for name, adapter in members.items():
                bank.load(name, adapter)
            scores = {model: measured(bank, mixed) for model, mixed in models.items()}
            bank.unmount()
            bank.load("fused", fused)
            scores[DELIVERED] = measured(bank, {"fused": 1.0})
        finally:
            bank.unmount()
    key = weights_key(weights)
    same = [name for name, mixed in models.items() if name != "base" and weights_key(mixed) == key and rank is None]
    verdict = judge(
        scores,
        stages=(),
        betas={name: beta for name, beta in betas.items() if name in data.test},
        recipe_of=mixture(weights),
        same=same,
        singles=[name for name in models if name not in _TAKEN],
        goal=goal,
        candidates=tried,
        validation_items=sum(len(domain.items) for domain in data.validation.values()),
    )
    ledger = [{"domain": name, "digest": data.test[name].digest, "reads": count} for name, count in reads.items()]
    return Verified(verdict, ledger)


def _rivals(members: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
    """Model → coefficients, for everything that the delivered one is judged against."""
    found: dict[str, dict[str, float]] = {"base": {}}
    for name in members:
        found[f"{name} (adapter)" if name in (*_TAKEN, DELIVERED) else name] = {name: 1.0}
    stack = {name: weight for name, weight in (stack_of(list(members)[-1], members) or {}).items() if weight}
    if len(stack) > 1:
        found["stack"] = stack
    if len(members) > 1:
        found["uniform"] = {name: 1 / len(members) for name in members}
    return found
