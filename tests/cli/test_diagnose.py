"""``diagnose``: figures and words about adapters, on the terminal, as JSON and as a page."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank


@pytest.fixture
def two(make_adapter, tmp_path) -> tuple[Path, Path]:
    return make_adapter(tmp_path / "a", 1, rank=2), make_adapter(tmp_path / "b", 2, rank=3, size=0.4)


@pytest.fixture
def data(tmp_path) -> Path:
    rows = [{"prompt": f"What is {k}?", "completion": f"It is {k}."} for k in range(5)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_figures_and_words(lorchestra, two):
    told = lorchestra("diagnose", "a", "b", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    a, b = (Adapter.load(directory) for directory in two)
    inner = sum(u.inner(b.modules[path]) for path, u in a.modules.items())
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"], pair["shared"]) == ("a", "b", 4)
    assert pair["overall"]["cosine"] == pytest.approx(inner / a.norm() / b.norm())
    assert found["adapters"]["a"]["norm"] == pytest.approx(a.norm())
    assert found["adapters"]["a"]["relative"] is None
    assert {cell["layer"] for cell in pair["cells"]} == {0, 1}
    assert set(pair["kinds"]) == {"self_attn.q_proj", "mlp.down_proj"}
    path = "model.layers.1.mlp.down_proj"
    assert len(pair["modules"][path]["row_angles"]) == 2
    singular = found["adapters"]["b"]["modules"][path]["singular_values"]
    assert singular == pytest.approx(b.modules[path].singular_values().tolist(), rel=1e-6)
    product = a.modules[path].dense() * b.modules[path].dense()
    assert pair["modules"][path]["sign_conflict"] == pytest.approx(float((product < 0).double().mean()))
    assert "drowns" in {remark["kind"] for remark in found["reading"]}

    plain = lorchestra("diagnose", "a", "b")
    assert plain.code == 0
    assert f"{pair['overall']['cosine']:.3f}" in plain.out
    assert f"{a.norm():.4g}" in plain.out
    for remark in found["reading"]:
        assert f"• {remark['text']}" in plain.out


def test_with_a_base_data_and_a_page(lorchestra, two, data, tiny_dir, tiny_model, tmp_path):
    arguments = ("one=a", "two=b", "--base", tiny_dir, "--data", f"one={data}", "-o", "page.html")
    told = lorchestra("diagnose", *arguments, "--json", "--dtype", "float32")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    a = Adapter.load(two[0])
    size = sum(float(tiny_model.get_submodule(path).weight.double().square().sum()) for path in a.modules) ** 0.5
    assert found["adapters"]["one"]["relative"] == pytest.approx(a.norm() / size)
    effect = found["activation"]["one"]
    assert effect["tokens"] > 0
    measured = effect["modules"].values()
    of = {name: sum(norms[name] ** 2 for norms in measured) for name in ("one", "two")}
    assert effect["overall"] == {"two": pytest.approx((of["two"] / of["one"]) ** 0.5)}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for remark in found["reading"]:
        assert remark["text"] in html.unescape(page)
    assert page.startswith("<!doctype html>")


def test_one_adapter_alone(lorchestra, two):
    told = lorchestra("diagnose", "b", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert found["pairs"] == []
    assert found["adapters"]["b"]["kept"]["3"] == pytest.approx(1.0)
    assert lorchestra("diagnose", "b").code == 0


def test_every_entry(lorchestra, two, monkeypatch):
    monkeypatch.setattr("lorchestra.fusion.signs.ENTRIES", 1)
    monkeypatch.setattr("lorchestra.fusion.signs.TILE", 16)
    sampled = json.loads(lorchestra("diagnose", "a", "b", "--json").out)["tiles"]
    assert sampled["seen"] < sampled["total"]
    assert set(sampled["sampled"]) == set(Adapter.load(two[0]).modules)
    whole = json.loads(lorchestra("diagnose", "a", "b", "--json", "--every_entry").out)["tiles"]
    assert whole == {"seen": sampled["total"], "total": sampled["total"], "sampled": {}}


def test_wrong_input(lorchestra, two, data, make_adapter, other_base, tiny_dir, tmp_path):
    make_adapter(tmp_path / "foreign", seed=3, base=other_base)
    lorchestra("diagnose", "a", "foreign").refused("different bases")
    lorchestra("diagnose", "a", "--base", other_base).refused("adapter a was trained on")
    lorchestra("diagnose", "a", "nothere").refused("'nothere'")
    lorchestra("diagnose", "a", "a/").refused("given twice")
    lorchestra("diagnose", "x=a", "x=b").refused("two adapters are called 'x'")
    lorchestra("diagnose", "=a").refused("NAME=DIRECTORY")
    lorchestra("diagnose", "a", "--data", f"a={data}").refused("--data needs --base")
    lorchestra("diagnose", "a", "--base", tiny_dir, "--data", f"c={data}").refused("no adapter is called 'c'", "a")
    lorchestra("diagnose", "a", "--base", tiny_dir, "--data", data.name).refused("NAME=FILE")
    lorchestra("diagnose", "a", "-o", tmp_path).refused("is a directory")
    lorchestra("diagnose").refused("ADAPTER")

    weights = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    (tmp_path / "b" / "lorchestra.json").unlink()
    lorchestra("diagnose", "a", "b").refused("NaN or infinity", "b")
    path = next(iter(Adapter.load(two[0]).modules))
    Adapter({path: LowRank(torch.ones(5, 1), torch.ones(1, 5))}).save(tmp_path / "small")
    lorchestra("diagnose", "a", "small").refused(repr(path), "(5, 5)", "small")


def test_nothing_in_common_is_named(lorchestra, two, tmp_path):
    Adapter({"layers.0.q_proj": LowRank(torch.ones(5, 1), torch.ones(1, 5))}).save(tmp_path / "other")
    told = lorchestra("diagnose", "a", "other")
    assert told.code == 0
    assert (
        "a and other change no module in common (a: model.layers.0.mlp.down_proj, …; other: layers.0.q_proj, …)"
        in told.out
    )
