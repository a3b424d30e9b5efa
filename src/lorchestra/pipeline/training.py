"""Training steps of a run: stages, and the baseline that is trained on everything mixed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.digest import json_digest
from lorchestra.adapter.lineage import BaseId
from lorchestra.base.nf4 import NF4
from lorchestra.data.render import Rendered
from lorchestra.errors import UserError
from lorchestra.events import Reporter
from lorchestra.pipeline.cache import SCRATCH, Step, StepCache, step_digest, write_json
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared, examples_of, rendered_digest
from lorchestra.pipeline.prototyping import write_prototypes
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import Stage
from lorchestra.recipe.suggestions import settle_stage
from lorchestra.train.settings import ContextMember, LoraSettings, Objective, TrainSettings
from lorchestra.train.stage import StageInputs, stage_lineage, train_stage

VERSION = 6  # raise it when the same settings would train another adapter


@dataclass(frozen=True)
class Trained:
    """A finished stage: its adapter, how training went (``training.json``), and its step."""

    adapter: Adapter
    training: Mapping[str, Any]
    step: Step


def stage_inputs(prepared: Prepared, stage: Stage, context: Mapping[str, tuple[Adapter, ContextMember]]) -> StageInputs:
    """What a stage of the recipe depends on; keys that it leaves open are settled from its data."""
    recipe, data = prepared.recipe, prepared.data[stage.name]
    stage, _ = settle_stage(recipe, stage, examples_of(data))
    items = data.rendered["train"]
    return StageInputs(
        name=stage.name,
        objective=stage.objective,
        lora=recipe.lora_of(stage),
        train=recipe.train_of(stage),
        items=items,
        validation=data.rendered["validation"],
        context=context,
        init_seed=recipe.seeds.init,
        data_seed=recipe.seeds.data,
        data={found.source: found.digest for found in data.loaded},
        salt=salt_of(items, [adapter for adapter, _ in context.values()]),
        quantised=quantised(recipe),
    )


def salt_of(items: Sequence[Rendered], context: Sequence[Adapter] = ()) -> str:
    """What sets a stage's start apart from the others': what it trains on, not what it is called or where it stands.

    So a stage that is renamed, moved or taken into another recipe is the same step.
    """
    return json_digest([rendered_digest(items), [adapter.digest for adapter in context]])


def quantised(recipe: Recipe) -> str:
    """``nf4`` where the base is held so while stages train; else empty."""
    return NF4 if recipe.dtype == NF4 else ""


def mixed_inputs(prepared: Prepared, tokens: int) -> StageInputs:
    """One adapter on all stages' data mixed, with the stages' parameters and tokens.

    Its rank is the sum of the stages' ranks at the first stage's scale; it sees every stage's training examples (of
    a preference pair the chosen answer), for ``tokens`` tokens: as many as the stages processed together. Its best
    checkpoint is chosen on the validation examples of every stage, as many as that stage used; it does not stop early.

    Raises:
        UserError: the stages change different modules, so that no one rank has their parameters.
    """
    recipe = prepared.recipe
    first = recipe.stages[0]
    lora = recipe.lora_of(first)
    targets = {recipe.lora_of(stage).target_modules for stage in recipe.stages}
    if len(targets) > 1:
        raise UserError(
            "evaluate.mixed_baseline: the stages have different target_modules, so one adapter cannot have as many "
            "parameters as they have together; give them the same, or leave the baseline out"
        )
    rank = sum(recipe.lora_of(stage).rank for stage in recipe.stages)
    items: list[Rendered] = []
    validation: list[Rendered] = []
    for stage in recipe.stages:
        rendered = prepared.data[stage.name].rendered
        items += _chosen(rendered["train"])
        validation += _chosen(rendered["validation"][: recipe.train_of(stage).eval_limit])
    train = recipe.train_of(first)
    steps_an_epoch = math.ceil(math.ceil(len(items) / train.batch_size) / train.gradient_accumulation)
    a_step = sum(item.length for item in items) / steps_an_epoch
    settings = {"max_steps": max(1, round(tokens / a_step)), "eval_every": None, "eval_limit": None, "patience": None}
    return StageInputs(
        name="mixed",
        objective=Objective(),
        lora=lora.at_rank(rank),
        train=train.model_copy(update=settings),
        items=items,
        validation=validation,
        context={},
        init_seed=recipe.seeds.init,
        data_seed=recipe.seeds.data,
        data={found.source: found.digest for stage in recipe.stages for found in prepared.data[stage.name].loaded},
        salt=salt_of(items),
        quantised=quantised(recipe),
    )


def budget(stages: Iterable[Trained], mixed: Trained) -> str:
    """``mixed: 270,102 tokens, 7,326,720 parameters; in stages: 270,455 tokens, 7,326,720 parameters``."""

    def spent(trained: Iterable[Trained]) -> str:
        training = [found.training for found in trained]
        tokens, parameters = (sum(int(t[key]) for t in training) for key in ("tokens", "trainable"))
        return f"{tokens:,} tokens, {parameters:,} parameters"

    return f"mixed: {spent([mixed])}; in stages: {spent(list(stages))}"


def _chosen(items: Sequence[Rendered]) -> list[Rendered]:
    return [Rendered(item.prompt, item.branches[:1], item.truncated) for item in items]


def stage_digest(prepared: Prepared, inputs: StageInputs, device: str, dtype: str) -> str:
    """Digest of a training step: base, rendered data, context, and the settings that matter to its adapter.

    What does not: names (of the stage, its context, its data), ``report_to``, ``checkpoint_every``, and every setting
    that another one switches off.
    """
    used = inputs.validation[: inputs.train.eval_limit]
    settings = {
        "objective": _objective(inputs.objective),
        "lora": _lora(inputs.lora, bool(inputs.context)),
        "train": _train(inputs.train, bool(used)),
        "context": [_member(member) for _, member in inputs.context.values()],
        "seeds": [inputs.init_seed, inputs.data_seed],
        "device": device,
        "dtype": dtype,
        **({} if inputs.stop is None else {"stop": inputs.stop}),
    }
    needs = {
        "base": prepared.base_digest,
        "salt": inputs.salt,
        "train": rendered_digest(inputs.items),
        "validation": rendered_digest(used),
        "context": [adapter.digest for adapter, _ in inputs.context.values()],
    }
    return step_digest("stage", VERSION, settings, needs)


def _objective(objective: Objective) -> dict[str, Any]:
    if objective.task == "sft":
        return {"task": "sft"}
    return objective.model_dump(mode="json", exclude={"label_smoothing"} if objective.loss == "ipo" else None)


def _lora(lora: LoraSettings, context: bool) -> dict[str, Any]:
    settings = lora.model_dump(mode="json", exclude=None if lora.init == "rescaled" else {"sigma"})
    if lora.target_modules != "all-linear":
        settings["target_modules"] = sorted(set(lora.target_modules))
    keep_apart = settings["orthogonality"]
    if keep_apart["mode"] != "penalty":
        del keep_apart["weight"]
    if keep_apart["mode"] == "off" or not context:
        del keep_apart["against_context"]
    return settings


def _train(train: TrainSettings, validated: bool) -> dict[str, Any]:
    unused = {"report_to", "checkpoint_every", "eval_limit"}  # the digest of the validation items tells how many
    if train.max_steps is not None:
        unused.add("epochs")
    if train.scheduler == "constant":
        unused.add("warmup_ratio")
    if not validated:
        unused |= {"eval_every", "patience"}
    return train.model_dump(mode="json", exclude=unused)


def _member(member: ContextMember) -> dict[str, Any]:
    if member.schedule == "constant" or member.weight == member.to:
        return {"weight": member.weight}
    return member.model_dump(mode="json", exclude={"end"} if member.schedule == "step" else None)


def load_trained(step: Step, inputs: StageInputs, base: BaseId) -> Trained:
    """Read a finished training step, under the names and settings of the recipe at hand.

    It may have been made by another recipe, with other names: the factors are the same, what is told of them is ours.
    """
    training = json.loads((step.directory / "training.json").read_text(encoding="utf-8"))
    stored = Adapter.load(step.directory / "adapter")
    lineage = stage_lineage(inputs, training["best_loss"], training["best_step"])
    adapter = replace(stored, base=base, lineage=replace(lineage, tools=stored.lineage.tools))
    ours = dict(zip((parent.name for parent in stored.lineage.context), inputs.context, strict=True))
    for row in training["history"]:
        if "context" in row:
            row["context"] = {ours.get(name, name): weight for name, weight in row["context"].items()}
    return Trained(adapter, training | _told(inputs), step)


def _told(inputs: StageInputs) -> dict[str, Any]:
    return {
        "scale": inputs.lora.scale,
        "lora": inputs.lora.model_dump(mode="json"),
        "train": inputs.train.model_dump(mode="json"),
        "objective": inputs.objective.model_dump(mode="json"),
    }


def train(
    prepared: Prepared,
    inputs: StageInputs,
    base: LazyBase,
    cache: StepCache,
    digest: str,
    reporter: Reporter,
    logs: Path,
    pause: float | None = None,
) -> Trained:
    """Train, or go on, or find it done.

    Raises:
        PausedError: at the first validation after the share ``pause`` of the steps; training again goes on from there.
    """

    def make(work: Path) -> dict[str, Any]:
        loaded = base.load()
        result = train_stage(
            loaded.model, prepared.base, loaded.pad_id, inputs, work / SCRATCH,
            reporter=reporter, log_directory=logs, pause=pause,
        )  # fmt: skip
        result.adapter.save(work / "adapter")
        write_prototypes(loaded.model, result.adapter, inputs.items, work / "adapter", reporter)
        training = {
            **asdict(result.progress),
            "steps": result.steps,
            "steps_per_epoch": result.steps_per_epoch,
            "trainable": result.trainable,
            "first_preference_loss": result.first_preference_loss,
            **_told(inputs),
        }
        write_json(work / "training.json", training)
        return {"adapter": result.adapter.digest, "seconds": result.progress.seconds}

    return load_trained(cache.build("stage", digest, make, reporter.say), inputs, prepared.base)


def context_of(
    recipe: Recipe, stage: Stage, adapters: Mapping[str, Adapter]
) -> dict[str, tuple[Adapter, ContextMember]]:
    """The context of ``stage``, in the recipe's order of adapters and stages."""
    order = [*recipe.adapters, *(s.name for s in recipe.stages)]
    return {name: (adapters[name], stage.context[name]) for name in sorted(stage.context, key=order.index)}
