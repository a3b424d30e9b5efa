"""What an adapter's factors say: effective scale, size, and whether an untrained A is the rescaled one."""

from __future__ import annotations

import math

import peft
import pytest
import torch

from lorchestra.adapter.inspect import inspect_factors, inspect_model
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError


def factors(rank=8, std=None, B=0.0, n=512, m=96, paths=("a", "b"), seed=0):
    """Path → ΔW whose A has ``std`` (σ/√r with σ = 0.02 by default) and whose B has entries of size ``B``."""
    generator = torch.Generator().manual_seed(seed)
    std = 0.02 / math.sqrt(rank) if std is None else std
    return {
        path: LowRank(torch.randn(m, rank, generator=generator) * B, torch.randn(rank, n, generator=generator) * std)
        for path in paths
    }


def view(updates, scale=1.0, sigma=0.02):
    return inspect_factors({path: (update, scale) for path, update in updates.items()}, sigma)


def test_numbers_are_those_of_the_dense_update():
    updates = factors(B=0.3, paths=("a", "b", "c"))
    for module in view(updates, scale=2.5).modules:
        update = updates[module.path]
        assert module.norm == pytest.approx(float(update.dense(torch.float64).norm()), rel=1e-5)
        assert module.std_A == pytest.approx(float(update.A.double().std()), rel=1e-5)
        assert (module.rank, module.shape, module.scale, module.initial) == (8, (96, 512), 2.5, False)
        assert module.expected_std == pytest.approx(0.02 / math.sqrt(8))
        assert module.flags == ()


@pytest.mark.parametrize(("std", "told"), [(0.0, True), (0.85, True), (0.95, False), (1.05, False), (1.15, True)])
def test_an_untrained_a_is_judged_against_sigma_over_root_r(std, told):
    found = view(factors(rank=4, n=20_000, std=std * 0.05 / 2), sigma=0.05)
    assert [any("not the rescaled" in flag for flag in module.flags) for module in found.modules] == [told, told]
    assert any("at its initialisation and changes nothing yet" in remark for remark in found.remarks)


def test_a_trained_a_is_not_judged():
    assert all(module.flags == () for module in view(factors(std=1.0, B=0.1)).modules)


def test_a_module_left_untrained_and_one_that_stands_out():
    updates = factors(B=0.1, paths=("a", "b", "c", "large")) | factors(paths=("still",))
    updates["large"] = LowRank(updates["large"].B * 20, updates["large"].A)
    flags = {module.path: module.flags for module in view(updates).modules}
    assert [flag.split(":")[0] for flag in flags["still"]] == ["untrained"]
    assert len(flags["large"]) == 1
    assert "× the median module's" in flags["large"][0]
    assert not any(flags[path] for path in "abc")


@pytest.mark.parametrize(("scale", "flag"), [(11.3, "inherited"), (-9.0, "inherited"), (8.0, ""), (0.0, "no effect")])
def test_scales_that_are_off(scale, flag):
    (found,) = {module.flags for module in view(factors(B=0.1), scale).modules}
    assert (flag in found[0]) if flag else not found


def test_scales_that_differ_are_remarked():
    updates = factors(B=0.1)
    found = inspect_factors({"a": (updates["a"], 1.0), "b": (updates["b"], 2.0)})
    assert found.remarks == ("modules have different scales (patterns of rank or alpha)",)
    assert view(updates).remarks == ()
    assert found.as_dict()["modules"][1]["scale"] == 2.0


def test_a_live_peft_model(tiny_model):
    config = peft.LoraConfig(
        r=8, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(tiny_model, config, "mine")
    found = {module.path: module for module in inspect_model(model, "mine").modules}
    assert len(found) == 4
    for path, module in found.items():
        layer = model.base_model.model.get_submodule(path)
        assert module.scale == pytest.approx(16 / math.sqrt(8))
        assert module.norm == pytest.approx(float(layer.get_delta_weight("mine").detach().norm()), rel=1e-4)


def test_a_model_without_lora(tiny_model):
    with pytest.raises(AdapterError, match="LlamaForCausalLM has no LoRA layers named 'default'; give the model"):
        inspect_model(tiny_model)
