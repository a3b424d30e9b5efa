"""The gate of a run: fitted to training prompts of all stages, mixed; which one, if there are several, λ-validation
chooses. What it is worth is judged on the sealed test (``gate_verdict.py``)."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.digest import json_digest
from lorchestra.bank import Bank
from lorchestra.errors import counted
from lorchestra.evaluate.metrics import loss_ratios
from lorchestra.evaluate.mixtures import score_each
from lorchestra.evaluate.score import Domain, Kind, Scores, make_domain, score
from lorchestra.events import Reporter
from lorchestra.gate.features import features
from lorchestra.gate.fit import fit
from lorchestra.gate.measure import GateExample, Measured, measure
from lorchestra.gate.network import Gate
from lorchestra.gate.settings import FitSettings
from lorchestra.gate.store import load, save
from lorchestra.pipeline.cache import Step, StepCache, step_digest, write_json
from lorchestra.pipeline.choosing import betas, domains_of, mounted
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared
from lorchestra.recipe.gate import SEVERAL, candidates, reason
from lorchestra.recipe.recipe import Recipe

MEASURE_VERSION = 1
VERSION = 2  # raise it when the same settings would fit another gate
SHOWN, NEAREST = 8, 3  # prompts in the report, and training prompts beside each


@dataclass(frozen=True)
class GateData:
    """What all gates of a recipe learn from and are chosen on.

    Args:
        train: examples of all stages, one of each in turn.
        texts: their prompts, for people.
        validation: domain → λ-validation items: for early stopping, and to choose among gates.
        asked: domain → the prompts of those items, for people.
        further: training prompts beyond these examples, each with its stage: they are not scored.
    """

    train: tuple[GateExample, ...]
    texts: tuple[str, ...]
    validation: Mapping[str, Domain]
    asked: Mapping[str, tuple[str, ...]]
    further: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def held_out(self) -> list[GateExample]:
        """λ-validation as a fit reads it: a prompt that is empty has no features, and is the base's."""
        return [
            GateExample(item, name, domain.kind, gold)
            for name, domain in self.validation.items()
            for item, gold in zip(domain.items, domain.gold, strict=True)
            if item.prompt
        ]


@dataclass(frozen=True)
class GateInputs:
    """What one gate depends on: how it is fitted, and the digests of its step and of the step that measures the
    adapters, which all gates of a recipe share."""

    name: str
    settings: FitSettings
    data: GateData
    measured: str
    digest: str


@dataclass(frozen=True)
class FittedGate:
    """The gate that λ-validation chose: what it is, how it was fitted (``fitted.json``), and what it was chosen from.

    ``candidates`` are the names of all gates with the goal's value on λ-validation, in the order of the recipe.
    """

    gate: Gate
    inputs: GateInputs
    told: Mapping[str, Any]
    step: Step
    candidates: tuple[tuple[str, float], ...]

    @property
    def warnings(self) -> list[str]:
        """It gives everything to one adapter, or the same to all prompts; in words."""
        loads = self.told["loads"]
        return [] if loads["kind"] == "routes" else [loads["sentence"]]


def gate_inputs(
    prepared: Prepared, members: Mapping[str, Adapter], weights: Mapping[str, float], dtype: str
) -> list[GateInputs]:
    """Everything that the recipe's gates depend on.

    Args:
        prepared: the data.
        members: of the fusion.
        weights: the static coefficients, which a gate may begin from.
        dtype: of the base that they are served with.
    """
    recipe = prepared.recipe
    wanted = candidates(recipe)
    if not wanted:
        return []
    data = _data(prepared, wanted[0].examples, wanted[0].keep_prompts)
    needs = {
        "base": prepared.base_digest,
        "members": {name: adapter.digest for name, adapter in members.items()},
        "train": json_digest(list(map(_content, data.train))),
        "validation": {name: domain.digest for name, domain in data.validation.items()},
    }
    shared = {"betas": betas(recipe), "dtype": dtype}
    measured = step_digest("measure", MEASURE_VERSION, shared, needs)
    further = json_digest([[name, list(prompt)] for name, prompt in data.further])
    also = {"further": further, "identity": asdict(prepared.base), "texts": json_digest([data.texts, dict(data.asked)])}
    out = []
    for name, asked in zip(gate_names(recipe), wanted, strict=True):
        settings = FitSettings(**asked.model_dump(exclude={"examples"}), seed=recipe.seeds.data)
        told = {"fit": asdict(settings), "name": recipe.name, "start": dict(weights), **shared}
        digest = step_digest("gate", VERSION, told, {**needs, **also})
        out.append(GateInputs(name, settings, data, measured, digest))
    return out


