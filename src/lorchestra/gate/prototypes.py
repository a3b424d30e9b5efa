"""What an adapter is for, as far as a router needs to know: where its training prompts lie, and what its ΔW looks at.

A file of its own beside the adapter (``prototypes.safetensors``), which names the adapter by its digest: beside other
weights it is nothing. An adapter that has none, another tool's perhaps, still has its directions, from its factors.

Axis letters: N prompts, n features, k centroids, q axes, d directions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.reading import reading
from lorchestra.base.safetensors_file import entries
from lorchestra.errors import AdapterError, SourceError
from lorchestra.gate.features import FeatureSpec

FILE = "prototypes.safetensors"
FORMAT = 1
LARGEST = 16 << 20  # bytes of a file
# Of all prototypes: one pass over a prompt serves all adapters. Fewer layers know another language less surely.
FEATURES = FeatureSpec(layers=2)
CENTROIDS, AXES, DIRECTIONS = 4, 16, 8  # at most
PROMPTS_EACH = 100  # training prompts to a centroid, at least
ROUNDS = 25  # of k-means
_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "W_pack", "in_proj")


@dataclass(frozen=True, eq=False)
class Prototype:
    """Of one adapter.

    Args:
        adapter: its digest.
        features: of the prompts.
        directions: ``[d, n]`` float32: the leading right singular vectors of ΔW where it reads the features, each times
            its singular value; of all of them together the norm is 1. Whatever (B M, M⁻¹ A) the factors are, these are
            the same, but for signs.
        prompts: N; 0 where only the weights are known.
        centroids: ``[k, n]`` float32, of the prompts' features.
        variance: ``[n]`` float32, of the features about their nearest centroid.
        axes: ``[q, n]`` float32, the principal axes of that scatter, each times its standard deviation.
    """

    adapter: str
    features: FeatureSpec
    directions: Tensor
    prompts: int = 0
    centroids: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    variance: Tensor = field(default_factory=lambda: torch.empty(0))
    axes: Tensor = field(default_factory=lambda: torch.empty(0, 0))


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    adapter: str = Field(max_length=100)
    layers: int = Field(ge=0)
    last: bool
    prompts: int = Field(ge=0)


def of_adapter(adapter: Adapter, features: FeatureSpec = FEATURES) -> Prototype:
    """What can be told from the weights alone."""
    return Prototype(adapter.digest, features, directions(adapter, features.layers))


def of_prompts(adapter: Adapter, x: Tensor, features: FeatureSpec = FEATURES, seed: int = 0) -> Prototype:
    """What can be told from the weights and the training prompts.

    Args:
        adapter: that was trained.
        x: ``[N, n]``, features of its training prompts.
        features: of which kind.
        seed: of the first centroids.

    Raises:
        AdapterError: no prompts, or NaN or infinity in a feature.
    """
    if not len(x) or not bool(torch.isfinite(x).all()):
        raise AdapterError(
            f"prototypes need the features of at least one prompt, all of them finite; got {tuple(x.shape)}"
        )
    x = x.double()
    k = max(1, min(CENTROIDS, len(x) // PROMPTS_EACH))
    centroids, nearest = _k_means(x, k, seed)
    scatter = x - centroids[nearest]
    known = of_adapter(adapter, features)
    return Prototype(
        known.adapter,
        features,
        known.directions,
        len(x),
        centroids.float(),
        scatter.square().mean(dim=0).float(),
        scattered(scatter),
    )


def scattered(deviations: Tensor) -> Tensor:
    """``[q, n]`` float32: principal axes of ``deviations [N, n]``, each times the standard deviation along it."""
    _, s, V = torch.linalg.svd(deviations.double(), full_matrices=False)
    axes: Tensor = V[:AXES] * (s[:AXES, None] / len(deviations) ** 0.5)
    return axes[s[:AXES] > 0].float()


def combined(adapter: Adapter, parts: Sequence[Prototype]) -> Prototype:
    """Of a sum of adapters: it is for the prompts of all of them.

    Args:
        adapter: the sum.
        parts: its members' prototypes, all of one kind of features and with prompts.
    """
    total = sum(part.prompts for part in parts)
    shares = [part.prompts / total for part in parts]
    stacked = torch.cat([part.axes.double() * share**0.5 for part, share in zip(parts, shares, strict=True)])
    _, s, V = torch.linalg.svd(stacked, full_matrices=False)
    axes = (V * s[:, None])[:AXES]
    return replace(
        of_adapter(adapter, parts[0].features),
        prompts=total,
        centroids=torch.cat([part.centroids for part in parts]),
        variance=torch.stack([part.variance * share for part, share in zip(parts, shares, strict=True)]).sum(dim=0),
        axes=axes[s[:AXES] > 0].float(),
    )


def directions(adapter: Adapter, layers: int) -> Tensor:
    """``[d, n]``: see :class:`Prototype`; none where the adapter does not change what reads the features.

    The stack of ΔWᵢ = BᵢAᵢ of the modules that read the features has the right singular vectors and values of the stack
    of RᵢAᵢ, with Bᵢ = QᵢRᵢ, and those are the left ones of a matrix with n rows and Σrᵢ columns: no m×n matrix exists.

    Args:
        adapter: any.
        layers: l: the features are states after so many layers, which the attention of layer l reads, normalised.
    """
    at = re.compile(rf"(?:.*\.)?(?:layers|h|blocks)\.{layers}\.(?:.*\.)?(?:{'|'.join(_INPUTS)})")
    read = [update for path, update in adapter.modules.items() if at.fullmatch(path)]
    width = max((update.shape[1] for update in read), default=0)
    rows = [torch.linalg.qr(update.B.double())[1] @ update.A.double() for update in read if update.shape[1] == width]
    if not rows:
        return torch.empty(0, 0)
    _, s, V = torch.linalg.svd(torch.cat(rows), full_matrices=False)
    kept = min(DIRECTIONS, int((s > s[0] * 1e-6).sum())) if float(s[0]) else 0
    found = V[:kept] * s[:kept, None]
    return (found / found.norm()).float() if kept else torch.empty(0, 0)


def save(prototype: Prototype, directory: Path) -> Path:
    """Write :data:`FILE` beside the adapter in ``directory``."""
    from safetensors.torch import save as serialised

    told = _Told(
        format=FORMAT,
        adapter=prototype.adapter,
        layers=prototype.features.layers,
        last=prototype.features.last,
        prompts=prototype.prompts,
    )
    tensors = {name: getattr(prototype, name).contiguous() for name in _TENSORS}
    path = directory / FILE
    path.write_bytes(serialised(tensors, metadata={"prototype": told.model_dump_json()}))
    return path


def load(directory: Path, adapter: str) -> Prototype | None:
    """Read what lies beside an adapter; ``None`` where there is nothing.

    Args:
        directory: of the adapter.
        adapter: its digest.

    Raises:
        AdapterError: it is damaged, too large, of another format or of another adapter.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    damaged = f"{path} is no file of prototypes, or is damaged"
    try:
        with reading(path):
            size = path.stat().st_size
            content = path.read_bytes() if size <= LARGEST else b""
            shapes = {entry.name: (entry.dtype, entry.shape) for entry in entries(path)} if content else {}
    except SourceError as error:
        raise AdapterError(f"{damaged}: {error}") from None
    if not content:
        raise AdapterError(f"{path} has {size:,} bytes; prototypes have 1 to {LARGEST:,}")
    told = _told(content, damaged)
    if told.adapter != adapter:
        raise AdapterError(
            f"{path} is of the adapter {told.adapter[:23]}…, and beside it lies {adapter[:23]}…; remove the file"
        )
    _check_shapes(shapes, damaged)
    from safetensors.torch import load as parsed

    tensors = parsed(content)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise AdapterError(f"{path} holds NaN or infinity; remove the file, or fetch the adapter again")
    if told.prompts and not len(tensors["centroids"]):
        raise AdapterError(f"{damaged}: {told.prompts:,} prompts without a centroid")
    return Prototype(told.adapter, FeatureSpec(told.layers, told.last), prompts=told.prompts, **tensors)


