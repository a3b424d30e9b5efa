"""QLoRA: stages train on a base in 4 bits, which stays what it is; what they make is an ordinary adapter."""

from __future__ import annotations

import json
import math
import random

import peft
import pytest
import torch
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.gpu.elsewhere import NAME
from tests.train.conftest import adapter_for, inputs, pairs, run
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.bank import Bank
from lorchestra.base import nf4
from lorchestra.base.home import home
from lorchestra.base.load import load_base
from lorchestra.evaluate.parity import logits_of
from lorchestra.evaluate.score import Scores, score
from lorchestra.pipeline.choosing import domains_of
from lorchestra.pipeline.execute import run as run_recipe
from lorchestra.pipeline.plan import plan
from lorchestra.pipeline.prepare import prepare
from lorchestra.recipe.recipe import Recipe
from lorchestra.train.settings import ContextMember, Objective
from lorchestra.train.stage import frozen_digest

pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes: pip install 'lorchestra[nf4]'")
PROMPTS = [(5, 60, 7, 100, 21), (44, 9, 200)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base whose rows hold whole blocks of 64."""
    directory = tmp_path_factory.mktemp("plain")
    make_tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def base(device, plain):
    if device.type == NAME:
        pytest.skip("bitsandbytes has no kernels for a device that is pretended")
    return load_base(plain, device=str(device), dtype="nf4")


def test_linear_modules_are_packed_and_multiply_as_they_unpack(base, plain):
    from bitsandbytes.functional import dequantize_4bit

    original = AutoModelForCausalLM.from_pretrained(plain)
    assert base.quantised == "nf4"
    assert base.id == load_base(plain, device="cpu", dtype="float32").id, "the fingerprint is of what is stored"
    for path, module in base.model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ != "Linear4bit":
            assert weight is None or weight.dtype == base.dtype
            continue
        stored = original.get_submodule(path).weight
        assert weight.dtype == torch.uint8
        assert weight.numel() == stored.numel() / 2
        unpacked = dequantize_4bit(weight.data, weight.quant_state).float().cpu()
        assert 0.02 < (unpacked - stored).norm() / stored.norm() < 0.15, "four bits"
        x = torch.randn(2, 3, stored.shape[1], generator=torch.Generator().manual_seed(0))
        found = module(x.to(base.device, base.dtype)).float().cpu()
        torch.testing.assert_close(found, x @ unpacked.T, rtol=0.05, atol=0.05 * float((x @ unpacked.T).std()))
    packed = [m for m in base.model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(packed) == 14
    assert not any(p.requires_grad for p in base.model.parameters())


def test_gradients_are_those_of_the_unpacked_weights(base):
    """Also after a pass without gradients, at which bitsandbytes would pack for a CPU kernel without a backward."""
    from bitsandbytes.functional import dequantize_4bit

    module = base.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(base.device, base.dtype)
    with torch.no_grad():
        module(x)
    x.requires_grad_()
    module(x).float().square().sum().backward()
    W = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    y = x.detach().float() @ W.T
    torch.testing.assert_close(x.grad.float(), 2 * y @ W, rtol=0.05, atol=0.05 * float((2 * y @ W).std()))


def test_a_stage_trains_and_what_it_makes_loads_in_plain_peft(base, plain, tmp_path, figure):
    before = frozen_digest(base.model)
    model = base.model
    rows = []
    context = Adapter(adapter_for(make_tiny_model(hidden_size=64, intermediate_size=128), 3).modules)
    made = {}
    for task, items in (("sft", None), ("dpo", pairs(12))):
        given = inputs(
            name=task, objective=Objective(task=task), quantised="nf4", context={"old": (context, ContextMember())},
            **({} if items is None else {"items": items, "validation": pairs(4, seed=1)}),
        )  # fmt: skip
        result = run(model, tmp_path, given, name=task)
        rows = result.progress.validation
        assert rows[-1]["loss"] < rows[0]["loss"]
        made[task] = result
    assert frozen_digest(model) == before
    assert made["dpo"].first_preference_loss == pytest.approx(math.log(2), rel=1e-2)
    figure(f"nf4 on {base.device}: first DPO loss {made['dpo'].first_preference_loss:.7f}, law {math.log(2):.7f}")

    made["sft"].adapter.save(tmp_path / "adapter")
    note = json.loads((tmp_path / "adapter" / "lorchestra.json").read_text())
    assert note["lineage"]["settings"]["base_quantised"] == "nf4"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "adapter")
    ours = Bank(AutoModelForCausalLM.from_pretrained(plain))
    ours.load("a", Adapter(made["sft"].adapter.modules))
    bare = logits_of(ours.model, PROMPTS)
    with ours.using({"a": 1.0}):
        for a, b, c in zip(logits_of(ours.model, PROMPTS), logits_of(theirs, PROMPTS), bare, strict=True):
            assert (a - b).norm() <= 1e-4 * (a - c).norm()


def test_the_bank_on_it_answers_as_peft_on_it(base, plain, tmp_path):
    adapter = adapter_for(make_tiny_model(hidden_size=64, intermediate_size=128), 1, scale=0.2)
    Adapter(adapter.modules).save(tmp_path / "adapter")
    bank = Bank(base.model)
    bank.load("a", Adapter(adapter.modules))
    bare = logits_of(base.model, PROMPTS)
    with bank.using({"a": 1.0}):
        ours = logits_of(base.model, PROMPTS)
    bank.unmount()
    theirs = logits_of(peft.PeftModel.from_pretrained(base.model, tmp_path / "adapter"), PROMPTS)
    for a, b, c in zip(ours, theirs, bare, strict=True):
        assert (a - b).norm() <= 0.05 * (a - c).norm(), "bfloat16 rounds"


def test_a_changed_scale_is_a_changed_base(base):
    before = frozen_digest(base.model)
    state = base.model.model.layers[1].mlp.down_proj.weight.quant_state
    state.absmax[0] += 1
    assert frozen_digest(base.model) != before
    assert len(list(nf4.scales(base.model))) == 5 * 14


def test_modules_that_a_base_stores_transposed_stay_told_apart(device, tmp_path):
    """GPT-2: a square weight would else be merged transposed, and nothing would say so."""
    if device.type == NAME:
        pytest.skip("bitsandbytes has no kernels for a device that is pretended")
    config = GPT2Config(vocab_size=260, n_positions=128, n_embd=64, n_layer=1, n_head=2, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    make_tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    base = load_base(tmp_path / "gpt2", device=str(device), dtype="nf4")
    made = run(base.model, tmp_path, inputs(quantised="nf4")).adapter
    assert made.transposed == set(made.modules)
    assert "transformer.h.0.attn.c_proj" in made.transposed
    plain = Bank(load_base(tmp_path / "gpt2", device=str(device), dtype="float32").model, BaseId())
    plain.load("a", Adapter(made.modules, transposed=made.transposed))


@pytest.mark.slow
def test_a_run_trains_on_it_and_is_judged_on_the_base_itself(device, plain, tmp_path):
    if device.type == NAME:
        pytest.skip("bitsandbytes has no kernels for a device that is pretended")
    chance = random.Random(0)
    rows = [{"prompt": f"q{i} {chance.randrange(999)}", "completion": f"a {chance.randrange(9)}"} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe.from_dict(
        {
            "name": "packed", "base": str(plain), "dtype": "nf4", "device": str(device),
            "train": {"max_steps": 3, "batch_size": 4}, "lora": {"rank": 2, "alpha": 4},
            "stages": [{"name": "s", "data": "d.jsonl"}], "evaluate": {"samples": 0},
        },
        tmp_path,
    )  # fmt: skip
    done = run_recipe(recipe, directory=tmp_path / "out")
    report = json.loads(done.report.with_suffix(".json").read_text())
    assert report["base"]["dtype"].startswith("nf4 (")
    assert any("on the base in nf4" in note for note in report["verdict"]["notes"])
    assert report["merge"]["parity"] < 0.05
    ours = [step for step in plan(recipe).steps if step.kind not in ("source", "data")]
    assert {step.name for step in ours} >= {"s", "fuse", "merge", "evaluate"}
    assert {step.state for step in ours} == {"cached"}, "plan and run mean the same steps"
    scores = json.loads(next((home() / "steps").glob("evaluate-*/scores.json")).read_text())
    bare = load_base(plain, device=str(device))
    expected = score(bare.model, domains_of(prepare(recipe), "test", None, choices=True)["s"], bare.pad_id)
    assert Scores.from_dict(scores["base"]["s"]).sums == expected.sums, "the base itself, not its 4 bits"
