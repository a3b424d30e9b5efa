"""Gates on disk: bit for bit, and refused where anything is not what they were trained with."""

from __future__ import annotations

import hashlib
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save
from tests.gate.scenes import BASE, make_gate, prompts_of

from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import AdapterError, SourceError, StorageError
from lorchestra.gate.features import FeatureSpec
from lorchestra.gate.network import Known
from lorchestra.gate.store import CONFIG, WEIGHTS, fitted
from lorchestra.gate.store import load as load_gate
from lorchestra.gate.store import save as save_gate

ADAPTERS = {name: f"sha256:{name}" for name in "abc"}
KINDS = [
    {},
    {"activation": "sigmoid", "hidden": 5, "top_k": 2, "temperature": 0.3},
    {"none": True, "groups": ("layers.0-3", "other"), "features": FeatureSpec(2, True)},
]


@pytest.fixture
def stored(tmp_path):
    gate = make_gate(hidden=3)
    gate.remember(prompts_of(5), [Known(f"sha256:{i}", "law", "What is a tort?") for i in range(5)])
    save_gate(gate, tmp_path / "gate", {"history": [1.0]})
    return tmp_path / "gate"


def rewrite(directory, **changed):
    """Change the description; ``None`` takes a key away. Keys of the gate are written ``gate__top_k``."""
    path = directory / CONFIG
    told = json.loads(path.read_text())
    for key, value in changed.items():
        place = told
        *before, last = key.split("__")
        for part in before:
            place = place[int(part) if part.isdigit() else part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(told))


def renumber(directory, **changed):
    """Other tensors, with a digest that fits them."""
    content = save({**load_file(directory / WEIGHTS), **changed})
    put(directory, content)


def put(directory, content):
    (directory / WEIGHTS).write_bytes(content)
    rewrite(directory, sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("remembers", [False, True])
def test_a_round_trip_keeps_every_bit(tmp_path, kind, remembers):
    gate = make_gate(**kind)
    if remembers:
        gate.remember(prompts_of(4), [Known(f"{i}", "medicine", "发烧怎么办?") for i in range(4)])
    save_gate(gate, tmp_path / "g")
    again = load_gate(tmp_path / "g", {**ADAPTERS, "others": "do not matter"}, BASE)
    assert again.spec == gate.spec
    assert again.digest == gate.digest
    x = prompts_of(6)
    assert torch.equal(again.coefficients(x), gate.coefficients(x))
    assert again.explain(x) == gate.explain(x)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    save_gate(again, tmp_path / "h")
    assert (tmp_path / "g" / WEIGHTS).read_bytes() == (tmp_path / "h" / WEIGHTS).read_bytes()
    assert (tmp_path / "g" / CONFIG).read_bytes() == (tmp_path / "h" / CONFIG).read_bytes()


def test_how_it_was_fitted_is_kept_for_people(stored):
    assert fitted(stored) == {"history": [1.0]}


def test_a_gate_that_is_there_is_replaced_and_nothing_else(stored, tmp_path):
    save_gate(make_gate(top_k=1), stored)
    assert load_gate(stored).spec.top_k == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(StorageError, match="not empty"):
        save_gate(make_gate(), tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["precious"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_neither_written_nor_read(stored, tmp_path, bad):
    gate = make_gate()
    with torch.no_grad():
        gate.last.weight[0, 0] = bad
    with pytest.raises(AdapterError, match=r"last\.weight holds NaN or infinity"):
        save_gate(gate, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    weight = load_file(stored / WEIGHTS)["last.weight"]
    weight[0, 0] = bad
    renumber(stored, **{"last.weight": weight})
    with pytest.raises(AdapterError, match=r"last\.weight holds NaN or infinity"):
        load_gate(stored)


@pytest.mark.parametrize(
    ("adapters", "base", "message"),
    [
        ({"a": "sha256:a", "b": "sha256:b"}, BASE, "'c' is not there"),
        ({**ADAPTERS, "b": "sha256:other"}, BASE, "trained with another 'b'"),
        ({"a": "sha256:a", "b": "sha256:b", "see": "sha256:c"}, BASE, "it is there as 'see'"),
        ({**ADAPTERS, "a": "sha256:b", "b": "sha256:a"}, BASE, "trained with another 'a'.*it is there as 'b'"),
        (ADAPTERS, BaseId("other", "sha256:else", BASE.tokenizer), "whose weights differ from those of other"),
        (ADAPTERS, BaseId("other", BASE.weights, "sha256:else"), "whose tokenizer differ"),
    ],
)
def test_other_adapters_and_bases_are_refused(stored, adapters, base, message):
    with pytest.raises(AdapterError, match=message):
        load_gate(stored, adapters, base)


def test_another_template_is_no_other_base(stored):
    load_gate(stored, ADAPTERS, BaseId(BASE.name, BASE.weights, BASE.tokenizer, "sha256:else"))
    load_gate(stored, ADAPTERS, BaseId("unknown"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 2}, "of format 2; this lorchestra reads 1"),
        ({"format": None}, "of format None"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"gate__surprise": 1}, "gate.surprise: Extra inputs"),
        ({"gate__hidden": None}, "gate.hidden: Field required"),
        ({"gate__hidden": "3"}, "gate.hidden"),
        ({"gate__activation": "relu"}, "gate.activation"),
        ({"gate__name": "../../etc"}, "no name for an adapter"),
        ({"gate__temperature": float("nan")}, "temperature is nan"),
        ({"gate__adapters": []}, "gate.adapters"),
        ({"gate__adapters__0__name": "a,b"}, "no name for a gate's member"),
        ({"gate__adapters__0__name": "b"}, "different names"),
        ({"gate__hidden": 4}, r"tensor 'first\.bias' is .*\(3,\).* expected .*\(4,\)"),
        ({"gate__hidden": 1 << 40}, "gate.hidden"),
        ({"gate__features__layers": -1}, "gate.features.layers"),
        ({"size": 9}, "expected"),
        ({"size": 1 << 40}, "size"),
        ({"prompts": []}, "tensor 'memory'"),
        ({"sha256": "0" * 64}, "is not the file that gate.json was written for"),
        ({"gate__none": True}, "tensor 'last.bias'"),
    ],
)  # fmt: skip
def test_a_description_that_was_changed_is_refused(stored, changed, message):
    rewrite(stored, **changed)
    with pytest.raises(AdapterError, match=message):
        load_gate(stored)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"format": 1}', "[" * 100_000])
