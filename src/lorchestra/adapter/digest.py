"""Content digests: what a thing is, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorchestra.adapter.lowrank import LowRank


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order, as bytes (little-endian hosts)."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


def adapter_digest(modules: Mapping[str, LowRank]) -> str:
    """SHA-256 over sorted (module path, factor, shape, dtype, bytes) of the folded factors."""
    sha = hashlib.sha256()
    for path in sorted(modules):
        for label, factor in (("B", modules[path].B), ("A", modules[path].A)):
            head = f"{path}\0{label}\0{tuple(factor.shape)}\0{factor.dtype}\0"
            sha.update(head.encode())
            sha.update(tensor_bytes(factor))
    return "sha256:" + sha.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
