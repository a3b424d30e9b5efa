"""What one training came to: everything that the tables, plots and verdicts of a sweep are made of, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any, Literal

from lorchestra.evaluate.score import Scores

Metric = Literal["accuracy", "preference_accuracy", "nll"]


@dataclass(frozen=True)
class HeldOut:
    """Scores on the test items.

    Args:
        metric: what the score is; of ``nll`` lower is better.
        values: per item 1 or 0 (a tie is shared), or −Σ log p of the gold answer in nats.
        weights: per item what it counts: 1, or the gold answer's tokens.
        nll: −Σ log p of each gold answer, nats.
        tokens: tokens of each gold answer.
        groups: of each item.
    """

    metric: Metric
    values: tuple[float, ...]
    weights: tuple[float, ...]
    nll: tuple[float, ...]
    tokens: tuple[float, ...]
    groups: tuple[str, ...]

    @classmethod
    def of(cls, scores: Scores) -> HeldOut:
        """Accuracy where every item has a choice, else the loss."""
        nll, tokens = tuple(map(float, scores.nll)), tuple(map(float, scores.gold_tokens))
        correct, _ = scores.correct()
        if len(correct) == len(scores):
            metric: Metric = "preference_accuracy" if scores.kind == "dpo" else "accuracy"
            return cls(metric, tuple(map(float, correct)), (1.0,) * len(scores), nll, tokens, scores.groups)
        return cls("nll", nll, tokens, nll, tokens, scores.groups)

    @property
    def score(self) -> float:
        """The mean."""
        return sum(self.values) / sum(self.weights)

    @classmethod
    def from_dict(cls, value: Any) -> HeldOut:
        """From what ``dataclasses.asdict`` gives, also after a round through JSON."""
        columns = {key: tuple(inner) for key, inner in value.items() if key != "metric"}
        return cls(metric=value["metric"], **columns)


@dataclass(frozen=True)
class Outcome:
    """One finished (or ended) training.

    Args:
        settings: key → value of the cell.
        seed: of the cell.
        fold: of the cell.
        state: ``done``; ``diverged``: a loss or gradient was not finite; ``stopped``: by successive halving.
        step: the last step; where it diverged; of a stopped one the step that decided.
        steps: of a whole training.
        steps_per_epoch: to count epochs.
        examples: part → how many of it are used (``eval_limit`` of the validation part, ``test_limit`` of the test).
        trainable: parameters.
        scale: γ.
        learning_rate: of the cell.
        history: per step: training loss and gradient norm (before clipping).
        validation: step and loss, before the first step included.
        best_step: whose factors were kept and tested; ``None`` without validation.
        seconds: of training and validation.
        tokens: trained on, padding apart.
        test: of the trained stack; ``None`` unless done, or without a test part.
        adapter: content digest.
        digest: of the cached training step.
    """

    settings: Mapping[str, Any]
    seed: int
    fold: int | None
    state: Literal["done", "diverged", "stopped"]
    step: int
    steps: int
    steps_per_epoch: int = 0
    examples: Mapping[str, int] | None = None
    trainable: int = 0
    scale: float = 0.0
    learning_rate: float = 0.0
    history: tuple[tuple[float, float], ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None
    seconds: float = 0.0
    tokens: int = 0
    test: HeldOut | None = None
    adapter: str = ""
    digest: str = ""

    @property
    def validation_loss(self) -> float | None:
        """Of the kept factors; of a stopped cell the last one."""
        after = [loss for step, loss in self.validation if step]
        if not after:
            return None
        return min(after) if self.state == "done" else after[-1]

    @property
    def final_validation_loss(self) -> float | None:
        """After the last step."""
        return self.validation[-1][1] if self.validation else None

    @property
    def worse_than_untrained(self) -> bool:
        """The validation loss after the last step is above that before the first, or there is none."""
        if self.state == "diverged":
            return True
        return len(self.validation) > 1 and self.validation[-1][1] > self.validation[0][1]

    @property
    def final_training_loss(self) -> float | None:
        """Mean over the last epoch's steps."""
        return fmean(loss for loss, _ in self.history[-max(self.steps_per_epoch, 1) :]) if self.history else None

    @property
    def gradient_norm(self) -> float | None:
        """Median over the steps, before clipping."""
        return median(norm for _, norm in self.history) if self.history else None

    @property
    def gap(self) -> float | None:
        """Validation loss minus training loss at the end, nats a token."""
        if self.final_validation_loss is None or self.final_training_loss is None:
            return None
        return self.final_validation_loss - self.final_training_loss

    @property
    def onset(self) -> float | None:
        """Epochs after which the validation loss only rose; ``None`` if its last value is the lowest."""
        trained = [row for row in self.validation if row[0]]
        if not trained or not self.steps_per_epoch:
            return None
        step, _ = min(trained, key=lambda row: row[1])
        return None if step == trained[-1][0] else step / self.steps_per_epoch

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Outcome:
        """From :meth:`as_dict`, also after a round through JSON."""
        read = dict(value)
        for key in ("history", "validation"):
            read[key] = tuple(tuple(row) for row in read[key])
        read["test"] = None if read["test"] is None else HeldOut.from_dict(read["test"])
        return cls(**read)


def finite_history(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float], ...]:
    """Training loss and gradient norm of the steps where both are known."""
    return tuple(
        (float(row["loss"]), float(row["gradient_norm"])) for row in rows if row.get("gradient_norm") is not None
    )
