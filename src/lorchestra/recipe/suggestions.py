"""What a recipe leaves open, settled from the stage's examples: a hundred want other settings than ten thousand.

Every number stands in a table here, with what it rests on. Values and reasons are printed; a key that is set anywhere
is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lorchestra.errors import counted
from lorchestra.stats.intervals import Interval
from lorchestra.train.settings import LoraSettings, TrainSettings

if TYPE_CHECKING:
    from lorchestra.recipe.recipe import Recipe
    from lorchestra.recipe.sections import Stage

Task = Literal["sft", "dpo"]


class Row(NamedTuple):
    """``value`` for less than ``below`` examples, and what that rests on."""

    below: float
    value: float
    why: str


_ANY = math.inf
RANKS = (
    Row(10_000, 8, "measured: with 200, r 4 learns less and 16 to 64 are not told from 8 (docs/rs-lora.md)"),
    Row(_ANY, 16, "above the article's r 4 to 8 for less than 10,000; convention"),
)
DROPOUTS = (
    Row(100, 0.1, "the fewer, the sooner they are learned by heart; 0.1 is the article's"),
    Row(500, 0.05, "the fewer, the sooner they are learned by heart; convention"),
    Row(_ANY, 0.0, "enough to do without; convention"),
)
RATES: Mapping[Task, tuple[Row, ...]] = {
    "sft": (
        Row(500, 5e-4, "measured: with 100, 2e-4 learns less and 1e-3 answers worse (docs/rs-lora.md)"),
        Row(_ANY, 2e-4, "convention (QLoRA's, arXiv 2305.14314)"),
    ),
    "dpo": (Row(_ANY, 5e-5, "preferences want a smaller one than answers; convention"),),
}
PATIENCE = Row(500, 3, "validations without a better one; the best is kept; convention")
FOLDS = ((20, 5), (200, 10), (1000, 5))  # for less examples than the first; from 1,000 on a hold-out test tells enough

UPDATES = 150  # that a stage takes at least, unless that were too many times through its examples; convention
SHORT = 32  # tokens to learn of an answer: up to here a label or a phrase, which does not repeat a text word for word
MOST: Mapping[str, tuple[int, str]] = {
    "short answers": (6, "convention"),
    "long answers": (4, "arXiv 2305.16264"),  # four times are nearly as good as fresh data
    "pairs": (3, "convention"),
}
FULL_SCALE = LoraSettings().scale  # that the learning rates are made for
DISAGREE = 0.2  # share of the questions that one of two models answers right and the other wrong; an assumption


@dataclass(frozen=True)
class Suggestion:
    """A value, and why: ``key`` is the recipe's (``lora.rank``), or ``folds`` for the advice on how to judge."""

    key: str
    value: float | None
    reason: str

    @property
    def advice(self) -> bool:
        """It is told, and changes nothing."""
        return self.key == "folds"

    @property
    def text(self) -> str:
        """``lora.rank 8 (240 examples: …)``: what to set to choose otherwise, the value, the reason."""
        return self.said if self.advice else f"{self.key} {self.said}"

    @property
    def said(self) -> str:
        """The value, and the reason."""
        value = "a hold-out test" if self.value is None else f"{self.value:.4g}{' folds' if self.advice else ''}"
        return f"{value} ({self.reason})"


@dataclass(frozen=True)
class StageExamples:
    """What is known of a stage's examples.

    Args:
        train: examples to train on.
        validation: examples for early stopping.
        test: examples that are held out for the verdict.
        tokens: mean of the tokens to learn of a training example (of a pair: of one of its answers).
    """

    train: int
    validation: int
    test: int
    tokens: float


def suggest_rank(n: int) -> Suggestion:
    """r for ``n`` training examples."""
    row = _row(RANKS, n)
    return Suggestion("lora.rank", int(row.value), f"{_examples(n)}: {row.why}")


def suggest_dropout(n: int) -> Suggestion:
    """Dropout of the inputs of A for ``n`` training examples."""
    row = _row(DROPOUTS, n)
    return Suggestion("lora.dropout", row.value, f"{_examples(n)}: {row.why}")


def suggest_learning_rate(n: int, task: Task, scale: float = FULL_SCALE) -> Suggestion:
    """The highest learning rate: scale × rate is what moves ΔW under Adam, so a larger scale has a smaller one.

    Args:
        n: training examples.
        task: of the stage.
        scale: s of ΔW = s·B·A.
    """
    row = _row(RATES[task], n)
    if scale <= FULL_SCALE * (1 + 1e-9):
        return Suggestion("train.learning_rate", row.value, f"{_examples(n)}: {row.why}")
    value = float(f"{row.value * FULL_SCALE / scale:.1e}")
    return Suggestion(
        "train.learning_rate",
        value,
        f"{_examples(n)}: {row.value:g} for a scale up to {FULL_SCALE:.3g}, less for {scale:.3g}; {row.why}",
    )


def suggest_epochs(n: int, task: Task, tokens: float, batch: int) -> Suggestion:
    """Times through the examples: for enough updates, and not so often that they are learned by heart.

    Args:
        n: training examples.
        task: of the stage.
        tokens: mean of the tokens to learn of an example.
        batch: examples an update.
    """
    kind = "pairs" if task == "dpo" else "short answers" if tokens <= SHORT else "long answers"
    most, why = MOST[kind]
    updates = max(1, math.ceil(n / batch))
    value = min(most, math.ceil(UPDATES / updates))
    capped = f", at most {most} times through {kind} ({why})" if value == most else "; convention"
    return Suggestion(
        "train.epochs",
        float(value),
        f"{_examples(n)}: about {UPDATES} updates are wanted, {updates:,} an epoch{capped}",
    )


