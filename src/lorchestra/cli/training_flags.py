"""The flags of ``ft`` and ``dpo``, spelled as in the ecosystem, and the keys of a recipe that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from lorchestra.cli.completion import adapters, among, listed_among, models
from lorchestra.cli.options import Device, Dtype, Field, Format, Json

Verb = Callable[[typer.Context], None]

# For Tab. What is right is decided by the settings of a stage (train/settings.py).
SCALINGS = ("lora", "rslora", "constant")
INITS = ("kaiming", "gaussian", "rescaled", "orthogonal")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
TRACKERS = ("tensorboard", "wandb", "mlflow")
TARGETS = ("all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_LORA, _TRAINING, _DATA, _CONTEXT, _RUN = "Adapter", "Training", "Data", "Context", "Run"
SETTLED = "from the number of examples"  # where a flag is not given; see recipe/suggestions.py


def _flag(
    panel: str | None, name: str, value: str | None, help: str, *, short: str = "", tab: Any = None, **more: Any
) -> Any:
    """``--name VALUE`` in a panel of the help; ``tab`` offers values. ``value`` ``None``: a switch."""
    names = (f"--{name}", short) if short else (f"--{name}",)
    return typer.Option(*names, metavar=value, help=help, rich_help_panel=panel, autocompletion=tab, **more)


Model = Annotated[
    str,
    _flag(None, "model_name_or_path", "BASE", "A directory, org/name, GGUF file or pip: source.", tab=models),
]
Dataset = Annotated[list[str], _flag(None, "dataset", "DATA", "Files, hf: or pip: sources, with commas.")]
OutputDir = Annotated[Path, _flag(None, "output_dir", "DIR", "Where the adapter goes.", short="-o")]

PeftType = Annotated[str, _flag(_LORA, "peft_type", "TYPE", "Only lora.", tab=among("lora"))]
Rank = Annotated[int | None, _flag(_LORA, "lora_rank", "N", "r.", show_default=SETTLED)]
Alpha = Annotated[
    float | None, _flag(_LORA, "lora_alpha", "X", "α.", show_default="16; without --lora_rank, of the same scale")
]
Dropout = Annotated[float | None, _flag(_LORA, "lora_dropout", "X", "Of the inputs of A.", show_default=SETTLED)]
Targets = Annotated[
    str,
    _flag(_LORA, "target_modules", "NAMES", "all-linear, or names with commas.", tab=listed_among(*TARGETS)),
]
Scaling = Annotated[
    str, _flag(_LORA, "scaling", "NAME", "lora (α/r), rslora (α/√r) or constant (α).", tab=among(*SCALINGS))
]
Init = Annotated[
    str,
    _flag(_LORA, "init_method", "NAME", "Of A: kaiming, gaussian, rescaled (σ/√r) or orthogonal.", tab=among(*INITS)),
]
Sigma = Annotated[float, _flag(_LORA, "sigma", "X", "σ of the rescaled initialisation.")]

Epochs = Annotated[
    float | None, _flag(_TRAINING, "num_train_epochs", "X", "Times through the examples.", show_default=SETTLED)
]
MaxSteps = Annotated[int | None, _flag(_TRAINING, "max_steps", "N", "Optimiser steps, instead of epochs.")]
Rate = Annotated[
    float | None, _flag(_TRAINING, "learning_rate", "X", "Highest, after the warm-up.", show_default=SETTLED)
]
Batch = Annotated[int, _flag(_TRAINING, "per_device_train_batch_size", "N", "Examples a micro-batch.")]
Accumulation = Annotated[int, _flag(_TRAINING, "gradient_accumulation_steps", "N", "Micro-batches a step.")]
Schedule = Annotated[
    str, _flag(_TRAINING, "lr_scheduler_type", "NAME", "cosine, linear, constant, …", tab=among(*SCHEDULES))
]
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
Loss = Annotated[str, _flag(_TRAINING, "loss_type", "NAME", "sigmoid or ipo.", tab=among("sigmoid", "ipo"))]
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
    _flag(
        _CONTEXT,
        "ref_adapter_path",
        "DIR[=WEIGHT]",
        "Adapter that policy and reference stand on, frozen.",
        tab=adapters,
    ),
]
Beside = Annotated[
    list[str] | None,
    _flag(
        _CONTEXT,
        "adapter",
        "DIR[=WEIGHT]",
        "Earlier adapter, active and frozen. Repeat.",
        short="-a",
        tab=adapters,
    ),
]

ReportTo = Annotated[
    str,
    _flag(
        _RUN,
        "report_to",
        "NAMES",
        "none, tensorboard, wandb, mlflow, with commas.",
        tab=listed_among("none", *TRACKERS),
    ),
]
LogDir = Annotated[Path | None, _flag(_RUN, "logging_dir", "DIR", "Of the trackers.", show_default="runs/NAME")]
SaveSteps = Annotated[int, _flag(_RUN, "save_steps", "N", "Checkpoint every N steps.")]

# Name → type and default, in the order of the help. A flag without a default is required.
SHARED: dict[str, tuple[Any, Any]] = {
    "model_name_or_path": (Model, Parameter.empty),
    "dataset": (Dataset, Parameter.empty),
    "output_dir": (OutputDir, Parameter.empty),
    "peft_type": (PeftType, "lora"),
    "lora_rank": (Rank, None),
    "lora_alpha": (Alpha, None),
    "lora_dropout": (Dropout, None),
    "target_modules": (Targets, "all-linear"),
    "scaling": (Scaling, "rslora"),
    "init_method": (Init, "kaiming"),
    "sigma": (Sigma, 0.02),
    "num_train_epochs": (Epochs, None),
    "max_steps": (MaxSteps, None),
    "learning_rate": (Rate, None),
    "per_device_train_batch_size": (Batch, 8),
    "gradient_accumulation_steps": (Accumulation, 1),
    "lr_scheduler_type": (Schedule, "cosine"),
    "warmup_ratio": (Warmup, 0.05),
    "weight_decay": (Decay, 0.0),
    "max_grad_norm": (Clip, 1.0),
    "eval_steps": (EvalSteps, None),
    "early_stopping_patience": (Patience, 2),
    "gradient_checkpointing": (Recompute, False),
    "seed": (Seed, 0),
    "data_seed": (DataSeed, None),
    "val_ratio": (ValRatio, None),
    "max_length": (MaxLength, 1024),
    "max_samples": (MaxSamples, None),
    "system": (System, None),
    "format": (Format, "auto"),
    "field": (Field, None),
    "adapter": (Beside, None),
    "report_to": (ReportTo, "none"),
    "logging_dir": (LogDir, None),
    "save_steps": (SaveSteps, 20),
    "device": (Device, "auto"),
    "dtype": (Dtype, "auto"),
    "as_json": (Json, False),
}
PREFERENCE: dict[str, tuple[Any, Any]] = {
    "ref_adapter_path": (Reference, None),
    "beta": (Beta, 0.1),
    "loss_type": (Loss, "sigmoid"),
    "label_smoothing": (Smoothing, 0.0),
}


def taking(table: Mapping[str, tuple[Any, Any]]) -> Callable[[Verb], Verb]:
    """Give a verb the flags of ``table``; it reads them from ``context.params``."""

    def give(verb: Verb) -> Verb:
        flags = {
            name: Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for name, (kind, default) in table.items()
        }

        @wraps(verb)
        def with_flags(context: typer.Context, **asked: Any) -> None:
            verb(context)

        of_context = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        with_flags.__annotations__ = {
            "context": typer.Context,
            **{name: flag.annotation for name, flag in flags.items()},
        }
        with_flags.__signature__ = Signature([of_context, *flags.values()])  # type: ignore[attr-defined]
        return with_flags

    return give


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


def names(asked: Mapping[str, Any]) -> dict[str, str]:
    """Key of the recipe → flag, as ``asked``: a brought-in adapter may be from either of two."""
    found = {path: flag for flag, path in PLACES.items()} | {
        ".".join(map(str, key)): flag for flag, key in KEYS.items()
    }
    if not asked.get("adapter"):
        found["adapters"] = "ref_adapter_path"
    return found
