"""Initialisations and scales against their formulas; schedules; the article's own Python, verbatim."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.errors import UserError
from lorchestra.train.context import final_weights, weight_at
from lorchestra.train.lora import expected_std, initial_A, new_member, target_paths
from lorchestra.train.peft_model import LoraConfig, get_peft_model
from lorchestra.train.schedule import BatchPlan
from lorchestra.train.settings import ContextMember, LoraSettings, TrainSettings


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "rescaled", "orthogonal"])
@pytest.mark.parametrize(("r", "n"), [(8, 4096), (64, 1024)])
def test_initial_std(init, r, n):
    settings = LoraSettings(rank=r, init=init)
    A = initial_A(settings, n, torch.Generator().manual_seed(0))
    assert A.shape == (r, n)
    assert float(A.std()) == pytest.approx(expected_std(settings, n), rel=0.02)
    assert abs(float(A.mean())) < 4 * expected_std(settings, n) / math.sqrt(r * n)


def test_the_articles_figure():
    A = initial_A(LoraSettings(rank=8, init="rescaled", sigma=0.02), 50_000, torch.Generator().manual_seed(0))
    assert float(A.std()) == pytest.approx(0.00707, rel=0.005)


def test_orthogonal_rows():
    A = initial_A(LoraSettings(rank=7, init="orthogonal"), 40, torch.Generator().manual_seed(0))
    torch.testing.assert_close(A @ A.T, torch.eye(7), rtol=0, atol=1e-5)


@given(st.integers(1, 64), st.floats(0.1, 64))
def test_scales(r, alpha):
    expected = {"lora": alpha / r, "rslora": alpha / r**0.5, "constant": alpha}
    for scaling, scale in expected.items():
        assert LoraSettings(rank=r, alpha=alpha, scaling=scaling).scale == pytest.approx(scale)


def test_modules_start_alike_whatever_else_is_adapted(tiny_model):
    everything = new_member(tiny_model, LoraSettings(), seed=3)
    one = new_member(tiny_model, LoraSettings(target_modules=("q_proj",)), seed=3)
    both = dict(zip(everything.paths, everything.A, strict=True))
    assert one.paths == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    for path, A in zip(one.paths, one.A, strict=True):
        assert torch.equal(A, both[path])
    assert not torch.equal(one.A[0], one.A[1])


def test_all_linear_leaves_the_output_embedding(tiny_model):
    paths = target_paths(tiny_model, "all-linear")
    assert len(paths) == 2 * 7
    assert "lm_head" not in paths
    with pytest.raises(UserError, match="matches no linear module"):
        target_paths(tiny_model, ("nothing",))


MEMBERS = st.builds(
    ContextMember,
    weight=st.floats(0, 2),
    schedule=st.sampled_from(["constant", "linear", "cosine", "step"]),
    to=st.floats(0, 2),
    start=st.floats(0, 0.4),
    end=st.floats(0.5, 1),
)


@given(MEMBERS, st.floats(0, 1), st.floats(0, 1))
def test_schedules_are_monotone_and_end_where_they_say(member, p, q):
    p, q = sorted((p, q))
    first, last = weight_at(member, 0.0), final_weights({"m": member})["m"]
    if member.schedule == "constant":
        assert first == last == member.weight
    else:
        assert last == pytest.approx(member.to)
        if member.start > 0:
            assert first == pytest.approx(member.weight)
    low, high = sorted((member.weight, member.to))
    if member.schedule != "constant":
        assert low - 1e-9 <= weight_at(member, p) <= high + 1e-9
        direction = member.to - member.weight
        assert (weight_at(member, q) - weight_at(member, p)) * direction >= -1e-9


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_an_epoch_sees_every_item_once(n, size, accumulation, fixed):
    settings = TrainSettings(batch_size=size, gradient_accumulation=accumulation, epochs=2)
    plan = BatchPlan([(i * 7) % 13 + 1 for i in range(n)], settings, seed=5, fixed=fixed)
    epochs = []
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + k) for k in range(plan.steps_per_epoch)]
        micro = [tuple(batch) for step in steps for batch in step]
        assert sorted(i for batch in micro for i in batch) == list(range(n))
        epochs.append(micro)
    if fixed:
        assert set(epochs[0]) == set(epochs[1]) == {tuple(b) for b in plan.composition()}
    assert plan.steps == 2 * plan.steps_per_epoch


ARTICLE_RESCALE = """
for name, module in model.named_modules():
    if 'lora_A' in name:
        module.weight.data *= (1 / (config.r ** 0.5))
"""

ARTICLE_PRINT = """
for n, p in model.named_parameters():
    if 'lora_A' in n and p.requires_grad:
        print(f"{n}: std={p.data.std().item():.4f}")
"""


def article_config(**changes):
    return LoraConfig(
        **{
            "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "bias": "none",
            "task_type": "CAUSAL_LM", "init_method": "rescaled",
        } | changes
    )  # fmt: skip


class TestArticle:
    def test_its_config_gives_its_std(self, capsys):
        from tests.conftest import make_tiny_model

        model = get_peft_model(make_tiny_model(hidden_size=256, num_attention_heads=4), article_config())
        exec(ARTICLE_PRINT, {"model": model})
        printed = [float(line.split("std=")[1]) for line in capsys.readouterr().out.splitlines()]
        assert len(printed) == 4
        assert all(abs(std - 0.00707) < 0.0006 for std in printed)

    def test_its_rescaling_loop_runs_and_scales_once(self, tiny_model):
        config = article_config(init_method="gaussian")
        model = get_peft_model(tiny_model, config)
        before = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
        exec(ARTICLE_RESCALE, {"model": model, "config": config})
        after = {n: p for n, p in model.named_parameters() if "lora_A" in n}
        assert len(before) == 4
        for name, value in before.items():
            torch.testing.assert_close(after[name].detach(), value / math.sqrt(8))

    def test_on_plain_peft_the_loop_fails(self, tiny_model):
        """The reason for ours; if PEFT mends it, this says so."""
        import peft

        config = peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny_model, config)
        with pytest.raises(AttributeError):
            exec(ARTICLE_RESCALE, {"model": model, "config": config})

    def test_plain_peft_loads_what_it_saves(self, tiny_model, tmp_path):
        import json

        import peft
        from tests.conftest import make_tiny_model

        model = get_peft_model(tiny_model, article_config()).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path / "adapter")
        assert "init_method" not in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        ids = torch.arange(4, 20)[None]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            again = peft.PeftModel.from_pretrained(make_tiny_model(), tmp_path / "adapter").eval()
            torch.testing.assert_close(again(input_ids=ids).logits, expected)

    def test_unknown_init_method(self):
        with pytest.raises(UserError, match="rescaled"):
            article_config(init_method="rescald")
