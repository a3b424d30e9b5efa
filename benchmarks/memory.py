"""What ``lorchestra plan``'s arithmetic says of the memory that an 8B model's stages need, from its shapes alone.

``python benchmarks/memory.py`` prints the table of docs/gpu.md. Nothing is loaded, and nothing is measured: estimates.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import LlamaConfig

from lorchestra.pipeline.costs import trainable
from lorchestra.pipeline.estimate import empty_model, scoring_memory, shape_of, training_memory
from lorchestra.train.settings import LoraSettings

RANK, SUPERVISED = 8, 0.25
BATCHES = ((1, 512), (4, 512), (8, 512), (1, 2048), (4, 2048))


def main() -> None:
    """One row a micro-batch, one column a number format, without and with gradient checkpointing."""
    with tempfile.TemporaryDirectory() as directory:
        llama = LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
        )  # fmt: skip
        llama.save_pretrained(directory)
        model = empty_model(Path(directory))
    numbers = trainable(model, LoraSettings(rank=RANK))
    shapes = {"bfloat16": shape_of(model, 2), "nf4": shape_of(model, 2, quantised=True)}
    print(f"Llama-3-8B: {shapes['nf4'].parameters:,} parameters; rank {RANK} on every linear module: {numbers:,}")
    print("GB of  weights ", *(f"{name} {shape.bytes / 1e9:.1f}" for name, shape in shapes.items()))
    print(f"GB of a stage beside one context adapter, {SUPERVISED:.0%} of the tokens supervised")
    print("batch × length   bfloat16  checkpointing       nf4  checkpointing")
    for batch, length in BATCHES:
        positions = batch * length
        cells = [
            training_memory(shape, numbers, numbers, positions, SUPERVISED * positions, recompute) / 1e9
            for shape in shapes.values()
            for recompute in (False, True)
        ]
        print(f"{batch} × {length:<12} {cells[0]:9.1f} {cells[1]:14.1f} {cells[2]:9.1f} {cells[3]:14.1f}")
    print(f"scoring, bfloat16: {scoring_memory(shapes['bfloat16'], 2 * numbers, SUPERVISED * 4096) / 1e9:.1f}")


if __name__ == "__main__":
    main()
