"""On the card a stage trains what plain PEFT trains, starts preferences at ln 2, and goes on where it was stopped."""

from __future__ import annotations

import math

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.gpu.elsewhere import NAME
from tests.train.conftest import BASE, KillAfter, KilledError, adapter_for, inputs, pairs, run
from tests.train.test_against_peft import CONTEXT, PAD, context_of, items, lora_layers, peft_batch, peft_model

from lorchestra.train.lora import new_member
from lorchestra.train.settings import ContextMember, LoraSettings, Orthogonality, TrainSettings
from lorchestra.train.settings import Objective as ObjectiveSettings
from lorchestra.train.stage import StageInputs, train_stage

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def test_a_step_is_pefts(device, tmp_path):
    """One step of AdamW on the new adapter, beside a frozen context."""
    settings, rendered = LoraSettings(rank=4, alpha=3, scaling="rslora"), items()
    context, adapter = context_of(0.4)
    train = TrainSettings(
        max_steps=1, batch_size=len(rendered), learning_rate=1e-2, weight_decay=0.1, warmup_ratio=0,
        scheduler="constant", max_grad_norm=0,
    )  # fmt: skip
    given = StageInputs(
        name="new", objective=ObjectiveSettings(), lora=settings, train=train, items=rendered, validation=[],
        context={"context": (adapter, ContextMember(weight=0.4))}, init_seed=5,
    )  # fmt: skip
    ours = train_stage(make_tiny_model().to(device), BASE, PAD, given, tmp_path / "work").adapter

    model = peft_model(settings, new_member(make_tiny_model(), settings, seed=5, name="new"), context).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model(**{key: value.to(device) for key, value in peft_batch(rendered).items()}).loss.backward()
    optimizer.step()
    layers = lora_layers(model)
    for path, update in ours.modules.items():
        B, A = (f["new"].weight.detach().cpu() for f in (layers[path].lora_B, layers[path].lora_A))
        # AdamW divides by the gradient's size: where that is near nothing, so is what the rounding leaves of it.
        torch.testing.assert_close(update.B / settings.scale, B, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(update.A, A, rtol=1e-3, atol=2e-4)
        assert B.abs().max() > 5e-3, "a step moves B by about the learning rate"
    assert CONTEXT.rank == 3, "the context did act"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_preference_law(device, name, loss, tmp_path, figure):
    """With the new adapter at zero the loss is ln 2, or 1/(4β²), against base + context."""
    model = make_tiny_model().to(device, FORMATS[name])
    given = inputs(
        objective=ObjectiveSettings(task="dpo", loss=loss), items=pairs(12), validation=pairs(4, seed=1),
        context={"old": (adapter_for(make_tiny_model(), 3, scale=0.3), ContextMember(weight=0.5))},
    )  # fmt: skip
    result = run(model, tmp_path, given)
    expected = math.log(2) if loss == "sigmoid" else 1 / (4 * 0.1**2)
    assert result.first_preference_loss == pytest.approx(expected, rel=1e-6 if name == "float32" else 1e-2)
    rows = result.progress.validation
    assert rows[-1]["loss"] < rows[0]["loss"], "it learns"
    figure(
        f"preference law ({loss}) on {device}, {name}: first loss {result.first_preference_loss:.7f}, "
        f"law {expected:.7f}"
    )


def test_a_stage_goes_on_where_it_was_stopped(device, tmp_path):
    model = make_tiny_model().to(device)
    with pytest.raises(KilledError):
        run(model, tmp_path, inputs(), reporter=KillAfter(5))
    resumed = run(model, tmp_path, inputs())
    whole = run(model, tmp_path, inputs(), name="whole")
    assert resumed.progress.step == whole.progress.step
    for path, update in whole.adapter.modules.items():
        # Bitwise on a CPU; a card may add in another order each time.
        torch.testing.assert_close(resumed.adapter.modules[path].B, update.B, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(resumed.adapter.modules[path].A, update.A, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["penalty", "projection"])
def test_orthogonality_curriculum_and_checkpointing(device, mode, tmp_path):
    """Everything a stage can do beside, at once: that it runs there, and learns."""
    given = inputs(
        lora=LoraSettings(rank=2, alpha=4, dropout=0.1, orthogonality=Orthogonality(mode=mode, against_context=True)),
        train=TrainSettings(
            epochs=2, batch_size=4, gradient_accumulation=2, learning_rate=1e-2,
            gradient_checkpointing=device.type != NAME,  # torch runs it in threads of its own, which pretend nothing
        ),
        context={
            "old": (adapter_for(make_tiny_model(), 3), ContextMember(weight=1.0, schedule="cosine", to=0.2)),
        },
    )  # fmt: skip
    rows = run(make_tiny_model().to(device), tmp_path, given).progress.validation
    assert rows[-1]["loss"] < rows[0]["loss"]
