"""What a base is: one digest for the same weights, another for one bit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lorchestra.base import fingerprint as module
from lorchestra.base.fingerprint import fingerprint
from lorchestra.base.home import home
from lorchestra.errors import SourceError


@pytest.fixture
def base(tiny_dir, tmp_path):
    return shutil.copytree(tiny_dir, tmp_path / "base")


def oracle(tensors):
    """The definition, over numpy arrays: sorted (name, dtype, shape, bytes)."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        sha.update(f"{name}\0F32\0{tuple(array.shape)}\0".encode() + array.tobytes())
    return "sha256:" + sha.hexdigest()


def test_the_definition(base):
    assert fingerprint(base).weights == oracle(load_file(base / "model.safetensors"))


def test_how_tensors_are_spread_does_not_matter(base):
    whole = fingerprint(base)
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors, reverse=True)
    (base / "model.safetensors").unlink()
    for part in range(3):
        save_file({n: tensors[n] for n in names[part::3]}, base / f"model-{part}.safetensors", {"format": "pt"})
    assert fingerprint(base) == whole


def test_one_bit_matters(base):
    whole = fingerprint(base).weights
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert fingerprint(base).weights != whole


def test_names_shapes_and_types_matter(tmp_path):
    seen = set()
    zeros = np.zeros((2, 3), np.float32)
    for i, tensors in enumerate(
        ({"a": zeros}, {"b": zeros}, {"a": zeros.T.copy()}, {"a": zeros.view(np.int32)}, {"a": zeros, "b": zeros})
    ):
        (tmp_path / str(i)).mkdir()
        save_file(tensors, tmp_path / str(i) / "model.safetensors")
        seen.add(fingerprint(tmp_path / str(i)).weights)
    assert len(seen) == 5


def test_an_empty_and_a_scalar_tensor(tmp_path):
    tensors = {"none": np.zeros((0, 4), np.float32), "one": np.array(2.0, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path).weights == oracle(tensors)


def test_bfloat16_is_read_as_bytes(tmp_path):
    from safetensors.torch import save_file as save_torch

    tensor = torch.arange(6).bfloat16().reshape(2, 3)
    save_torch({"a": tensor}, tmp_path / "model.safetensors")
    raw = b"a\0BF16\0(2, 3)\0" + tensor.view(torch.uint8).numpy().tobytes()
    assert fingerprint(tmp_path).weights == "sha256:" + hashlib.sha256(raw).hexdigest()


def test_it_is_remembered_by_size_and_time(base, monkeypatch):
    whole = fingerprint(base)

    def forbidden(shards, reporter):
        raise AssertionError("the weights are read again")

    monkeypatch.setattr(module, "_weights_digest", forbidden)
    assert fingerprint(base) == whole
    os.utime(base / "model.safetensors", ns=(5, 5))
    with pytest.raises(AssertionError, match="read again"):
        fingerprint(base)
    assert [p.suffix for p in (home() / "fingerprints").iterdir() if p.suffix != ".lock"] == [".json"]


def test_tokenizer_and_template(base):
    whole = fingerprint(base, "named")
    assert whole.name == "named"
    template = (base / "chat_template.jinja").read_text()
    assert whole.template == "sha256:" + hashlib.sha256(template.encode()).hexdigest()
    (base / "chat_template.jinja").write_text(template + " ")
    other = fingerprint(base, "named")
    assert (other.weights, other.tokenizer) == (whole.weights, whole.tokenizer)
    assert other.template not in ("", whole.template)
    # The same template in tokenizer_config.json, where older files keep it.
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert fingerprint(base, "named") == whole
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert fingerprint(base).template == ""
    tokens = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(tokens | {"version": "2.0"}))
    assert fingerprint(base).tokenizer != whole.tokenizer


def test_no_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match=r"pickled weights .* are not read"):
        fingerprint(tmp_path)


def test_a_tensor_in_two_files(base):
    shutil.copyfile(base / "model.safetensors", base / "copy.safetensors")
    with pytest.raises(SourceError, match=r"which copy\.safetensors holds too"):
        fingerprint(base)


def entry(first, last, **changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [first, last]} | changes


def written(header, data=b"\0" * 16, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "its header would be"),
        (b"\1\0\0", "its header would be"),
        (written({"a": entry(0, 8)}, size=2**63), "its header would be"),
        (written({"a": entry(0, 8)}, size=99_000_000), "its header would be"),
        (written(b"not json"), "JSONDecodeError"),
        (written(b"\xff\xfe\xfd"), "UnicodeDecodeError"),
        (written(["a"]), "in its header"),
        (written({"a": [1, 2]}), "in its header"),
        (written({"a": {"dtype": "F32", "shape": [2]}}), "data_offsets"),
        (written({"a": entry(0, 8, data_offsets=[0])}), "in its header"),
        (written({"a": entry(0, 8, data_offsets=["x", "y"])}), "in its header"),
        (written({"a": entry(0, 8), "b": entry(4, 12)}), "'b' overlaps another or leaves a gap"),
        (written({"a": entry(0, 8), "b": entry(9, 16)}), "'b' overlaps another or leaves a gap"),
        (written({"a": entry(-8, 0), "b": entry(0, 16)}), "'a' overlaps another or leaves a gap"),
        (written({"a": entry(0, 8), "b": entry(8, 4)}), "overlaps another or leaves a gap"),
        (written({"a": entry(0, 8), "b": entry(8, 24)}), r"should have .* bytes and has"),
        (written({"a": entry(0, 8)}), r"should have .* bytes and has"),
        (written({"a": entry(0, 16)}), r"'a' of shape \(2,\) in F32 has 16 bytes"),
    ],
)
def test_damage(tmp_path, content, says):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=says) as caught:
        fingerprint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert not list((home() / "fingerprints").glob("*.json")), "nothing is remembered of it"


def test_a_truncated_file(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SourceError, match="fetch it again"):
        fingerprint(base)
