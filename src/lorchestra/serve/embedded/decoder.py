"""A forward pass of the Llama family (Llama, Mistral, Qwen 2, Qwen 3), written for serving.

q, k and v are one matrix, gate and up are one; keys and values go straight into slots; each row of the batch is changed
by its own adapter. The formulas are those of transformers' models, from whose weights it is made, and
``models.check`` holds it to them when a server starts.

Axis letters: b rows, L positions, n hidden size, h key-value heads, g query heads to each, d head width, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, rms_norm, silu

from lorchestra.bank.rows import Acting, Group, RowBank
from lorchestra.serve.embedded.linear import Linear
from lorchestra.serve.embedded.slots import CacheShape, Decoding, Reading

FAMILY = ("llama", "mistral", "qwen2", "qwen3")


class _Norm:
    """RMSNorm (Zhang & Sennrich 2019): w · x / √(mean(x²) + ε), in one pass over memory on a CPU.

    There torch makes it of ten. Of ``[x, −x]`` the mean is 0 and the variance is mean(x²), so layer normalisation,
    which is one, gives it in its first half.

    Args:
        weight: ``[n]``.
        epsilon: ε.
    """

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self._weight, self._epsilon = weight, epsilon
        self._twice = torch.cat((weight, weight)) if weight.device.type == "cpu" else None

    def __call__(self, x: Tensor, room: Tensor | None) -> Tensor:
        """``[…, n]`` to the same; ``room`` is ``[…, 2n]`` to work in."""
        n = len(self._weight)
        if room is None or self._twice is None:
            return rms_norm(x, (n,), self._weight, self._epsilon)
        room[..., :n] = x
        torch.neg(x, out=room[..., n:])
        return layer_norm(room, (2 * n,), self._twice, None, self._epsilon)[..., :n]


@dataclass(frozen=True, eq=False)
class _Layer:
    before: _Norm
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    after: _Norm
    up: Linear  # gate, then up
    down: Linear


class LlamaDecoder:
    """The model, with rows of adapters.

    Args:
        model: transformers' causal language model of :data:`FAMILY`, in eval mode; weights that are laid out anew are
            copied, so forget it afterwards.
        max_length: positions there are rotations for.
    """

    def __init__(self, model: Any, max_length: int) -> None:
        config, inner = model.config, model.model
        self.hidden = config.hidden_size
        heads, self.heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or self.hidden // heads
        self.group = heads // self.heads
        self.eps = config.rms_norm_eps
        self.dtype, self.device = inner.embed_tokens.weight.dtype, inner.embed_tokens.weight.device
        self.embedding = inner.embed_tokens.weight
        self.tokens = model.lm_head.weight.shape[0]
        self.shape = CacheShape(config.num_hidden_layers, self.heads, self.width)
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
                    _Norm(layer.input_layernorm.weight, self.eps),
                    Linear.of(attention.q_proj, attention.k_proj, attention.v_proj),
                    attention.q_norm.weight if hasattr(attention, "q_norm") else None,
                    attention.k_norm.weight if hasattr(attention, "k_norm") else None,
                    Linear.of(attention.o_proj),
                    _Norm(layer.post_attention_layernorm.weight, self.eps),
                    Linear.of(mlp.gate_proj, mlp.up_proj),
                    Linear.of(mlp.down_proj),
                )
            )
        self.groups, self.depth = tuple(groups), len(self.layers)
        self.norm = _Norm(inner.norm.weight, self.eps)
        self.head = Linear.of(model.lm_head)
        places = torch.arange(max_length, device=self.device)[None]
        cos, sin = inner.rotary_emb(torch.zeros(1, 1, 1, dtype=self.dtype, device=self.device), places)
        # The second half of a head turns against the first: sin of the first half is negative once and for all.
        half = self.width // 2
        self.cos, self.sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)

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
        return self._through(ids, step, bank, acting, self.depth)

    @torch.inference_mode()
    def embedded(self, ids: Tensor) -> Tensor:
        """Input embeddings ``[b, L, n]`` of ids ``[b, L]``."""
        return embedding(ids.to(self.device), self.embedding)

    @torch.inference_mode()
    def early_states(self, ids: Tensor, step: Reading, bank: RowBank, layers: int) -> Tensor:
        """The base's own states; as :class:`~lorchestra.serve.embedded.scheduler.Decoder`."""
        x = self._through(ids, step, bank, Acting(()), layers)
        return self.norm(x, None) if layers == self.depth else x

    def _through(self, ids: Tensor, step: Reading | Decoding, bank: RowBank, acting: Acting, layers: int) -> Tensor:
        """The states after the first ``layers``."""
        b, L = ids.shape
        x = self.embedded(ids)
        places = step.positions.to(self.device)
        cos, sin = self.cos[places][:, :, None], self.sin[places][:, :, None]  # [b, L, 1, d]
        queries, keys = self.heads * self.group * self.width, self.heads * self.width
        half = self.width // 2
        room = x.new_empty(b, L, 2 * self.hidden) if x.device.type == "cpu" else None
        for i, layer in enumerate(self.layers[:layers]):
            y = layer.before(x, room)
            qkv = layer.qkv(y)
            if acting.parts:
                bank.add(acting, 4 * i, y, torch.split(qkv, [queries, keys, keys], dim=-1))
            qk = qkv[..., : queries + keys].view(b, L, -1, self.width)
            v = qkv[..., queries + keys :].view(b, L, self.heads, self.width)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = torch.split(qk, [self.heads * self.group, self.heads], dim=2)
                q = rms_norm(q, (self.width,), layer.q_norm, self.eps)
                qk = torch.cat((q, rms_norm(k, (self.width,), layer.k_norm, self.eps)), dim=2)
            turned = torch.cat((qk[..., half:], qk[..., :half]), dim=-1)
            qk = torch.addcmul(qk * cos, turned, sin)
            q = qk[:, :, : self.heads * self.group].view(b, L, self.heads, self.group, self.width)
            seen = step.attend(i, q, qk[:, :, self.heads * self.group :], v).reshape(b, L, queries)
            y = layer.out(seen)
            bank.add(acting, 4 * i + 1, seen, (y,))
            x = x + y
            y = layer.after(x, room)
            both = layer.up(y)
            gate, up = both.chunk(2, dim=-1)
            bank.add(acting, 4 * i + 2, y, (gate, up))
            inside = silu(gate).mul_(up)
            y = layer.down(inside)
            bank.add(acting, 4 * i + 3, inside, (y,))
            x = x + y
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token, ``[…, V]``, from ``[…, n]`` of :meth:`hidden_states`."""
        return self.head(self.norm(hidden, None))
