"""Safetensors files by their headers: which tensors a base has, where they lie, what they are."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorchestra.errors import SourceError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; what safetensors itself allows
# Bytes of one entry of the types that are whole bytes wide; the packed ones (F4, F6_…) are not listed.
WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Args:
        name: as in the file.
        dtype: safetensors' name (``BF16``, …).
        shape: of the tensor.
        first: its first byte in the file.
        end: the byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.first


def entries(path: Path) -> list[Entry]:
    """Every tensor of a safetensors file, in the order of the bytes; together they fill the file.

    Raises:
        SourceError: it is not one, or is cut off, or its header contradicts itself.
    """
    damaged = f"{path} is not a safetensors file, or is damaged"
    whole = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > min(whole - 8, MAX_HEADER):
            raise SourceError(f"{damaged}: its header would be {size:,} bytes of {whole:,}; fetch it again")
        text = stream.read(size)
    try:
        header = dict(json.loads(text))
        header.pop("__metadata__", None)
        found = [_entry(name, value, 8 + size) for name, value in header.items()]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise SourceError(f"{damaged}: {error!r} in its header; fetch it again") from error
    found.sort(key=lambda entry: (entry.first, entry.end))
    end = 8 + size
    for entry in found:
        if entry.first != end or entry.end < entry.first:
            raise SourceError(f"{damaged}: tensor {entry.name!r} overlaps another or leaves a gap; fetch it again")
        end = entry.end
    if end != whole:
        raise SourceError(f"{damaged}: it should have {end:,} bytes and has {whole:,}; fetch it again")
    for entry in found:
        width = WIDTHS.get(entry.dtype)
        if width is not None and math.prod(entry.shape) * width != entry.size:
            raise SourceError(
                f"{damaged}: tensor {entry.name!r} of shape {entry.shape} in {entry.dtype} has {entry.size:,} bytes; "
                "fetch it again"
            )
    return found


def _entry(name: str, value: Any, start: int) -> Entry:
    first, last = value["data_offsets"]
    shape = tuple(int(size) for size in value["shape"])
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape} of {name!r}")
    return Entry(name, str(value["dtype"]), shape, start + int(first), start + int(last))


def weight_files(base: Path) -> list[Path]:
    """The files that transformers would read: those of the index, else the one file, else all there are; sorted.

    Raises:
        SourceError: none, one that is named is missing, or a name that leaves the directory.
    """
    index = base / INDEX
    if index.exists():
        names = sorted(set(weight_map(index).values()))
        strange = [name for name in names if not _plain(name)]
        if strange:
            raise SourceError(
                f"{index} names {strange[0]!r}, which is no plain file name in the model's directory; nothing outside "
                "it is read. Fetch the model again, from somebody you trust"
            )
        files = [base / name for name in names]
    else:
        files = [base / SINGLE] if (base / SINGLE).exists() else sorted(base.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise SourceError(f"{base} is incomplete: {INDEX} names {', '.join(missing)}; fetch the model again")
    if not files:
        raise SourceError(
            f"{base} holds no *.safetensors; pickled weights (.bin, .pt) are not read. Convert the model with "
            "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return files


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, as an index says.

    Raises:
        SourceError: the index is damaged.
    """
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{index} is damaged ({error!r}); fetch the model again") from error


def _plain(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\:\0")
