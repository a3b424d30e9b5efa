"""Look at the data before training on it: what is there, what is wrong with it, how it reads to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lorchestra.data.example import Example
from lorchestra.data.leakage import Alike, alike, said
from lorchestra.data.load import Loaded
from lorchestra.data.near import but_for_numbers
from lorchestra.data.render import Rendered, Renderer
from lorchestra.data.split import Splits, SplitSpec
from lorchestra.errors import DataError, counted

FEW_TRAIN, FEW_HELD_OUT = 50, 20
PARTS = ("train", "validation", "test")
SHOWN = 3  # rendered examples a stage


class EmptyPartError(DataError):
    """Nothing fell into a part of the split (``part``) that should have a share of the examples."""

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


@dataclass(frozen=True)
class StageData:
    """The data of one stage: as loaded, as split, as rendered (part → one :class:`Rendered` per example)."""

    name: str
    task: str
    loaded: tuple[Loaded, ...]
    splits: Splits
    rendered: Mapping[str, tuple[Rendered, ...]]

    @classmethod
    def render(
        cls, name: str, task: Literal["sft", "dpo"], loaded: Sequence[Loaded], splits: Splits, renderer: Renderer
    ) -> StageData:
        """Render every example as the stage will train on it.

        Raises:
            DataError: from the renderer, with the example's origin.
        """
        one = renderer.preference if task == "dpo" else renderer.sft
        rendered = {part: tuple(one(example) for example in examples) for part, examples in splits.parts()}
        return cls(name, task, tuple(loaded), splits, rendered)


@dataclass(frozen=True)
class StageCheck:
    """What was found in one stage.

    Args:
        counts: part → examples.
        groups: part → groups.
        supervised: part → tokens that the loss counts.
        lengths: tokens of a prompt with its longest answer, over all parts: mean, p50, p90, p99, max.
        truncated: examples that were cut to ``max_length``; ``cut_answers`` of them lost part of an answer.
        duplicates: examples left out as repeated.
        near_duplicates: examples that nearly repeat an earlier one of the same part.
        leakage: held-out examples whose like is in an earlier part (train, validation, test) of any stage;
            ``leakage_exact`` of them with the very same prompt.
        examples: text and supervised ``[start, end)`` spans of the first few.
        warnings: sentences about what should be looked at.
    """

    name: str
    task: str
    format: str
    rows: int
    sources: tuple[str, ...]
    dropped: Mapping[str, int]
    counts: Mapping[str, int]
    groups: Mapping[str, int]
    supervised: Mapping[str, int]
    lengths: Mapping[str, float]
    truncated: int
    cut_answers: int
    duplicates: int
    near_duplicates: int
    leakage: int
    leakage_exact: int
    end_of_turn: str
    examples: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; the report's ``data[stage]``."""
        out: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            out[name] = (
                dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
            )
        del out["name"]
        out["examples"] = [{"text": text, "supervised": [[*span] for span in spans]} for text, spans in self.examples]
        return out