_TENSORS = ("directions", "centroids", "variance", "axes")


def _told(content: bytes, damaged: str) -> _Told:
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
        told = _Told.model_validate_json(header["__metadata__"]["prototype"])
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{damaged}: what it says of itself cannot be read ({type(error).__name__})") from error
    if told.format != FORMAT:
        raise AdapterError(f"{damaged}: its format is {told.format}; this lorchestra reads {FORMAT}")
    return told


def _check_shapes(shapes: dict[str, tuple[str, tuple[int, ...]]], damaged: str) -> None:
    if shapes.keys() != set(_TENSORS) or any(dtype != "F32" for dtype, _ in shapes.values()):
        raise AdapterError(f"{damaged}: it holds {', '.join(sorted(shapes)) or 'nothing'}, not {', '.join(_TENSORS)}")
    found = {name: shape for name, (_, shape) in shapes.items()}
    axes = {name: 1 if name == "variance" else 2 for name in _TENSORS}
    widths = {shape[-1] for name, shape in found.items() if len(shape) == axes[name] and shape[0]}
    if any(len(found[name]) != axes[name] for name in _TENSORS) or len(widths) > 1:
        raise AdapterError(f"{damaged}: its tensors are {found}, which do not belong together")
    if bool(found["centroids"][0]) != bool(found["variance"][0]):
        raise AdapterError(f"{damaged}: centroids and their variance go together")


def _k_means(x: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centroids ``[k, n]`` (Lloyd 1982), and which is nearest to each row; centroids of nobody are left out."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    centroids = x[order[:k]].clone() if k > 1 else x.mean(dim=0, keepdim=True)
    nearest = torch.cdist(x, centroids).argmin(dim=1)
    for _ in range(ROUNDS if k > 1 else 0):
        used = [j for j in range(len(centroids)) if bool((nearest == j).any())]
        centroids = torch.stack([x[nearest == j].mean(dim=0) for j in used])
        before, nearest = nearest, torch.cdist(x, centroids).argmin(dim=1)
        if len(used) == k and bool((nearest == before).all()):
            break
        k = len(used)
    return centroids, nearest
