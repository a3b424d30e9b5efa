"""``inspect``: scales, norms and stds of a PEFT directory of any tool, against plain PEFT and dense algebra."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.train.lora import new_member
from lorchestra.train.settings import LoraSettings


@pytest.fixture
def foreign(tiny_model, tmp_path):
    """A directory that plain PEFT wrote: rsLoRA, one module with another rank and alpha."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian",
        rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 6},
    )  # fmt: skip
    model = peft.get_peft_model(tiny_model, config)
    model.save_pretrained(tmp_path / "initial")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "trained")
    return model


def test_scales_norms_and_stds_are_pefts(lorchestra, foreign):
    told = lorchestra("inspect", "trained", "--json")
    assert told.code == 0, told.err
    modules = {module["path"]: module for module in json.loads(told.out)["modules"]}
    layers = {n: m for n, m in foreign.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(modules) == set(layers)
    for path, layer in layers.items():
        update = layer.get_delta_weight("default").detach().double()
        assert modules[path]["scale"] == pytest.approx(layer.scaling["default"])
        assert modules[path]["norm"] == pytest.approx(float(torch.linalg.matrix_norm(update)), rel=1e-4)
        assert modules[path]["std_A"] == pytest.approx(float(layer.lora_A["default"].weight.std()), rel=1e-5)
        assert modules[path]["shape"] == list(update.shape)
    assert modules["model.layers.0.self_attn.q_proj"]["scale"] == pytest.approx(6 / math.sqrt(2))
    shown = lorchestra("inspect", "trained").out
    assert "modules have different scales" in shown
    assert "made by another tool" in shown
    assert "unverified: shapes only" in shown


def test_the_initialisation_is_judged_only_before_training(lorchestra, foreign):
    unknown = json.loads(lorchestra("inspect", "initial", "--json").out)
    assert not any(m["flags"] for m in unknown["modules"]), "an initialisation that nobody named is not judged"
    initial = json.loads(lorchestra("inspect", "initial", "--sigma", 0.02, "--json").out)
    assert all(any("not the rescaled initialisation" in flag for flag in m["flags"]) for m in initial["modules"])
    assert "at its initialisation" in initial["remarks"][0]
    trained = json.loads(lorchestra("inspect", "trained", "--sigma", 0.02, "--json").out)
    assert not any("initialisation" in flag for m in trained["modules"] for flag in m["flags"])
    assert trained["remarks"] == ["modules have different scales (patterns of rank or alpha)"]


def test_where_it_came_from(lorchestra, make_adapter, tmp_path):
    first = Adapter.load(make_adapter(tmp_path / "first", seed=1))
    make_adapter(tmp_path / "second", seed=2, context=(Parent("first", first.digest, 0.5),), data={"notes.jsonl": "1"})
    told = lorchestra("inspect", "second").out
    assert "stage second (sft" in told
    assert "on notes.jsonl" in told
    assert f"beside 0.5·first ({first.digest[7:19]})" in told
    assert "known by digest" in told
    lorchestra("fuse", "first=0.3", "second=-1", "-o", "sum")
    assert f"fusion sum (linear) = 0.3·first ({first.digest[7:19]}) + -1·second" in lorchestra("inspect", "sum").out


@pytest.mark.parametrize("init", ["kaiming", "rescaled"])
def test_our_own_fresh_adapter_is_what_it_was_meant_to_be(lorchestra, tiny_model, tmp_path, init):
    """Scale from the lineage, since on disk it is 1; A is judged where σ was chosen, and is right."""
    lora = LoraSettings(rank=8, alpha=16, init=init)
    modules = new_member(tiny_model, lora, 0, "new").folded()
    lineage = Lineage(made_by="stage", name="new", task="sft", settings={"lora": lora.model_dump(mode="json")})
    Adapter(modules, lineage=lineage).save(tmp_path / "new")
    told = json.loads(lorchestra("inspect", "new", "--json").out)
    assert {m["scale"] for m in told["modules"]} == {16 / math.sqrt(8)}
    assert {m["scale_on_disk"] for m in told["modules"]} == {1.0}
    assert not any(m["flags"] for m in told["modules"])
    assert {m["expected_std"] for m in told["modules"]} == ({0.02 / math.sqrt(8)} if init == "rescaled" else {None})
    assert "trained at scale 5.657, which is folded into B" in lorchestra("inspect", "new").out


def test_a_summary_by_kind_and_every_module_in_natural_order(lorchestra, tmp_path):
    noise = torch.Generator().manual_seed(0)
    modules = {
        f"model.layers.{layer}.{kind}": LowRank(
            torch.randn(6, 2, generator=noise) * (50 if (layer, kind) == (10, "v_proj") else 1),
            torch.randn(2, 4, generator=noise),
        )
        for layer in range(12)
        for kind in ("q_proj", "v_proj")
    }
    Adapter(modules).save(tmp_path / "many")
    told = lorchestra("inspect", "many").out
    rows = {line.split()[0]: line.split() for line in told.splitlines() if line.strip()}
    assert rows["q_proj"][1:4] == rows["v_proj"][1:4] == ["12", "2", "6×4"]
    for kind in ("q_proj", "v_proj"):
        total = math.sqrt(sum(update.norm() ** 2 for path, update in modules.items() if path.endswith(kind)))
        assert f" {total:.4g} " in next(line for line in told.splitlines() if line.split()[:1] == [kind])
    assert "what is off, in 1 module:" in told
    assert rows["model.layers.10.v_proj"][-3:] == ["the", "median", "module's"]
    assert "model.layers.9.v_proj" not in rows
    every = [line.split()[0] for line in lorchestra("inspect", "many", "--all").out.splitlines() if " 6×4 " in line]
    assert every == [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in ("q_proj", "v_proj")]


def test_wrong_input(lorchestra, tiny_dir, make_adapter, tmp_path):
    lorchestra("inspect", "nothere").refused("'nothere'")
    lorchestra("inspect", tiny_dir).refused("a whole model, not an adapter")
    lorchestra("inspect").refused("ADAPTER")
    path = make_adapter(tmp_path / "a", seed=1) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    lorchestra("inspect", "a").refused("adapter_model.safetensors")
