"""An adapter into the base's weights, one tensor at a time.

Each changed tensor is read, added to in float32, rounded once to the output dtype and written; memory is bounded
by the largest tensor. The directory appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.digest import tensor_bytes
from lorchestra.adapter.directory import whole_directory
from lorchestra.errors import AdapterError, SourceError
from lorchestra.events import SILENT, Reporter, Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# safetensors' names of the dtypes that weights have.
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_NOT_COPIED = ("lorchestra.json", "adapter_config.json", "config.json")
_TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "*.tiktoken",
)  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        dtype: of the output's changed tensors (``float32``, …).
        modules: changed tensors.
        update_ratio: ‖ΔW‖ / ‖W‖ over the changed tensors.
        rounding_lost: ‖(W′ − W) − ΔW‖ / ‖ΔW‖: the share of the update that rounding to the output dtype disturbed.
        seconds: it took.
    """

    dtype: str
    modules: int
    update_ratio: float
    rounding_lost: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass
class _Sums:
    update: float = 0.0
    weight: float = 0.0
    lost: float = 0.0
    dtype: str = ""


def merge(
    base: str | Path,
    adapter: Adapter,
    out: str | Path,
    *,
    dtype: str = "auto",
    tokenizer_from: Path | None = None,
    reporter: Reporter = SILENT,
) -> MergeReport:
    """Write base + adapter as a Hugging Face directory.

    Args:
        base: a model directory with safetensors, one file or sharded.
        adapter: its ΔW are added to the weights of the same names.
        out: a directory that does not exist yet, or is empty.
        dtype: ``auto`` keeps each tensor's; else floating tensors are written in it.
        tokenizer_from: where tokenizer and chat template come from, if not from the base.
        reporter: progress.

    Raises:
        AdapterError: a module that the base does not have, or of another shape.
        SourceError: no safetensors, a quantised base, an unknown dtype.
        StorageError: ``out`` is taken, or cannot be written.
    """
    started = time.perf_counter()
    base, out = Path(base), Path(out)
    if dtype != "auto" and dtype not in DTYPES:
        raise SourceError(f"dtype {dtype!r} is unknown; there are auto, {', '.join(DTYPES)}")
    config = _config(base)
    shards = _shards(base)
    updates = _assign(adapter, _shapes(shards), bool(config.get("tie_word_embeddings")))
    companions = _companions(base, tokenizer_from)
    sums = _Sums()
    with whole_directory(out, "the merged model") as partial:
        for path in companions:
            shutil.copyfile(path, partial / path.name)
        with reporter.task("merge", sum(p.stat().st_size for p in shards), "B") as task:
            for shard in shards:
                _merge_shard(shard, partial / shard.name, adapter, updates, dtype, sums, task)
        if dtype != "auto":
            config["dtype"] = dtype
            config.pop("torch_dtype", None)
        _write(partial / "config.json", config)
        _rewrite_index(partial)
        note = {
            "schema": 1,
            "made_by": "merge",
            "adapter": adapter.digest,
            "base": asdict(adapter.base),
            "lineage": asdict(adapter.lineage),
        }
        _write(partial / "lorchestra.json", note)
    return MergeReport(
        dtype=sums.dtype,
        modules=len(updates),
        update_ratio=math.sqrt(sums.update / sums.weight) if sums.weight else 0.0,
        rounding_lost=math.sqrt(sums.lost / sums.update) if sums.update else 0.0,
        seconds=time.perf_counter() - started,
    )


def _config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    if not path.exists():
        raise SourceError(f"{base} has no config.json, so it is not a model directory")
    config = _read(path)
    if config.get("quantization_config"):
        raise SourceError(
            f"{base} is quantised; merging would have to round twice. Merge into the unquantised model and quantise "
            "the result, or serve the adapter beside the quantised base"
        )
    return config


def _shards(base: Path) -> list[Path]:
    """The files that transformers would read: those of the index, else the one file, else all there are."""
    index, single = base / _INDEX, base / "model.safetensors"
    if index.exists():
        shards = [base / name for name in sorted(set(_read(index).get("weight_map", {}).values()))]
    else:
        shards = [single] if single.exists() else sorted(base.glob("*.safetensors"))
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise SourceError(f"{base} is incomplete: {_INDEX} names {', '.join(missing)}; fetch the model again")
    if not shards:
        raise SourceError(f"{base} holds no *.safetensors to merge into")
    return shards


