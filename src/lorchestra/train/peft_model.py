"""The article's Python: ``LoraConfig(..., init_method="rescaled")`` and ``get_peft_model``, over plain PEFT.

This is the one door to a live PEFT model. Stages do not train through it (they train through the bank); it is
here for code that already speaks PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lorchestra.errors import UserError
from lorchestra.train.lora import initial_A
from lorchestra.train.settings import LoraSettings

INIT_METHODS = ("kaiming", "gaussian", "rescaled", "orthogonal")
_OURS = ("init_method", "sigma")


@dataclass
class LoraConfig(peft.LoraConfig):  # type: ignore[misc]  # peft ships no types
    """PEFT's ``LoraConfig`` with lorchestra's initialisations.

    Args:
        init_method: ``kaiming``, ``gaussian``, ``rescaled`` (A ~ N(0, σ²/r)) or ``orthogonal``; ``None`` leaves it
            to PEFT's ``init_lora_weights``.
        sigma: σ of ``rescaled``.

    Neither is written to ``adapter_config.json``: they say how A started, not what the adapter is.

    Raises:
        UserError: an unknown ``init_method``.
    """

    init_method: str | None = field(default=None)
    sigma: float = field(default=0.02)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_method is not None and self.init_method not in INIT_METHODS:
            raise UserError(f"init_method {self.init_method!r} is unknown; there are {', '.join(INIT_METHODS)}")

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key not in _OURS}


class _Factors(nn.ModuleDict):
    """A ``lora_A`` of PEFT that lists its factors in ``named_modules`` but not itself, a container without weight.

    So the article's loop, which rescales ``module.weight`` wherever the name holds ``lora_A``, meets every
    factor once and nothing else.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if module is not self:
                yield name, module


def get_peft_model(model: nn.Module, peft_config: peft.LoraConfig, adapter_name: str = "default", seed: int = 0) -> Any:
    """``peft.get_peft_model``, with ``init_method`` applied.

    Args:
        model: a transformers model; PEFT wraps it in place.
        peft_config: ours or PEFT's own.
        adapter_name: PEFT's name of the adapter.
        seed: of the initialisation (used with ``init_method``).

    Returns:
        The ``PeftModel``; plain PEFT saves and loads it.

    Raises:
        UserError: ``init_method`` on a module whose factors are not matrices (a convolution).
    """
    wrapped = peft.get_peft_model(model, peft_config, adapter_name)
    method = getattr(peft_config, "init_method", None)
    generator = torch.Generator().manual_seed(seed)
    for path, module in wrapped.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        module.lora_A.__class__ = _Factors
        if method is not None and adapter_name in module.lora_A:
            weight = module.lora_A[adapter_name].weight
            if weight.ndim != 2:
                raise UserError(f"init_method {method!r} is for linear modules; {path} is a convolution, leave it out")
            settings = LoraSettings(rank=weight.shape[0], init=method, sigma=peft_config.sigma)
            with torch.no_grad():
                weight.copy_(initial_A(settings, weight.shape[1], generator))
                module.lora_B[adapter_name].weight.zero_()
    return wrapped
