"""The flags of ``ft`` and ``dpo``, spelled as in the ecosystem, and the keys of a recipe that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
# Problems that a key has not one flag for, told with the flag that they come from.
PLACES = {"dataset": "stages.0.data", "adapter": "adapters", "val_ratio": "split", "output_dir": "stages.0.name"}


def names() -> dict[str, str]:
    """Key of the recipe → flag."""
    return {path: flag for flag, path in PLACES.items()} | {".".join(map(str, key)): flag for flag, key in KEYS.items()}
