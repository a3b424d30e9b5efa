"""PEFT directories: the only reader and writer of them.

What we write says ``lora_alpha = r`` and ``use_rslora = false`` with the scale folded into B, so that every engine
applies exactly the ΔW that was trained. Anybody's directory is read; what cannot be used exactly is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.directory import whole_directory
from lorchestra.adapter.lineage import BaseId, Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.adapter.refusals import MERGE_FIRST, refuse
from lorchestra.adapter.scales import module_scales
from lorchestra.errors import AdapterError

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "lorchestra.json"
SCHEMA = 1
_PREFIX = "base_model.model."
_LINEAR_KEYS, _EMBEDDING_KEYS = ("lora_B.weight", "lora_A.weight"), ("lora_embedding_B", "lora_embedding_A")
# Whole weights that PEFT saves beside factors of an embedding or a head: the base's own, which LoRA leaves frozen.
_FROZEN = ".base_layer.weight"
# What only training needs: VeLoRA's compression of stored activations leaves the forward pass as it is.
_TRAINING_ONLY = ".lora_velora_embed"


def read_peft(directory: Path) -> Adapter:
    """Read a PEFT LoRA directory, scale folded into B, factors in float32 on the CPU.

    A directory without our sidecar (made by PEFT, ms-swift, LLaMA-Factory, …) has no fingerprint of its base: it is
    checked by shapes alone when it is used.

    Raises:
        AdapterError: something is missing, damaged, or cannot be represented exactly as ΔW = B·A per module; the
            message names it and the way out.
    """
    config = _config(directory)
    factors, embeddings = _factors(directory)
    scales = module_scales(config, _ranks(factors))
    base, lineage, transposed, digest = _sidecar(directory, config, factors)
    scaled = {path: f if scales[path] == 1.0 else f * scales[path] for path, f in factors.items()}
    try:
        adapter = Adapter(scaled, base, lineage, transposed, embeddings)
    except AdapterError as error:
        raise AdapterError(f"{directory}: {error}") from error
    if digest and digest != adapter.digest:
        raise AdapterError(
            f"{directory}: {WEIGHTS} and {CONFIG} are not those that {SIDECAR} was written for (digest "
            f"{adapter.digest[:23]}…, expected {digest[:23]}…). The adapter was changed or damaged; fetch it again, or "
            f"delete {SIDECAR} to use it as an unverified one"
        )
    return adapter


def look(directory: Path) -> None:
    """Refuse what :func:`read_peft` would refuse by its configuration, or because its weights' file is not whole.

    The weights are not read: of a thousand adapters this takes a moment.

    Raises:
        AdapterError: as :func:`read_peft`.
    """
    from safetensors import SafetensorError, safe_open

    _config(directory)
    path = _weights(directory)
    try:
        with safe_open(path, "numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error


def effective_scales(directory: Path) -> dict[str, float]:
    """Module path → the scale s of ΔW = s·B·A that the directory's configuration asks for.

    Raises:
        AdapterError: as :func:`read_peft`.
    """
    return module_scales(_config(directory), _ranks(_factors(directory)[0]))


def write_peft(adapter: Adapter, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a PEFT directory, whole or not at all; an adapter that is there is replaced.

    Args:
        adapter: to write.
        directory: where; its parent is created.
        dtype: of the stored factors. The digest in the sidecar is that of what is stored.

    Raises:
        StorageError: the place is taken by something that is no adapter, or cannot be written.
    """
    from safetensors.torch import save

    tensors, stored = {}, {}
    for path, update in adapter.modules.items():
        B, A = update.B.detach().cpu().to(dtype).contiguous(), update.A.detach().cpu().to(dtype).contiguous()
        key_B, key_A = _EMBEDDING_KEYS if path in adapter.embeddings else _LINEAR_KEYS
        tensors[f"{_PREFIX}{path}.{key_B}"], tensors[f"{_PREFIX}{path}.{key_A}"] = B, A
        stored[path] = LowRank(B.float(), A.float())
    sidecar = {
        "schema": SCHEMA,
        "digest": Adapter(stored).digest,
        "base": asdict(adapter.base),
        "lineage": asdict(adapter.lineage),
        "transposed": sorted(adapter.transposed),
    }
    with whole_directory(directory, "the adapter", replaces=CONFIG) as partial:
        (partial / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        _write_json(partial / CONFIG, _peft_config(adapter))
        _write_json(partial / SIDECAR, sidecar)
    return directory


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    ranks = {path: update.rank for path, update in adapter.modules.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    uncommon = [path for path, rank in ranks.items() if rank != common]
    # PEFT takes the first pattern that matches the end of a path: a path that ends in another's is named before it.
    named = [p for p in ranks if ranks[p] != common or any(p.endswith(f".{other}") for other in uncommon)]
    pattern = {re.escape(path): ranks[path] for path in sorted(named, key=lambda p: (-len(p), p))}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.name or None,
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": bool(adapter.transposed - adapter.embeddings),
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise AdapterError(f"{directory} is no directory; an adapter is a directory with {CONFIG} and {WEIGHTS}")
    config = _json(directory, CONFIG)
    if config is None:
        hint = "; this is a whole model, not an adapter" if (directory / "config.json").exists() else ""
        raise AdapterError(f"{directory} has no {CONFIG}, so it is not a PEFT adapter{hint}")
    refuse(config, directory)
    return config


def _json(directory: Path, name: str) -> dict[str, Any] | None:
    path = directory / name
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} should hold a JSON object; it holds {type(value).__name__}")
    return value


def _factors(directory: Path) -> tuple[dict[str, LowRank], frozenset[str]]:
    """Module path → factors in float32, without scale; and which of the modules are embeddings."""
    path = directory / WEIGHTS
    tensors = _tensors(directory)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    embeddings, frozen = set(), {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{path} holds {key!r} as {tensor.dtype}; factors must be floating-point numbers")
        if key.endswith(_FROZEN):
            frozen[key.removeprefix(_PREFIX).removesuffix(_FROZEN)] = tensor
            continue
        if key.endswith(_TRAINING_ONLY):
            continue
        module, factor, embedding = _parse_key(key, path)
        if factor in halves.setdefault(module, {}):
            raise AdapterError(f"{path} holds lora_{factor} of {module!r} twice, under two adapter names")
        halves[module][factor] = tensor.float()
        if embedding:
            embeddings.add(module)
    out: dict[str, LowRank] = {}
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{path} holds only lora_{next(iter(pair))} of {module!r}; the file is incomplete")
        if pair["A"].ndim > 2:
            raise AdapterError(
                f"{path} adapts {module!r}, a convolution (lora_A is {tuple(pair['A'].shape)}), and only matrices can "
                f"be combined: {MERGE_FIRST}"
            )
        try:
            out[module] = LowRank(pair["B"], pair["A"])
        except AdapterError as error:
            raise AdapterError(f"{path}, module {module!r}: {error}") from error
    if not out:
        raise AdapterError(f"{path} holds no lora_A and lora_B")
    _check_frozen(frozen, out, embeddings, path)
    return out, frozenset(embeddings)


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS
    if not path.is_file():
        pickled = "; adapter_model.bin is a pickle and is not read: load it in PEFT and save it again as safetensors"
        hint = pickled if (directory / "adapter_model.bin").exists() else ""
        raise AdapterError(f"{directory} has no {WEIGHTS}{hint}")
    return path


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = _weights(directory)
    try:
        # Read, not mapped: whoever writes into the file later does not change what was checked.
        tensors: dict[str, torch.Tensor] = load(path.read_bytes())
    except KeyError as error:
        raise AdapterError(f"{path} holds numbers of a kind {error} that cannot be read: {MERGE_FIRST}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error
    return tensors


def _check_frozen(
    frozen: Mapping[str, torch.Tensor], factors: Mapping[str, LowRank], embeddings: set[str], path: Path
) -> None:
    """A saved weight may be left aside only beside LoRA factors of its own shape: PEFT trains those in its stead."""
    for module, weight in frozen.items():
        if module not in factors:
            raise AdapterError(f"{path} holds the whole weight of {module!r}, which would be lost: {MERGE_FIRST}")
        m, n = factors[module].shape
        if tuple(weight.shape) not in ((m, n), (n, m)):
            raise AdapterError(
                f"{path} holds a weight of shape {tuple(weight.shape)} for {module!r}, whose factors change one of "
                f"shape {(n, m) if module in embeddings else (m, n)}; the file is damaged"
            )


def _parse_key(key: str, path: Path) -> tuple[str, str, bool]:
    """Module path, ``A`` or ``B``, and whether the module is an embedding."""
    name = key.removeprefix(_PREFIX)
    for factor in ("A", "B"):
        module, sign, rest = name.partition(f".lora_{factor}.")
        # PEFT's state dicts name the adapter in between: lora_A.default.weight
        if sign and (rest == "weight" or (rest.endswith(".weight") and rest.count(".") == 1)):
            return module, factor, False
        module, sign, rest = name.partition(f".lora_embedding_{factor}")
        if sign and (not rest or (rest.startswith(".") and rest.count(".") == 1)):
            return module, factor, True
    raise AdapterError(f"{path} holds {key!r}, which is no LoRA factor and would be lost: {MERGE_FIRST}")


def _ranks(factors: Mapping[str, LowRank]) -> dict[str, int]:
    return {path: update.rank for path, update in factors.items()}


def _sidecar(
    directory: Path, config: Mapping[str, Any], factors: Mapping[str, LowRank]
) -> tuple[BaseId, Lineage, frozenset[str], str]:
    """Base, lineage, transposed modules and digest; what the configuration alone says without a sidecar."""
    value = _json(directory, SIDECAR)
    flagged = frozenset(factors if config.get("fan_in_fan_out") else ())
    if value is None:
        return BaseId(name=str(config.get("base_model_name_or_path") or "")), Lineage(), flagged, ""
    if value.get("schema") != SCHEMA:
        raise AdapterError(
            f"{directory / SIDECAR} has schema {value.get('schema')}; this version reads {SCHEMA}. Update lorchestra"
        )
    try:
        lineage = dict(value["lineage"])
        for key in ("parents", "context"):
            lineage[key] = tuple(Parent(**parent) for parent in lineage[key])
        transposed = frozenset(value.get("transposed", flagged))
        return BaseId(**value["base"]), Lineage(**lineage), transposed, str(value["digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{directory / SIDECAR} is damaged: {error}") from error
