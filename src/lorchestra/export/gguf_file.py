"""Writing tensors into a GGUF file and reading them back: rounding by the gguf library, one tensor in memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorchestra.errors import StorageError, TrainingError, UserError
from lorchestra.events import Reporter

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# Option → GGUF's type of matrices; vectors (norms, biases) stay float32.
FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_BLOCK = 32  # entries of a row that share a scale in q8_0
_LARGEST_HALF = 65504.0
_PIECE = 1 << 24  # entries rounded at once


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name and shape in the file, its type, and how to come by it.

    ``load`` gives any floating dtype; it is called once to write and once to check.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    load: Callable[[], Tensor]


def kind_for(shape: Sequence[int], dtype: str) -> GGMLQuantizationType:
    """The type of a tensor: vectors in float32; in q8_0, rows that do not fill its blocks in float16."""
    from gguf import GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    name = FORMATS[dtype]
    return GGMLQuantizationType["F16" if name == "Q8_0" and shape[-1] % _BLOCK else name]


def write(writer: GGUFWriter, path: Path, tensors: Sequence[Planned], dtype: str, reporter: Reporter) -> None:
    """Write header, metadata and tensors; the writer is closed.

    Raises:
        UserError: an entry that float16 cannot hold.
        StorageError: the disk has no room for the file.
    """
    import gguf

    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[FORMATS[dtype]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in tensors:
        block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
        nbytes = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=tensor.kind)
    needed, free = sum(t.nbytes for t in writer.tensors[0].values()), shutil.disk_usage(path.parent).free
    if needed > free:
        raise StorageError(
            f"{path.name} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; make room, or use another disk"
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with reporter.task(f"write {path.name}", len(tensors), "tensor") as task:
            for tensor in tensors:
                writer.write_tensor_data(_rounded(tensor))
                task.advance(1)
    finally:
        writer.close()


def check(path: Path, tensors: Iterable[Planned], reporter: Reporter) -> float:
    """Read every tensor back and compare it with its source, entry by entry.

    Returns:
        ‖written − source‖ / ‖source‖ over all tensors.

    Raises:
        TrainingError: a tensor is missing, of another shape, or further off than its format rounds.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    planned = list(tensors)
    extra = set(found) ^ {tensor.name for tensor in planned}
    if extra:
        raise TrainingError(f"{path.name} does not hold what was to be written: {sorted(extra)[0]!r}. It is not kept")
    lost = size = 0.0
    with reporter.task(f"check {path.name}", len(planned), "tensor") as task:
        for tensor in planned:
            source = tensor.load()
            read = found[tensor.name]
            if tuple(int(n) for n in reversed(read.shape)) != tuple(source.shape) or read.tensor_type != tensor.kind:
                raise TrainingError(f"{path.name}: {tensor.name!r} has another shape or type. It is not kept")
            values = gguf.dequantize(read.data, read.tensor_type)
            for first in range(0, source.shape[0], _rows(source)):
                part = source[first : first + _rows(source)].float()
                back = torch.from_numpy(np.array(values[first : first + _rows(source)]))
                error = (back - part).abs()
                if not bool((error <= _tolerance(part, tensor.kind.name)).all()):
                    worst = float(error.max())
                    raise TrainingError(
                        f"{path.name}: {tensor.name!r} read back is off by {worst:.3g}, more than {tensor.kind.name} "
                        "rounds. It is not kept"
                    )
                lost += float(error.double().square().sum())
                size += float(part.double().square().sum())
            task.advance(1)
    return math.sqrt(lost / size) if size else 0.0


def _tolerance(part: Tensor, kind: str) -> Tensor | float:
    """How far rounding to ``kind`` may move an entry; elementwise."""
    if kind == "F32":
        return 0.0
    if kind == "F16":
        return part.abs() * 2**-11 + 2**-25
    if kind == "BF16":
        return part.abs() * 2**-8 + 2**-126
    # q8_0: whole multiples, at most 127, of a step d that is itself rounded to float16.
    step = part.reshape(*part.shape[:-1], -1, _BLOCK).abs().amax(-1, keepdim=True) / 127
    return ((0.5 + 127 * 2**-11) * step + 127 * 2**-25).expand(*step.shape[:-1], _BLOCK).reshape(part.shape) * 1.001


def _rows(tensor: Tensor) -> int:
    return max(_PIECE // max(tensor[0].numel(), 1), 1)


def _rounded(planned: Planned) -> np.ndarray[Any, Any]:
    """The tensor's bytes in the file, as an array of the type that the writer expects."""
    import gguf

    tensor = planned.load()
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{planned.name!r} holds NaN or infinity; the model is damaged or its training diverged")
    pieces = []
    for first in range(0, tensor.shape[0], _rows(tensor)):
        part = tensor[first : first + _rows(tensor)].float()
        if planned.kind.name in ("F16", "Q8_0"):
            largest = float(part.abs().max()) / (127 if planned.kind.name == "Q8_0" else 1)
            if largest > _LARGEST_HALF:
                raise UserError(
                    f"{planned.name!r} holds an entry of {largest:.3g}, beyond float16; export with --dtype bf16 or f32"
                )
        pieces.append(gguf.quantize(part.contiguous().numpy(), planned.kind))
    return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
