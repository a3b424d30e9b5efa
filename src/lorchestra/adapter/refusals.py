"""What cannot be held as one ΔW = B·A per module on an unchanged base: refused by name, with the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorchestra.errors import AdapterError

Config = Mapping[str, Any]

MERGE_FIRST = "merge it into its base with PEFT (merge_and_unload) and use the result as a base"
# Initialisations that leave the base as it is. Another one may have changed it, and ΔW then belongs to that base.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "kaiming", "rescaled", "true", "false")
# Ways of PEFT to use the factors that are not x Wᵀ + x Aᵀ Bᵀ.
VARIANTS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
KNOWN_SWITCHES = ("use_rslora", "use_dora", "use_qalora", "use_bdlora")


def _altered(config: Config) -> bool:
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower() not in PLAIN_INITS


def _variants(config: Config) -> list[str]:
    unknown = [key for key in config if key.startswith("use_") and key not in KNOWN_SWITCHES]
    return [key for key in (*VARIANTS, *unknown) if config.get(key)]


# (what it is called, is it there, what to do)
TABLE: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("{peft_type} (not LoRA)", lambda c: str(c.get("peft_type", "LORA")).upper() != "LORA", MERGE_FIRST),
    ("DoRA (use_dora)", lambda c: bool(c.get("use_dora")), f"{MERGE_FIRST}, or train without DoRA"),
    (
        "trained biases (bias={bias})",
        lambda c: c.get("bias") not in (None, "none"),
        f"{MERGE_FIRST}, or train with bias='none'",
    ),
    ("lora_bias", lambda c: bool(c.get("lora_bias")), f"{MERGE_FIRST}, or train without lora_bias"),
    ("whole modules (modules_to_save={modules_to_save})", lambda c: bool(c.get("modules_to_save")), MERGE_FIRST),
    (
        "init_lora_weights={init_lora_weights}, which changes the base's weights",
        _altered,
        "convert it to a plain LoRA with PEFT (save_pretrained(path_initial_model_for_weight_conversion=…))",
    ),
    ("trained tokens (trainable_token_indices)", lambda c: bool(c.get("trainable_token_indices")), MERGE_FIRST),
    ("replicated layers (layer_replication)", lambda c: bool(c.get("layer_replication")), MERGE_FIRST),
    ("parameters that are no modules (target_parameters)", lambda c: bool(c.get("target_parameters")), MERGE_FIRST),
    ("{variants}, which is more than ΔW = B·A", lambda c: bool(_variants(c)), MERGE_FIRST),
)


def refuse(config: Config, directory: Path) -> None:
    """Check a PEFT configuration.

    Raises:
        AdapterError: it asks for something in :data:`TABLE`.
    """
    for name, found, way_out in TABLE:
        if found(config):
            keys = ("peft_type", "bias", "modules_to_save", "init_lora_weights")
            shown = name.format(variants=", ".join(_variants(config)), **{key: config.get(key) for key in keys})
            raise AdapterError(f"{directory} uses {shown}, which cannot be combined exactly with others: {way_out}")
