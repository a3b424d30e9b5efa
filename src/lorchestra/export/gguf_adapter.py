"""An adapter as a GGUF file, to be used beside its base in llama.cpp (``--lora``) and Ollama (``ADAPTER``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import TrainingError, UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.export.architectures import ELSEWHERE, Architecture, architecture_of, reorder, tensor_name
from lorchestra.export.factors import LIMITS, balanced, difference
from lorchestra.export.gguf_file import Planned, check, kind_for, write
from lorchestra.export.gguf_model import Written


def export_adapter(
    adapter: Adapter,
    config: Any,
    file: Path,
    dtype: str,
    *,
    notes: Mapping[str, str] | None = None,
    reporter: Reporter = SILENT,
) -> Written:
    """Write ``file`` and check it.

    llama.cpp applies alpha / r with the rank of each tensor; alpha here is the commonest rank, and modules of another
    rank have what is left of their scale in B, so that every ΔW is exactly the adapter's.

    Args:
        adapter: to write.
        config: transformers configuration of its base.
        file: to write; its directory exists.
        dtype: of the factors, a key of :data:`lorchestra.export.gguf_file.FORMATS`.
        notes: further metadata, by key.
        reporter: progress.

    Raises:
        UserError: a base or a module that GGUF does not hold.
        TrainingError: the file does not give the adapter back.
    """
    import gguf

    found = architecture_of(config)
    names = {path: _name(path, adapter, config, found) for path in adapter.modules}
    alpha = Counter(update.rank for update in adapter.modules.values()).most_common(1)[0][0]
    factors: dict[str, torch.Tensor] = {}
    for path, update in adapter.modules.items():
        B, A = balanced(update)
        rows = reorder(path, config, found)
        factors[f"{names[path]}.lora_a"] = A
        factors[f"{names[path]}.lora_b"] = (rows(B) if rows else B) * (update.rank / alpha)
    tensors = [
        Planned(name, tuple(factor.shape), kind_for(factor.shape, dtype), factors[name].contiguous)
        for name, factor in factors.items()
    ]
    writer = gguf.GGUFWriter(path=None, arch=found.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_name(file.stem)
    for key, text in (notes or {}).items():
        writer.add_string(key, text)
    write(writer, file, tensors, dtype, reporter)
    check(file, tensors, reporter)
    error = difference(adapter, read_adapter(file, names, config, found))
    if not error <= LIMITS[dtype]:
        raise TrainingError(
            f"{file.name} read back differs from the adapter by {error:.2%} of ‖ΔW‖ ({LIMITS[dtype]:.2%} is allowed in "
            f"{dtype}). It is not kept"
        )
    return Written(file, file.stat().st_size, len(tensors), error)


def _name(path: str, adapter: Adapter, config: Any, found: Architecture) -> str:
    if path in adapter.embeddings or (path == "lm_head" and config.tie_word_embeddings):
        raise UserError(
            f"the adapter changes {path!r}, which llama.cpp does not adapt as PEFT does; merge it into its base "
            "(lorchestra merge) and export the merged model"
        )
    if path in adapter.transposed:
        raise UserError(f"module {path!r} stores its weight transposed, which GGUF's families here do not; {ELSEWHERE}")
    return tensor_name(f"{path}.weight", config, found)


def read_adapter(file: Path, names: Mapping[str, str], config: Any, found: Architecture) -> dict[str, LowRank]:
    """Module path → ΔW as llama.cpp applies it from ``file``: alpha over each tensor's own rank, rows put back.

    Args:
        file: GGUF.
        names: module path → tensor name.
        config, found: of the base.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {t.name: np.array(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    out = {}
    for path, name in names.items():
        A, B = (torch.from_numpy(tensors[f"{name}.lora_{letter}"]) for letter in "ab")
        rows = reorder(path, config, found)
        if rows is not None:
            order = rows(torch.arange(B.shape[0])[:, None])[:, 0]  # where each row went
            back = torch.empty_like(B)
            back[order] = B
            B = back
        out[path] = LowRank(B * (alpha / A.shape[0]), A)
    return out
