"""What a fitted gate is worth: the sealed test, read once for it, against static coefficients and an oracle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank import Bank
from lorchestra.base.load import Base
from lorchestra.evaluate.gated import GATE, ORACLE, STATIC, GateVerdict, judge_gate
from lorchestra.evaluate.ledger import Ledger
from lorchestra.evaluate.metrics import flat, loss_ratios
from lorchestra.evaluate.mixtures import score_each, score_mixtures
from lorchestra.evaluate.score import Domain, Scores, score
from lorchestra.evaluate.verdict import DELIVERED
from lorchestra.events import Reporter
from lorchestra.fusion.search import weights_key
from lorchestra.pipeline.cache import Step, StepCache, discard, place, step_digest, write_json
from lorchestra.pipeline.choosing import Chosen, betas, domains_of, mounted
from lorchestra.pipeline.gating import FittedGate, coefficients_of, shares
from lorchestra.pipeline.judging import Judged, read_scores, sealed_items, write_scores
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared
from lorchestra.stats.intervals import proportion_interval

VERSION = 1  # raise it when the same gate would be scored otherwise
Points = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class GateJudged:
    """The verdict on a gate, what the report tells of it, and the step; ``fitted`` is the gate."""

    verdict: GateVerdict
    told: Mapping[str, Any]
    step: Step
    fitted: FittedGate


@dataclass(frozen=True)
class GateVerdictInputs:
    """The sealed test, the points among which the oracle takes one in each domain, and the step's digest."""

    domains: Mapping[str, Domain]
    points: Points
    digest: str


def gate_verdict_inputs(
    prepared: Prepared, members: Mapping[str, Adapter], weights: Mapping[str, float], fitted: FittedGate, dtype: str
) -> GateVerdictInputs:
    """Everything that the scores of a gate and of the oracle depend on.

    Args:
        prepared: the data.
        members: of the fusion.
        weights: the static coefficients.
        fitted: the gate.
        dtype: of the base.
    """
    domains = domains_of(prepared, "test", prepared.recipe.evaluate.test_limit, choices=True)
    points = {"base": {}, **{name: {name: 1.0} for name in members}, STATIC: dict(weights)}
    digest = step_digest(
        "judge",
        VERSION,
        {"points": points, "betas": betas(prepared.recipe), "dtype": dtype},
        {
            "base": prepared.base_digest,
            "gate": fitted.inputs.digest,
            "members": {name: adapter.digest for name, adapter in members.items()},
            "domains": {name: domain.digest for name, domain in domains.items()},
            "validation": {name: domain.digest for name, domain in fitted.inputs.data.validation.items()},
        },
    )
    return GateVerdictInputs(domains, points, digest)


def gate_verdict_step(
    prepared: Prepared,
    members: Mapping[str, Adapter],
    chosen: Chosen,
    judged: Judged,
    fitted: FittedGate,
    base: LazyBase,
    cache: StepCache,
    reporter: Reporter,
) -> GateJudged:
    """Score gate and oracle on the sealed test, enter the reading, and judge them beside the models of the verdict.

    Args:
        prepared: the data.
        members: of the fusion.
        chosen: the static coefficients.
        judged: the verdict on what is delivered otherwise, with the scores of every static model.
        fitted: the gate.
        base: plain, as the gate is served with it.
        cache: of steps.
        reporter: progress.
    """
    inputs = gate_verdict_inputs(prepared, members, chosen.weights, fitted, str(base.dtype))
    items = sealed_items(prepared)

    def make(work: Path) -> dict[str, Any]:
        for name, domain in inputs.domains.items():
            Ledger.here().enter(items[name], name, inputs.digest, domain.digest)
        return _score(work, prepared, members, inputs, fitted, base.load(), reporter)

    step = cache.build("judge", inputs.digest, make, reporter.say)
    found = json.loads((step.directory / "judged.json").read_text(encoding="utf-8"))
    static = read_scores(judged.step.directory / "scores.json")
    scores = {STATIC if name == DELIVERED else name: by for name, by in static.items()}
    scores |= read_scores(step.directory / "scores.json")
    verdict = judge_gate(
        scores,
        betas={name: beta for name, beta in betas(prepared.recipe).items() if name in inputs.domains},
        static=chosen.weights,
        oracle=found["oracle"],
        goal=prepared.recipe.fusion.aim(),
    )
    return GateJudged(verdict, _told(prepared, inputs, fitted, verdict, found), step, fitted)


def place_gate(judged: GateJudged, members: Mapping[str, Path], target: Path) -> None:
    """Put a gate with its members at ``target``: all that ``--gate`` needs, in one directory.

    Args:
        judged: the gate.
        members: name → PEFT directory, of every member.
        target: in place of what is there; a kill leaves hidden siblings at most.
    """
    whole = target.with_name(f".{target.name}.whole")
    discard(whole)
    place(judged.fitted.step.directory / "gate", whole)
    for name, adapter in members.items():
        place(adapter, whole / "adapters" / name)
    place(whole, target)
    discard(whole)


