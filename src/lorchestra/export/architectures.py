"""How each family of models is written as GGUF: metadata, names and order of tensors, as llama.cpp reads them.

What llama.cpp would compute otherwise than transformers does is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorchestra.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ELSEWHERE = "convert the merged model with llama.cpp's convert_hf_to_gguf.py instead"
# Rotary bases of sliding layers that llama.cpp assumes where the file does not say.
_LOCAL_BASE = 10_000.0


@dataclass(frozen=True)
class Architecture:
    """One family.

    Args:
        name: as GGUF calls it.
        interleaved: rows of q and k are in llama.cpp's order for the interleaved rotary embedding.
        shifted: norms are stored as 1 + weight.
        explicit_heads: the width of a head is always written.
        windows: every how many layers attention is global, with sliding windows in between; 0: no windows.
    """

    name: str
    interleaved: bool = False
    shifted: bool = False
    explicit_heads: bool = False
    windows: int = 0


_KNOWN: Mapping[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", explicit_heads=True),
    "gemma2": Architecture("gemma2", shifted=True, explicit_heads=True, windows=2),
    "gemma3_text": Architecture("gemma3", shifted=True, explicit_heads=True, windows=6),
}


def architecture_of(config: Any) -> Architecture:
    """The family of a transformers configuration.

    Raises:
        UserError: one that is not written here, or with a feature that llama.cpp would leave out.
    """
    kind = str(getattr(config, "model_type", ""))
    if kind not in _KNOWN:
        raise UserError(
            f"a model of type {kind!r} cannot be written as GGUF here, only {', '.join(_KNOWN)}; {ELSEWHERE}"
        )
    found = _KNOWN[kind]
    for reason in _strange(config, found):
        raise UserError(f"this {kind} model {reason}, which llama.cpp would leave out; {ELSEWHERE}")
    return found


def _strange(config: Any, found: Architecture) -> list[str]:
    """What of the model GGUF or llama.cpp has no place for."""
    out = []
    rope = rope_of(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        out.append(f"scales its rotary embedding by {rope['rope_type']!r}")
    if rope.get("rope_type") == "llama3" and found.name != "llama":
        out.append("scales its rotary embedding by 'llama3'")
    if getattr(config, "hidden_act", "silu") not in ("silu", "gelu_pytorch_tanh"):
        out.append(f"has the activation {config.hidden_act!r}")
    if found.windows:
        layers = range(config.num_hidden_layers)
        pattern = ["full_attention" if (i + 1) % found.windows == 0 else "sliding_attention" for i in layers]
        if list(config.layer_types) != pattern:
            out.append(f"does not alternate its windows every {found.windows} layers")
        scale, heads = config.query_pre_attn_scalar, config.hidden_size // config.num_attention_heads
        largest = {"gemma2": 46, "gemma3": 62}[found.name]  # their 27B divides by another width
        if scale != (heads if config.num_hidden_layers == largest else head_dim(config)):
            out.append(f"scales attention by 1/√{scale}")
    return out


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any) -> Mapping[str, Any]:
    """Rotary parameters of the global layers."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    return dict(found.get("full_attention", found))


def add_metadata(writer: GGUFWriter, config: Any, found: Architecture) -> None:
    """The hyperparameters, in the file's own words."""
    rope = rope_of(config)
    writer.add_context_length(_context(config, found))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    if found.name == "llama":
        writer.add_rope_dimension_count(head_dim(config))
    if found.explicit_heads or head_dim(config) * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    _add_rope_scaling(writer, rope)
    if found.windows:
        writer.add_sliding_window(config.sliding_window)
        _add_windowed(writer, config)


def _context(config: Any, found: Architecture) -> int:
    """Positions; where llama.cpp knows no sliding window, as many as fit into one, so that both see the same."""
    window = None if found.windows else getattr(config, "sliding_window", None)
    used = window if window and getattr(config, "use_sliding_window", True) else config.max_position_embeddings
    return int(min(used, config.max_position_embeddings))


def _add_windowed(writer: GGUFWriter, config: Any) -> None:
    for value, add in (
        (getattr(config, "attn_logit_softcapping", None), writer.add_attn_logit_softcapping),
        (getattr(config, "final_logit_softcapping", None), writer.add_final_logit_softcapping),
    ):
        if value:
            add(value)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    local = float(dict(rope.get("sliding_attention") or {}).get("rope_theta", _LOCAL_BASE))
    if "sliding_attention" in rope and local != _LOCAL_BASE:
        writer.add_rope_freq_base_swa(local)


def _add_rope_scaling(writer: GGUFWriter, rope: Mapping[str, Any]) -> None:
    import gguf

    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def rope_factors(config: Any) -> Tensor | None:
    """Llama 3's rotary scaling as llama.cpp takes it: a divisor for each frequency, ``[head_dim / 2]`` float32."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = head_dim(config)
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    lengths = 2 * math.pi / frequencies
    low, high, factor = float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), float(rope["factor"])
    trained = float(rope["original_max_position_embeddings"])
    smooth = (trained / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = torch.where(lengths < trained / high, torch.ones_like(lengths), between)
    return torch.where(lengths > trained / low, torch.full_like(lengths, factor), divisors).float()


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows ``[heads · d, …]`` of q or k in llama.cpp's order: of every head the two halves in turn."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def reorder(path: str, config: Any, found: Architecture) -> Callable[[Tensor], Tensor] | None:
    """What becomes of the rows (out features) of module ``path``; ``None``: they stay."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path.rsplit(".", 1)[-1])
    return (lambda rows: interleave(rows, heads)) if found.interleaved and heads else None


def tensor_name(name: str, config: Any, found: Architecture) -> str:
    """GGUF's name of a tensor of the model.

    Raises:
        UserError: it has none: the model holds something that llama.cpp does not know.
    """
    import gguf

    kind = next(kind for kind in gguf.MODEL_ARCH if gguf.MODEL_ARCH_NAMES[kind] == found.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if mapped is None:
        raise UserError(
            f"the model holds {name!r}, which has no place in a GGUF file of type {found.name}; {ELSEWHERE}"
        )
    return str(mapped)
