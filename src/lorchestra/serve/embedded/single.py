"""One position of one sequence through all layers in one call, compiled: while nobody else is there, a step of Python
and torch takes a fifth of its time for calling.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorchestra.bank.kernel import HEADER as ROWS
from lorchestra.bank.rows import Acting
from lorchestra.base.native import library
from lorchestra.serve.embedded.attention import HEADER as ATTENTION
from lorchestra.serve.embedded.attention import WIDTHS
from lorchestra.serve.embedded.pieces import COMPILED, Heads
from lorchestra.serve.embedded.pieces import HEADER as LAYER
from lorchestra.serve.embedded.slots import Decoding

SOURCE = Path(__file__).with_name("single.cpp")
_NAMES = (
    "before", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias", "after", "up", "up_bias", "down", "down_bias",
)  # fmt: skip


class Weights(ctypes.Structure):
    """Of a layer: where each lies, as ``Layer`` in ``single.cpp``; 0 where there is none."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _NAMES)


class Single:
    """Runs :class:`~lorchestra.serve.embedded.decoder.LlamaDecoder`'s layers for one row on a CPU.

    It holds weights of its own, as models have them: those that oneDNN laid out are read by nobody else.

    Args:
        heads: of the model, in float32 or bfloat16, of a width in :data:`~lorchestra.serve.embedded.attention.WIDTHS`.
        layers: of each, name → tensor or ``None``: ``before``, ``after`` ``[n]``; ``q_norm``, ``k_norm`` ``[d]``;
            ``qkv`` ``[(h·g + 2h)·d, n]``, ``out`` ``[n, h·g·d]``, ``up`` ``[2i, n]`` (gate, then up), ``down``
            ``[n, i]``, and of each of these a bias.
        head: ``[V, n]``, of the output.

    Raises:
        UserError: there is no compiler, or it fails.
    """

    def __init__(self, heads: Heads, layers: Sequence[dict[str, Tensor | None]], head: Tensor) -> None:
        self._heads = heads
        self._kept = [{k: None if v is None else v.contiguous() for k, v in layer.items()} for layer in layers]
        self._weights = (Weights * len(layers))(
            *[
                Weights(*[None if (x := layer[name]) is None else x.data_ptr() for name in _NAMES])
                for layer in self._kept
            ]
        )
        self._head = head.detach().contiguous()
        first: Any = self._kept[0]
        self._inside, self._hidden = first["up"].shape[0] // 2, first["up"].shape[1]
        compiled, named = library(SOURCE, LAYER, ATTENTION, ROWS), COMPILED[heads.cosine.dtype]
        self._run, self._product = getattr(compiled, f"single_{named}"), getattr(compiled, f"product_{named}")
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._run.restype = self._product.restype = None
        self._product.argtypes = [pointer, pointer, integer, integer, pointer]
        self._run.argtypes = [
            pointer, pointer, *[integer] * 4, ctypes.c_float, integer, integer, pointer, pointer, pointer, integer,
            integer, pointer, integer, pointer, pointer, pointer,
        ]  # fmt: skip
        sizes = [heads.heads * heads.group, heads.heads, heads.heads]
        m = [*(size * heads.width for size in sizes), self._hidden, self._inside, self._inside, self._hidden]
        self._m = (ctypes.c_int64 * len(m))(*m)
        self._places: dict[int, tuple[Any, Any]] = {}  # by rank: where factors lie

    @staticmethod
    def takes(heads: Heads) -> bool:
        """Whether there is a kernel for such a model."""
        return heads.cosine.dtype in COMPILED and heads.width in WIDTHS and heads.cosine.device.type == "cpu"

    def hidden_states(self, x: Tensor, step: Decoding, acting: Acting) -> Tensor | None:
        """The states after all layers, where it is one row and its adapters are in the model's dtype; else ``None``.

        Args:
            x: ``[1, 1, n]``, its embedding; used up.
            step: positions and cache of this pass.
            acting: the row in a bank of :attr:`LlamaDecoder.groups <lorchestra.serve.embedded.decoder.LlamaDecoder>`.
        """
        held = step.alone()
        if held is None or len(acting.parts) > 1 or acting.loose:
            return None
        factors, rank, A, B = None, 0, None, None
        if acting.parts:
            store, _ = acting.parts[0]
            if store.flat.dtype != x.dtype:
                return None
            factors, rank = store.flat.data_ptr(), store.rank
            if rank not in self._places:
                offsets = [offset for place in store.places for offset in place.B]
                self._places[rank] = (
                    (ctypes.c_int64 * len(store.places))(*[place.A for place in store.places]),
                    (ctypes.c_int64 * len(offsets))(*offsets),
                )
            A, B = self._places[rank]
        of, (slots, at) = self._heads, held
        x = x.contiguous()
        self._run(
            x.data_ptr(), self._weights, len(self._weights), of.heads * of.group, of.heads, of.width, of.epsilon,
            self._hidden, self._inside, of.cosine[at].data_ptr(), of.sine[at].data_ptr(), slots.data_ptr(),
            slots.stride(0), at, factors, rank, A, B, self._m,
        )  # fmt: skip
        return x

    def logits(self, x: Tensor) -> Tensor:
        """``[…, V]`` from one normalised state, ``[…, n]``."""
        x, (m, n) = x.contiguous(), self._head.shape
        out = torch.empty(*x.shape[:-1], m, dtype=x.dtype)
        self._product(self._head.data_ptr(), x.data_ptr(), n, m, out.data_ptr())
        return out


def fits(weights: Sequence[Tensor], free: int) -> bool:
    """Whether copies of ``weights`` take no more than an eighth of ``free`` bytes of memory."""
    return 8 * sum(weight.numel() * weight.element_size() for weight in weights) <= free


def copied(*modules: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear modules with the same input, one after the other, as new tensors."""
    weight = torch.cat([module.weight.detach() for module in modules])
    if all(module.bias is None for module in modules):
        return weight, None
    biases = [m.weight.new_zeros(m.weight.shape[0]) if m.bias is None else m.bias.detach() for m in modules]
    return weight, torch.cat(biases)
