"""A gate on disk: ``gate.safetensors`` (its numbers) and ``gate.json`` (everything else).

What is read is not trusted: the file's header must hold exactly the tensors that the description says, before a byte
of them is loaded, and the gate runs on the very adapters and the base that it was trained with, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lorchestra.adapter.directory import whole_directory
from lorchestra.adapter.lineage import BaseId
from lorchestra.base.reading import read_json, reading
from lorchestra.base.safetensors_file import entries
from lorchestra.errors import AdapterError, SourceError, UserError
from lorchestra.gate.features import FeatureSpec
from lorchestra.gate.network import MOST_MEMBERS, AdapterId, Gate, GateSpec, Known, Memory

CONFIG, WEIGHTS = "gate.json", "gate.safetensors"
FORMAT = 1
LARGEST_CONFIG = 32_000_000  # bytes
WIDEST = 1 << 18  # features or hidden units
_TYPES = {"F32": torch.float32, "F16": torch.float16}
Text = Annotated[str, Field(max_length=1000)]


class _Read(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Adapter(_Read):
    name: Text
    digest: Text


class _Base(_Read):
    name: str = ""
    weights: Text = ""
    tokenizer: Text = ""
    template: Text = ""


class _Features(_Read):
    layers: Annotated[int, Field(ge=0, le=10_000)]
    last: bool


class _Spec(_Read):
    name: Text
    adapters: Annotated[list[_Adapter], Field(min_length=1, max_length=MOST_MEMBERS)]
    base: _Base
    features: _Features
    activation: Literal["softmax", "sigmoid", "linear"]
    groups: list[Text]
    top_k: int | None
    none: bool
    temperature: float
    hidden: Annotated[int, Field(ge=0, le=WIDEST)]


class _Known(_Read):
    digest: Text
    domain: Text = ""
    text: Text = ""


class _File(_Read):
    format: Literal[1]
    gate: _Spec
    size: Annotated[int, Field(ge=1, le=WIDEST)]
    sha256: str
    prompts: list[_Known] | None
    fit: dict[str, Any]


def save(gate: Gate, directory: Path, fit: Mapping[str, Any] | None = None) -> Path:
    """Write a gate, whole or not at all; a gate that is there is replaced.

    Args:
        gate: to write.
        directory: where; its parent is created.
        fit: plain JSON about how it came to be; read by people, not by :func:`load`.

    Raises:
        AdapterError: it holds NaN or infinity.
        StorageError: the place is taken by something that is no gate, or cannot be written.
    """
    from safetensors.torch import save as serialised

    tensors = {name: value.detach().cpu().contiguous() for name, value in gate.state_dict().items()}
    if gate.memory is not None:
        tensors["memory"] = gate.memory.vectors.cpu().contiguous()
    _finite(tensors, f"gate {gate.spec.name!r}")
    numbers = serialised(tensors)
    told = {
        "format": FORMAT,
        "gate": gate.spec.as_dict(),
        "size": gate.size,
        "sha256": hashlib.sha256(numbers).hexdigest(),
        "prompts": None if gate.memory is None else [asdict(known) for known in gate.memory.prompts],
        "fit": dict(fit or {}),
    }
    with whole_directory(directory, "the gate", replaces=CONFIG) as partial:
        (partial / WEIGHTS).write_bytes(numbers)
        (partial / CONFIG).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return directory


def load(directory: Path, adapters: Mapping[str, str] | None = None, base: BaseId | None = None) -> Gate:
    """Read a gate and check it against what it is to run on.

    Args:
        directory: from :func:`save`.
        adapters: name → digest of what is there; others than the gate's members do not matter. ``None``: not checked.
        base: that is there; ``None``: not checked.

    Raises:
        SourceError: a file is missing or cannot be read.
        AdapterError: a file is damaged or of another format, a member is missing or was changed, or the base is another
            one.
    """
    told = _config(directory)
    try:
        spec = _spec(told.gate)
        numbers = _numbers(directory, told, spec)
        gate = Gate(spec, numbers.pop("mean"), numbers.pop("std"))
    except UserError as error:
        if isinstance(error, (AdapterError, SourceError)):
            raise
        raise AdapterError(f"{directory / CONFIG} is damaged: {error}") from error
    memory = numbers.pop("memory", None)
    gate.load_state_dict({**numbers, "mean": gate.mean, "std": gate.std})
    gate.eval().requires_grad_(False)
    if memory is not None and told.prompts is not None:
        gate.memory = Memory(memory, tuple(Known(p.digest, p.domain, p.text) for p in told.prompts))
    if adapters is not None:
        _check_adapters(gate, adapters)
    if base is not None:
        _check_base(gate, base)
    return gate


def fitted(directory: Path) -> dict[str, Any]:
    """What :func:`save` was told about how the gate came to be.

    Raises:
        SourceError, AdapterError: as :func:`load`.
    """
    return _config(directory).fit


def _config(directory: Path) -> _File:
    path = directory / CONFIG
    with reading(path):
        size = path.stat().st_size
    if size > LARGEST_CONFIG:
        raise AdapterError(f"{path} has {size:,} bytes; a gate's description has at most {LARGEST_CONFIG:,}")
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise AdapterError(
            f"{path} is of format {value.get('format')!r}; this lorchestra reads {FORMAT}. Fit the gate again, or use "
            "the lorchestra that made it"
        )
    try:
        return _File.model_validate_json(json.dumps(value))
    except (ValidationError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise AdapterError(f"{path} is damaged: {error}; fetch the gate again") from error
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AdapterError(f"{path} is damaged: {where}: {first['msg']}; fetch the gate again") from error


def _spec(read: _Spec) -> GateSpec:
    return GateSpec(
        read.name,
        tuple(AdapterId(adapter.name, adapter.digest) for adapter in read.adapters),
        BaseId(read.base.name, read.base.weights, read.base.tokenizer, read.base.template),
        FeatureSpec(read.features.layers, read.features.last),
        read.activation,
        tuple(read.groups),
        read.top_k,
        read.none,
        read.temperature,
        read.hidden,
    )


def _expected(told: _File, spec: GateSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor → type and shape: no other file is a gate of this description."""
    n, width = told.size, spec.hidden or told.size
    out = {"mean": (n,), "std": (n,), "last.weight": (spec.outputs, width), "last.bias": (spec.outputs,)}
    if spec.hidden:
        out |= {"first.weight": (spec.hidden, n), "first.bias": (spec.hidden,)}
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {name: ("F32", shape) for name, shape in out.items()}
    if told.prompts is not None:
        wanted["memory"] = ("F16", (len(told.prompts), n))
    return wanted