def test_what_is_no_description_is_refused(stored, text):
    (stored / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises((AdapterError, SourceError), match=r"gate\.json"):
        load_gate(stored)


def test_tensors_that_do_not_belong_are_refused(stored):
    renumber(stored, extra=torch.zeros(2))
    with pytest.raises(AdapterError, match=r"tensor 'extra' is .*expected none"):
        load_gate(stored)


def test_a_missing_tensor_and_another_type_are_refused(stored):
    tensors = load_file(stored / WEIGHTS)
    put(stored, save({name: value for name, value in tensors.items() if name != "std"}))
    with pytest.raises(AdapterError, match=r"tensor 'std' is missing"):
        load_gate(stored)
    put(stored, save({**tensors, "std": tensors["std"].double()}))
    with pytest.raises(AdapterError, match=r"tensor 'std' is .*F64"):
        load_gate(stored)
    put(stored, save({**tensors, "std": -tensors["std"]}))
    with pytest.raises(AdapterError, match="standardised"):
        load_gate(stored)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K*.",  # a pickle
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 40) + b'{"mean":{"dtype":"F32","shape":[8]}}    ',
    ],
    ids=["empty", "pickle", "header", "list", "offsets"],
)
def test_what_is_no_safetensors_file_is_refused(stored, content):
    put(stored, content)
    with pytest.raises((AdapterError, SourceError), match=r"gate\.safetensors"):
        load_gate(stored)


def test_a_huge_file_is_not_read(stored):
    with (stored / WEIGHTS).open("ab") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(AdapterError, match=r"more than the gate of gate\.json"):
        load_gate(stored)
    with (stored / CONFIG).open("ab") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(AdapterError, match=r"gate\.json has 1,099,511,627,776 bytes"):
        load_gate(stored)


def test_a_missing_file_is_told(stored, tmp_path):
    (stored / WEIGHTS).unlink()
    with pytest.raises(SourceError, match="there is no such file"):
        load_gate(stored)
    with pytest.raises(SourceError, match="there is no such file"):
        load_gate(tmp_path / "nowhere")
