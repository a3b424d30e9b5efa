"""A tiny random model, made on the spot: the quick suite needs no network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background, where a shell has Ctrl-C ignored: the tests that press it need what a terminal gives.
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_tokenizer():
    """A byte-level fast tokenizer: any text, Chinese too, 256 bytes and four special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|endoftext|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(seed: int = 0, **overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "bos_token_id": 1,
    } | overrides
    torch.manual_seed(seed)
    # A larger spread than the default 0.02: a tiny model whose logits differ between inputs.
    model = LlamaForCausalLM(LlamaConfig(**settings, initializer_range=0.15)).float().eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny-base")
    make_tiny_model().save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_model():
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return make_tiny_tokenizer()


@pytest.fixture(autouse=True)
def private_home(tmp_path, monkeypatch):
    """No test touches the user's cache."""
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def tidy_checkout():
    """No test leaves anything in the checkout."""
    checkout = Path(__file__).parent.parent
    before = set(os.listdir(checkout))
    yield
    left = {name for name in set(os.listdir(checkout)) - before if not name.startswith(".")}
    assert not left, f"left in the checkout: {sorted(left)}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI nothing is skipped: there a skip is a failure, with its reason."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("LORCHESTRA_TESTS_SKIP_NOTHING") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"


@pytest.fixture
def mounted():
    """``mounted(place, options)`` mounts a file system of its own (tmpfs) on a directory, until the test ends."""
    places = []

    def mount(place, options):
        if not sys.platform.startswith("linux") or os.geteuid() != 0:
            pytest.skip("only root on Linux mounts a file system")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        if told.returncode:
            pytest.skip(f"no file system can be mounted here: {told.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def small_disk(tmp_path, mounted):
    """A file system on ``small``; ``small_disk(size)`` gives it that many KiB."""
    (tmp_path / "small").mkdir()
    place = mounted(tmp_path / "small", "size=16k")
    return lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", place], check=True)
