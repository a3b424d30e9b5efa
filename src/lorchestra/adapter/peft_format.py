"""PEFT directories: the only reader and writer of them.

What we write says ``lora_alpha = r`` and ``use_rslora = false`` with the scale folded into B, so that every engine
applies exactly the ΔW that was trained. Anybody's directory is read; what cannot be used exactly is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorchestra.adapter.adapter import Adapter, BaseId, Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.adapter.refusals import refuse
from lorchestra.errors import AdapterError, StorageError

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "lorchestra.json"
SCHEMA = 1
_PREFIX = "base_model.model."
# A pattern of a foreign file is an untrusted regular expression: it gets this long, in seconds.
PATTERN_SECONDS = 0.2


def read_peft(directory: Path) -> Adapter:
    """Read a PEFT LoRA directory, scale folded into B, factors in float32 on the CPU.

    A directory without our sidecar (made by PEFT, ms-swift, LLaMA-Factory, …) has no fingerprint of its base: it is
    checked by shapes alone when it is used.

    Raises:
        AdapterError: something is missing, damaged, or cannot be represented exactly as ΔW = B·A per module; the
            message names it and the way out.
    """
    config = _config(directory)
    factors = _factors(directory, config)
    modules = {}
    transposed = set()
    for path, (B, A) in factors.items():
        scale = _scale(config, path, A.shape[0])
        modules[path] = LowRank(B * scale, A)
        if config.get("fan_in_fan_out"):
            transposed.add(path)
    base, lineage, digest = _sidecar(directory, config)
    adapter = Adapter(modules, base, lineage, frozenset(transposed))
    if digest and digest != adapter.digest:
        raise AdapterError(
            f"{directory}: the weights are not those that {SIDECAR} was written for (digest {adapter.digest[:23]}…, "
            f"expected {digest[:23]}…). The adapter was changed or damaged; fetch it again, or delete {SIDECAR} to use "
            "it as an unverified one"
        )
    return adapter


def effective_scales(directory: Path) -> dict[str, float]:
    """Module path → the scale s of ΔW = s·B·A that the directory's configuration asks for.

    Raises:
        AdapterError: as :func:`read_peft`.
    """
    config = _config(directory)
    return {path: _scale(config, path, A.shape[0]) for path, (_, A) in _factors(directory, config).items()}


def write_peft(adapter: Adapter, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a PEFT directory, whole or not at all; an adapter that is there is replaced.

    Args:
        adapter: to write.
        directory: where; its parent is created.
        dtype: of the stored factors. The digest in the sidecar is that of what is stored.

    Raises:
        StorageError: the place is taken by something that is no adapter, or cannot be written.
    """
    from safetensors.torch import save_file

    if directory.exists() and any(directory.iterdir()) and not (directory / CONFIG).exists():
        raise StorageError(f"{directory} is not empty and holds no adapter; choose another directory")
    tensors, stored = {}, {}
    for path, update in adapter.modules.items():
        B, A = update.B.detach().cpu().to(dtype).contiguous(), update.A.detach().cpu().to(dtype).contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"], tensors[f"{_PREFIX}{path}.lora_A.weight"] = B, A
        stored[path] = LowRank(B.float(), A.float())
    kept = Adapter(stored, adapter.base, adapter.lineage, adapter.transposed)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        _write_json(partial / CONFIG, _peft_config(adapter))
        _write_json(
            partial / SIDECAR,
            {"schema": SCHEMA, "digest": kept.digest, "base": asdict(kept.base), "lineage": asdict(kept.lineage)},
        )
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    except OSError as error:
        raise StorageError(f"cannot write the adapter to {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    ranks = {path: update.rank for path, update in adapter.modules.items()}
    common = max(ranks.values(), key=list(ranks.values()).count)
    # PEFT matches patterns as regular expressions against the end of a path: an escaped full path is that path alone.
    pattern = {_escaped(path): rank for path, rank in ranks.items() if rank != common}
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
        "fan_in_fan_out": bool(adapter.transposed),
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
    }


