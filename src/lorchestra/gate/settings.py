"""How a gate is built and trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorchestra.errors import UserError
from lorchestra.gate.network import Activation


@dataclass(frozen=True)
class FitSettings:
    """See :class:`~lorchestra.gate.network.GateSpec` for what it is.

    Args:
        activation: ``softmax``, ``sigmoid`` or ``linear``.
        layers: l of the features.
        last_token: the last token's state is a feature too.
        hidden: units of a hidden layer; 0: linear.
        groups: of layers with coefficients of their own; 1: one for all.
        top_k: members that act at most. Training is with all of them, validation as it will be used.
        none: the base competes.
        temperature: of the activation.
        epochs: end to end; 0 keeps the warm start.
        learning_rate: of Adam (Kingma and Ba 2015, arXiv 1412.6980).
        batch_size: examples a step.
        patience: validations without a better one, after which training ends.
        entropy: weight of the mean entropy of a prompt's coefficients, which is made larger.
        balance: weight of 1 − the entropy of the mean coefficients over its maximum (after the load-balancing loss of
            Fedus et al. 2022, arXiv 2101.03961).
        keep_prompts: the gate's file keeps the beginnings of its training prompts, to explain choices by.
        seed: of the hidden layer and of the order of the examples.

    Raises:
        UserError: a number out of range.
    """

    activation: Activation = "softmax"
    layers: int = 0
    last_token: bool = False
    hidden: int = 0
    groups: int = 1
    top_k: int | None = None
    none: bool = False
    temperature: float = 1.0
    epochs: float = 2.0
    learning_rate: float = 1e-3
    batch_size: int = 8
    patience: int = 3
    entropy: float = 0.0
    balance: float = 0.01
    keep_prompts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("groups", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("epochs", "entropy", "balance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate is {self.learning_rate}; expected a number above 0")
