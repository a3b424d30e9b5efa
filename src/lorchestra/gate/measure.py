"""What a gate learns from: examples with their domain, and how the base and every adapter fare on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lorchestra.adapter.digest import json_digest
from lorchestra.bank import Bank
from lorchestra.data.render import Rendered
from lorchestra.errors import DataError, TrainingError
from lorchestra.events import SILENT, Reporter
from lorchestra.objective.batch import Batch, batches, pack
from lorchestra.objective.logprobs import BranchScores, branch_logprobs, tree_is_exact

POSITIONS = 4096  # of one forward pass, padding included
BETA = 0.1  # of preference domains for which none is given


@dataclass(frozen=True)
class GateExample:
    """A prompt with what should be said to it.

    Args:
        item: one branch or one per choice (``sft``), or chosen and rejected (``dpo``).
        domain: it belongs to; a gate is not told, its losses are weighed by it.
        kind: ``sft`` counts the gold branch's negative log-likelihood, ``dpo`` the sigmoid loss with the base as
            reference.
        gold: which branch of ``sft`` is right.
        text: of the prompt, for people.
    """

    item: Rendered
    domain: str
    kind: Literal["sft", "dpo"] = "sft"
    gold: int = 0
    text: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the prompt's token ids."""
        return json_digest(list(self.item.prompt))

    @property
    def scored(self) -> Rendered:
        """The item with the branches that count."""
        if self.kind == "dpo":
            return self.item
        return Rendered(self.item.prompt, (self.item.branches[self.gold],), self.item.truncated)


@dataclass(frozen=True)
class Measured:
    """Losses of the base and of every single member, on training and validation examples.

    Args:
        members: K names.
        train: per example: the loss of the base, then of each member, in nats (a sum over ``sft``'s tokens).
        validation: as ``train``.
        margins: of ``dpo`` examples the base's log p(chosen) − log p(rejected), first of training, then of validation
            examples; 0 of others.
        digest: of the examples, and of the adapters.
    """

    members: tuple[str, ...]
    train: tuple[tuple[float, ...], ...]
    validation: tuple[tuple[float, ...], ...]
    margins: tuple[float, ...]
    digest: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Measured:
        """From :meth:`as_dict`, also after a round through JSON."""
        train, validation = (tuple(tuple(row) for row in value[part]) for part in ("train", "validation"))
        return cls(tuple(value["members"]), train, validation, tuple(value["margins"]), value["digest"])


def check_examples(train: Sequence[GateExample], validation: Sequence[GateExample]) -> None:
    """Whether a gate can learn from these.

    Raises:
        DataError: no examples in a part, or an example without a prompt.
    """
    for part, examples in (("to learn from", train), ("to validate by", validation)):
        if not examples:
            raise DataError(f"a gate has no examples {part}; give more data")
        for example in examples:
            if not example.item.prompt:
                raise DataError(
                    f"an example of {example.domain!r} has no prompt, and a gate chooses by prompts; leave out texts "
                    "without a question"
                )


def measured_digest(
    bank: Bank,
    members: Sequence[str],
    train: Sequence[GateExample],
    validation: Sequence[GateExample],
    betas: Mapping[str, float],
) -> str:
    """What :func:`measure`'s result is a function of, but for the number format of the base."""
    told = [
        [[e.kind, e.domain, e.item.prompt, [branch.ids for branch in e.scored.branches]] for e in part]
        for part in (train, validation)
    ]
    adapters = [[name, bank.member(name).digest] for name in members]
    return json_digest([bank.base.weights if bank.base else "", adapters, dict(betas), told])


