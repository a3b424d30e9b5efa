"""What steps will cost, before they run: operations, seconds, bytes. Rough to a factor of two, and said to be so.

Time is operations over a measured rate of matrix products, times the share of it that such a step reaches; memory is
weights, adapters with their optimiser, and activations.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorchestra.base import nf4
from lorchestra.errors import SourceError

# Shares of the measured matrix-product rate that whole steps reach: short sequences, small adapters, norms and
# attention keep them below it (SmolLM2-135M on two CPU cores: 0.28 to 0.42, and 0.4 to 0.7).
TRAINING, SCORING = 0.33, 0.5
PASS = 40e-6  # seconds a linear module needs in a pass however little it computes: Python, hooks, kernel launch
DISK = 0.4e9  # bytes a second, reading, writing or hashing
RUNTIME = 0.6e9  # bytes of Python, torch and the tokenizer
POSITIONS = 4096  # of a forward pass without gradients, padding included
OPTIMISER = 16  # bytes per trainable number: float32 value, gradient and two moments


@dataclass(frozen=True)
class Shape:
    """What a base costs.

    Args:
        parameters: of the whole model.
        body: numbers that every token is multiplied with (all but the embeddings).
        head: numbers of the output embedding, which supervised tokens alone meet.
        vocabulary: rows of the output embedding.
        hidden: width of the residual stream.
        layers: of the stack.
        modules: linear modules in the body.
        widths: Σ (in + out features) of the linear modules: numbers kept per position for the backward pass.
        element: bytes of a number in the dtype it is loaded in.
        packed: numbers of the linear modules, if they are held in 4 bits (nf4); else 0.
    """

    parameters: int
    body: int
    head: int
    vocabulary: int
    hidden: int
    layers: int
    modules: int
    widths: int
    element: int
    packed: int = 0

    @property
    def bytes(self) -> int:
        """Of the loaded weights."""
        return (self.parameters - self.packed) * self.element + round(self.packed * nf4.BYTES)

    @property
    def plain(self) -> Shape:
        """Not quantised."""
        return replace(self, packed=0)

    def forward(self, tokens: float, supervised: float, length: float) -> float:
        """FLOP of scoring: ``tokens`` in sequences of ``length``, logits for ``supervised`` of them."""
        attention = 4 * self.layers * self.hidden * length
        return tokens * (2 * self.body + attention) + 2 * self.head * supervised

    def training(self, tokens: float, supervised: float, length: float, adapters: int, checkpointing: bool) -> float:
        """FLOP of training: forward and the gradient of activations (the base is frozen), and the adapters' own.

        ``adapters`` are the numbers of the new adapter and of its context; ``checkpointing`` computes forward twice.
        """
        return self.forward(tokens, supervised, length) * (3 if checkpointing else 2) + 6 * adapters * tokens


@dataclass(frozen=True)
class Machine:
    """Where the steps run: device, dtype, and their measured rates (FLOP/s of matrix products, bytes/s of copying)."""

    device: str
    dtype: str
    flops: float
    bandwidth: float
    memory: int | None


def empty_model(directory: Path) -> Any:
    """The base's modules without their weights, on the meta device.

    Raises:
        SourceError: transformers does not know the architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{directory} cannot be loaded as a causal language model: {error}") from error


def shape_of(model: Any, element: int, quantised: bool = False) -> Shape:
    """Count ``model`` (an :func:`empty_model` will do).

    Args:
        model: with or without weights.
        element: bytes of a number in the dtype it is loaded in.
        quantised: its linear modules will be held in 4 bits (nf4).
    """
    from lorchestra.bank import linear_shape

    head = model.get_output_embeddings()
    shapes = [s for _, m in model.named_modules() if m is not head and (s := linear_shape(m))]
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = {id(w): w.numel() for w in (model.get_input_embeddings().weight, head.weight)}
    config = model.config.get_text_config()
    return Shape(
        parameters=parameters,
        body=parameters - sum(embeddings.values()),
        head=head.weight.numel(),
        vocabulary=head.weight.shape[0],
        hidden=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        modules=len(shapes),
        widths=sum(m + n for m, n in shapes),
        element=element,
        packed=sum(m * n for m, n in shapes) if quantised else 0,
    )


def measure(device: Any, dtype: Any, shape: Shape, seconds: float = 0.3) -> Machine:
    """Time products of the size that the base's layers have, and copies, on the device and in the dtype of the run."""
    import torch

    width = max(shape.hidden, 64)
    wide = max(shape.body // max(shape.layers * width * 4, 1), width)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, width, generator=generator).to(device=device, dtype=dtype)
    w = torch.randn(width, wide, generator=generator).to(device=device, dtype=dtype)
    product = _fastest(lambda: x @ w, device, seconds * 2 / 3)
    block = torch.zeros(1 << 24, dtype=torch.uint8, device=device)
    copy = _fastest(block.clone, device, seconds / 3)
    flops = 2 * x.shape[0] * width * wide / product
    return Machine(str(device), str(dtype).removeprefix("torch."), flops, 2 * block.numel() / copy, memory_of(device))


def memory_of(device: Any) -> int | None:
    """Bytes that the device has, where that can be found out."""
    import os

    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _fastest(work: Any, device: Any, seconds: float) -> float:
    """Seconds of the fastest run of ``work``: what else the machine does makes a run longer, never shorter."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    work()
    wait()
    best, runs, begun = float("inf"), 0, time.perf_counter()
    while runs < 3 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        work()
        wait()
        best, runs = min(best, time.perf_counter() - started), runs + 1
    return best


def training_memory(
    shape: Shape, trainable: int, context: int, positions: float, supervised: float, checkpointing: bool
) -> float:
    """Bytes at the peak of a training step.

    Args:
        shape: of the base.
        trainable: numbers of the new adapter.
        context: numbers of the frozen adapters.
        positions: of a micro-batch, padding included.
        supervised: tokens of a micro-batch that meet the output embedding.
        checkpointing: keep only what goes between the layers.
    """
    kept = shape.widths + 4 * shape.hidden * shape.layers
    if checkpointing:
        kept = shape.hidden * shape.layers + kept // max(shape.layers, 1)
    activations = positions * kept * shape.element
    logits = supervised * shape.vocabulary * (shape.element + 12)  # as computed, in float32, and their gradient
    adapters = trainable * (OPTIMISER + shape.element) + context * shape.element
    return RUNTIME + shape.bytes + adapters + activations + logits


def scoring_memory(shape: Shape, adapters: int, supervised: float, models: int = 1) -> float:
    """Bytes at the peak of scoring: ``models`` copies of the base, ``adapters`` numbers, and one large batch."""
    widest = 2 * shape.widths / max(shape.layers, 1)
    batch = POSITIONS * (widest + 4 * shape.hidden) * shape.element
    logits = supervised * shape.vocabulary * (shape.element + 8)
    return RUNTIME + models * shape.bytes + adapters * shape.element + batch + logits