def suggest_patience(n: int) -> Suggestion | None:
    """Validations to wait for a better one; ``None``: train to the end."""
    if n >= PATIENCE.below:
        return None
    return Suggestion("train.patience", int(PATIENCE.value), f"{_examples(n)}: {PATIENCE.why}")


def suggest_folds(n: int, held_out: int | None = None) -> Suggestion:
    """How to judge with ``n`` examples in all: value 10 or 5 folds, or ``None``, a test that is held out.

    Args:
        n: examples before any split.
        held_out: of them, those of a hold-out test; a tenth by default.
    """
    held_out = n // 10 if held_out is None else held_out
    folds = next((folds for below, folds in FOLDS if n < below), None)
    if folds is None:
        reason = f"{_examples(n)}: {held_out:,} of them tell accuracies apart that differ by {_apart(held_out)}"
        return Suggestion("folds", None, reason)
    return Suggestion(
        "folds",
        folds,
        f"{_examples(n)}: a hold-out test of {held_out:,} tells accuracies apart that differ by {_apart(held_out)}, "
        f"all of them by {_apart(n)}; `lorchestra sweep` with folds: {folds} tests on every example once",
    )


def detectable(n: int) -> float:
    """The difference of two models' accuracies on the same ``n`` questions that is found four times out of five."""
    return Interval(0.0, 0.0, 0.0, n, error=math.sqrt(DISAGREE / n)).detectable or 0.0 if n else math.inf


def lines(suggestions: Mapping[str, Sequence[Suggestion]]) -> list[str]:
    """What was suggested for each stage, for the person who is watching: a line each, and one before them."""
    settled = [f"  {name}: {found.text}" for name, stage in suggestions.items() for found in stage if not found.advice]
    if settled:
        settled.insert(0, "not set, so settled from the examples (set a key to choose otherwise):")
    judge = [f"  {name}: {found.text}" for name, stage in suggestions.items() for found in stage if found.advice]
    if judge:
        judge.insert(0, "to judge stages with so many examples:")
    return [*settled, *judge]


def plain(suggestions: Mapping[str, Sequence[Suggestion]]) -> dict[str, list[dict[str, Any]]]:
    """As JSON."""
    return {name: [asdict(found) for found in stage] for name, stage in suggestions.items()}


def settle(recipe: Recipe, data: Mapping[str, StageExamples]) -> tuple[Recipe, dict[str, tuple[Suggestion, ...]]]:
    """The recipe with every stage settled, and stage → what was suggested, the advice on how to judge last.

    Args:
        recipe: as written.
        data: stage → its examples.
    """
    stages, told = [], {}
    for stage in recipe.stages:
        known = data[stage.name]
        settled, found = settle_stage(recipe, stage, known)
        judged = min(known.test, recipe.evaluate.test_limit or known.test) or None
        told[stage.name] = (*found, suggest_folds(known.train + known.validation + known.test, judged))
        stages.append(settled)
    return recipe.model_copy(update={"stages": tuple(stages)}), told


def settle_stage(recipe: Recipe, stage: Stage, data: StageExamples) -> tuple[Stage, tuple[Suggestion, ...]]:
    """The stage with its open keys (:meth:`Recipe.open_keys`) written on it, and what was suggested.

    An open key for which nothing is suggested has its plain default. A settled stage stays as it is.
    """
    open_keys = recipe.open_keys(stage)
    lora, train, found = _suggested(stage.task, data, recipe.lora_of(stage), recipe.train_of(stage), open_keys)
    values = {"lora": lora.model_dump(mode="json"), "train": train.model_dump(mode="json")}
    written: dict[str, dict[str, Any]] = {"lora": dict(stage.lora), "train": dict(stage.train)}
    for key in open_keys:
        section, _, name = key.partition(".")
        written[section][name] = values[section][name]
    return stage.model_copy(update=written), found


def _suggested(
    task: Task, data: StageExamples, lora: LoraSettings, train: TrainSettings, open_keys: Sequence[str]
) -> tuple[LoraSettings, TrainSettings, tuple[Suggestion, ...]]:
    n, found = data.train, list[Suggestion]()
    if "lora.rank" in open_keys:
        found.append(suggest_rank(n))
        rank = int(found[-1].value or 0)
        if "lora.alpha" in open_keys:
            default, lora = lora, lora.at_rank(rank)
            if lora.alpha != default.alpha:
                why = f"keeps the scale {lora.scale:.3g} that r {default.rank} and α {default.alpha:g} have"
                found.append(Suggestion("lora.alpha", lora.alpha, why))
        else:
            lora = lora.model_copy(update={"rank": rank})
    if "lora.dropout" in open_keys:
        found.append(suggest_dropout(n))
        lora = lora.model_copy(update={"dropout": found[-1].value})
    if "train.epochs" in open_keys:
        batch = train.batch_size * train.gradient_accumulation
        found.append(suggest_epochs(n, task, data.tokens, batch))
        train = train.model_copy(update={"epochs": found[-1].value})
        patience = suggest_patience(n) if data.validation and "train.patience" in open_keys else None
        if patience is not None:
            found.append(patience)
            train = train.model_copy(update={"patience": patience.value})
    if "train.learning_rate" in open_keys:
        found.append(suggest_learning_rate(n, task, lora.scale))
        train = train.model_copy(update={"learning_rate": found[-1].value})
    return lora, train, tuple(found)


def _row(table: Sequence[Row], n: int) -> Row:
    return next(row for row in table if n < row.below)


def _examples(n: int) -> str:
    return counted(n, "example")


def _apart(n: int) -> str:
    least = detectable(n)
    return f"{least:.2f} or more" if least < 1 else "more than there is"
