"""A forward pass of any transformers model that hands its attention to transformers' attention interface.

The model runs as it is; its attention is ours, which keeps keys and values in slots, and hooks on its linear modules
add each row's adapter. Slower than :mod:`lorchestra.serve.embedded.decoder`, and right for far more models.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lorchestra.bank.factors import groups_of
from lorchestra.bank.mount import linear_shape
from lorchestra.bank.rows import Acting, RowBank
from lorchestra.errors import UserError
from lorchestra.serve.embedded.cache import CacheShape
from lorchestra.serve.embedded.slots import Decoding, Reading

ATTENTION = "lorchestra_slots"
ZERO = "fit the gate on features of 0 layers (--layers 0)"
_STEP: ContextVar[Reading | Decoding] = ContextVar("lorchestra_step")


class GenericDecoder:
    """The model, with rows of adapters.

    Linear modules see the whole batch, ``[b, L, n]``, in all but mixtures of experts and the like; only those that do
    can be changed by adapters.

    Args:
        model: transformers' causal language model, in eval mode; its attention is replaced, and hooks stay on it.

    Raises:
        UserError: the model does not use the attention interface, or does something to keys and values that slots do
            not know.
    """

    def __init__(self, model: Any) -> None:
        self._body, self._head = model.base_model, model.get_output_embeddings()
        config = model.config.get_text_config()
        kind = model.config.model_type
        if self._head is None or self._body is model:
            raise UserError(f"{kind!r} is no causal language model that the embedded engine can serve")
        # What some families do to their logits in the end; what is not known here, the check finds.
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        weight = model.get_input_embeddings().weight
        self.device = weight.device
        self.dtype = model.dtype
        self.tokens = self._head.weight.shape[0]
        _register()
        try:
            model.set_attn_implementation(ATTENTION)
            seen = _Seen()
            linears = {path: module for path, module in model.named_modules() if linear_shape(module) is not None}
            hooks = [
                module.register_forward_pre_hook(seen.linear(path))
                for path, module in linears.items()
                if module is not self._head
            ]
            try:
                self._pass(torch.zeros(2, 3, dtype=torch.int64), seen)
            finally:
                for hook in hooks:
                    hook.remove()
            self.shape = seen.shape()
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"the embedded engine cannot serve {kind!r} models ({error}); use --engine vllm") from error
        shapes = {path: shape for path in seen.paths if (shape := linear_shape(linears[path])) is not None}
        self.groups = groups_of(shapes)
        self._adding: tuple[RowBank, Acting] | None = None
        names = ("layers", "h", "blocks")
        self._layers = next((found for name in names if (found := getattr(self._body, name, None)) is not None), ())
        self.depth = len(self._layers)
        for index, path in enumerate(shapes):
            linears[path].register_forward_hook(self._hook(index))

    @torch.inference_mode()
    def hidden_states(self, ids: Tensor, step: Reading | Decoding, bank: RowBank, acting: Acting) -> Tensor:
        """The last hidden states, after the final norm; as :class:`~lorchestra.serve.embedded.scheduler.Decoder`."""
        self._adding = bank, acting
        try:
            return self._pass(ids, step)
        finally:
            self._adding = None

    @torch.inference_mode()
    def embedded(self, ids: Tensor) -> Tensor:
        """Input embeddings ``[b, L, n]`` of ids ``[b, L]``."""
        found: Tensor = self._body.get_input_embeddings()(ids.to(self.device))
        return found

    @torch.inference_mode()
    def early_states(self, ids: Tensor, step: Reading, bank: RowBank, layers: int) -> Tensor:
        """The base's own states; as :class:`~lorchestra.serve.embedded.scheduler.Decoder`."""
        if layers == self.depth:
            return self._pass(ids, step)

        def leave(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            raise _Reached(arguments[0] if arguments else named["hidden_states"])

        hook = self._layers[layers].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self._pass(ids, step)
        except _Reached as reached:
            return reached.states
        finally:
            hook.remove()
        raise UserError(f"this model does not pass through its layers one by one; {ZERO}")

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token, ``[…, V]``, from ``[…, n]`` of :meth:`hidden_states`."""
        logits: Tensor = self._head(hidden)
        if self._factor != 1.0:
            logits = logits * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _pass(self, ids: Tensor, step: Any) -> Tensor:
        token = _STEP.set(step)
        try:
            out: Tensor = self._body(
                input_ids=ids.to(self.device), position_ids=step.positions.to(self.device), use_cache=False
            ).last_hidden_state
            return out
        finally:
            _STEP.reset(token)

    def _hook(self, index: int) -> Any:
        def add(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            if self._adding is not None and self._adding[1]:
                bank, acting = self._adding
                bank.add(acting, index, arguments[0], (output,))
            return output

        return add


class _Reached(Exception):  # noqa: N818  # no error: how a pass is left
    """The states that were wanted are there; the layers after them need not be computed."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _Seen:
    """A pass that finds out what is kept of a position, and which linear modules see the whole batch."""

    def __init__(self) -> None:
        self.positions = torch.arange(3).expand(2, 3)
        self.paths: list[str] = []
        self._kept: dict[int, tuple[int, int]] = {}

    def linear(self, path: str) -> Any:
        def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor) and arguments[0].shape[:2] == (2, 3):
                self.paths.append(path)

        return see

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        if k.shape != v.shape:
            raise ValueError(f"keys of shape {tuple(k.shape)} and values of {tuple(v.shape)}")
        self._kept[layer] = (k.shape[2], k.shape[3])
        return torch.zeros_like(q)

    def shape(self) -> CacheShape:
        if sorted(self._kept) != list(range(len(self._kept))) or len(set(self._kept.values())) != 1:
            raise ValueError(f"its layers keep {self._kept or 'nothing'}")
        heads, width = self._kept[0]
        return CacheShape(len(self._kept), heads, width)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: ``[b, heads, L, d]`` in, ``[b, L, heads, d]`` out."""
    if softcap is not None:
        raise ValueError("its scores are capped")
    (b, heads, L, d), h = query.shape, key.shape[1]
    q = query.view(b, h, heads // h, L, d).permute(0, 3, 1, 2, 4)
    out = _STEP.get().attend(
        module.layer_idx, q, key.transpose(1, 2), value.transpose(1, 2), scale=scaling, window=sliding_window
    )
    return out.reshape(b, L, heads, d), None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
