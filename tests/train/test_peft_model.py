"""The article's Python, word for word, on the model that ``lorchestra`` returns; plain PEFT beside it."""

from __future__ import annotations

import copy
import json
import math

import peft
import pytest
import torch
from transformers import Conv1D

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.inspect import inspect_model
from lorchestra.bank import Bank
from lorchestra.errors import UserError
from lorchestra.train.peft_model import LoraConfig, get_peft_model

SIGMA, RANK = 0.02, 8

# As the article prints it; only the module that is imported from is another.
ARTICLE = """
from peft import LoraConfig, get_peft_model

lora_config = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.1,
    bias="none",
    task_type="CAUSAL_LM",
    init_method="rescaled" # 启用RS-LoRA式初始化
)

model = get_peft_model(base_model, lora_config)
"""
RESCALE = """
for name, module in model.named_modules():
    if 'lora_A' in name:
        module.weight.data *= (1 / (config.r ** 0.5))
"""
CHECK = """
# 检查LoRA A矩阵的标准差
for n, p in model.named_parameters():
    if 'lora_A' in n and p.requires_grad:
        print(f"{n}: std={p.data.std().item():.4f}")
"""
WORDS = {"r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def as_in_the_article(base_model):
    names = {"base_model": base_model}
    exec(ARTICLE.replace("from peft import", "from lorchestra import"), names)
    return names["model"], names["lora_config"]


def stds(model) -> dict[str, float]:
    return {n: p.data.std().item() for n, p in model.named_parameters() if "lora_A" in n}


@pytest.fixture
def wide_model():
    """Enough entries in every A that its std is known to a few per cent."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()


def test_the_articles_configuration_starts_at_sigma_over_root_r(wide_model):
    model, config = as_in_the_article(wide_model)
    found = stds(model)
    assert len(found) == 4
    for std in found.values():
        assert std == pytest.approx(SIGMA / math.sqrt(RANK), rel=0.07)  # 2,048 entries: ±1.6 % is one sigma
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B" in n)
    trainable = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}
    assert (config.lora_dropout, config.bias, config.init_method) == (0.1, "none", "rescaled")


def test_the_articles_two_loops_run_verbatim(wide_model, capsys):
    model, config = as_in_the_article(wide_model)
    before = {n: p.data.clone() for n, p in model.named_parameters()}
    exec(RESCALE, {"model": model, "config": config})
    for name, parameter in model.named_parameters():
        factor = 1 / math.sqrt(RANK) if "lora_A" in name else 1.0
        torch.testing.assert_close(parameter.data, before[name] * factor)
    exec(CHECK, {"model": model})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{n}: std={std:.4f}" for n, std in stds(model).items()]
    assert len(lines) == 4


def test_on_plain_peft_the_first_loop_fails(wide_model):
    plain = peft.get_peft_model(wide_model, peft.LoraConfig(**WORDS))
    with pytest.raises(AttributeError):
        exec(RESCALE, {"model": plain, "config": peft.LoraConfig(**WORDS)})


def test_the_loop_gives_the_rescaled_initialisation_to_a_gaussian_start(wide_model):
    """The article's manual way: N(0, σ²) times 1/√r, here from σ = 1/r of PEFT's gaussian."""
    config = LoraConfig(**WORDS, init_method="gaussian")
    model = get_peft_model(wide_model, config)
    exec(RESCALE, {"model": model, "config": config})
    for std in stds(model).values():
        assert std == pytest.approx(1 / RANK / math.sqrt(RANK), rel=0.07)


def test_it_saves_with_plain_peft_and_loads_in_both(tiny_model, tmp_path):
    base, for_peft = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    model, _ = as_in_the_article(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")

    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["lora_alpha"] == 16
    assert not {"init_method", "sigma"} & set(written)
    assert type(peft.PeftConfig.from_pretrained(tmp_path / "adapter")) is peft.LoraConfig

    plain = peft.PeftModel.from_pretrained(for_peft, tmp_path / "adapter").eval()
    bank = Bank(base)
    bank.load("a", Adapter.load(tmp_path / "adapter"))
    with torch.no_grad(), bank.using({"a": 1.0}):
        torch.testing.assert_close(plain(input_ids=ids).logits, expected)
        torch.testing.assert_close(base(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(base(input_ids=ids).logits, expected, atol=1e-2)


def test_inspect_reads_the_live_model(wide_model):
    model, _ = as_in_the_article(wide_model)
    view = inspect_model(model)
    assert len(view.modules) == 4
    for module in view.modules:
        assert module.initial
        assert module.scale == 2.0
        assert module.expected_std == pytest.approx(SIGMA / math.sqrt(RANK))
        assert module.flags == ()
    kaiming = inspect_model(get_peft_model(model.unload(), LoraConfig(**WORDS)))
    assert all("not the rescaled initialisation" in module.flags[0] for module in kaiming.modules)


def test_the_seed_decides_the_start(tiny_model):
    def start(seed: int) -> dict[str, float]:
        config = LoraConfig(**WORDS, init_method="rescaled")
        return stds(get_peft_model(copy.deepcopy(tiny_model), config, seed=seed))

    assert start(1) == start(1)
    assert all(start(2)[name] != std for name, std in start(1).items())


def test_unknown_initialisations_and_convolutions_are_refused():
    with pytest.raises(UserError, match="'rescald' is unknown; there are kaiming, gaussian, rescaled, orthogonal"):
        LoraConfig(**WORDS, init_method="rescald")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.linear = Conv1D(4, 4)

    with pytest.raises(UserError, match="conv is a convolution"):
        get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv", "linear"], init_method="rescaled"))
