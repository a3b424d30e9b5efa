"""What nf4 needs and refuses; what it computes is in ``tests/gpu/test_nf4.py``."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lorchestra.base import nf4
from lorchestra.base.load import NumberFormat, choose_dtype, choose_format, load_base
from lorchestra.errors import SourceError, UserError

CPU = torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    """``installed(False)``: as on a machine without bitsandbytes."""
    return lambda there: monkeypatch.setattr(nf4, "find_spec", lambda name: object() if there else None)


def test_without_bitsandbytes_it_says_what_to_install(installed, tiny_dir):
    installed(False)
    for ask in (lambda: choose_format(CPU, "nf4"), lambda: load_base(tiny_dir, dtype="nf4")):
        with pytest.raises(UserError, match=r"dtype nf4 needs bitsandbytes.*pip install 'lorchestra\[nf4\]'") as caught:
            ask()
        assert caught.value.exit_code == 2


def test_a_run_says_so_before_it_fetches_anything(installed, tmp_path, monkeypatch):
    from lorchestra.pipeline.execute import run
    from lorchestra.recipe.recipe import Recipe

    installed(False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("")
    recipe = Recipe.from_dict(
        {"name": "x", "base": "hf:no/such", "dtype": "nf4", "stages": [{"name": "s", "data": "d.jsonl"}]}, tmp_path
    )
    with pytest.raises(UserError, match="needs bitsandbytes"):
        run(recipe)


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes"])
def test_a_model_that_is_quantised_already_is_refused(installed, tiny_dir, tmp_path, method):
    installed(True)
    directory = shutil.copytree(tiny_dir, tmp_path / "packed")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(SourceError, match=f"packed is quantised by {method} already.*leave dtype nf4 out") as caught:
        load_base(directory, dtype="nf4")
    assert caught.value.exit_code == 2


def test_formats(installed):
    installed(True)
    held = choose_format(CPU, "nf4")
    assert held == NumberFormat(choose_dtype(CPU), "nf4")
    assert held.plain == choose_format(CPU) == NumberFormat(choose_dtype(CPU))
    assert str(NumberFormat(torch.bfloat16)) == "torch.bfloat16", "digests of steps before nf4 stay what they were"
    assert (str(NumberFormat(torch.bfloat16, "nf4")), NumberFormat(torch.bfloat16, "nf4").name) == (
        "nf4 (torch.bfloat16)", "nf4 (bfloat16)",
    )  # fmt: skip
    assert NumberFormat(torch.float32).name == "float32"
    with pytest.raises(UserError, match="dtype 'int8' is unknown; there are auto, float32, bfloat16, float16, nf4"):
        choose_format(CPU, "int8")


def test_a_plain_model_has_no_scales(tiny_model):
    assert list(nf4.scales(tiny_model)) == []
