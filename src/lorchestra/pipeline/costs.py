"""What the steps of one recipe will roughly cost, from its rendered data and the shape of its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorchestra.data.render import Rendered
from lorchestra.fusion.search import fixed_points, passes_of, stack_of, weights_key
from lorchestra.objective.batch import length
from lorchestra.pipeline.choosing import domains_of
from lorchestra.pipeline.estimate import (
    DISK,
    PASS,
    POSITIONS,
    RUNTIME,
    SCORING,
    TRAINING,
    Machine,
    Shape,
    scoring_memory,
    training_memory,
)
from lorchestra.pipeline.judging import rivals
from lorchestra.pipeline.prepare import Prepared
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import Stage
from lorchestra.train.context import final_weights
from lorchestra.train.lora import target_paths
from lorchestra.train.schedule import BatchPlan
from lorchestra.train.settings import LoraSettings, TrainSettings
from lorchestra.train.stage import StageInputs

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Outlook:
    """What a stage is about to do; ``None`` where it depends on what is not here yet.

    Args:
        task: ``sft`` or ``dpo``.
        examples: part → count.
        steps: optimiser updates.
        trainable: numbers in the new adapter, exactly.
        rank: of the new adapter; ``None`` where the examples will settle it.
        scaling: how its scale is made.
        scale: s of ΔW = s·B·A.
        supervised: tokens of the training part that the loss counts.
        tokens: tokens that all its steps process together, without validation.
    """

    task: str
    examples: Mapping[str, int]
    steps: int | None
    trainable: int | None
    rank: int | None
    scaling: str
    scale: float | None
    supervised: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Cost:
    """Estimated seconds and bytes at the peak."""

    seconds: float
    memory: float


def outlook_of(recipe: Recipe, stage: Stage, model: Any | None, examples: Mapping[str, int]) -> Outlook:
    """What can be said of a stage without its rendered data.

    Args:
        recipe: of the stage.
        stage: to look at.
        model: of its base, with or without weights, if that is here.
        examples: part → count; empty if the data is not here.
    """
    lora, train, open_keys = recipe.lora_of(stage), recipe.train_of(stage), recipe.open_keys(stage)
    steps = train.max_steps
    if "train" in examples and "train.epochs" not in open_keys:
        steps = BatchPlan([0] * examples["train"], train, recipe.seeds.data, fixed=True).steps
    if "lora.rank" in open_keys:
        scale = lora.scale if "lora.alpha" in open_keys else None  # at another rank, α follows unless it is set
        return Outlook(stage.task, examples, steps, None, None, lora.scaling, scale)
    numbers = None if model is None else trainable(model, lora)
    return Outlook(stage.task, examples, steps, numbers, lora.rank, lora.scaling, lora.scale)


def trainable(model: Any, lora: LoraSettings) -> int:
    """Numbers in a new adapter, exactly: Σ r·(m + n)."""
    return sum(lora.rank * (m + n) for m, n in target_paths(model, lora.target_modules).values())


class Costs:
    """Estimates for a recipe whose base and data are here.

    Args:
        prepared: the recipe with its data.
        model: the base, with or without weights.
        shape: of ``model``.
        machine: measured rates.
    """

    def __init__(self, prepared: Prepared, model: Any, shape: Shape, machine: Machine) -> None:
        self.prepared, self.recipe = prepared, prepared.recipe
        self.model, self.shape, self.machine = model, shape, machine

    def stage(self, stage: Stage) -> tuple[Outlook, Cost]:
        """Of one stage of the recipe."""
        rendered = self.prepared.data[stage.name].rendered
        return self._training(
            stage.task, self.recipe.lora_of(stage), self.recipe.train_of(stage),
            rendered["train"], rendered["validation"], self._numbers(stage.context),
        )  # fmt: skip

    def refit(self, inputs: StageInputs) -> tuple[Outlook, Cost]:
        """Of a stage that is trained again on its λ-validation examples too."""
        return self._training(
            inputs.objective.task, inputs.lora, inputs.train, inputs.items, (), self._numbers(inputs.context),
            inputs.stop,
        )  # fmt: skip

    def mixed(self, inputs: StageInputs) -> tuple[Outlook, Cost]:
        """Of the baseline trained on everything mixed."""
        return self._training("sft", inputs.lora, inputs.train, inputs.items, inputs.validation, 0)

    def search(self) -> Cost:
        """Of the candidates on λ-validation."""
        fusion, members = self.recipe.fusion, self.recipe.members
        fixed = fixed_points(members, {name: self._stack(name, members) for name in members})
        count = passes_of(fusion.strategy, len(members), len(fixed), fusion.candidates)
        seconds, supervised = self._scoring("validation", fusion.validation_limit)
        return Cost(count * seconds, scoring_memory(self.shape, self._numbers(self.recipe.members), supervised))

    def judging(self, limit: int | None, models: int) -> Cost:
        """Of ``models`` models, one after the other, on the sealed tests of all data that are prepared."""
        seconds, supervised = self._scoring("test", limit)
        memory = scoring_memory(self.shape.plain, self._numbers(self.recipe.members), supervised)
        return Cost(models * seconds, memory)

    def fuse(self) -> Cost:
        """Of the fused adapter: read, multiplied, written."""
        numbers = self._numbers(self.recipe.members)
        return Cost(12 * numbers / DISK, RUNTIME + 12 * numbers)

    def merge(self) -> Cost:
        """Of the merged model: written, hashed, and loaded beside the base for the parity check."""
        shape = self.shape.plain
        memory = scoring_memory(shape, self._numbers(self.recipe.members), supervised=256, models=2)
        return Cost((shape.bytes + 3 * self._delivered.bytes) / DISK, memory)

    def evaluate(self) -> Cost:
        """Of every model on the sealed test, and of the answers before and after."""
        evaluate = self.recipe.evaluate
        seconds, supervised = self._scoring("test", evaluate.test_limit)
        stages = [stage.name for stage in self.recipe.stages]
        every = dict.fromkeys([*self.recipe.adapters, *stages])
        last, mixed = self._stack(stages[-1], list(every)), evaluate.mixed_baseline
        models = {weights_key(point) for point in rivals(stages, self.recipe.members, last, mixed).values()}
        seconds *= len(models) + 1 + self.recipe.fusion.refit
        if evaluate.samples:  # a token is made as fast as the weights can be read
            token = 2 * self.shape.bytes / self.machine.bandwidth + self.shape.modules * PASS
            seconds += 2 * evaluate.sample_tokens * token
        # One after the other: the base itself, and what is delivered in its own number format.
        larger = max(self.shape.plain, self._delivered, key=lambda shape: shape.bytes)
        return Cost(seconds, scoring_memory(larger, self._numbers(self.recipe.members), supervised))

    def gate(self) -> Cost:
        """Of one gate: every member scored on its examples, trained through them, scored on λ-validation."""
        gate = self.recipe.fusion.gate
        assert gate is not None
        items = [
            item
            for stage in self.recipe.stages
            for item in self.prepared.data[stage.name].rendered["train"][: gate.examples]
        ]
        members, shape = self._numbers(self.recipe.members), self.shape.plain
        tokens, supervised = sum(map(length, items)), sum(item.supervised for item in items)
        mean = tokens / max(len(items), 1)
        scoring = shape.forward(tokens, supervised, mean) / (SCORING * self.machine.flops)
        training = shape.training(tokens, supervised, mean, members, False) / (TRAINING * self.machine.flops)
        held, widest = self._scoring("validation", self.recipe.fusion.validation_limit)
        seconds = (len(self.recipe.members) + 1) * scoring + gate.epochs * (training + held) + 2 * held
        return Cost(seconds, training_memory(shape, 0, members, POSITIONS, widest, False))

    def judge(self) -> Cost:
        """Of a gate and an oracle on the sealed test, and of what the oracle is chosen from on λ-validation."""
        test, supervised = self._scoring("test", self.recipe.evaluate.test_limit)
        held, _ = self._scoring("validation", self.recipe.fusion.validation_limit)
        seconds = 2 * test + (len(self.recipe.members) + 2) * held
        return Cost(seconds, scoring_memory(self.shape.plain, self._numbers(self.recipe.members), supervised))

    @property
    def _delivered(self) -> Shape:
        """Of the model that the verdict is about: merged, or the base."""
        deliver, plain = self.recipe.deliver, self.shape.plain
        return replace(plain, element=_BYTES.get(deliver.dtype, plain.element)) if deliver.merged else plain

    def basis(self) -> str:
        """How the estimates are made, in a sentence or two."""
        return (
            f"Times and memory are estimates, rough to a factor of two: {self.machine.flops / 1e9:,.0f} GFLOP/s of "
            f"matrix products were measured here just now ({self.machine.device}, {self.machine.dtype}), of which "
            f"training is taken to reach {TRAINING:.0%} and scoring {SCORING:.0%}; 4 FLOP a parameter and token to "
            "train (the base is frozen), 2 to score."
        )

    def _training(
        self,
        task: Literal["sft", "dpo"],
        lora: LoraSettings,
        train: TrainSettings,
        items: Sequence[Rendered],
        validation: Sequence[Rendered],
        context: int,
        stop: int | None = None,
    ) -> tuple[Outlook, Cost]:
        shape = self.shape
        lengths = [length(item) for item in items]
        plan = BatchPlan(lengths, train, self.recipe.seeds.data, fixed=True, stop=stop)
        epochs = plan.last / plan.steps_per_epoch
        mean = sum(lengths) / max(len(lengths), 1)
        tokens, supervised = sum(lengths), sum(item.supervised for item in items)
        numbers = trainable(self.model, lora)
        flop = shape.training(
            epochs * tokens, epochs * supervised, mean, numbers + context, train.gradient_checkpointing
        )
        seconds = flop / (TRAINING * self.machine.flops)

        held = validation[: train.eval_limit]
        times = 1 + math.ceil(plan.last / (train.eval_every or plan.steps_per_epoch))
        passes = times * math.ceil(sum(map(length, held)) / POSITIONS)
        scored = shape.forward(sum(map(length, held)), sum(item.supervised for item in held), mean) * times
        if task == "dpo":  # the reference is scored once
            scored += scored / times + shape.forward(tokens, supervised, mean)
            passes += plan.micro_batches
        seconds += scored / (SCORING * self.machine.flops)
        seconds += (3 * plan.last * train.gradient_accumulation + passes) * shape.modules * PASS
        seconds += 3 * shape.bytes / DISK  # the base is read once, and hashed before and after

        share = supervised / max(tokens, 1)
        positions = max(lengths, default=0) * train.batch_size
        memory = max(
            training_memory(shape, numbers, context, positions, share * positions, train.gradient_checkpointing),
            scoring_memory(shape, 4 * numbers + context, share * POSITIONS),
        )
        outlook = Outlook(
            task=task,
            examples={"train": len(items), "validation": len(validation)},
            steps=plan.last,
            trainable=numbers,
            rank=lora.rank,
            scaling=lora.scaling,
            scale=lora.scale,
            supervised=supervised,
            tokens=round(epochs * tokens),
        )
        return outlook, Cost(seconds, memory)

    def _numbers(self, names: Sequence[str] | Mapping[str, Any]) -> int:
        """Numbers of the adapters ``names`` together, trained or not."""
        brought = self.prepared.adapters
        return sum(
            brought[name].parameters
            if name in brought
            else trainable(self.model, self.recipe.lora_of(self.recipe.stage(name)))
            for name in names
        )

    def _scoring(self, part: Literal["validation", "test"], limit: int | None) -> tuple[float, float]:
        """Seconds of scoring ``part`` on one model, and the supervised tokens of a full batch."""
        verdict = part == "test"  # the search sees the stages' own domains alone, and no choices
        stages = {stage.name for stage in self.recipe.stages}
        domains = domains_of(self.prepared, part, limit, choices=verdict)
        items = [item for name, found in domains.items() if verdict or name in stages for item in found.items]
        tokens, supervised = sum(map(length, items)), sum(item.supervised for item in items)
        flop = self.shape.forward(tokens, supervised, tokens / max(len(items), 1))
        passes = len(domains) + tokens // POSITIONS
        seconds = flop / (SCORING * self.machine.flops) + passes * self.shape.modules * PASS
        return seconds, supervised / max(tokens, 1) * POSITIONS

    def _stack(self, name: str, members: Sequence[str]) -> dict[str, float] | None:
        """What :func:`stack_of` will say of ``name``: a stage's context is known beforehand."""
        if name in self.prepared.adapters:
            brought = {other: self.prepared.adapters[other] for other in members if other in self.prepared.adapters}
            found = stack_of(name, brought)
            return None if found is None else {**dict.fromkeys(members, 0.0), **found}
        final = {other: weight for other, weight in final_weights(self.recipe.stage(name).context).items() if weight}
        if not final.keys() <= set(members):
            return None
        return {**dict.fromkeys(members, 0.0), **final, name: 1.0}
