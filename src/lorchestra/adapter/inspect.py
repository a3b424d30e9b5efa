"""Looking at an adapter: how it was initialised, its effective scale, how much it changes, and what is off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from torch import nn

from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError

# Another initialisation is off by more than a tenth; beside that, the std of N entries has an error of 1/√(2N).
STD_TOLERANCE = 0.10
# Scales of 2.8 (PEFT's default α with rsLoRA) to 11.3 (ms-swift's) come from an α inherited from plain LoRA.
LARGE_SCALE = 8.0


@dataclass(frozen=True)
class ModuleView:
    """One module of an adapter.

    ``std_A`` is of A's entries; ``expected_std`` is σ/√r, if there is a σ to judge it by. ``initial``: B is zero, the
    module is untrained, and only then ``std_A`` says something about the initialisation. ``scale`` is s of
    ΔW = s·B·A, ``norm`` ‖ΔW‖ (Frobenius).
    """

    path: str
    rank: int
    shape: tuple[int, int]
    std_A: float
    expected_std: float | None
    initial: bool
    scale: float
    norm: float
    flags: tuple[str, ...]


@dataclass(frozen=True)
class AdapterView:
    """All modules, and the remarks that concern the adapter as a whole."""

    modules: tuple[ModuleView, ...]
    remarks: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def inspect_factors(updates: Mapping[str, tuple[LowRank, float]], sigma: float | None = 0.02) -> AdapterView:
    """Look at factors.

    Args:
        updates: module path → (ΔW with its scale s folded into B, s).
        sigma: σ of the rescaled initialisation, which an untrained A is judged against; ``None``: it had another.
    """
    norms = {path: update.norm() for path, (update, _) in updates.items()}
    trained = [norm for norm in norms.values() if norm > 0]
    typical = median(trained) if trained else 0.0
    views = []
    for path, (update, scale) in updates.items():
        flags = []
        initial = not bool(update.B.any())
        std = float(update.A.float().std()) if update.A.numel() > 1 else 0.0
        expected = None if sigma is None else sigma / math.sqrt(update.rank)
        if initial and trained:
            flags.append("untrained: B is zero here although other modules moved")
        if (
            initial
            and expected is not None
            and abs(std / expected - 1) > STD_TOLERANCE + 3 / math.sqrt(2 * update.A.numel())
        ):
            flags.append(f"std of A is {std:.4g}, not σ/√r = {expected:.4g}: not the rescaled initialisation")
        if abs(scale) > LARGE_SCALE:
            flags.append(f"scale {scale:.3g} is large: was α inherited from a recipe without rsLoRA?")
        if scale == 0:
            flags.append("scale 0: the module has no effect")
        if norms[path] > 10 * typical > 0:
            flags.append(f"‖ΔW‖ is {norms[path] / typical:.0f}× the median module's")
        views.append(
            ModuleView(path, update.rank, update.shape, std, expected, initial, scale, norms[path], tuple(flags))
        )
    remarks = []
    if not trained:
        remarks.append("B is zero everywhere: the adapter is at its initialisation and changes nothing yet")
    if len({round(view.scale, 9) for view in views}) > 1:
        remarks.append("modules have different scales (patterns of rank or alpha)")
    return AdapterView(tuple(views), tuple(remarks))


def inspect_model(model: nn.Module, adapter_name: str = "default", sigma: float = 0.02) -> AdapterView:
    """Look at the live LoRA layers of a PEFT model (any with ``lora_A``, ``lora_B`` and ``scaling`` by name).

    Raises:
        AdapterError: the model has no such layers.
    """
    updates: dict[str, tuple[LowRank, float]] = {}
    for path, module in model.named_modules():
        factors, scaling = getattr(module, "lora_A", None), getattr(module, "scaling", None)
        if isinstance(factors, nn.ModuleDict) and isinstance(scaling, dict) and adapter_name in factors:
            outputs = module.get_submodule("lora_B").get_submodule(adapter_name)
            A = factors[adapter_name].get_parameter("weight").detach().float().cpu()
            B = outputs.get_parameter("weight").detach().float().cpu()
            scale = float(scaling[adapter_name])
            updates[path.removeprefix("base_model.model.")] = (LowRank(B * scale, A), scale)
    if not updates:
        raise AdapterError(
            f"{type(model).__name__} has no LoRA layers named {adapter_name!r}; give the model that get_peft_model "
            "returned, and the name of its adapter"
        )
    return inspect_factors(updates, sigma)