@dataclass(frozen=True)
class Check:
    """What was found, stage by stage, and in the extra domains of the verdict after them."""

    stages: tuple[StageCheck, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Every warning, with its stage."""
        return tuple(f"{stage.name}: {warning}" for stage in self.stages for warning in stage.warnings)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """JSON-able; the report's ``data``."""
        return {stage.name: stage.as_dict() for stage in self.stages}


def check_data(
    stages: Sequence[StageData],
    renderer: Renderer,
    spec: SplitSpec | None = None,
    domains: Sequence[StageData] = (),
) -> Check:
    """Look at all stages together: what is held out in one must not be trained on in another.

    Args:
        stages: rendered with ``renderer``.
        renderer: for the end-of-turn token and the text of examples.
        spec: as they were split; a part with a share above 0 must not be empty.
        domains: data for the verdict alone, of which nothing but the sealed test is looked at.

    Raises:
        DataError: an empty part, an example with nothing supervised, an answer without its end-of-turn token.
    """
    spec = spec or SplitSpec()
    for stage in (*stages, *domains):
        _refuse_empty(stage, spec, PARTS if stage in stages else ("test",))
    looked_at = [*stages, *(_sealed(domain) for domain in domains)]
    for stage in looked_at:
        _refuse_masked(stage)
        _refuse_endless(stage, renderer)
    found = alike([(stage.name, part, e) for stage in looked_at for part, items in stage.splits.parts() for e in items])
    return Check(tuple(_stage(stage, renderer, found[stage.name]) for stage in looked_at))


def _sealed(domain: StageData) -> StageData:
    """Its sealed test alone: the rest is not read by anything."""
    splits = replace(domain.splits, train=(), validation=())
    return replace(domain, splits=splits, rendered={"train": (), "validation": (), "test": domain.rendered["test"]})


def _refuse_empty(stage: StageData, spec: SplitSpec, needed: Sequence[str]) -> None:
    total = sum(len(examples) for _, examples in stage.splits.parts())
    groups = len({example.group for _, examples in stage.splits.parts() for example in examples})
    for part, examples in stage.splits.parts():
        if not examples and part in needed and getattr(spec, part) > 0:
            raise EmptyPartError(
                f"stage {stage.name}: the {part} part is empty. Its {counted(total, 'example')} make "
                f"{counted(groups, 'group')}, and a hash "
                f"puts {getattr(spec, part):.0%} of the groups there. Give more examples, a larger share, another "
                "seed, or a group column with more values",
                part,
            )


def _refuse_masked(stage: StageData) -> None:
    masked = [
        example.origin or example.gold[:40]
        for example, item in _items(stage)
        if not item.branches or not all(any(branch.supervised) for branch in item.branches)
    ]
    if masked:
        raise DataError(
            f"stage {stage.name}: {counted(len(masked), 'example')} without one supervised token in the answer, so "
            f"there is nothing to learn from: {_few(masked)}. Raise max_length, or leave these rows out (where)"
        )


def _refuse_endless(stage: StageData, renderer: Renderer) -> None:
    endless = [
        example.origin or example.gold[:40]
        for example, item in _items(stage)
        if not _is_cut(item, renderer) and any(branch.ids[-1] != renderer.end_of_turn for branch in item.branches)
    ]
    cut = sum(_is_cut(item, renderer) for item in stage.rendered["train"])
    if endless:
        raise DataError(
            f"stage {stage.name}: {counted(len(endless), 'answer')} without the end-of-turn token "
            f"{renderer.template.end_text!r} at the end, so the model would not learn to stop: {_few(endless)}. "
            "Check the chat template"
        )
    if cut and cut == len(stage.rendered["train"]):
        raise DataError(
            f"stage {stage.name}: every training answer is longer than max_length {renderer.max_length} and loses its "
            "end-of-turn token, so the model would not learn to stop. Raise max_length or shorten the answers"
        )


def _items(stage: StageData) -> list[tuple[Example, Rendered]]:
    return [
        pair for part, examples in stage.splits.parts() for pair in zip(examples, stage.rendered[part], strict=True)
    ]


def _is_cut(item: Rendered, renderer: Renderer) -> bool:
    longest = max(item.branches, key=lambda branch: len(branch.ids)).ids
    return bool(item.truncated) and len(longest) == renderer.max_length and longest[-1] != renderer.end_of_turn


def _stage(stage: StageData, renderer: Renderer, found: Alike) -> StageCheck:
    rendered = [item for _, item in _items(stage)]
    lengths = np.array([item.length for item in rendered])
    truncated = sum(item.truncated > 0 for item in rendered)
    cut = sum(_is_cut(item, renderer) for item in rendered)
    dropped: Counter[str] = Counter()
    for loaded in stage.loaded:
        dropped.update(loaded.dropped)
    counts = {part: len(examples) for part, examples in stage.splits.parts()}
    shown = [renderer.spans(item) for item in rendered[:SHOWN]]
    return StageCheck(
        name=stage.name,
        task=stage.task,
        format=", ".join(dict.fromkeys(loaded.format for loaded in stage.loaded)),
        rows=sum(loaded.rows for loaded in stage.loaded),
        sources=tuple(loaded.describe() for loaded in stage.loaded),
        dropped=dict(dropped),
        counts=counts,
        groups={part: len({example.group for example in examples}) for part, examples in stage.splits.parts()},
        supervised={part: sum(item.supervised for item in items) for part, items in stage.rendered.items()},
        lengths={"mean": round(float(lengths.mean()), 1), "max": int(lengths.max())}
        | {f"p{p}": int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 99)},
        truncated=truncated,
        cut_answers=cut,
        duplicates=stage.splits.duplicates,
        near_duplicates=found.near,
        leakage=len(found.leaks),
        leakage_exact=found.exact,
        end_of_turn=renderer.template.end_text,
        examples=tuple((text, tuple((start, end) for start, end in spans)) for text, spans in shown),
        warnings=tuple(_warnings(stage, renderer, counts, truncated, cut, found.leaks)),
    )


def _warnings(
    stage: StageData, renderer: Renderer, counts: Mapping[str, int], truncated: int, cut: int, leaks: Sequence[str]
) -> list[str]:
    total = sum(counts.values())
    out = list(renderer.notes)
    if 0 < counts["train"] < FEW_TRAIN:
        out.append(
            f"only {counted(counts['train'], 'training example')}: the adapter will hardly learn more than their form"
        )
    for part in ("validation", "test"):
        if 0 < counts[part] < FEW_HELD_OUT:
            out.append(f"only {counted(counts[part], f'{part} example')}: figures made on them have wide intervals")
    if 20 * truncated > total:
        out.append(f"{truncated} of {counted(total, 'example')} cut to max_length {renderer.max_length}")
    if cut:
        out.append(f"{counted(cut, 'answer')} cut off in the middle: longer than max_length {renderer.max_length}")
    if leaks:
        out.append(
            f"{counted(len(leaks), 'held-out example')} with the like in another part (set group): {_few(leaks)}"
        )
    out += _templated(stage.splits)
    if 20 * stage.splits.duplicates > total:
        out.append(f"{counted(stage.splits.duplicates, 'repeated example')} left out")
    return out


def _templated(splits: Splits) -> list[str]:
    """A warning if more than a twentieth of the training examples repeat another with other numbers."""
    examples = [*splits.train, *splits.validation, *splits.test]
    trained = len(splits.train)
    groups = [group for group in but_for_numbers([said(example) for example in examples]) if group[0] < trained]
    repeated = sum(sum(i < trained for i in group) - 1 for group in groups)
    if 20 * repeated <= trained:
        return []
    one, other = (examples[i] for i in max(groups, key=lambda group: sum(i < trained for i in group))[:2])
    pair = " ~ ".join(example.origin or example.prompt[-1].content[:40] for example in (one, other))
    held_out = sum(i >= trained for group in groups for i in group)
    as_well = f", and so do {held_out} of those held out, which then test little" if held_out else ""
    return [
        f"{repeated} of {counted(trained, 'training example')} repeat another with nothing but other numbers "
        f"({pair}: {one.gold.strip()[:60]!r}){as_well}; they teach that one pattern, and count as one example rather "
        "than many"
    ]


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