def _numbers(directory: Path, told: _File, spec: GateSpec) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    expected = _expected(told, spec)
    most = sum(math.prod(shape) * 4 + 200 for _, shape in expected.values()) + 1000
    with reading(path):
        size = path.stat().st_size
        if size > most:
            raise AdapterError(f"{path} has {size:,} bytes, more than the gate of {CONFIG}; fetch the gate again")
        found = {entry.name: (entry.dtype, entry.shape) for entry in entries(path)}
        content = path.read_bytes() if found == expected else b""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise AdapterError(
                f"{path}: tensor {name!r} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')} by "
                f"{CONFIG}; fetch the gate again"
            )
    if hashlib.sha256(content).hexdigest() != told.sha256:
        raise AdapterError(
            f"{path} is not the file that {CONFIG} was written for; it was changed, fetch the gate again"
        )
    from safetensors.torch import load as parsed

    tensors: dict[str, Tensor] = parsed(content)
    _finite(tensors, str(path))
    return tensors


def _finite(tensors: Mapping[str, Tensor], what: str) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(
                f"{what}: {name} holds NaN or infinity; it was damaged, or its training diverged. Fit it again"
            )


def _check_adapters(gate: Gate, adapters: Mapping[str, str]) -> None:
    for member in gate.spec.adapters:
        digest = adapters.get(member.name)
        if digest == member.digest:
            continue
        elsewhere = next((name for name, found in adapters.items() if found == member.digest), None)
        hint = f"; it is there as {elsewhere!r}: give it the name {member.name!r}" if elsewhere else ""
        if digest is None:
            raise AdapterError(
                f"gate {gate.spec.name!r} chooses among {', '.join(gate.members)}, and {member.name!r} is not there"
                f"{hint}. Give all its adapters, or fit a gate for those that are there"
            )
        raise AdapterError(
            f"gate {gate.spec.name!r} was trained with another {member.name!r} (digest {member.digest[:23]}…; the one "
            f"that is there has {digest[:23]}…){hint}. Use the adapter it was trained with, or fit it again"
        )


def _check_base(gate: Gate, base: BaseId) -> None:
    ours = gate.spec.base
    for what, there, wanted in (
        ("weights", base.weights, ours.weights),
        ("tokenizer", base.tokenizer, ours.tokenizer),
    ):
        if there and wanted and there != wanted:
            raise AdapterError(
                f"gate {gate.spec.name!r} reads the states of {ours.name or 'another base'}, whose {what} differ from "
                f"those of {base.name or 'this base'}; use its own base, or fit it again"
            )
