"""A model directory as one GGUF file: for llama.cpp, Ollama and what is built on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorchestra.base.safetensors_file import entries, weight_files
from lorchestra.data.template import ChatTemplate
from lorchestra.errors import DataError, SourceError, TrainingError
from lorchestra.evaluate.parity import logits_of
from lorchestra.events import SILENT, Reporter
from lorchestra.export.architectures import (
    Architecture,
    add_metadata,
    architecture_of,
    reorder,
    rope_factors,
    rope_of,
    tensor_name,
)
from lorchestra.export.gguf_file import Planned, check, kind_for, write
from lorchestra.export.tokens import add_tokenizer

# How far the logits may move, as a share of their spread; measured on trained models: float16 0.1 %, q8_0 1–3 %.
LIMITS = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, "q8_0": 0.2}
_FLOATING = {"F64", "F32", "F16", "BF16"}
# What transformers takes from a GGUF file. All else it leaves at its defaults, where the check puts the model's.
_CARRIED = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "vocab_size", "tie_word_embeddings", "sliding_window", "model_type", "architectures", "dtype",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A GGUF file that was checked.

    Args:
        file: its path.
        size: in bytes.
        tensors: in it.
        error: ‖written − source‖ / ‖source‖ over all of them.
        logits: how far transformers' reading of the file moves the logits, as a share of their spread; ``None`` if
            that was not measured.
    """

    file: Path
    size: int
    tensors: int
    error: float
    logits: float | None = None


def read_config(directory: Path) -> Any:
    """The transformers configuration of a model directory.

    Raises:
        SourceError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{directory} has no configuration that transformers can read: {error}") from error


def export_model(
    directory: Path,
    file: Path,
    dtype: str,
    *,
    tokenizer_from: Path | None = None,
    notes: dict[str, str] | None = None,
    prompts: Sequence[str] = (),
    reporter: Reporter = SILENT,
) -> Written:
    """Write ``file`` and check it.

    Args:
        directory: a model with safetensors, config.json and tokenizer.
        file: to write; its directory exists.
        dtype: a key of :data:`lorchestra.export.gguf_file.FORMATS`.
        tokenizer_from: a GGUF file of the same base, to copy the tokenizer from.
        notes: further metadata, by key.
        prompts: texts on which the logits of the file are compared with the model's; none: they are not. Both models
            are loaded in float32, one after the other.
        reporter: progress.

    Raises:
        UserError: an architecture or tokenizer that GGUF does not hold, or an entry beyond float16.
        SourceError: damaged or missing files.
        TrainingError: the file does not give the model back.
    """
    import gguf

    config = read_config(directory)
    found = architecture_of(config)
    tensors = plan(directory, config, found, dtype)
    writer = gguf.GGUFWriter(path=None, arch=found.name)
    writer.add_name(file.stem)
    add_metadata(writer, config, found)
    add_tokenizer(writer, directory, config.vocab_size, tokenizer_from)
    _add_end_of_turn(writer, directory)
    for key, text in (notes or {}).items():
        writer.add_string(key, text)
    write(writer, file, tensors, dtype, reporter)
    error = check(file, tensors, reporter)
    logits = None
    if prompts:
        with reporter.task("compare logits", None, "model") as task:
            logits = compare_logits(directory, file, config, prompts)
            task.advance()
        if not logits <= LIMITS[dtype]:
            raise TrainingError(
                f"the logits of {file.name} differ from the model's by {logits:.2%} of their spread "
                f"({LIMITS[dtype]:.1%} is allowed in {dtype}). It is not kept"
            )
    return Written(file, file.stat().st_size, len(tensors), error, logits)


def plan(directory: Path, config: Any, found: Architecture, dtype: str) -> list[Planned]:
    """Every tensor of the file, with how to come by it.

    Raises:
        UserError: a tensor without a place in GGUF.
        SourceError: damaged files, or quantised weights.
    """
    out = []
    for path in weight_files(directory):
        for entry in entries(path):
            if entry.name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # the input embedding's
            if entry.dtype not in _FLOATING:
                raise SourceError(
                    f"{path.name} holds {entry.name!r} as {entry.dtype}, quantised; merge into the unquantised base "
                    "(lorchestra merge --dequantise)"
                )
            name = tensor_name(entry.name, config, found)
            shift = found.shifted and entry.name.endswith("norm.weight")
            rows = reorder(entry.name.rsplit(".", 1)[0], config, found)
            load = _loader(path, entry.name, rows, shift)
            out.append(Planned(name, entry.shape, kind_for(entry.shape, dtype), load))
    factors = rope_factors(config)
    if factors is not None:
        shape = tuple(factors.shape)
        out.append(Planned("rope_freqs.weight", shape, kind_for(shape, dtype), lambda: factors))
    if not any(tensor.name == "token_embd.weight" for tensor in out):
        raise SourceError(f"{directory} holds no input embedding; it is no whole model")
    return out


def _loader(path: Path, name: str, rows: Callable[[Tensor], Tensor] | None, shift: bool) -> Callable[[], Tensor]:
    def load() -> Tensor:
        from safetensors import safe_open

        with safe_open(path, "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        if shift:
            tensor = tensor.float() + 1
        return rows(tensor) if rows else tensor

    return load


def _add_end_of_turn(writer: Any, directory: Path) -> None:
    """The token that ends an answer, where it is not the eos token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    try:
        end = ChatTemplate(tokenizer).end
    except DataError:
        return  # no chat model: text ends with eos
    if end != tokenizer.eos_token_id:
        writer.add_eot_token_id(end)


def compare_logits(directory: Path, file: Path, config: Any, prompts: Sequence[str]) -> float:
    """‖logits(file) − logits(model)‖ over the spread of the model's logits, read by transformers, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    ids = [tokenizer(text)["input_ids"] for text in prompts]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()
    expected = logits_of(model, ids)
    del model
    read = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    plain = rope_of(config).get("rope_type", "default") == "default"
    for key, value in config.to_dict().items():
        carried = key in _CARRIED or (key == "rope_parameters" and plain)
        if hasattr(read, key) and not carried:
            setattr(read, key, value)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=read, dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()  # fmt: skip
    found = logits_of(model, ids)
    moved = sum(float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True))
    spread = sum(float((b - b.mean(-1, keepdim=True)).double().square().sum()) for b in expected)
    return math.sqrt(moved / spread) if spread > 0 else math.inf
