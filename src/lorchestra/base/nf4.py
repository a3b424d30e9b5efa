"""A base held in 4 bits while adapters train on it (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

Weights of linear modules are rounded to the 16 values of NF4 in blocks of 64, with the blocks' scales in 8 bits; they
are turned back, block by block, whenever they are multiplied. The directory on disk stays what it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorchestra.base.dequantise import quantisation
from lorchestra.errors import SourceError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NF4 = "nf4"
# 4 bits; an 8-bit scale for 64 numbers; a float32 scale of 256 such scales.
BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a number


def require_bitsandbytes() -> None:
    """Raises ``UserError`` where nf4 cannot be had."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "dtype nf4 needs bitsandbytes, which is not installed here; `pip install 'lorchestra[nf4]'`, "
            "or choose another dtype"
        )


def refuse_quantised(directory: Path) -> None:
    """nf4 is made of plain weights.

    Raises:
        SourceError: the model is stored quantised already.
    """
    if method := quantisation(directory):
        raise SourceError(
            f"{directory} is quantised by {method} already, and nf4 would round it a second time. Give the plain model "
            "that it was made from, or leave dtype nf4 out"
        )


def hush() -> None:
    """Where bitsandbytes is installed, accelerate imports it, and it says that a CPU kernel could be had from a hub."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def settings(dtype: torch.dtype) -> Any:
    """transformers' ``BitsAndBytesConfig``: NF4 with double quantisation, multiplying in ``dtype``."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_as_packed(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights anew, in place, for a CPU kernel without a backward pass.

    It does so on CPUs with bfloat16 instructions at the first forward pass without gradients, and training after that
    would get wrong gradients without an error (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # no attribute that types know


def scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of what turns the packed weights of ``model`` back: scales, their scales, the 16 values.

    They are neither parameters nor buffers. Nothing of a model that is not quantised.
    """
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            for part, tensor in state.as_dict(packed=True).items():
                yield f"{name}.{part}", tensor
