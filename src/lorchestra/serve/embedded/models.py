"""Which forward pass serves a model, and whether it is the model's own."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor

from lorchestra.bank.rows import RowBank
from lorchestra.base.load import Base
from lorchestra.errors import UserError
from lorchestra.serve.embedded.decoder import FAMILY, LlamaDecoder
from lorchestra.serve.embedded.generic import GenericDecoder
from lorchestra.serve.embedded.scheduler import Decoder
from lorchestra.serve.embedded.slots import Slots

UNLIMITED = 8192  # positions of a model that does not say
# ‖difference‖ / ‖logits‖ over the checked tokens; rounding alone is far below, another formula far above.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PROMPT, NEW = 12, 3  # tokens that are checked: read, then decoded


def longest(model: Any, asked: int | None) -> int:
    """Positions of a sequence.

    Raises:
        UserError: more than the model has.
    """
    own = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)
    if asked is not None and not 1 <= asked <= own:
        raise UserError(f"max_length: got {asked}, expected 1 to {own}, the positions of this model")
    return own if asked is None else asked


def free_memory(device: torch.device) -> int:
    """Bytes that are free on ``device`` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


@torch.inference_mode()
def decoder_for(base: Base, max_length: int, kernel: bool = False) -> Decoder:
    """The forward pass for ``base``; its logits are compared with the model's own before it is used.

    Args:
        base: the model.
        max_length: positions of a sequence.
        kernel: compile what can be compiled of it.

    Raises:
        UserError: there is no compiler, it computes something else, or the model's attention cannot be kept in slots.
    """
    model = base.model
    noise = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, rows, (2, PROMPT + NEW), generator=noise)
    expected = model(ids.to(base.device), use_cache=False).logits.float()
    decoder: Decoder = LlamaDecoder(model, max_length, kernel) if _plain(base, max_length) else GenericDecoder(model)
    error = float((_logits(decoder, ids) - expected).norm() / expected.norm())
    if not error <= TOLERANCE.get(decoder.dtype, 1e-1):
        raise UserError(
            f"the embedded engine computes other logits for this {model.config.model_type!r} model than transformers "
            f"(relative difference {error:.2g}); use --engine vllm, and tell us about the model"
        )
    return decoder


def _plain(base: Base, max_length: int) -> bool:
    """Whether it is of the family that has a forward pass of its own, in a form that pass knows."""
    config = base.model.config
    if config.model_type not in FAMILY or base.quantised or getattr(config, "hidden_act", "silu") != "silu":
        return False
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    windows = window is not None and window < max_length and "sliding_attention" in kinds
    turns = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return not windows and turns in ("default", "linear", "llama3", "yarn")


def _logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """Of all positions of ``ids [2, L]``: a prompt, then tokens one by one."""
    bank = RowBank(decoder.groups, device=decoder.device)
    slots = Slots(decoder.shape, 0, PROMPT + NEW, decoder.dtype, decoder.device)
    for row in range(2):
        slots.take(row, PROMPT, PROMPT + NEW)
    base = bank.mixed("base", [])
    step = slots.reading(range(2), (0, 0), (PROMPT, PROMPT))
    found = [decoder.hidden_states(ids[:, :PROMPT], step, bank, bank.beside([base, base]))]
    step.keep()
    for row in range(2):
        slots.begin(row)
    for at in range(PROMPT, PROMPT + NEW):
        found.append(decoder.hidden_states(ids[:, at : at + 1], slots.decoding(), bank, bank.acting((0, 1))))
    return decoder.logits(torch.cat(found, dim=1)).float()
