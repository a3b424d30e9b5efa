"""``fuse``: one adapter for several, exactly or at a rank, and what was kept."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import dense_logits
from transformers import AutoModelForCausalLM

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage
from lorchestra.adapter.lowrank import LowRank
from lorchestra.fusion.bounds import Bounds
from lorchestra.fusion.methods import METHODS, apply

IDS = torch.tensor([[1, 40, 41, 42, 90, 2]])


@pytest.fixture
def two(make_adapter, tmp_path) -> dict[Path, float]:
    return {make_adapter(tmp_path / "a", 1, rank=2): 0.3, make_adapter(tmp_path / "b", 2, rank=3): -0.5}


def dense(members: dict[Path, float]) -> dict[str, torch.Tensor]:
    loaded = [(Adapter.load(directory), weight) for directory, weight in members.items()]
    return {path: sum(w * a.modules[path].dense(torch.float64) for a, w in loaded) for path in loaded[0][0].modules}


def test_the_exact_sum(lorchestra, tiny_dir, two):
    told = lorchestra("fuse", "a=0.3", "b=-0.5", "-o", "fused", "--json")
    assert told.code == 0, told.err
    summary, fused, expected = json.loads(told.out), Adapter.load("fused"), dense(two)
    assert {update.rank for update in fused.modules.values()} == {5}
    for path, update in fused.modules.items():
        torch.testing.assert_close(update.dense(torch.float64), expected[path], rtol=1e-5, atol=1e-7)
    assert summary["retained"] == 1.0
    assert summary["norm"] == pytest.approx(sum(float(d.square().sum()) for d in expected.values()) ** 0.5)
    assert summary["norms"]["a"] == pytest.approx(
        sum(float(u.dense(torch.float64).square().sum()) for u in Adapter.load("a").modules.values()) ** 0.5
    )
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), "fused").eval()
    with torch.no_grad():
        found = plain(input_ids=IDS).logits.double()
    torch.testing.assert_close(found, dense_logits(tiny_dir, two, IDS), rtol=1e-4, atol=1e-4)


def test_at_a_rank_it_is_the_best_approximation_and_says_what_it_kept(lorchestra, two):
    told = lorchestra("fuse", "a=0.3", "b=-0.5", "-o", "fused", "--rank", 2)
    assert told.code == 0, told.err
    kept, whole = 0.0, 0.0
    fused = Adapter.load("fused")
    for path, matrix in dense(two).items():
        U, S, Vh = torch.linalg.svd(matrix)
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        torch.testing.assert_close(fused.modules[path].dense(torch.float64), best, rtol=1e-4, atol=1e-6)
        kept, whole = kept + float(S[:2].square().sum()), whole + float(S.square().sum())
    assert 0.4 < kept / whole < 0.99
    assert f"retained energy {kept / whole:.2%}, least in model.layers." in told.out


def test_one_adapter_at_one_is_itself(lorchestra, two):
    assert lorchestra("fuse", "a", "-o", "fused").code == 0
    assert Adapter.load("fused").digest == Adapter.load("a").digest


def test_the_help_lists_every_method_with_its_line(lorchestra, monkeypatch):
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    told = lorchestra("fuse", "--help")
    for row in METHODS.values():
        assert f"{row.name}: {row.summary}" in told.out
    assert "METHODS" not in told.out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_says_what_it_kept(lorchestra, two, method):
    """What is on the disk is what the method's function makes."""
    row = METHODS[method]
    options = ["--rank", 4] if method == "svd" or row.home == "elementwise" else []
    options += ["--density", 0.6] if row.density else []
    options += ["--seed", 3] if row.seeded else []
    told = lorchestra("fuse", "a=0.9", "b=0.4", "-o", "fused", "--method", method, *options, "--json")
    assert told.code == 0, told.err
    summary, fused = json.loads(told.out), Adapter.load("fused")
    members = {name: Adapter.load(name) for name in ("a", "b")}
    expected = apply(
        method,
        members,
        {"a": 0.9, "b": 0.4},
        bounds=Bounds(rank=4 if "--rank" in options else None),
        density=0.6 if row.density else None,
        seed=3 if row.seeded else None,
    )
    assert summary["digest"] == fused.digest == expected.adapter.digest
    assert summary["retained"] == expected.retained
    assert (fused.lineage.task, fused.lineage.made_by) == (method, "fusion")
    assert {parent.name for parent in fused.lineage.parents} == {"a", "b"}
    assert max(update.rank for update in fused.modules.values()) == (4 if "--rank" in options else 5)