def _score(
    work: Path,
    prepared: Prepared,
    members: Mapping[str, Adapter],
    inputs: GateVerdictInputs,
    fitted: FittedGate,
    base: Base,
    reporter: Reporter,
) -> dict[str, Any]:
    bank = mounted(base, members)
    gate = fitted.gate
    try:
        validation = _on_validation(bank, inputs.points, fitted, base.pad_id)
        oracle = _oracle(prepared, inputs.points, validation)
        ours: dict[str, Scores] = {}
        told: dict[str, Scores] = {}
        rows: dict[str, Tensor] = {}
        count = sum(len(domain.items) * (1 + (name in oracle)) for name, domain in inputs.domains.items())
        with reporter.task("sealed test of the gate", count, "item") as task:
            groups = gate.spec.group_of(list(bank.layers()))
            for name, domain in inputs.domains.items():
                found, _ = coefficients_of(gate, base.model, [item.prompt for item in domain.items])
                ours[name] = score_each(bank, domain, gate.members, found, base.pad_id, groups, task.advance)
                rows[name] = shares(found)
                if name in oracle:
                    with bank.using(dict(oracle[name])):
                        told[name] = score(base.model, domain, base.pad_id, task.advance)
    finally:
        bank.unmount()
    write_scores(work / "scores.json", {GATE: ours, **({ORACLE: told} if told else {})})
    write_json(
        work / "judged.json",
        {
            "oracle": oracle,
            "validation": {
                point: {name: asdict(found) for name, found in by.items()} for point, by in validation.items()
            },
            "coefficients": {name: found.tolist() for name, found in rows.items()},
        },
    )
    return {"items": sum(len(domain.items) for domain in inputs.domains.values())}


def _on_validation(bank: Bank, points: Points, fitted: FittedGate, pad_id: int) -> dict[str, dict[str, Scores]]:
    """Point → domain → scores on λ-validation; the same coefficients are scored once."""
    alike: dict[str, list[str]] = {}
    for name, weights in points.items():
        alike.setdefault(weights_key(weights), []).append(name)
    mixtures = [points[names[0]] for names in alike.values()]
    out: dict[str, dict[str, Scores]] = {name: {} for name in points}
    for domain, held_out in fitted.inputs.data.validation.items():
        found = score_mixtures(bank, held_out, mixtures, pad_id)
        for names, scores in zip(alike.values(), found, strict=True):
            for name in names:
                out[name][domain] = scores
    return out


def _oracle(
    prepared: Prepared, points: Points, validation: Mapping[str, Mapping[str, Scores]]
) -> dict[str, dict[str, float]]:
    """Domain → the point with the lowest loss there on λ-validation; the sealed test has no say."""
    ratios = {
        name: loss_ratios(found, validation["base"], betas(prepared.recipe)) for name, found in validation.items()
    }
    return {domain: dict(points[min(points, key=lambda name: ratios[name][domain])]) for domain in validation["base"]}


def _told(
    prepared: Prepared, inputs: GateVerdictInputs, fitted: FittedGate, verdict: GateVerdict, found: Mapping[str, Any]
) -> dict[str, Any]:
    """The report's ``gate``."""
    recipe, spec, goal = prepared.recipe, fitted.gate.spec, prepared.recipe.fusion.aim()
    items = sealed_items(prepared)
    rows = {name: [dict(zip(spec.members, row, strict=True)) for row in by]
            for name, by in found["coefficients"].items()}  # fmt: skip
    on_validation = {
        point: {name: Scores.from_dict(value) for name, value in by.items()}
        for point, by in found["validation"].items()
    }
    values = {
        point: goal.value(loss_ratios(by, on_validation["base"], betas(recipe))) for point, by in on_validation.items()
    }
    return {
        **verdict.as_dict(),
        "notes": [*verdict.notes, *([] if fitted.warnings else [fitted.told["loads"]["sentence"]])],
        "warnings": fitted.warnings,
        "members": list(spec.members),
        "means": {
            name: {member: sum(row[member] for row in by) / len(by) for member in spec.members}
            for name, by in rows.items()
        },
        "own": {
            name: flat(proportion_interval([_own(row, name) for row in by], inputs.domains[name].groups))
            for name, by in rows.items()
            if name in spec.members
        },
        "oracle": found["oracle"],
        "prompts": fitted.told["prompts"],
        "candidates": [
            *({"name": name, "value": value, "gate": True, "taken": name == fitted.inputs.name}
              for name, value in fitted.candidates),
            *({"name": name, "value": value, "gate": False, "taken": False} for name, value in values.items()),
        ],
        "history": [
            {"step": check["step"], "loss": check["training"], "validation": check["validation"]}
            for check in fitted.told["history"]
        ],
        "settings": {
            **asdict(fitted.inputs.settings),
            "prompts": len(fitted.inputs.data.train),
            "parameters": fitted.told["parameters"],
            "seconds": fitted.told["seconds"],
            "digest": fitted.gate.digest,
        },
        "ledger": [
            {"domain": name, "digest": domain.digest, "reads": Ledger.here().count(items[name], domain.digest)}
            for name, domain in inputs.domains.items()
        ],
    }  # fmt: skip


def _own(row: Mapping[str, float], domain: str) -> float:
    """1 where the adapter of ``domain`` has the largest coefficient, shared among ties; 0 where no adapter acts."""
    if not any(row.values()):
        return 0.0
    best = [name for name, weight in row.items() if weight == max(row.values())]
    return 1 / len(best) if domain in best else 0.0
