"""What a gate is worth: fitted to a case of ``benchmarks/gate.py``, and judged on its sealed test.

Whatever takes long is kept in small pieces, so that a measurement that is ended early goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gate_parts import Case

PIECE = 20  # training examples that are measured at once


def kept(place: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Plain JSON, made once."""
    if not place.exists():
        partial = place.with_suffix(".partial")
        partial.write_text(json.dumps(make()), encoding="utf-8")
        partial.rename(place)
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def fitted(asked: argparse.Namespace, case: Case, layers: int, epochs: float, start: Any = None) -> Any:
    """A gate, on losses of the members that are measured once."""
    from lorchestra.gate import FitSettings
    from lorchestra.gate.fit import fit

    train = [one.example for one in case.drawn(asked.examples)]
    held = [one.example for one in case.first("validation", asked.held)]
    members, pad_id = tuple(case.members), case.base.pad_id
    with case.mounted() as bank:
        known = measured(asked, bank, train, held)
        settings = FitSettings(layers=layers, epochs=epochs, keep_prompts=True)
        return fit(
            bank, members, train, held, settings, name="domains", pad_id=pad_id, measured=known, start=start,
            prompts=[(one.domain, one.item.prompt) for one in case.prompts("train")],
        )  # fmt: skip


def measured(asked: argparse.Namespace, bank: Any, train: Sequence[Any], held: Sequence[Any]) -> Any:
    """The members' losses on every example."""
    from lorchestra.gate.measure import Measured, measure, measured_digest

    members, pad_id = bank.names, asked.pad_id
    pieces = max(1, min(-(-len(train) // PIECE), len(held)))
    parts = []
    for k in range(pieces):
        mine = [part[k * len(part) // pieces : (k + 1) * len(part) // pieces] for part in (train, held)]
        digest = measured_digest(bank, members, *mine, {})[7:31]
        told = kept(
            asked.work / f"measured-{digest}.json",
            lambda mine=mine: measure(bank, members, *mine, pad_id=pad_id).as_dict(),
        )
        parts.append(Measured.from_dict(told))
    return Measured(
        members,
        tuple(row for part in parts for row in part.train),
        tuple(row for part in parts for row in part.validation),
        (0.0,) * (len(train) + len(held)),
        measured_digest(bank, members, train, held, {}),
    )


def static(asked: argparse.Namespace, case: Case) -> Any:
    """The best candidate of a search on λ-validation: of the run's, or of one that is made here."""
    from lorchestra.events import SILENT
    from lorchestra.pipeline.searching import Searched, SearchPlan, search_weights

    if asked.searched:
        found = Searched.from_dict(json.loads(asked.searched.read_text(encoding="utf-8")))
    else:
        domains = case.domains("validation", asked.held)
        found = search_weights(case.base, case.members, domains, {}, SearchPlan(), asked.work / "search", SILENT)
    return min(found.candidates, key=lambda candidate: candidate.score)


def losses(asked: argparse.Namespace, case: Case) -> dict[str, Any]:
    """The verdict on a gate trained end to end."""
    from lorchestra.adapter.digest import json_digest
    from lorchestra.evaluate.gated import judge_gate
    from lorchestra.evaluate.score import Scores
    from lorchestra.gate import load, save
    from lorchestra.pipeline.gate_alone import enter_sealed
    from lorchestra.pipeline.gating import coefficients_of

    best = static(asked, case)
    place = asked.work / f"gate-{asked.layers}-{asked.epochs:g}-{asked.examples}"
    if not place.exists():
        made = fitted(asked, case, asked.layers, asked.epochs, dict(best.weights))
        save(made.gate, place, made.as_dict())
    gate = load(place)
    fit = json.loads((place / "gate.json").read_text(encoding="utf-8"))["fit"]
    held = case.held(asked.items)
    reads = {} if asked.short else enter_sealed(held, gate)
    mixtures = {"base": {}, **{name: {name: 1.0} for name in case.members}, "static": dict(best.weights)}
    scores: dict[str, dict[str, Scores]] = {model: {} for model in (*mixtures, "oracle", "gate")}
    given, right = {}, {}
    with case.mounted() as bank:
        for name, one in held.items():
            rows, _ = coefficients_of(gate, bank.model, [item.prompt for item in one.domain.items])
            given[name] = dict(zip(gate.members, rows.mean(dim=0).tolist(), strict=True))
            right[name] = float((rows.argmax(dim=1) == gate.members.index(name)).float().mean())
            for model, weights in mixtures.items():
                digest = json_digest([weights, one.domain.digest, bank_digest(bank), str(case.base.dtype)])
                scores[model][name] = scored(asked, bank, one.domain, weights, digest)
            digest = json_digest([gate.digest, one.domain.digest, str(case.base.dtype)])
            scores["gate"][name] = scored(asked, bank, one.domain, (gate, rows), digest)
            scores["oracle"][name] = scores[fit["loads"]["best"][name]][name]
    oracle = {name: {} if model == "base" else {model: 1.0} for name, model in fit["loads"]["best"].items()}
    verdict = judge_gate(scores, betas={}, static=best.weights, oracle=oracle)
    behind = verdict.behind_oracle
    return {
        "layers": asked.layers, "epochs": asked.epochs, "examples": asked.examples, "begun": fit["begun"],
        "history": fit["history"], "static": dict(best.weights), "static_origin": best.origin,
        "oracle": fit["loads"]["best"], "items": asked.items, "reads": reads, "verdict": verdict.as_dict(),
        "coefficients": given, "accuracy": right,
        "behind_oracle": None if behind is None else [behind.estimate, behind.low, behind.high],
    }  # fmt: skip


def bank_digest(bank: Any) -> list[Any]:
    """Of its base and its members."""
    return [bank.base.weights, [[name, bank.member(name).digest] for name in bank.names]]


def scored(asked: argparse.Namespace, bank: Any, domain: Any, how: Any, digest: str) -> Any:
    """A domain under one mixture, or under a gate's row for each item."""
    from lorchestra.evaluate.mixtures import score_each
    from lorchestra.evaluate.score import Scores, score

    def make() -> dict[str, Any]:
        if isinstance(how, Mapping):
            with bank.using(how):
                return asdict(score(bank.model, domain, asked.pad_id))
        gate, rows = how
        return asdict(score_each(bank, domain, gate.members, rows, asked.pad_id))

    return Scores.from_dict(kept(asked.work / f"scores-{digest[7:31]}.json", make))