def test_energy_and_budget(lorchestra, two):
    whole = dense(two)
    told = lorchestra("fuse", "a=0.3", "b=-0.5", "-o", "fused", "--energy", 0.9, "--json")
    assert json.loads(told.out)["retained"] >= 0.9
    for path, update in Adapter.load("fused").modules.items():
        power = torch.linalg.svdvals(whole[path]).square()
        r = update.rank
        assert float(power[:r].sum()) >= 0.9 * float(power.sum()) > float(power[: r - 1].sum())
    told = lorchestra("fuse", "a=0.3", "b=-0.5", "-o", "fused", "--budget", 200, "--json")
    summary = json.loads(told.out)
    assert 200 - 80 < summary["parameters"] <= 200
    dropped = [path for path, share in summary["per_module"].items() if share == 0]
    assert set(Adapter.load("fused").modules) == set(whole) - set(dropped)
    assert (
        f"{len(dropped)} modules left out" in lorchestra("fuse", "a=0.3", "b=-0.5", "-o", "fused", "--budget", 200).out
    )


def test_saved_in_bfloat16_it_says_what_rounding_moved(lorchestra, two):
    told = lorchestra("fuse", "a=0.3", "b=-0.5", "-o", "fused", "--dtype", "bfloat16", "--json")
    summary, expected, fused = json.loads(told.out), dense(two), Adapter.load("fused")
    error = sum(float((fused.modules[p].dense(torch.float64) - m).square().sum()) for p, m in expected.items()) ** 0.5
    size = sum(float(m.square().sum()) for m in expected.values()) ** 0.5
    assert summary["rounding"] == pytest.approx(error / size, rel=1e-3)
    assert 1e-4 < summary["rounding"] < 1e-2
    assert summary["bytes"] < 2 * summary["parameters"] + 4000
    assert summary["digest"] == fused.digest


def test_weights_by_module(lorchestra, two):
    """Patterns, a file and the default together: the last word counts, module by module."""
    Path("weights.yaml").write_text("b:\n  layers.0: 2\n  '*.down_proj': -1\n")
    told = lorchestra(
        "fuse",
        "a=0.3",
        "b=-0.5",
        "-o",
        "fused",
        "--weights-file",
        "weights.yaml",
        "--weights-for",
        "q_proj: a=0 b=0.25",
    )
    assert told.code == 0, told.err
    fused = Adapter.load("fused")
    a, b = Adapter.load("a"), Adapter.load("b")
    for path in a.modules:
        first, second = (0.0, 0.25) if path.endswith("q_proj") else (0.3, -1.0)
        expected = first * a.modules[path].dense(torch.float64) + second * b.modules[path].dense(torch.float64)
        torch.testing.assert_close(fused.modules[path].dense(torch.float64), expected, rtol=1e-5, atol=1e-7)
    assert {parent.name: parent.digest for parent in fused.lineage.parents} == {"a": a.digest, "b": b.digest}
    assert fused.lineage.settings["weights_for"][-1] == {"pattern": "q_proj", "weights": {"a": 0.0, "b": 0.25}}
    Path("weights.json").write_text(json.dumps({"b": dict.fromkeys(b.modules, 2.0)}))
    assert lorchestra("fuse", "a=0", "b=0", "-o", "fused", "--weights-file", "weights.json").code == 0
    assert Adapter.load("fused").norm() == pytest.approx(2 * b.norm())


def test_adapters_without_a_common_module_are_remarked(lorchestra, two):
    Adapter({"q_proj": LowRank(torch.ones(4, 1), torch.ones(1, 4))}).save("c")
    told = lorchestra("fuse", "a", "c", "-o", "fused")
    assert told.code == 0
    assert "a and c have no module in common (model.layers.0.mlp.down_proj, q_proj)" in told.err


def test_names_never_leave_the_output_directory(lorchestra, two, tmp_path):
    """Names within an adapter are text: a module or a lineage called ../x makes no file."""
    (tmp_path / "work").mkdir()
    evil = Adapter(
        {"../../x": LowRank(torch.ones(4, 1), torch.ones(1, 4)), "/tmp/y": LowRank(torch.ones(4, 1), torch.ones(1, 4))},
        lineage=Lineage(name="../../z"),
    )
    evil.save(tmp_path / "work" / "evil")
    before = {p for p in tmp_path.rglob("*") if "home" not in p.parts}
    told = lorchestra("fuse", "a", "work/evil", "-o", "work/fused", "--rank", 1)
    assert told.code == 0, told.err
    new = {p for p in tmp_path.rglob("*") if "home" not in p.parts} - before
    assert {p.relative_to(tmp_path / "work").parts[0] for p in new} == {"fused"}
    assert set(Adapter.load("work/fused").modules) > {"../../x", "/tmp/y"}


