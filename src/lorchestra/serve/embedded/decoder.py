"""A forward pass of the Llama family (Llama, Mistral, Qwen 2, Qwen 3), written for serving.

q, k and v are one matrix, gate and up are one; keys and values go straight into slots; each row of the batch is changed
by its own adapter. The formulas are those of transformers' models, from whose weights it is made, and
``models.check`` holds it to them when a server starts.

Axis letters: b rows, L positions, n hidden size, h key-value heads, g query heads to each, d head width, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import embedding

from lorchestra.bank.factors import Group
from lorchestra.bank.rows import Acting, RowBank
from lorchestra.serve.embedded.cache import CacheShape
from lorchestra.serve.embedded.linear import Linear
from lorchestra.serve.embedded.pieces import COMPILED, Compiled, Heads, Pieces, Stock
from lorchestra.serve.embedded.single import Single, copied, fits
from lorchestra.serve.embedded.slots import Decoding, Reading

FAMILY = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, eq=False)
class _Layer:
    before: Tensor  # weights of the norm
    qkv: Linear
    heads: tuple[Tensor, Tensor] | None  # weights of the norms of queries and keys
    out: Linear
    after: Tensor
    up: Linear  # gate, then up
    down: Linear


class LlamaDecoder:
    """The model, with rows of adapters.

    Args:
        model: transformers' causal language model of :data:`FAMILY`, in eval mode; weights that are laid out anew are
            copied, so forget it afterwards.
        max_length: positions there are rotations for.
        kernel: compile :class:`~lorchestra.serve.embedded.pieces.Compiled` and use it where it can be used; and, where
            there is ample memory for copies of the weights, :class:`~lorchestra.serve.embedded.single.Single` and
            :class:`~lorchestra.serve.embedded.tiles.Tiles`.

    Raises:
        UserError: there is no compiler, or it fails.
    """

    def __init__(self, model: Any, max_length: int, kernel: bool = False) -> None:
        config, inner = model.config, model.model
        self.hidden = config.hidden_size
        heads, self.heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or self.hidden // heads
        self.group = heads // self.heads
        self.dtype, self.device = inner.embed_tokens.weight.dtype, inner.embed_tokens.weight.device
        self.embedding = inner.embed_tokens.weight
        self.tokens = model.lm_head.weight.shape[0]
        self.shape = CacheShape(config.num_hidden_layers, self.heads, self.width)
        alike = all(value.dtype == self.dtype for value in inner.parameters())
        compiled = kernel and alike and self.device.type == "cpu" and self.dtype in COMPILED
        linears, head = [p for p in inner.layers.parameters() if p.dim() == 2], model.lm_head.weight
        free = psutil.virtual_memory().available if compiled else 0
        tiles = fits([*linears, *linears, head], free)  # beside the copy for a sequence that is alone
        sizes = (heads * self.width, self.heads * self.width, self.heads * self.width)
        groups: list[Group] = []
        self.layers = []
        for i, layer in enumerate(inner.layers):
            attention, mlp, at = layer.self_attn, layer.mlp, f"model.layers.{i}"
            inside = mlp.gate_proj.weight.shape[0]
            groups += [
                Group(tuple(f"{at}.self_attn.{name}_proj" for name in "qkv"), self.hidden, sizes),
                Group((f"{at}.self_attn.o_proj",), sizes[0], (self.hidden,)),
                Group((f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"), self.hidden, (inside, inside)),
                Group((f"{at}.mlp.down_proj",), inside, (self.hidden,)),
            ]
            self.layers.append(
                _Layer(
                    layer.input_layernorm.weight.detach(),
                    Linear.of(attention.q_proj, attention.k_proj, attention.v_proj, tiles=tiles),
                    _head_norms(attention),
                    Linear.of(attention.o_proj, tiles=tiles),
                    layer.post_attention_layernorm.weight.detach(),
                    Linear.of(mlp.gate_proj, mlp.up_proj, tiles=tiles),
                    Linear.of(mlp.down_proj, tiles=tiles),
                )
            )
        self.groups, self.depth = tuple(groups), len(self.layers)
        self.norm = inner.norm.weight.detach()
        self.head = Linear.of(model.lm_head, tiles=tiles)
        places = torch.arange(max_length, device=self.device)[None]
        cos, sin = inner.rotary_emb(torch.zeros(1, 1, 1, dtype=self.dtype, device=self.device), places)
        # The second half of a head turns against the first: sin of the first half is negative once and for all.
        half = self.width // 2
        sine = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        described = Heads(self.heads, self.group, self.width, config.rms_norm_eps, cos[0].contiguous(), sine)
        self._pieces: Pieces = Compiled(described) if compiled else Stock(described)
        small = Single.takes(described) and fits(linears if head is self.embedding else [*linears, head], free)
        plain_head = model.lm_head.weight.dtype == self.dtype and model.lm_head.bias is None
        self._single = (
            Single(described, [_weights(layer) for layer in inner.layers], model.lm_head.weight)
            if small and plain_head
            else None
        )

    @torch.inference_mode()
    def hidden_states(self, ids: Tensor, step: Reading | Decoding, bank: RowBank, acting: Acting) -> Tensor:
        """The last hidden states, before the final norm.

        Args:
            ids: ``[b, L]``.
            step: positions, cache and attention of this pass.
            bank: of the adapters.
            acting: the batch's rows in it.

        Returns:
            ``[b, L, n]``.
        """
        if self._single is not None and ids.shape == (1, 1) and isinstance(step, Decoding):
            alone = self._single.hidden_states(self.embedded(ids), step, acting)
            if alone is not None:
                return alone
        return self._through(ids, step, bank, acting, self.depth)

    @torch.inference_mode()
    def embedded(self, ids: Tensor) -> Tensor:
        """Input embeddings ``[b, L, n]`` of ids ``[b, L]``."""
        return embedding(ids.to(self.device), self.embedding)

    @torch.inference_mode()
    def early_states(self, ids: Tensor, step: Reading, bank: RowBank, layers: int) -> Tensor:
        """The base's own states; as :class:`~lorchestra.serve.embedded.scheduler.Decoder`."""
        x = self._through(ids, step, bank, Acting(), layers)
        return self._pieces.norm(x, self.norm) if layers == self.depth else x

    def _through(self, ids: Tensor, step: Reading | Decoding, bank: RowBank, acting: Acting, layers: int) -> Tensor:
        """The states after the first ``layers``."""
        b, L = ids.shape
        x = self.embedded(ids)
        rotations = self._pieces.rotations(step.positions.to(self.device))
        queries, keys = self.heads * self.group * self.width, self.heads * self.width
        y = self._pieces.norm(x, self.layers[0].before)
        for i, layer in enumerate(self.layers[:layers]):
            if i:
                x, y = self._pieces.add_norm(x, y, layer.before)
            qkv = layer.qkv(y)
            if acting:
                bank.add(acting, 4 * i, y, torch.split(qkv, [queries, keys, keys], dim=-1))
            q = self._pieces.turn(qkv, rotations, layer.heads, step, i)
            seen = step.seen(i, q).reshape(b, L, queries)
            y = layer.out(seen)
            bank.add(acting, 4 * i + 1, seen, (y,))
            x, y = self._pieces.add_norm(x, y, layer.after)
            both = layer.up(y)
            if acting:
                bank.add(acting, 4 * i + 2, y, both.chunk(2, dim=-1))
            inside = self._pieces.gated(both)
            y = layer.down(inside)
            bank.add(acting, 4 * i + 3, inside, (y,))
        return x + y

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token, ``[…, V]``, from ``[…, n]`` of :meth:`hidden_states`."""
        hidden = self._pieces.norm(hidden, self.norm)
        if self._single is not None and hidden.numel() == self.hidden:
            return self._single.logits(hidden)
        return self.head(hidden)


def _head_norms(attention: Any) -> tuple[Tensor, Tensor] | None:
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight.detach(), attention.k_norm.weight.detach()


def _weights(layer: Any) -> dict[str, Tensor | None]:
    """As :class:`~lorchestra.serve.embedded.single.Single` takes them."""
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = _head_norms(attention) or (None, None)
    found: dict[str, Tensor | None] = {
        "before": layer.input_layernorm.weight.detach(),
        "after": layer.post_attention_layernorm.weight.detach(),
        "q_norm": q_norm,
        "k_norm": k_norm,
    }
    for name, modules in (
        ("qkv", (attention.q_proj, attention.k_proj, attention.v_proj)), ("out", (attention.o_proj,)),
        ("up", (mlp.gate_proj, mlp.up_proj)), ("down", (mlp.down_proj,)),
    ):  # fmt: skip
        found[name], found[f"{name}_bias"] = copied(*modules)
    return found