def gate_names(recipe: Recipe) -> list[str]:
    """Of the gates' steps: ``gate``, or ``gate:sigmoid-4-0`` among several, the values of the keys that list some."""
    found = candidates(recipe)
    if len(found) == 1:
        return ["gate"]
    return [f"gate:{'-'.join(str(getattr(settings, key)) for key in SEVERAL)}" for settings in found]


def fit_gate(
    prepared: Prepared,
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    base: LazyBase,
    cache: StepCache,
    reporter: Reporter,
) -> FittedGate:
    """Fit every gate of the recipe, or find it done, and choose one on λ-validation; arguments as :func:`gate_inputs`.

    Raises:
        DataError: no example with a prompt.
        TrainingError: a loss that is not finite.
        StorageError: the disk is full or closed.
    """
    inputs = gate_inputs(prepared, members, weights, str(base.dtype))
    steps = []
    for one in inputs:

        def make(work: Path, one: GateInputs = one) -> dict[str, Any]:
            measured = _measured(prepared, members, one, base, cache, reporter)
            return _fit(prepared, members, weights, one, measured, base, work, reporter)

        if cache.lookup("gate", one.digest) is None:
            reporter.say(f"{one.name}: {_called(one, len(members), reason(prepared.recipe))}")
        steps.append(cache.build("gate", one.digest, make, reporter.say))
    return chosen_gate(prepared, members, inputs, steps)


def chosen_gate(
    prepared: Prepared, members: Mapping[str, Adapter], inputs: Sequence[GateInputs], steps: Sequence[Step]
) -> FittedGate:
    """Of finished fits the one with the lowest value of the goal on λ-validation; of equal ones the first."""
    goal = prepared.recipe.fusion.aim()
    told = [json.loads((step.directory / "fitted.json").read_text(encoding="utf-8")) for step in steps]
    values = []
    for found in told:
        ours, theirs = (
            {name: Scores.from_dict(value) for name, value in found["scores"][model].items()}
            for model in ("gate", "base")
        )
        values.append(goal.value(loss_ratios(ours, theirs, betas(prepared.recipe))))
    best = min(range(len(values)), key=values.__getitem__)
    named = tuple((one.name, value) for one, value in zip(inputs, values, strict=True))
    digests = {name: adapter.digest for name, adapter in members.items()}
    gate = load(steps[best].directory / "gate", digests, prepared.base)
    return FittedGate(gate, inputs[best], told[best], steps[best], named)


