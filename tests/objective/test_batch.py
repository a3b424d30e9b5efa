"""The layout of a batch against its description, position by position; padding and company that change no score."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.data.render import Branch, Rendered
from lorchestra.objective.batch import Batch, batches, length, pack
from lorchestra.objective.logprobs import branch_logprobs

PAD = 3
TOKEN = st.integers(4, 259)


@st.composite
def rendered(draw: st.DrawFn, prompts: int = 0) -> Rendered:
    prompt = tuple(draw(st.lists(TOKEN, min_size=prompts, max_size=6)))
    branches = []
    for _ in range(draw(st.integers(1, 4))):
        ids = tuple(draw(st.lists(TOKEN, min_size=1, max_size=5)))
        branches.append(Branch(ids, tuple(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))))
    return Rendered(prompt, tuple(branches))


def places(items: list[Rendered], tree: bool) -> list[list[tuple[int, int, int, int]]]:
    """Per row, per position: item, branch of the item (−1 in the prompt), position it would have alone, token."""
    rows = []
    for i, item in enumerate(items):
        groups = [range(len(item.branches))] if tree else [[b] for b in range(len(item.branches))]
        for group in groups:
            row = [(i, -1, p, token) for p, token in enumerate(item.prompt)]
            for b in group:
                row += [(i, b, len(item.prompt) + p, token) for p, token in enumerate(item.branches[b].ids)]
            rows.append(row)
    return rows


def visible(batch: Batch) -> torch.Tensor:
    """``[s, L, L]`` which keys a query sees."""
    s, width = batch.input_ids.shape
    causal = torch.ones(width, width, dtype=torch.bool).tril().expand(s, width, width)
    return causal if batch.mask is None else batch.mask[:, 0]


LISTS = st.lists(rendered(), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(LISTS, st.booleans())
def test_every_token_sees_its_prompt_and_its_own_branch_at_the_positions_it_has_alone(
    items: list[Rendered], tree: bool
) -> None:
    batch = pack(items, PAD, tree=tree)
    rows = places(items, tree)
    sees = visible(batch)
    assert batch.row_item.tolist() == [row[0][0] for row in rows]
    assert batch.tokens == sum(map(len, rows))
    for s, row in enumerate(rows):
        ids = batch.input_ids[s].tolist()
        assert ids == [token for *_, token in row] + [PAD] * (len(ids) - len(row))
        for query, (_, branch, position, _) in enumerate(row):
            expected = [k for k in range(query + 1) if row[k][1] in (-1, branch)]
            assert sees[s, query].nonzero().flatten().tolist() == expected
            assert [row[k][2] for k in expected] == list(range(position + 1)), "what it sees is what it would see alone"
            assert (query if batch.position_ids is None else int(batch.position_ids[s, query])) == position
        assert sees[s].any(dim=-1).all(), "no query, padding included, sees nothing: its softmax would be NaN"


@settings(max_examples=60, deadline=None)
@given(LISTS, st.booleans())
def test_each_supervised_token_is_predicted_from_the_place_before_it(items: list[Rendered], tree: bool) -> None:
    batch = pack(items, PAD, tree=tree)
    rows = places(items, tree)
    found = Counter()
    for r, c, target, branch in zip(
        *(t.tolist() for t in (batch.row, batch.column, batch.target, batch.branch)), strict=True
    ):
        item = int(batch.item[branch])
        own = branch - batch.item.tolist().index(item)
        i, b, position, _ = rows[r][c]
        assert i == item
        assert b in (-1, own)
        found[item, own, position + 1, target] += 1
    expected = Counter(
        (i, b, len(item.prompt) + p, token)
        for i, item in enumerate(items)
        for b, branch in enumerate(item.branches)
        for p, (token, counts) in enumerate(zip(branch.ids, branch.supervised, strict=True))
        if counts and len(item.prompt) + p > 0  # nothing stands before the first token of all
    )
    assert found == expected
    assert batch.supervised == expected.total()
    assert batch.item.tolist() == [i for i, item in enumerate(items) for _ in item.branches]


@pytest.mark.parametrize("tree", [True, False])
def test_padding_and_company_change_no_score(tiny_model, tree: bool) -> None:
    """Whatever id pads, however long the others are: right padding comes after all that counts."""
    short = Rendered((5, 6, 7), (Branch((8, 9), (True, True)), Branch((10, 11, 12), (True, False, True))))
    single = Rendered((20, 21), (Branch((22, 23, 24), (True,) * 3),))
    long = Rendered(tuple(range(30, 90)), (Branch(tuple(range(90, 120)), (True,) * 30), Branch((7,), (True,))))
    with torch.no_grad():
        alone = [branch_logprobs(tiny_model, pack([item], PAD, tree=tree)).sums for item in (short, single, long)]
        expected = torch.cat(alone)
        for pad in (PAD, 0, 200):
            found = branch_logprobs(tiny_model, pack([short, single, long], pad, tree=tree)).sums
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        backwards = branch_logprobs(tiny_model, pack([long, single, short], PAD, tree=tree)).sums
    torch.testing.assert_close(backwards, torch.cat(alone[::-1]), rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.lists(rendered(prompts=1), min_size=1, max_size=4))
def test_a_shared_prompt_gives_the_scores_of_separate_rows(items: list[Rendered]) -> None:
    from tests.conftest import make_tiny_model

    model = make_tiny_model()
    with torch.no_grad():
        shared, separate = (branch_logprobs(model, pack(items, PAD, tree=tree)) for tree in (True, False))
    torch.testing.assert_close(shared.sums, separate.sums, rtol=1e-4, atol=1e-4)
    assert shared.tokens.tolist() == separate.tokens.tolist()
    assert shared.item.tolist() == separate.item.tolist()


def test_sharing_saves_what_it_says() -> None:
    item = Rendered(tuple(range(10, 60)), tuple(Branch((i, 2), (True, True)) for i in range(4, 8)))
    assert (length(item, True), length(item, False)) == (58, 52)
    assert (pack([item], PAD, tree=True).tokens, pack([item], PAD, tree=False).tokens) == (58, 4 * 52)


def test_an_item_with_one_branch_is_laid_out_the_same_either_way() -> None:
    items = [Rendered((5, 6), (Branch((7, 8), (True, True)),)), Rendered((9,), (Branch((7,), (True,)),))]
    tree, rows = (pack(items, PAD, tree=value) for value in (True, False))
    assert (tree.mask, tree.position_ids) == (rows.mask, rows.position_ids) == (None, None)
    for name in ("input_ids", "row", "column", "target", "branch", "item", "row_item"):
        assert torch.equal(getattr(tree, name), getattr(rows, name)), name


@settings(max_examples=60, deadline=None)
@given(st.lists(rendered(), min_size=1, max_size=10), st.integers(1, 80), st.booleans())
def test_batches_go_by_length_and_none_could_have_joined_the_one_before(
    items: list[Rendered], budget: int, tree: bool
) -> None:
    groups = batches(items, budget, tree)
    lengths = [length(items[i], tree) for group in groups for i in group]
    assert lengths == sorted(lengths), "like lengths together: little padding"
    for before, after in pairwise(groups):
        rows = sum(1 if tree else len(items[i].branches) for i in [*before, after[0]])
        assert rows * length(items[after[0]], tree) > budget


def test_no_items_no_batches() -> None:
    assert batches([], 100) == []