def test_wrong_input(lorchestra, two, make_adapter, other_base, tiny_dir, tmp_path):
    make_adapter(tmp_path / "foreign", seed=3, base=other_base)
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    for name, text in {"bad": "{", "list": "[1]", "flat": "a: 0.3", "text": "a: {q_proj: x}"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    lorchestra("fuse", "a=0.3", "b=half", "-o", "out").refused("'half' is not a finite number", "ADAPTER=WEIGHT")
    lorchestra("fuse", "a", "nothere", "-o", "out").refused("'nothere'")
    lorchestra("fuse", "a", "foreign", "-o", "out").refused("different bases")
    lorchestra("fuse", "a", "b", "-o", "out", "--method", "tie").refused("'tie'", "linear", "did you mean ties?")
    for options, words in {
        ("--density", 0.5): ("linear thins nothing out",),
        ("--method", "dare", "--density", 1.5): ("in (0, 1]; got 1.5",),
        ("--method", "ties", "--seed", 1): ("no chance in ties",),
        ("--method", "svd"): ("give a rank, an energy or a budget",),
        ("--method", "average", "--weights-for", "q_proj: a=1"): ("average has one weight for each adapter",),
        ("--energy", 1.5): ("in (0, 1]; got 1.5",),
        ("--budget", 3): ("budget of 3 parameters is too small",),
        ("--dtype", "int8"): ("--dtype 'int8'", "bfloat16"),
        ("--compute-dtype", "bfloat16"): ("--compute_dtype 'bfloat16'", "float64"),
        ("--weights-for", "layers.0-9"): ("as in 'layers.0-9: general=0.3",),
        ("--weights-for", "layers.0: a"): ("'a' has no weight",),
        ("--weights-for", "layers.0: a=x"): ("'x' is not a finite number",),
        ("--weights-for", "layers.7: a=1"): ("no module of 'a' matches 'layers.7'",),
        ("--weights-for", "q_proj: c=1"): ("'c', which is no member",),
        ("--weights-file", "absent.yaml"): ("absent.yaml cannot be read",),
        ("--weights-file", "bad.yaml"): ("bad.yaml cannot be read",),
        ("--weights-file", "list.yaml"): ("holds list; it should map",),
        ("--weights-file", "flat.yaml"): ("'a' has 0.3; it should map",),
        ("--weights-file", "text.yaml"): ("'q_proj' has 'x', which is not a number",),
    }.items():
        lorchestra("fuse", "a", "b", "-o", "out", *options).refused(*words)
    lorchestra("fuse", "a", "b", "-o", "a").refused("--output_dir a is adapter 'a'")
    lorchestra("fuse", "a=0", "b=0", "-o", "out").refused("every weight is zero")
    lorchestra("fuse", "a", "a/", "-o", "out").refused("given twice")
    lorchestra("fuse", "a", "b", "-o", "out", "--rank", 0).refused("--rank")
    lorchestra("fuse", "-o", "out").refused("ADAPTER")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    lorchestra("fuse", "a", "b", "-o", "model").refused("model is not empty and holds no adapter")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


def damaged(make_adapter, tmp_path, name):
    directory = make_adapter(tmp_path / name, seed=5)
    (directory / "lorchestra.json").unlink()
    return directory, directory / "adapter_model.safetensors"


def test_damaged_adapters_are_named_and_nothing_is_written(lorchestra, two, make_adapter, tmp_path):
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    cases = {
        "nan": "holds NaN or infinity",
        "shape": "belong to different bases",
        "cut": "damaged or not a safetensors",
        "text": "damaged or not a safetensors",
        "half": "the file is incomplete",
        "pickle": "adapter_model.bin is a pickle and is not read",
    }
    for name, words in cases.items():
        directory, weights = damaged(make_adapter, tmp_path, name)
        tensors = load_file(weights)
        if name == "nan":
            tensors[key][0, 0] = float("nan")
        elif name == "shape":
            tensors[key] = torch.ones(2, 7)
        elif name == "half":
            del tensors[key]
        save_file(tensors, weights)
        if name == "cut":
            weights.write_bytes(weights.read_bytes()[:-5])
        elif name == "text":
            weights.write_text("not a safetensors file")
        elif name == "pickle":
            weights.unlink()
            torch.save(tensors, directory / "adapter_model.bin")
        before = sorted(tmp_path.iterdir())
        lorchestra("fuse", "a", name, "-o", "out").refused(name, words)
        assert sorted(tmp_path.iterdir()) == before
