"""Which tensor of the base's files a module of an adapter changes, and what the output's files will hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.safetensors_file import INDEX, Entry, entries, weight_files, weight_map
from lorchestra.errors import AdapterError, SourceError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# safetensors' names of the types that weights have.
KINDS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {kind: code for code, kind in KINDS.items()}
HEADS = ("lm_head", "embed_out", "output_layer")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
# Modules that some bases keep in one tensor, and the end of its name.
_FUSED = {
    "q_proj": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"), "gate_proj": ("gate_up_proj",),
}  # fmt: skip
_FUSED |= dict.fromkeys(("k_proj", "v_proj"), _FUSED["q_proj"]) | {"up_proj": _FUSED["gate_proj"]}


@dataclass(frozen=True)
class Output:
    """One tensor to write.

    Args:
        name: in the output.
        source: the base's tensor that it is made from.
        kind: dtype in the output.
        module: path of the adapter's module that is added, if any.
    """

    name: str
    source: Entry
    kind: torch.dtype
    module: str | None = None

    @property
    def size(self) -> int:
        """Bytes in the output."""
        return math.prod(self.source.shape) * self.kind.itemsize


@dataclass(frozen=True)
class Shard:
    """One file to write: what is in it, in order.

    Args:
        source: the base's file.
        outputs: its tensors.
    """

    source: Path
    outputs: tuple[Output, ...]

    @cached_property
    def header(self) -> bytes:
        """The file's beginning, up to the first tensor."""
        listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for output in self.outputs:
            place = [position, position + output.size]
            shape = list(output.source.shape)
            listed[output.name] = {"dtype": CODES[output.kind], "shape": shape, "data_offsets": place}
            position += output.size
        text = json.dumps(listed).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(output.size for output in self.outputs)


def plan_shards(base: Path, config: Mapping[str, Any], adapter: Adapter, dtype: str, untie: bool) -> list[Shard]:
    """Every file of the output; every module of the adapter found, and of the right shape.

    Args:
        base: a model directory.
        config: its configuration.
        adapter: to be added.
        dtype: ``auto`` keeps each tensor's; else floating tensors get it.
        untie: give the output embedding a weight of its own where it shares the input embedding's.

    Raises:
        AdapterError: a module that the base does not have, has otherwise, or shares with another.
        SourceError: missing, damaged or quantised files.
    """
    files = weight_files(base)
    held = {path: entries(path) for path in files}
    where: dict[str, Entry] = {}
    for path, found in held.items():
        for entry in found:
            if entry.name in where:
                raise SourceError(f"{path} holds {entry.name!r}, which another file of the base holds too")
            where[entry.name] = entry
    _check_index(base, held)
    heads = [name for name in where if name.removesuffix(".weight").rpartition(".")[2] in HEADS]
    embedding = _input_embedding(where)
    tied = bool(config.get("tie_word_embeddings")) or not heads
    modules = _assign(adapter, where, embedding, tied)
    apart = _untied(modules, embedding, tied, untie, config) if embedding else None
    shards = []
    for path, found in held.items():
        outputs = []
        for entry in found:
            if apart is not None and entry.name == apart[0]:
                continue  # the second copy of a tied weight: the one that is read is the embedding's
            kind = _kind(entry, dtype)
            outputs.append(Output(entry.name, entry, kind, modules.get(entry.name)))
            if apart is not None and entry.name == embedding:
                outputs.append(Output(apart[0], entry, kind, apart[1]))
        shards.append(Shard(path, tuple(outputs)))
    return shards


def _check_index(base: Path, held: Mapping[Path, Sequence[Entry]]) -> None:
    if not (base / INDEX).exists():
        return
    there = {path.name: {entry.name for entry in found} for path, found in held.items()}
    for tensor, file in weight_map(base / INDEX).items():
        if tensor not in there[file]:
            raise SourceError(f"{base} is incomplete: {file} lacks {tensor!r}, which {INDEX} says is in it")


def _kind(entry: Entry, wanted: str) -> torch.dtype:
    if entry.dtype not in KINDS:
        raise SourceError(
            f"tensor {entry.name!r} of the base is of type {entry.dtype}, to which nothing can be added; use the "
            "unquantised model, or --dequantise (dequantise=True in prepare_base)"
        )
    kind = KINDS[entry.dtype]
    return DTYPES[wanted] if wanted != "auto" and kind.is_floating_point else kind


