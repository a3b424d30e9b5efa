"""What a gate sees of a prompt, computed beside the sequences that run: the features of its training.

The same numbers as :func:`lorchestra.gate.features.features` makes of the transformers model, up to rounding, by the
forward pass that serves: the first l layers, without any adapter, and nothing after them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorchestra.bank.rows import RowBank
from lorchestra.errors import UserError
from lorchestra.serve.embedded.cache import CacheShape
from lorchestra.serve.embedded.scheduler import ALONE, SHAPE, Decoder
from lorchestra.serve.embedded.slots import Slots


class Sight:
    """Features of prompts. It belongs to the thread that steps.

    Args:
        decoder: the model.
        bank: of its adapters, none of which acts here.
    """

    def __init__(self, decoder: Decoder, bank: RowBank) -> None:
        self._decoder, self._bank = decoder, bank

    def of(self, prompt: Sequence[int], layers: int, last: bool) -> Tensor:
        """``[n]`` float32 on the CPU: the mean over the prompt's tokens, with ``last`` the last one's state after it.

        Args:
            prompt: at least one token.
            layers: l; 0 reads the input embeddings, else the states after so many layers.
            last: append the last token's state: ``[2n]``.

        Raises:
            UserError: more layers than the model has.
        """
        if layers > self._decoder.depth:
            raise UserError(
                f"features of {layers} layers were asked for, and this base has {self._decoder.depth}; the gate "
                "belongs to another base"
            )
        total, end = torch.zeros(()), torch.zeros(())
        for states in self._states(torch.tensor([list(prompt)]), layers):
            total, end = total + states.float().sum(dim=0), states[-1].float()
        mean = total / len(prompt)
        return (torch.cat((mean, end)) if last else mean).cpu()

    def _states(self, ids: Tensor, layers: int) -> Sequence[Tensor]:
        """``[L, n]`` of the prompt's parts, which are read one after the other."""
        if layers == 0:
            return [self._decoder.embedded(ids)[0]]
        length, shape = ids.shape[1], self._decoder.shape
        slots = Slots(
            CacheShape(layers, shape.heads, shape.width), 0, length, self._decoder.dtype, self._decoder.device
        )
        slots.take(0, length, length)
        found = []
        for start in range(0, length, ALONE):
            part = ids[:, start : start + ALONE]
            count = part.shape[1]
            L = -(-count // SHAPE) * SHAPE  # as prompts are read: few shapes
            step = slots.reading((0,), (start,), (count,), L)
            padded = torch.zeros(1, L, dtype=torch.int64)
            padded[:, :count] = part
            found.append(self._decoder.early_states(padded, step, self._bank, layers)[0, :count])
            step.keep()
        return found