def coefficients_of(gate: Gate, model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Coefficients ``[n, K]`` (``[n, G, K]``) of the gate for ``prompts``, and their features ``[n, size]``.

    An empty prompt has no features (zeros here): it is answered by the base.
    """
    there = [i for i, prompt in enumerate(prompts) if prompt]
    x = torch.zeros(len(prompts), gate.size)
    groups = (len(gate.spec.groups),) if gate.spec.groups else ()
    found = torch.zeros(len(prompts), *groups, len(gate.members))
    if there:
        x[there] = features(model, [prompts[i] for i in there], gate.spec.features)
        with torch.no_grad():
            found[there] = gate.coefficients(x[there])
    return found, x


def shares(coefficients: Tensor) -> Tensor:
    """``[n, K]``: with groups of layers their mean."""
    return coefficients.mean(dim=1) if coefficients.ndim == 3 else coefficients


def _called(inputs: GateInputs, members: int, why: str) -> str:
    """``softmax (…) over 3 adapters, fitted to 240 prompts of 3 stages``; ``why`` the activation, if it was settled."""
    stages = len({example.domain for example in inputs.data.train})
    return (
        f"{inputs.settings.activation}{f' ({why})' if why else ''} over {counted(members, 'adapter')}, fitted to "
        f"{counted(len(inputs.data.train), 'prompt')} of {counted(stages, 'stage')}"
    )


def _data(prepared: Prepared, limit: int | None, keep: bool) -> GateData:
    """At most ``limit`` training examples of every stage, and as many of λ-validation as a search uses."""
    recipe = prepared.recipe
    by_stage: list[list[tuple[GateExample, str]]] = []
    further: list[tuple[str, tuple[int, ...]]] = []
    for stage in recipe.stages:
        data = prepared.data[stage.name]
        drawn = list(data.splits.train)
        if limit is not None and limit < len(drawn):
            further += [(stage.name, item.prompt) for item in data.rendered["train"]]
            drawn = random.Random(recipe.seeds.data).sample(drawn, limit)
        kind: Kind = "dpo" if data.task == "dpo" else "sft"
        domain = make_domain(stage.name, kind, drawn, prepared.renderer, choices=False)
        by_stage.append(
            [
                (GateExample(item, stage.name, kind, gold, text if keep else ""), text)
                for item, gold, text in zip(
                    domain.items, domain.gold, (example.asked for example in drawn), strict=True
                )
                if item.prompt
            ]
        )
    mixed = [found[i] for i in range(max(map(len, by_stage))) for found in by_stage if i < len(found)]
    held = recipe.fusion.validation_limit
    every = domains_of(prepared, "validation", held, choices=False)
    validation = {stage.name: every[stage.name] for stage in recipe.stages if stage.name in every}
    asked = {
        name: tuple(example.asked for example in prepared.data[name].splits.validation[:held]) for name in validation
    }
    texts = tuple(text for _, text in mixed)
    return GateData(tuple(e for e, _ in mixed), texts, validation, asked, tuple(further))


def _content(example: GateExample) -> list[Any]:
    branches = [[branch.ids, branch.supervised] for branch in example.item.branches]
    return [example.domain, example.kind, example.gold, example.item.prompt, branches]


def _measured(
    prepared: Prepared,
    members: Mapping[str, Adapter],
    inputs: GateInputs,
    base: LazyBase,
    cache: StepCache,
    reporter: Reporter,
) -> Measured:
    """How base and adapters fare on every example; a step of its own, for several gates share it."""

    def make(work: Path) -> dict[str, Any]:
        loaded = base.load()
        bank = mounted(loaded, members)
        try:
            found = measure(
                bank, tuple(members), inputs.data.train, inputs.data.held_out,
                pad_id=loaded.pad_id, betas=betas(prepared.recipe), reporter=reporter,
            )  # fmt: skip
        finally:
            bank.unmount()
        write_json(work / "measured.json", found.as_dict())
        return {"examples": len(inputs.data.train) + len(inputs.data.held_out)}

    step = cache.build("measure", inputs.measured, make, reporter.say)
    return Measured.from_dict(json.loads((step.directory / "measured.json").read_text(encoding="utf-8")))


def _fit(
    prepared: Prepared,
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    inputs: GateInputs,
    measured: Measured,
    lazy: LazyBase,
    work: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Fit one gate, and score it and the base on λ-validation."""
    base, data, started = lazy.load(), inputs.data, time.perf_counter()
    bank = mounted(base, members)
    try:
        fitted = fit(
            bank, tuple(members), data.train, data.held_out, inputs.settings, name=prepared.recipe.name,
            pad_id=base.pad_id, betas=betas(prepared.recipe), measured=measured, start=weights,
            prompts=data.further, reporter=reporter,
        )  # fmt: skip
        seconds, gate = time.perf_counter() - started, fitted.gate
        save(gate, work / "gate", fitted.as_dict())
        scores, prompts = _on_validation(bank, gate, data, base.pad_id, reporter)
    finally:
        bank.unmount()
    told = {
        **fitted.as_dict(),
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in gate.parameters()),
        "scores": {
            model: {name: asdict(found) for name, found in by_domain.items()} for model, by_domain in scores.items()
        },
        "prompts": [of[k] for k in range(SHOWN) for of in prompts if k < len(of)][:SHOWN],
    }
    write_json(work / "fitted.json", told)
    return {"gate": gate.digest, "prompts": len(data.train)}


def _on_validation(
    bank: Bank, gate: Gate, data: GateData, pad_id: int, reporter: Reporter
) -> tuple[dict[str, dict[str, Scores]], list[list[dict[str, Any]]]]:
    """Scores of ``gate`` and ``base``, domain by domain, and some prompts explained."""
    scores: dict[str, dict[str, Scores]] = {"gate": {}, "base": {}}
    prompts = []
    count = 2 * sum(len(domain.items) for domain in data.validation.values())
    groups = gate.spec.group_of(list(bank.layers()))
    with reporter.task("λ-validation of the gate", count, "item") as task:
        for name, domain in data.validation.items():
            rows, x = coefficients_of(gate, bank.model, [item.prompt for item in domain.items])
            scores["gate"][name] = score_each(bank, domain, gate.members, rows, pad_id, groups, task.advance)
            scores["base"][name] = score(bank.model, domain, pad_id, task.advance)
            prompts.append(_explained(gate, name, data, shares(rows), x))
    return scores, prompts


def _explained(gate: Gate, domain: str, data: GateData, rows: Tensor, x: Tensor) -> list[dict[str, Any]]:
    """The first λ-validation prompts of a domain: coefficients, and the training prompts that they are near."""
    asked = data.asked[domain][:SHOWN]
    nearest = gate.explain(x[: len(asked)], NEAREST)
    return [
        {
            "domain": domain,
            "prompt": text,
            "coefficients": dict(zip(gate.members, row.tolist(), strict=True)),
            "nearest": [
                {"domain": near.known.domain, "prompt": data.texts[near.index], "similarity": near.similarity}
                for near in found
            ],
        }
        for text, row, found in zip(asked, rows, nearest, strict=False)
    ]