def _input_embedding(where: Mapping[str, Entry]) -> str | None:
    found = [name for name in where if name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS]
    return min(found, key=lambda name: (name.count("."), name)) if found else None


def _assign(adapter: Adapter, where: Mapping[str, Entry], embedding: str | None, tied: bool) -> dict[str, str]:
    """Tensor name in the files → module path in the adapter; a tied head is under its own name, in the files or not."""
    found: dict[str, str] = {}
    for path, update in adapter.modules.items():
        name = _tensor_name(path, where)
        if tied and embedding and path.rpartition(".")[2] in HEADS:
            name = name or f"{path}.weight"
            entry = replace(where[embedding], name=name)
        elif name is None:
            raise AdapterError(f"the base has no weight for module {path!r}{_hint(path, where)}")
        else:
            entry = where[name]
        if name in found:
            raise AdapterError(f"modules {found[name]!r} and {path!r} would both change {name!r} of the base")
        if len(entry.shape) != 2:
            raise AdapterError(
                f"module {path!r} is {name!r} in the base, of shape {entry.shape}: several matrices in one tensor "
                "(experts, or a fused layer), to which one ΔW cannot be added exactly. Merge this adapter with PEFT "
                "(merge_and_unload), or leave these modules out of it"
            )
        if not KINDS.get(entry.dtype, torch.float32).is_floating_point:
            raise AdapterError(
                f"module {path!r} is {name!r} in the base, stored as {entry.dtype}: it is quantised, and nothing can "
                "be added to it. Use the unquantised model"
            )
        m, n = update.shape
        expected = (n, m) if path in adapter.transposed else (m, n)
        if entry.shape != expected:
            raise AdapterError(f"module {path!r} changes a weight of shape {expected}; the base's is {entry.shape}")
        found[name] = path
    return found


def _tensor_name(path: str, where: Mapping[str, Any]) -> str | None:
    """Module path → tensor name; files and modules may differ by the model's own prefix (``model.``) or a wrapper's."""
    inner = path.partition(".")[2] or path
    for name in (f"{path}.weight", f"model.{path}.weight", f"{inner}.weight", path):
        if name in where:
            return name
    ends = [name for name in where if name.endswith(f".{path.removeprefix('model.')}.weight")]
    return ends[0] if len(ends) == 1 else None


def _hint(path: str, where: Mapping[str, Entry]) -> str:
    """What else it may be: a fused tensor, experts in one, or another base."""
    parent, _, last = path.rpartition(".")
    inner = parent.partition(".")[2] or parent
    for end in _FUSED.get(last, ()):
        fused = [name for name in where if name.endswith((f"{inner}.{end}.weight", f"{inner}.{end}"))]
        if fused:
            return (
                f": it keeps it inside {fused[0]!r}, together with others. Convert the base to the layout that the "
                "adapter was trained on (load it and save_pretrained), or merge with PEFT"
            )
    start, experts, _ = path.partition(".experts.")
    stacked = [n for n in where if experts and n.startswith(start + experts) and len(where[n].shape) > 2]
    if stacked:
        return f": it keeps all experts in {stacked[0]!r}, one tensor; merge this adapter with PEFT (merge_and_unload)"
    near = [name for name in where if name.endswith(f".{last}.weight")][:1]
    return f"{f' (a similar one is {near[0]!r})' if near else ''}; the adapter is of another base"


def _untied(
    modules: dict[str, str], embedding: str, tied: bool, untie: bool, config: Mapping[str, Any]
) -> tuple[str, str | None] | None:
    """Name and module of an output embedding that parts from the input embedding; ``None`` where nothing parts."""
    head = next((name for name, path in modules.items() if path.rpartition(".")[2] in HEADS), None)
    if not tied or (head is None and embedding not in modules):
        return None
    if not untie:
        raise AdapterError(
            f"the adapter changes {modules[head or embedding]!r}, whose weight the input and the output embedding "
            "share in this base: adding to it would change both. Give the output embedding a weight of its own with "
            "--untie (untie=True), or leave the module out"
        )
    nested = [name for name, part in config.items() if isinstance(part, Mapping) and "vocab_size" in part]
    if nested:
        raise AdapterError(
            f"--untie: the base's configuration is nested ({nested[0]}), and what it says of shared embeddings depends "
            "on the architecture; set tie_word_embeddings to false in transformers and save the model"
        )
    return (head or "lm_head.weight", modules.get(head) if head else None)
