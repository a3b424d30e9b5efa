"""What is held out must not be trained on, in any stage: the same prompt, or nearly the same text, in two parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorchestra.data.example import Example
from lorchestra.data.near import near_pairs, shingles, without_boilerplate
from lorchestra.data.split import content_key, normalise

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Alike:
    """What was found in one stage.

    Args:
        near: examples that nearly repeat an earlier one of the same part.
        leaks: held-out examples whose like is in an earlier part of any stage, each as ``held out ~ its like``.
        exact: how many of ``leaks`` have the very same prompt.
    """

    near: int
    leaks: tuple[str, ...]
    exact: int


def alike(items: Sequence[tuple[str, str, Example]]) -> dict[str, Alike]:
    """Stage → :class:`Alike`, for all examples of a recipe as (stage, part, example)."""
    texts = [said(example) for _, _, example in items]
    sources = [(stage, example.origin.rpartition(":")[0]) for stage, _, example in items]
    pairs = dict.fromkeys(near_pairs(without_boilerplate([shingles(text) for text in texts], sources)), False)
    prompts = [content_key(example)[0] for _, _, example in items]
    first: dict[str, dict[str, int]] = {}  # prompt → part → its first example
    for j, (_, part, _) in enumerate(items):
        first.setdefault(prompts[j], {}).setdefault(part, j)
    for j, (_, part, _) in enumerate(items):
        others = [first[prompts[j]][other] for other in PARTS if other != part and other in first[prompts[j]]]
        pairs |= {(min(i, j), max(i, j)): True for i in others}
    near: dict[str, set[int]] = {stage: set() for stage, _, _ in items}
    leaks: dict[str, dict[int, str]] = {stage: {} for stage in near}
    exact: dict[str, set[int]] = {stage: set() for stage in near}
    for (i, j), same in pairs.items():
        if items[i][:2] == items[j][:2]:
            near[items[j][0]].add(j)
        if items[i][1] != items[j][1]:
            known, held = sorted((i, j), key=lambda k: PARTS.index(items[k][1]))
            stage = items[held][0]
            leaks[stage].setdefault(held, f"{_where(*items[held])} ~ {_where(*items[known])}")
            if same:
                exact[stage].add(held)
    return {s: Alike(len(near[s]), tuple(leaks[s].values()), len(exact[s])) for s in near}


def said(example: Example) -> str:
    """All that an example says but its system prompt, normalised."""
    return normalise("\n".join([*(t.content for t in example.messages if t.role != "system"), example.rejected or ""]))


def _where(stage: str, part: str, example: Example) -> str:
    return f"{stage}/{part} {example.origin or normalise(example.prompt[-1].content)[:30]}"
