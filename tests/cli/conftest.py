"""``lorchestra`` as a person types it, and adapters to use it on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


@dataclass(frozen=True)
class Told:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """One message with ``words``, exit code 2, no traceback, nothing on standard output."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        for word in words:
            assert word in self.err


@pytest.fixture
def lorchestra(monkeypatch, capsys, tmp_path) -> Callable[..., Told]:
    """``lorchestra("ft", "--dataset", …)`` in an empty working directory."""
    from lorchestra.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: object) -> Told:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["lorchestra", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Told(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def make_adapter(tiny_dir, tiny_model) -> Callable[..., Path]:
    """``make_adapter(directory, seed, rank=2, size=0.1, **lineage)``: random factors on q_proj and down_proj."""
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.lineage import Lineage
    from lorchestra.adapter.lowrank import LowRank
    from lorchestra.base.fingerprint import fingerprint

    def make(directory: Path, seed: int, rank: int = 2, size: float = 0.1, base: Path = tiny_dir, **lineage) -> Path:
        noise = torch.Generator().manual_seed(seed)
        modules = {}
        for path, module in tiny_model.named_modules():
            if path.endswith(("q_proj", "down_proj")):
                m, n = module.weight.shape
                B, A = torch.randn(m, rank, generator=noise), torch.randn(rank, n, generator=noise)
                modules[path] = LowRank(B * size, A * size)
        made = Lineage(**{"made_by": "stage", "name": directory.name, "task": "sft", **lineage})
        return Adapter(modules, fingerprint(base, str(base)), made).save(directory)

    return make


@pytest.fixture(scope="session")
def other_base(tmp_path_factory) -> Path:
    """A base of the same shapes and other weights."""
    from tests.conftest import make_tiny_model, make_tiny_tokenizer

    directory = tmp_path_factory.mktemp("other-base")
    make_tiny_model(seed=7).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


@torch.no_grad()
def dense_logits(base: Path, mixture: dict[Path, float], ids: torch.Tensor) -> torch.Tensor:
    """The oracle: logits of base + Σλ·ΔW, every ΔW formed densely, all in float64."""
    from transformers import AutoModelForCausalLM

    from lorchestra.adapter.adapter import Adapter

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    for directory, weight in mixture.items():
        for path, update in Adapter.load(directory).modules.items():
            model.get_submodule(path).weight += weight * update.dense(torch.float64)
    return model(input_ids=ids).logits
