"""Mistakes are told with the flags that were typed, and nothing else in a message is changed."""

from __future__ import annotations

import pytest

from lorchestra.cli.in_flags import in_flags, translated
from lorchestra.cli.training_flags import names
from lorchestra.errors import TrainingError


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("recipe: lora.rank: expected at least 1, got 0", "--lora_rank: expected at least 1, got 0"),
        (
            "recipe: lora.rank: no\nrecipe: stages.0.data.1.source: source 'x': there is no x",
            "--lora_rank: no\n--dataset: source 'x': there is no x",
        ),
        ("recipe: adapters.notes: source 'notes': no", "--adapter: source 'notes': no"),
        ("recipe: stages.0.data.0: fields: unknown part 'prmpt'", "--field: unknown part 'prmpt'"),
        ("odd.csv:3: fields.prompt: there is no column 'q'", "odd.csv:3: --field prompt: there is no column 'q'"),
        (
            "map them: fields: {prompt: <column or {{ template }}>, completion: <column>}.",
            "map them: --field 'prompt=<column or {{ template }}>' --field 'completion=<column>'.",
        ),
        ("lower learning_rate (now 1) or alpha", "lower --learning_rate (now 1) or alpha"),
        ("Lower train.batch_size, or raise max_length.", "Lower --per_device_train_batch_size, or raise --max_length."),
        ("max_length/x.jsonl: 'max_length' is no column", "max_length/x.jsonl: 'max_length' is no column"),
        ("the seed of the base, and its device", "the seed of the base, and its device"),
    ],
)
def test_keys_become_flags(message, told):
    assert translated(message, names({"adapter": "notes"})) == told


def test_the_kind_of_a_mistake_stays():
    with pytest.raises(TrainingError, match="lower --learning_rate"), in_flags(names({"adapter": "notes"})):
        raise TrainingError("lower learning_rate")