def _escaped(path: str) -> str:
    return path.replace(".", r"\.")


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _config(directory: Path) -> dict[str, Any]:
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
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} should hold a JSON object; it holds {type(value).__name__}")
    return value


def _factors(directory: Path, config: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module path → (B, A), float32, without scale."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / WEIGHTS
    if not path.is_file():
        pickled = "; adapter_model.bin is a pickle and is not read: load it in PEFT and save it again as safetensors"
        hint = pickled if (directory / "adapter_model.bin").exists() else ""
        raise AdapterError(f"{directory} has no {WEIGHTS}{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, factor = _parse_key(key, path)
        if factor in halves.setdefault(module, {}):
            raise AdapterError(f"{path} holds lora_{factor} of {module!r} twice, under two adapter names")
        halves[module][factor] = tensor.float()
    out = {}
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{path} holds only lora_{next(iter(pair))} of {module!r}; the file is incomplete")
        out[module] = (pair["B"], pair["A"])
    if not out:
        raise AdapterError(f"{path} holds no lora_A and lora_B")
    return out


def _parse_key(key: str, path: Path) -> tuple[str, str]:
    name = key.removeprefix(_PREFIX)
    for factor in ("A", "B"):
        module, sign, rest = name.partition(f".lora_{factor}.")
        # PEFT's state dicts name the adapter in between: lora_A.default.weight
        if sign and (rest == "weight" or (rest.endswith(".weight") and rest.count(".") == 1)):
            return module, factor
    if ".lora_embedding_" in key:
        raise AdapterError(
            f"{path} adapts an embedding ({key!r}), which is not handled yet; merge that part into the base with PEFT, "
            "or train without embeddings"
        )
    raise AdapterError(f"{path} holds {key!r}, which is no LoRA factor; it cannot be used exactly")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _pattern(config.get("alpha_pattern") or {}, module)
    alpha = float(config.get("lora_alpha", rank) if alpha is None else alpha)
    r = _pattern(config.get("rank_pattern") or {}, module)
    r = int(config.get("r", rank) if r is None else r)
    if r != rank:
        raise AdapterError(f"module {module!r}: the configuration says rank {r}, the weights have rank {rank}")
    return alpha / r**0.5 if config.get("use_rslora") else alpha / r


def _pattern(patterns: Mapping[str, Any], module: str) -> Any:
    """The value for ``module``: its own path literally, else as PEFT matches (``(.*\\.)?(pattern)$``), time-bound."""
    import regex

    for pattern, value in patterns.items():
        if pattern == module or module.endswith("." + pattern):
            return value
    for pattern, value in patterns.items():
        try:
            if regex.fullmatch(rf"(.*\.)?({pattern})", module, timeout=PATTERN_SECONDS):
                return value
        except TimeoutError:
            raise AdapterError(f"the pattern {pattern!r} takes too long on {module!r}; refused") from None
        except regex.error as error:
            raise AdapterError(f"the pattern {pattern!r} is no regular expression: {error}") from None
    return None


def _sidecar(directory: Path, config: Mapping[str, Any]) -> tuple[BaseId, Lineage, str]:
    value = _json(directory, SIDECAR)
    if value is None:
        return BaseId(name=str(config.get("base_model_name_or_path") or "")), Lineage(), ""
    if value.get("schema") != SCHEMA:
        raise AdapterError(
            f"{directory / SIDECAR} has schema {value.get('schema')}; this version reads {SCHEMA}. Update lorchestra"
        )
    try:
        lineage = dict(value["lineage"])
        for key in ("parents", "context"):
            lineage[key] = tuple(Parent(**parent) for parent in lineage[key])
        return BaseId(**value["base"]), Lineage(**lineage), str(value["digest"])
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{directory / SIDECAR} is damaged: {error}") from error
