"""Operations and numbers against torch's own counting on the real modules."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import make_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from lorchestra.bank import Bank
from lorchestra.errors import SourceError
from lorchestra.pipeline.estimate import (
    POSITIONS,
    empty_model,
    measure,
    scoring_memory,
    shape_of,
    training_memory,
)
from lorchestra.train.lora import new_member
from lorchestra.train.settings import LoraSettings

WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def wide():
    model = make_tiny_model(vocab_size=1000, **WIDE)
    model.set_attn_implementation("eager")  # torch counts no fused attention on a CPU
    return model


def counted(work) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_is_that_of_the_model(tied, tmp_path):
    model = make_tiny_model(tie_word_embeddings=tied, **WIDE)
    model.save_pretrained(tmp_path)
    empty = empty_model(tmp_path)
    assert all(p.is_meta for p in empty.parameters())
    shape = shape_of(empty, element=2)
    assert shape == shape_of(model, element=2)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.bytes == 2 * shape.parameters
    assert shape.head == 260 * 128
    assert shape.body == sum(p.numel() for p in model.model.parameters()) - 260 * 128
    assert shape.modules == 3 * 7


def test_a_directory_that_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(SourceError, match="cannot be loaded as a causal language model"):
        empty_model(tmp_path)


def test_operations_of_scoring_are_those_that_torch_counts(wide):
    ids = torch.randint(0, 260, (4, 64))

    def forward():
        with torch.no_grad():
            wide(input_ids=ids)

    # Every position meets the vocabulary here; the head's share is exact, attention is counted in full.
    expected = shape_of(wide, 4).forward(tokens=256, supervised=256, length=64)
    assert expected == pytest.approx(counted(forward), rel=0.02)


def test_operations_of_training_are_those_that_torch_counts(wide):
    bank = Bank(wide)
    member = new_member(wide, LoraSettings(rank=4), 0)
    bank.mount_trainable("new", member)
    ids = torch.randint(0, 260, (4, 64))
    numbers = sum(p.numel() for p in member.parameters())

    def step():
        with bank.using({"new": 1.0}):
            wide(input_ids=ids).logits.logsumexp(-1).mean().backward()

    try:
        found = counted(step)
    finally:
        bank.unmount()
    expected = shape_of(wide, 4).training(256, 256, 64, numbers, checkpointing=False)
    assert expected == pytest.approx(found, rel=0.08)  # the first layer has no gradient to pass on
    assert shape_of(wide, 4).training(256, 256, 64, numbers, checkpointing=True) > 1.4 * expected


def test_memory_grows_with_what_it_is_made_of(wide):
    shape = shape_of(wide, 2)
    plain = training_memory(shape, trainable=10**6, context=0, positions=4096, supervised=512, checkpointing=False)
    more = training_memory(shape, trainable=2 * 10**6, context=0, positions=4096, supervised=512, checkpointing=False)
    assert more - plain == 10**6 * (16 + 2)
    wider = training_memory(shape, trainable=10**6, context=0, positions=8192, supervised=512, checkpointing=False)
    assert wider - plain == 4096 * (shape.widths + 4 * shape.hidden * shape.layers) * 2
    assert training_memory(shape, 10**6, 0, 4096, 512, checkpointing=True) < plain
    assert scoring_memory(shape, 0, 0, models=2) - scoring_memory(shape, 0, 0) == shape.bytes
    assert scoring_memory(shape, 0, POSITIONS) > scoring_memory(shape, 0, 0)


def test_the_machine_is_measured_in_a_moment(wide):
    machine = measure(torch.device("cpu"), torch.float32, shape_of(wide, 4), seconds=0.03)
    assert (machine.device, machine.dtype) == ("cpu", "float32")
    assert 1e8 < machine.flops < 1e15
    assert 1e8 < machine.bandwidth < 1e13
    assert machine.memory is None or machine.memory > 1e8


def test_four_bits_count_for_linear_modules_alone(wide):
    """½ byte a number, an 8-bit scale for 64 of them, a float32 scale for 256 of these; the rest as it is loaded."""
    plain, packed = shape_of(wide, 2), shape_of(wide, 2, quantised=True)
    linear = sum(m.weight.numel() for n, m in wide.named_modules() if n.endswith("_proj"))
    assert packed.bytes == round((plain.parameters - linear) * 2 + linear * (0.5 + 1 / 64 + 4 / 16384))
    assert packed.plain == plain
    numbers = (1000, 0, 512, 128, False)
    saved = training_memory(plain, *numbers) - training_memory(packed, *numbers)
    assert saved == plain.bytes - packed.bytes, "activations are in the dtype that is computed in"
