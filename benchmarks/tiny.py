"""The tiny random base of the benchmarks' short forms: nothing is fetched, and nothing is meant by what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_base(directory: Path, layers: int) -> Any:
    """A Llama of ``layers`` layers, of width 32 and 260 tokens, written to ``directory`` with a tokenizer of them."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, pad_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={f"t{i}": i for i in range(260)}, merges=[])), pad_token="t3"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    return model
