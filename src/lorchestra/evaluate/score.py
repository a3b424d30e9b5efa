"""Model → scores of every example, kept whole so that any metric can be made of them later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lorchestra.adapter.digest import json_digest
from lorchestra.data.example import Example
from lorchestra.data.render import Rendered, Renderer
from lorchestra.objective.batch import batches, pack
from lorchestra.objective.logprobs import branch_logprobs, tree_is_exact

Array = NDArray[np.float64]
Kind = Literal["sft", "dpo"]
TOKENS_PER_BATCH = 4096  # positions of a forward pass, padding included


@dataclass(frozen=True)
class Domain:
    """Held-out items of one domain, rendered.

    Args:
        name: of the domain.
        kind: ``sft`` (an answer, or one among choices) or ``dpo`` (chosen over rejected).
        items: one branch (an answer), two (chosen, rejected) or one per choice.
        gold: which branch of each item is right.
        groups: what each item belongs to.
    """

    name: str
    kind: Kind
    items: tuple[Rendered, ...]
    gold: tuple[int, ...]
    groups: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the items' token ids, gold answers and groups."""
        ids = [[item.prompt, [branch.ids for branch in item.branches]] for item in self.items]
        return json_digest([self.kind, ids, self.gold, self.groups])

    def first(self, limit: int | None) -> Domain:
        """The first ``limit`` items."""
        if limit is None or limit >= len(self.items):
            return self
        return Domain(self.name, self.kind, self.items[:limit], self.gold[:limit], self.groups[:limit])


def make_domain(name: str, kind: Kind, examples: Sequence[Example], renderer: Renderer, choices: bool = True) -> Domain:
    """Render held-out examples for scoring.

    Of an answer the tokens count that a stage would train on: in a conversation every assistant turn, or with the
    renderer's ``supervise="last"`` the last. Choices and pairs differ in their last turn alone, and only it counts.

    Args:
        name: of the domain.
        kind: see :class:`Domain`.
        examples: held out.
        renderer: that of the training run.
        choices: score the choices of multiple-choice items too (for accuracy), not the gold answer alone.
    """
    items, gold = [], []
    for example in examples:
        if kind == "dpo":
            items.append(renderer.preference(example))
            gold.append(0)
        elif choices and example.choices:
            items.append(renderer.choice(example))
            gold.append(example.answer)
        else:
            items.append(renderer.sft(example))
            gold.append(0)
    return Domain(name, kind, tuple(items), tuple(gold), tuple(example.group for example in examples))


@dataclass(frozen=True)
class Scores:
    """What a model thinks of a domain's items.

    Args:
        kind: of the domain.
        sums: per item, Σ log p of each branch in nats.
        tokens: per item, supervised tokens of each branch.
        gold: the right branch of each item.
        groups: of each item.
    """

    kind: Kind
    sums: tuple[tuple[float, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    gold: tuple[int, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def nll(self) -> Array:
        """``[n]`` −Σ log p of the gold answer's tokens (see :func:`make_domain`), nats."""
        return np.array([-sums[g] for sums, g in zip(self.sums, self.gold, strict=True)])

    @property
    def gold_tokens(self) -> Array:
        """``[n]`` tokens of the gold answer."""
        return np.array([float(tokens[g]) for tokens, g in zip(self.tokens, self.gold, strict=True)])

    def correct(self, normalised: bool = False) -> tuple[Array, list[str]]:
        """1 where the gold branch is the likeliest, shared among ties, else 0; and the groups of those items.

        Args:
            normalised: compare log p per token instead of in sum.

        Items with one branch are left out.
        """
        values, groups = [], []
        for sums, tokens, gold, group in zip(self.sums, self.tokens, self.gold, self.groups, strict=True):
            if len(sums) < 2:
                continue
            marks = [s / max(t, 1) for s, t in zip(sums, tokens, strict=True)] if normalised else list(sums)
            best = [i for i, mark in enumerate(marks) if mark == max(marks)]
            values.append(1 / len(best) if gold in best else 0.0)
            groups.append(group)
        return np.array(values), groups

    def loss(self, base: Scores, beta: float) -> tuple[Array, Array]:
        """Numerators and denominators ``[n]`` of the domain's loss relative to the base's (1 at the base).

        sft: negative log-likelihood per token over the base's. dpo: the sigmoid loss with the base as reference
        over ln 2, its value at the base.
        """
        if self.kind == "sft":
            return self.nll, base.nll
        ours = np.array([s[0] - s[1] for s in self.sums])
        theirs = np.array([s[0] - s[1] for s in base.sums])
        return np.logaddexp(0.0, -beta * (ours - theirs)), np.full(len(self), np.log(2.0))

    @classmethod
    def from_dict(cls, value: Any) -> Scores:
        """From what ``dataclasses.asdict`` gives, also after a round through JSON."""
        return cls(
            value["kind"],
            tuple(tuple(s) for s in value["sums"]),
            tuple(tuple(t) for t in value["tokens"]),
            tuple(value["gold"]),
            tuple(value["groups"]),
        )


@torch.no_grad()
def score(model: Any, domain: Domain, pad_id: int, on_batch: Callable[[int], None] = lambda items: None) -> Scores:
    """Score ``domain`` on ``model`` as it stands (under a bank's selection, or none).

    Args:
        model: a transformers causal language model.
        domain: held-out items.
        pad_id: token id for padding.
        on_batch: hears how many items are done.
    """
    device = next(model.parameters()).device
    tree = tree_is_exact(model)
    sums: list[tuple[float, ...]] = [()] * len(domain.items)
    tokens: list[tuple[int, ...]] = [()] * len(domain.items)
    for indices in batches(domain.items, TOKENS_PER_BATCH, tree):
        found = branch_logprobs(model, pack([domain.items[i] for i in indices], pad_id, device, tree))
        of_item, values, counts = found.item.tolist(), found.sums.tolist(), found.tokens.tolist()
        for k, i in enumerate(indices):
            mine = [j for j, item in enumerate(of_item) if item == k]
            sums[i] = tuple(values[j] for j in mine)
            tokens[i] = tuple(counts[j] for j in mine)
        on_batch(len(indices))
    return Scores(domain.kind, tuple(sums), tuple(tokens), domain.gold, domain.groups)
