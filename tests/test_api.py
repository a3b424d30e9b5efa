"""What ``lorchestra`` has at its top: there when asked for, and nothing heavy before."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import lorchestra


def test_importing_it_imports_nothing_heavy():
    heavy = ("torch", "transformers", "peft", "numpy", "pydantic", "typer")
    code = (
        "import sys, lorchestra; lorchestra.__version__; dir(lorchestra);"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_what_its_room_has():
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.lowrank import LowRank
    from lorchestra.bank import Bank
    from lorchestra.fusion.methods import compress, fuse
    from lorchestra.fusion.stream import merge
    from lorchestra.gate import Gate
    from lorchestra.pipeline.execute import run
    from lorchestra.recipe.recipe import Recipe
    from lorchestra.train.peft_model import LoraConfig, get_peft_model

    found = (Adapter, Bank, Gate, LoraConfig, LowRank, Recipe, compress, fuse, get_peft_model, merge, run)
    for thing in found:
        assert getattr(lorchestra, thing.__name__) is thing
    assert {thing.__name__ for thing in found} | {"__version__"} == set(lorchestra.__all__) <= set(dir(lorchestra))
    assert lorchestra.__version__ == version("lorchestra")


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'Adaptor'; it has Adapter"):
        _ = lorchestra.Adaptor
    with pytest.raises(ImportError):
        from lorchestra import adaptor  # noqa: F401


def test_adapters_are_fused_compressed_and_merged(tiny_dir, tmp_path):
    """The Python of the design's contract, end to end, against dense float64 algebra."""
    from transformers import AutoModelForCausalLM

    noise = torch.Generator().manual_seed(0)
    path = "model.layers.1.self_attn.o_proj"

    def adapter() -> lorchestra.Adapter:
        B, A = torch.randn(32, 3, generator=noise), torch.randn(3, 32, generator=noise)
        return lorchestra.Adapter({path: lorchestra.LowRank(B, A)})

    a, b = adapter(), adapter()
    a.save(tmp_path / "a")
    assert lorchestra.Adapter.load(tmp_path / "a").digest == a.digest
    fused = lorchestra.fuse([a, b], [0.3, -0.5])
    expected = 0.3 * a.modules[path].dense(torch.float64) - 0.5 * b.modules[path].dense(torch.float64)
    torch.testing.assert_close(fused.modules[path].dense(torch.float64), expected, rtol=1e-5, atol=1e-6)
    small, retained = lorchestra.compress(fused, 2)
    assert small.modules[path].rank == 2
    S = torch.linalg.svdvals(expected)
    assert retained == pytest.approx(float(S[:2].square().sum() / S.square().sum()), rel=1e-5)

    lorchestra.merge(str(tiny_dir), fused, str(tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(tiny_dir).get_submodule(path).weight.detach()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_submodule(path).weight.detach()
    torch.testing.assert_close(merged.double(), base.double() + expected, rtol=1e-5, atol=1e-6)
