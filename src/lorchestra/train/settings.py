"""The settings of one stage, checked: what the adapter is, how it is trained, what it is trained beside."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Orthogonality(Settings):
    """Keep the rows of A and the columns of B apart; see :mod:`lorchestra.train.orthogonality`.

    ``penalty`` adds ``weight``·‖cos‖² of the normalised rows to the loss; ``projection`` removes from the
    gradient the part that turns rows towards each other. ``against_context`` does the same against the row
    spaces of the context's adapters (O-LoRA, Wang et al. 2023, arXiv 2310.14152).
    """

    mode: Literal["off", "penalty", "projection"] = "off"
    weight: Annotated[float, Field(ge=0)] = 0.1
    against_context: bool = False


class LoraSettings(Settings):
    """The new adapter of a stage. Scaling and initialisation are independent choices."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Positive = 16.0
    scaling: Literal["lora", "rslora", "constant"] = "rslora"
    init: Literal["kaiming", "gaussian", "rescaled", "orthogonal"] = "kaiming"
    sigma: Positive = 0.02
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    orthogonality: Orthogonality = Orthogonality()

    @property
    def scale(self) -> float:
        """s of ΔW = s·B·A: α/r, α/√r or α."""
        if self.scaling == "constant":
            return self.alpha
        return self.alpha / (self.rank if self.scaling == "lora" else math.sqrt(self.rank))

    def at_rank(self, rank: int) -> LoraSettings:
        """Another rank at the same scale."""
        if rank == self.rank:
            return self
        alpha = {"lora": self.scale * rank, "rslora": self.scale * math.sqrt(rank), "constant": self.scale}
        return self.model_copy(update={"rank": rank, "alpha": alpha[self.scaling]})


class TrainSettings(Settings):
    """How a stage is trained. ``max_steps`` wins over ``epochs``; a step is one optimiser update."""

    epochs: Positive = 1.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Positive = 2e-4
    batch_size: Annotated[int, Field(ge=1)] = 8
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    warmup_ratio: Fraction = 0.05
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    eval_every: Annotated[int, Field(ge=1)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    eval_limit: Annotated[int, Field(ge=1)] | None = None
    checkpoint_every: Annotated[int, Field(ge=1)] = 20
    gradient_checkpointing: bool = False
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()


class ContextMember(Settings):
    """One earlier adapter in the context of a stage: its weight, or the schedule of its weight.

    The weight stays at ``weight`` until the fraction ``start`` of the training, moves to ``to`` along the
    ``schedule`` and stays there from ``end`` on. ``step`` jumps at ``start``. ``constant`` ignores the others.
    """

    weight: float = 1.0
    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    to: float = 0.0
    start: Fraction = 0.0
    end: Fraction = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> ContextMember:
        if self.schedule in ("linear", "cosine") and self.start >= self.end:
            raise ValueError(f"start ({self.start}) must come before end ({self.end})")
        return self


class Objective(Settings):
    """What a stage minimises. ``beta`` and ``label_smoothing`` belong to preference tasks."""

    task: Literal["sft", "dpo"] = "sft"
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
