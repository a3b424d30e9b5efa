"""A gate on its own, as ``lorchestra gate`` asks for it: fitted to examples of several domains, judged on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lorchestra.adapter.digest import json_digest
from lorchestra.bank import Bank
from lorchestra.data.load import DataSpec, load_examples
from lorchestra.data.render import Renderer
from lorchestra.data.split import SplitSpec, split
from lorchestra.errors import UserError
from lorchestra.evaluate.gated import BASE, GATE, ORACLE, STATIC, GateVerdict, judge_gate
from lorchestra.evaluate.ledger import Ledger, item_digest
from lorchestra.evaluate.mixtures import score_each
from lorchestra.evaluate.score import Domain, Scores, make_domain, score
from lorchestra.events import Reporter
from lorchestra.gate.measure import GateExample
from lorchestra.gate.network import Gate
from lorchestra.pipeline.gating import coefficients_of, shares
from lorchestra.pipeline.search_alone import Task, kind_of
from lorchestra.stats.intervals import Interval, proportion_interval

FEWEST = 2  # examples of a domain in a part


@dataclass(frozen=True)
class Held:
    """One domain, read and rendered.

    Args:
        domain: its items.
        texts: their prompts, for people.
        digests: of the sources.
        items: what each is known by in the ledger of sealed tests.
    """

    domain: Domain
    texts: tuple[str, ...]
    digests: frozenset[str]
    items: tuple[str, ...]

    @property
    def truncated(self) -> int:
        """Examples that were cut to the maximum length."""
        return sum(item.truncated > 0 for item in self.domain.items)

    def examples(self) -> list[GateExample]:
        """The items as a gate learns from them."""
        domain = self.domain
        return [
            GateExample(item, domain.name, domain.kind, gold, text)
            for item, gold, text in zip(domain.items, domain.gold, self.texts, strict=True)
        ]


@dataclass(frozen=True)
class Choice:
    """What a gate gave to one prompt; plain JSON by :func:`dataclasses.asdict`.

    Args:
        domain: of the prompt.
        prompt: its text.
        coefficients: member → coefficient, the mean over groups of layers.
        nearest: training prompts with like features: domain, text where it was kept, digest, similarity.
    """

    domain: str
    prompt: str
    coefficients: dict[str, float]
    nearest: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class GateJudged:
    """A gate beside its rivals on held-out examples.

    Args:
        verdict: losses, differences, a sentence.
        coefficients: domain → member → mean coefficient.
        accuracy: domain → how often the greatest coefficient is that of the adapter that is best there; domains of
            which that is known, and ``all``.
        choices: some prompts of every domain.
        oracle: domain → the adapter (or ``base``) that was best on the gate's own validation examples.
    """

    verdict: GateVerdict
    coefficients: dict[str, dict[str, float]]
    accuracy: dict[str, Interval]
    choices: tuple[Choice, ...]
    oracle: dict[str, str]


def read_domains(
    sources: Mapping[str, Sequence[DataSpec]],
    renderer: Renderer,
    parts: SplitSpec,
    *,
    task: Task = "auto",
    relative_to: Path,
    reporter: Reporter,
) -> tuple[dict[str, Held], dict[str, Held]]:
    """Domain → training part, and domain → validation part (empty where its share is 0); a group is in one part.

    Args:
        sources: domain → what it is read from.
        renderer: of the base.
        parts: shares of the two, without a test.
        task: ``auto`` is ``dpo`` for preference pairs, else ``sft``.
        relative_to: of paths.
        reporter: says how each source was read.

    Raises:
        DataError, SourceError: what cannot be found or read.
        UserError: a domain that mixes pairs with other examples, or has too few examples.
    """
    train: dict[str, Held] = {}
    validation: dict[str, Held] = {}
    for name, specs in sources.items():
        read = [
            load_examples(spec, "dpo" if task == "dpo" else "sft", relative_to=relative_to, reporter=reporter)
            for spec in specs
        ]
        examples = [example for loaded in read for example in loaded.examples]
        kind = kind_of(name, examples, task)
        divided = split(examples, parts)
        digests = frozenset(loaded.digest for loaded in read)
        for into, part, share in (
            (train, divided.train, parts.train),
            (validation, divided.validation, parts.validation),
        ):
            if share == 0:
                continue
            if len(part) < FEWEST:
                what = "" if into is train else " to stop by (--validation_share)"
                alike = len({example.group for example in examples}) == 1
                why = "all of them are one group, with the same prompt perhaps" if alike else "give more"
                raise UserError(
                    f"--data {name} leaves {len(part)} of {len(examples)} examples{what}, and {FEWEST} at least are "
                    f"needed; {why}"
                )
            domain = make_domain(name, kind, part, renderer, choices=False)
            into[name] = Held(domain, tuple(example.asked for example in part), digests, tuple(map(item_digest, part)))
    return train, validation


def judge_alone(
    bank: Bank,
    gate: Gate,
    data: Mapping[str, Held],
    *,
    pad_id: int,
    static: Mapping[str, float],
    oracle: Mapping[str, str],
    betas: Mapping[str, float],
    shown: int,
    reporter: Reporter,
) -> GateJudged:
    """Score base, every adapter, static weights, oracle and gate on the same items.

    Args:
        bank: with the gate's members mounted.
        gate: to judge.
        data: domain → held-out examples.
        pad_id: token id for padding.
        static: member → λ, the same for all prompts.
        oracle: domain → the adapter (or ``base``) that an oracle takes; other domains have none.
        betas: domain → β of preference pairs.
        shown: prompts of each domain to explain.
        reporter: progress.
    """
    alone = {BASE: {}, **{_called(name): {name: 1.0} for name in gate.members}, STATIC: dict(static)}
    scores: dict[str, dict[str, Scores]] = {model: {} for model in (*alone, ORACLE, GATE)}
    given, hits, groups = {}, {}, {}
    choices: list[Choice] = []
    by_layers = gate.spec.group_of(sorted({path for name in gate.members for path in bank.member(name).modules}))
    count = sum(len(held.domain.items) for held in data.values()) * (len(alone) + 1)
    with reporter.task("score", count, "example") as task:
        for name, held in data.items():
            domain = held.domain
            for model, weights in alone.items():
                with bank.using(weights):
                    scores[model][name] = score(bank.model, domain, pad_id, task.advance)
            rows, x = coefficients_of(gate, bank.model, [item.prompt for item in domain.items])
            scores[GATE][name] = score_each(bank, domain, gate.members, rows, pad_id, by_layers, task.advance)
            found = shares(rows)
            given[name] = dict(zip(gate.members, found.mean(dim=0).tolist(), strict=True))
            if name in oracle:
                best = oracle[name]
                scores[ORACLE][name] = scores[BASE if best == BASE else _called(best)][name]
                hits[name] = [float(chosen == best) for chosen in _first(gate, found)]
                groups[name] = domain.groups
            choices += _choices(gate, name, held, found, x, shown)
    if not oracle:
        del scores[ORACLE]
    verdict = judge_gate(
        scores,
        betas=betas,
        static=static,
        oracle={name: {} if best == BASE else {best: 1.0} for name, best in oracle.items() if name in data},
        delivers=False,
    )
    accuracy = {name: proportion_interval(values, groups[name]) for name, values in hits.items()}
    if hits:
        every = [(name, group) for name in hits for group in groups[name]]
        accuracy["all"] = proportion_interval(np.concatenate([np.array(values) for values in hits.values()]), every)
    return GateJudged(verdict, given, accuracy, tuple(choices), {n: b for n, b in oracle.items() if n in data})


def enter_sealed(data: Mapping[str, Held], gate: Gate) -> dict[str, int]:
    """Domain → how often examples of it that belong to a sealed test of this machine have been read by now."""
    ledger, reads = Ledger.here(), {}
    for name, held in data.items():
        if items := ledger.sealed(held.items):
            reads[name] = ledger.enter(items, name, json_digest(["gate eval", gate.digest]))
    return reads


def _called(name: str) -> str:
    """An adapter among the models that are compared."""
    return f"{name} (adapter)" if name in (BASE, STATIC, ORACLE, GATE) else name


def _first(gate: Gate, coefficients: Tensor) -> list[str]:
    """Whose coefficient is greatest, prompt by prompt; the base where nobody acts, or it has the greatest share."""
    rest = 1 - coefficients.sum(dim=1) if gate.spec.none else coefficients.new_full((len(coefficients),), 1e-6)
    names = [*gate.members, BASE]
    sizes = np.concatenate([coefficients.abs().numpy(), rest[:, None].numpy()], axis=1)
    return [names[k] for k in sizes.argmax(axis=1).tolist()]


def _choices(gate: Gate, name: str, held: Held, found: Tensor, x: Tensor, shown: int) -> list[Choice]:
    nearest = gate.explain(x[:shown])
    return [
        Choice(
            name,
            text,
            dict(zip(gate.members, row, strict=True)),
            tuple(
                {"domain": n.known.domain, "prompt": n.known.text, "digest": n.known.digest, "similarity": n.similarity}
                for n in near
            ),
        )
        for text, row, near in zip(held.texts[:shown], found[:shown].tolist(), nearest, strict=True)
    ]
