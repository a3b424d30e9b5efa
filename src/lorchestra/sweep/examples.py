"""What a cell trains and is judged on: the recipe's examples, perturbed as its settings ask, or dealt to folds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorchestra.data.check import StageData
from lorchestra.data.example import Example
from lorchestra.data.perturb import imbalanced, subset, with_label_noise
from lorchestra.data.split import Splits, SplitSpec, normalise, part_of
from lorchestra.errors import UserError
from lorchestra.pipeline.prepare import Prepared, split_spec


def perturbed(prepared: Prepared, stage: str, settings: Mapping[str, Any], seed: int) -> Prepared:
    """``prepared`` with the stage's training examples changed as ``settings`` ask; validation and test stay clean.

    Raises:
        DataError: see :func:`changed`.
    """
    splits = prepared.data[stage].splits
    train = changed(splits.train, settings, seed)
    return prepared if train == splits.train else _with(prepared, stage, replace(splits, train=train))


def changed(train: tuple[Example, ...], settings: Mapping[str, Any], seed: int) -> tuple[Example, ...]:
    """Training examples thinned to ``data.imbalance``, then to ``data.size``, then mislabelled to ``data.noise``.

    Raises:
        DataError: too few examples, no classes, or amounts that make no sense.
    """
    if (ratio := settings.get("data.imbalance")) is not None:
        train = imbalanced(train, ratio, seed)
    if (size := settings.get("data.size")) is not None:
        train = subset(train, size, seed)
    if share := settings.get("data.noise"):
        train = with_label_noise(train, share, seed)
    return train


def folded(prepared: Prepared, stage: str, fold: int, folds: int) -> Prepared:
    """``prepared`` with fold ``fold`` (from 0) of ``folds`` as the stage's test; the rest is split as the recipe asks.

    A group is in one fold, by its hash. Of the others, validation has the share it has beside training in the recipe.

    Raises:
        UserError: the stage has a context, which was trained on the recipe's own split; or a fold would be empty.
    """
    recipe = prepared.recipe
    if recipe.stage(stage).context:
        raise UserError(
            f"folds: stage {stage!r} has a context that was trained on the recipe's own split, so other folds of it "
            "would be judged on what the context has seen; sweep it on the split (folds: null), or without its context"
        )
    data, spec = prepared.data[stage], split_spec(recipe)
    shares = spec.train + spec.validation
    inner = SplitSpec(spec.train / shares, 1 - spec.train / shares, 0.0, spec.seed + 1)
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for _, examples in data.splits.parts():
        for example in examples:
            part = "test" if fold_of(example, folds, spec.seed) == fold else part_of(_group(example), inner)
            parts[part].append(example)
    wanted = ["train", "test", *(["validation"] if spec.validation else [])]
    if empty := [part for part in wanted if not parts[part]]:
        raise UserError(
            f"folds: {folds} are too many for {sum(map(len, parts.values()))} examples: nothing is left for the "
            f"{empty[0]} part of fold {fold + 1}; ask for fewer"
        )
    for part in ("validation", "test"):  # by hash, so that the first n are a fair sample
        parts[part].sort(key=lambda example: _hash(example, f"{spec.seed}\norder"))
    train, validation, test = (tuple(examples) for examples in parts.values())
    return _with(prepared, stage, Splits(train, validation, test, data.splits.duplicates))


def fold_of(example: Example, folds: int, seed: int) -> int:
    """The fold of an example's group: a function of the seed, the number of folds and the group alone."""
    return int.from_bytes(_hash(example, f"{seed}\nfold")[:8], "big") % folds


def _hash(example: Example, salt: str) -> bytes:
    return hashlib.sha256(f"{salt}\n{normalise(_group(example))}".encode()).digest()


def _group(example: Example) -> str:
    return example.group or "\n".join(f"{turn.role}: {turn.content}" for turn in example.prompt)


def _with(prepared: Prepared, stage: str, splits: Splits) -> Prepared:
    data = prepared.data[stage]
    again = StageData.render(data.name, data.task, data.loaded, splits, prepared.renderer)  # type: ignore[arg-type]
    return replace(prepared, data={**prepared.data, stage: again})
