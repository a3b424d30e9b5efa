"""‖W‖ of a base's modules, read from its safetensors a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lorchestra.base.safetensors_file import Entry, entries, weight_files
from lorchestra.errors import AdapterError, SourceError
from lorchestra.events import SILENT, Reporter

BLOCK = 1 << 22  # entries read at once
_FLOATING = {"F64", "F32", "F16", "BF16"}


def weight_norms(
    base: Path,
    shapes: Mapping[str, tuple[int, int]],
    transposed: Collection[str] = (),
    reporter: Reporter = SILENT,
) -> dict[str, float]:
    """Module path → ‖W‖ (Frobenius), summed in float64.

    Args:
        base: a model directory with safetensors.
        shapes: module path → ``(m, n)`` of the update that an adapter has for it.
        transposed: modules whose weight is stored ``[in, out]``.
        reporter: progress.

    Raises:
        AdapterError: the base does not have the module, or in another shape.
        SourceError: no safetensors, a damaged file, or weights that are not floating-point numbers.
    """
    from safetensors import safe_open

    tensors = {entry.name: (file, entry) for file in weight_files(base) for entry in entries(file)}
    norms = {}
    with reporter.task("norms of the base", len(shapes), "module") as task:
        for path, shape in shapes.items():
            file, entry = tensors[_tensor(path, tensors)]
            _check(entry, path, shape[::-1] if path in transposed else shape)
            with safe_open(file, "pt") as opened:
                norms[path] = _norm(opened.get_slice(entry.name), entry.shape)
            task.advance(1)
    return norms


def _norm(part: Any, shape: tuple[int, ...]) -> float:
    rows = max(BLOCK // shape[1], 1)
    blocks = (part[first : first + rows] for first in range(0, shape[0], rows))
    return math.sqrt(math.fsum(float(block.double().square().sum()) for block in blocks))


def _check(entry: Entry, path: str, shape: tuple[int, int]) -> None:
    if entry.dtype not in _FLOATING:
        raise SourceError(
            f"the base holds {path!r} as {entry.dtype}, quantised; give the unquantised base, or leave --base out"
        )
    if entry.shape != shape:
        raise AdapterError(
            f"module {path!r}: the adapter changes a weight of shape {shape}, the base's is {entry.shape}; the "
            "adapter belongs to another base"
        )


def _tensor(path: str, names: Collection[str]) -> str:
    """A module's tensor; its name in the files may differ by the model's own prefix, or a wrapper's."""
    exact, bare = f"{path}.weight", f"{path.removeprefix('model.')}.weight"
    if exact in names:
        return exact
    ends = [name for name in names if name == bare or name.endswith(f".{bare}")]
    if not ends and bare == "lm_head.weight":  # tied: the input embedding's
        ends = [name for name in names if name.endswith("embed_tokens.weight")]
    if len(ends) == 1:
        return ends[0]
    raise AdapterError(f"the base has no weight for module {path!r}; the adapter belongs to another base")