def measure(
    bank: Bank,
    members: Sequence[str],
    train: Sequence[GateExample],
    validation: Sequence[GateExample],
    *,
    pad_id: int,
    betas: Mapping[str, float] | None = None,
    reporter: Reporter = SILENT,
) -> Measured:
    """Score the base and each member alone on every example: K + 1 forward passes of each.

    Args:
        bank: with the members mounted.
        members: K of its names.
        train: to learn from.
        validation: to stop by.
        pad_id: token id for padding.
        betas: domain → β of preference pairs.
        reporter: progress.

    Raises:
        DataError: no examples in a part, or an example without a prompt.
        TrainingError: a loss that is not finite.
    """
    betas = betas or {}
    check_examples(train, validation)
    every = [*train, *validation]
    margins = [0.0] * len(every)
    rows: list[list[float]] = [[] for _ in every]
    with reporter.task("score the adapters", len(every) * (len(members) + 1), "example") as task:
        for name in ("", *members):
            for indices, batch in packed(bank.model, every, range(len(every)), pad_id, POSITIONS):
                with torch.no_grad(), bank.using({name: 1.0} if name else {}):
                    scores = branch_logprobs(bank.model, batch)
                if not name:
                    for i, margin in zip(indices, pair_margins(scores, [every[i] for i in indices]), strict=True):
                        margins[i] = margin
                losses = example_losses(scores, [every[i] for i in indices], [margins[i] for i in indices], betas)
                for i, loss in zip(indices, losses.tolist(), strict=True):
                    rows[i].append(loss)
                task.advance(len(indices))
    names = ("base", *members)
    for i, row in enumerate(rows):
        for name, loss in zip(names, row, strict=True):
            if not abs(loss) < float("inf"):
                raise TrainingError(
                    f"{name!r} has a loss of {loss} on an example of {every[i].domain!r}; compute in float32, or look "
                    "for a damaged adapter"
                )
    found = tuple(tuple(row) for row in rows)
    return Measured(
        tuple(members),
        found[: len(train)],
        found[len(train) :],
        tuple(margins),
        measured_digest(bank, members, train, validation, betas),
    )


def packed(
    model: Any, examples: Sequence[GateExample], chosen: Sequence[int], pad_id: int, positions: int
) -> list[tuple[list[int], Batch]]:
    """Batches of the chosen examples, each with their places among ``examples``."""
    device, tree = next(model.parameters()).device, tree_is_exact(model)
    items = [examples[i].scored for i in chosen]
    return [
        ([chosen[k] for k in group], pack([items[k] for k in group], pad_id, device, tree))
        for group in batches(items, positions, tree)
    ]


def pair_margins(scores: BranchScores, examples: Sequence[GateExample]) -> list[float]:
    """log p(chosen) − log p(rejected) of every preference pair, 0 of other examples."""
    sums, firsts = scores.sums.tolist(), _firsts(scores, len(examples))
    return [
        sums[first] - sums[first + 1] if example.kind == "dpo" else 0.0
        for first, example in zip(firsts.tolist(), examples, strict=True)
    ]


def example_losses(
    scores: BranchScores, examples: Sequence[GateExample], margins: Sequence[float], betas: Mapping[str, float]
) -> Tensor:
    """``[items]`` float32, in nats, differentiable.

    Negative log-likelihood of the answer; of a pair −log σ(β·(margin − the base's)), DPO's sigmoid loss (Rafailov et
    al. 2023, arXiv 2305.18290) with the base as reference.

    Args:
        scores: of the batch that holds ``examples``, in order.
        examples: its items.
        margins: of the base.
        betas: domain → β.
    """
    firsts = _firsts(scores, len(examples))
    device = scores.sums.device
    pairs = torch.tensor([example.kind == "dpo" for example in examples], device=device)
    second = torch.where(pairs, firsts + 1, firsts)
    beta = torch.tensor([betas.get(example.domain, BETA) for example in examples], device=device)
    theirs = torch.tensor(list(margins), dtype=torch.float32, device=device)
    chosen = scores.sums[firsts]
    return torch.where(pairs, softplus(-beta * (chosen - scores.sums[second] - theirs)), -chosen)


def _firsts(scores: BranchScores, items: int) -> Tensor:
    """``[items]`` the first branch of each."""
    return torch.searchsorted(scores.item, torch.arange(items, device=scores.item.device))


def domain_shares(examples: Sequence[GateExample], base: Sequence[float]) -> Tensor:
    """``[n]`` float64 weights w, by which Σ wᵢ·lossᵢ is the mean over domains of loss / base loss (1 at the base).

    Args:
        examples: n.
        base: the base's losses (of ``dpo``: ln 2).
    """
    totals: dict[str, float] = {}
    for example, loss in zip(examples, base, strict=True):
        totals[example.domain] = totals.get(example.domain, 0.0) + loss
    return torch.tensor(
        [1 / (len(totals) * max(totals[example.domain], 1e-12)) for example in examples], dtype=torch.float64
    )