def _shapes(shards: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for shard in shards:
        try:
            with safe_open(shard, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = tensors.get_slice(name)
                    _output_dtype(part.get_dtype(), "auto")
                    shapes[name] = tuple(part.get_shape())
        except SafetensorError as error:
            raise SourceError(f"{shard} is damaged or not a safetensors file: {error}") from error
    return shapes


def _assign(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], tied: bool) -> dict[str, str]:
    """Tensor name in the files → module path in the adapter, every module found and of the right shape."""
    found: dict[str, str] = {}
    for path, update in adapter.modules.items():
        name = _tensor_name(path, shapes)
        head = path.rsplit(".", 1)[-1] == "lm_head"
        if head and (tied or name is None):
            raise AdapterError(
                f"the adapter changes {path!r}, whose weight is the input embedding's too in this base: untie them "
                "first (set tie_word_embeddings to false in transformers and save the model), or leave it out"
            )
        if name is None:
            near = [n for n in shapes if n.endswith("." + path.rsplit(".", 1)[-1] + ".weight")][:1]
            hint = f" (a similar one is {near[0]!r})" if near else ""
            raise AdapterError(f"the base has no weight for module {path!r}{hint}; the adapter is of another base")
        if name in found:
            raise AdapterError(f"modules {found[name]!r} and {path!r} would both change {name!r} of the base")
        m, n = update.shape
        expected = (n, m) if path in adapter.transposed else (m, n)
        if shapes[name] != expected:
            raise AdapterError(f"module {path!r} changes a weight of shape {expected}; the base's is {shapes[name]}")
        found[name] = path
    return found


def _tensor_name(path: str, shapes: Mapping[str, Any]) -> str | None:
    """Module path → tensor name; files and modules may differ by the model's own prefix (``model.``) or a wrapper's."""
    inner = path.partition(".")[2] or path
    for name in (f"{path}.weight", f"model.{path}.weight", f"{inner}.weight"):
        if name in shapes:
            return name
    ends = [name for name in shapes if name.endswith(f".{path.removeprefix('model.')}.weight")]
    return ends[0] if len(ends) == 1 else None


def _merge_shard(
    shard: Path, out: Path, adapter: Adapter, updates: Mapping[str, str], dtype: str, sums: _Sums, task: Task
) -> None:
    from safetensors import safe_open

    with safe_open(shard, "pt") as tensors, out.open("wb") as stream:
        names = list(tensors.keys())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        kinds = {}
        for name in names:
            shape = list(tensors.get_slice(name).get_shape())
            kind = _output_dtype(tensors.get_slice(name).get_dtype(), dtype)
            size = math.prod(shape) * kind.itemsize
            header[name] = {"dtype": _CODES[kind], "shape": shape, "data_offsets": [position, position + size]}
            kinds[name] = kind
            position += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            weight: Tensor = tensors.get_tensor(name)
            size = weight.numel() * weight.element_size()
            if name in updates:
                path = updates[name]
                weight = _added(weight, adapter, path, kinds[name], sums)
            stream.write(tensor_bytes(weight.to(kinds[name])))
            task.advance(size)


def _output_dtype(code: str, wanted: str) -> torch.dtype:
    known = {name: kind for kind, name in _CODES.items()}
    if code not in known:
        raise SourceError(f"the base holds tensors of type {code}, which cannot be merged; use an unquantised model")
    kind = known[code]
    return DTYPES[wanted] if wanted != "auto" and kind.is_floating_point else kind


def _added(weight: Tensor, adapter: Adapter, path: str, kind: torch.dtype, sums: _Sums) -> Tensor:
    update = adapter.modules[path].dense(torch.float32)
    if path in adapter.transposed:
        update = update.T
    before = weight.float()
    after = (before + update).to(kind)
    sums.update += float(update.double().square().sum())
    sums.weight += float(before.double().square().sum())
    sums.lost += float((after.double() - before.double() - update.double()).square().sum())
    sums.dtype = str(kind).removeprefix("torch.")
    return after


def _companions(base: Path, tokenizer: Path | None) -> list[Path]:
    """Files to copy: the base's, with its tokenizer's replaced by those of ``tokenizer``."""

    def found(directory: Path, patterns: Iterable[str]) -> list[Path]:
        names = (p for p in sorted(directory.iterdir()) if p.is_file() and p.name not in _NOT_COPIED)
        return [path for path in names if any(fnmatch(path.name, pattern) for pattern in patterns)]

    copied = found(base, _COPIED)
    if tokenizer is None:
        return copied
    own = found(tokenizer, _TOKENIZER)
    if not own:
        raise SourceError(f"{tokenizer} holds no tokenizer (tokenizer.json, …)")
    return [path for path in copied if not any(fnmatch(path.name, pattern) for pattern in _TOKENIZER)] + own


def _rewrite_index(out: Path) -> None:
    """The index of a sharded model counts bytes; they change with the dtype."""
    index = out / _INDEX
    if not index.exists():
        return
    value = _read(index)
    from safetensors import safe_open

    total = 0
    for shard in out.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                total += math.prod(part.get_shape()) * _output_dtype(part.get_dtype(), "auto").itemsize
    value.setdefault("metadata", {})["total_size"] = total
    _write(index, value)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path} is damaged: {error}; fetch the model again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} should hold a JSON object; it holds {type(value).__name__}")
    return value


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
