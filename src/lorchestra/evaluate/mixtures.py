"""Many mixtures of one bank in the same forward passes: several on the same items, or one for each item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lorchestra.bank import Bank
from lorchestra.evaluate.score import TOKENS_PER_BATCH, Domain, Scores
from lorchestra.objective.batch import batches, pack
from lorchestra.objective.logprobs import branch_logprobs, tree_is_exact


@torch.no_grad()
def score_mixtures(
    bank: Bank, domain: Domain, mixtures: Sequence[Mapping[str, float]], pad_id: int, positions: int = TOKENS_PER_BATCH
) -> list[Scores]:
    """Score ``domain`` under every mixture, as :func:`lorchestra.evaluate.score.score` would one after the other.

    Every item stands in the batch once for each mixture, with its row's coefficients: where the items are too few to
    fill a batch, the mixtures fill it, and copies of an item need no padding beside each other.

    Args:
        bank: with every name of the mixtures mounted.
        domain: held-out items.
        mixtures: name → λ, each.
        pad_id: token id for padding.
        positions: of a forward pass, padding included.
    """
    model = bank.model
    device = next(model.parameters()).device
    tree = tree_is_exact(model)
    n = len(domain.items)
    copies = [item for item in domain.items for _ in mixtures]
    sums: list[list[tuple[float, ...]]] = [[()] * n for _ in mixtures]
    tokens: list[tuple[int, ...]] = [()] * n
    for indices in batches(copies, positions, tree):
        batch = pack([copies[i] for i in indices], pad_id, device, tree)
        rows = [mixtures[indices[k] % len(mixtures)] for k in batch.row_item.tolist()]
        with bank.using_rows(rows):
            found = branch_logprobs(model, batch)
        of_item, values, counts = found.item.tolist(), found.sums.tolist(), found.tokens.tolist()
        for k, copy in enumerate(indices):
            i, c = divmod(copy, len(mixtures))
            mine = [j for j, item in enumerate(of_item) if item == k]
            sums[c][i] = tuple(values[j] for j in mine)
            tokens[i] = tuple(counts[j] for j in mine)
    return [Scores(domain.kind, tuple(found), tuple(tokens), domain.gold, domain.groups) for found in sums]


@torch.no_grad()
def score_each(
    bank: Bank,
    domain: Domain,
    members: Sequence[str],
    coefficients: Tensor,
    pad_id: int,
    groups: Mapping[str, int] | None = None,
    on_batch: Callable[[int], None] = lambda items: None,
) -> Scores:
    """Score ``domain``, each item under coefficients of its own: what a gate answers with.

    Args:
        bank: with ``members`` mounted.
        domain: held-out items.
        members: K names.
        coefficients: ``[n, K]``, or ``[n, G, K]`` of G groups of modules.
        pad_id: token id for padding.
        groups: module path → its group, of coefficients by group.
        on_batch: hears how many items are done.
    """
    model = bank.model
    device = next(model.parameters()).device
    tree = tree_is_exact(model)
    sums: list[tuple[float, ...]] = [()] * len(domain.items)
    tokens: list[tuple[int, ...]] = [()] * len(domain.items)
    for indices in batches(domain.items, TOKENS_PER_BATCH, tree):
        batch = pack([domain.items[i] for i in indices], pad_id, device, tree)
        rows = coefficients[[indices[k] for k in batch.row_item.tolist()]]
        with bank.using_tensor(members, rows, groups):
            found = branch_logprobs(model, batch)
        of_item, values, counts = found.item.tolist(), found.sums.tolist(), found.tokens.tolist()
        for k, i in enumerate(indices):
            mine = [j for j, item in enumerate(of_item) if item == k]
            sums[i] = tuple(values[j] for j in mine)
            tokens[i] = tuple(counts[j] for j in mine)
        on_batch(len(indices))
    return Scores(domain.kind, tuple(sums), tuple(tokens), domain.gold, domain.groups)
