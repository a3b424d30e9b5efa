"""``gate fit`` and ``gate eval``: what they write and print, and how they refuse."""

from __future__ import annotations

import json

import pytest

from lorchestra.adapter.adapter import Adapter
from lorchestra.cli.completion import gates
from lorchestra.cli.gate import ACTIVATIONS
from lorchestra.gate.network import ACTIVATIONS as KNOWN
from lorchestra.gate.store import load


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def adapters(make_adapter, tmp_path):
    return [make_adapter(tmp_path / name, seed, size=0.2) for seed, name in enumerate(("law", "clinic"))]


@pytest.fixture
def notes(tmp_path):
    return write(
        tmp_path / "notes.jsonl", [{"prompt": f"fever {i}?", "completion": f"rest {i % 7}"} for i in range(24)]
    )


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"合同 {i}?", "chosen": f"甲 {i}", "rejected": f"乙 {i % 5}"} for i in range(20)]
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def asked(tiny_dir, adapters, notes, pairs):
    """``gate fit`` over two adapters and two domains, short."""
    return (
        "gate", "fit", tiny_dir, "law", "clinic", "--data", notes, "--data", f"contracts={pairs}", "-o", "chooser",
        "--epochs", 1, "--dtype", "float32",
    )  # fmt: skip


def test_the_tables_here_are_the_real_ones():
    assert ACTIVATIONS == KNOWN


def test_fits_writes_and_judges(lorchestra, asked, tiny_dir, notes, pairs, tmp_path):
    told = lorchestra(*asked, "--layers", 1, "--hidden", 4, "--keep-prompts", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    members = {name: Adapter.load(tmp_path / name).digest for name in ("law", "clinic")}
    gate = load(tmp_path / "chooser", members)
    assert gate.digest == found["digest"]
    assert (gate.spec.name, gate.spec.features.layers, gate.spec.hidden) == ("chooser", 1, 4)
    assert set(found["validation"]) == {"law", "clinic", "oracle", "gate"}
    assert found["validation"]["gate"] == min(check["validation"] for check in found["history"])
    assert found["examples"]["train"] + found["examples"]["validation"] == 44
    assert {known.domain for known in gate.memory.prompts} == {"notes", "contracts"}
    assert all(known.text.startswith(("fever", "合同")) for known in gate.memory.prompts)

    new = write(tmp_path / "new.jsonl", [{"prompt": f"cough {i}?", "completion": f"tea {i}"} for i in range(12)])
    judge = (
        "gate", "eval", tiny_dir, "chooser", "law", "clinic", "--data", f"notes={new}", "--data", pairs,
        "--dtype", "float32",
    )  # fmt: skip
    told = lorchestra(*judge, "--json", "--show", 1)
    assert told.code == 0, told.err
    result = json.loads(told.out)
    assert result["evaluation"]["models"] == ["base", "law", "clinic", "static", "oracle", "gate"]
    assert result["oracle"] == {"notes": found["loads"]["best"]["notes"]}, "a domain of another name has no oracle"
    assert set(result["routing_accuracy"]) == {"notes", "all"}
    assert result["static"] == {"law": 0.5, "clinic": 0.5}
    assert [prompt["domain"] for prompt in result["prompts"]] == ["notes", "pairs"]
    assert result["prompts"][0]["prompt"].startswith("cough")
    assert len(result["prompts"][0]["nearest"]) == 3
    assert "gate chooser was trained on the source of pairs" in told.err
    shown = lorchestra(*judge, "--static", "law=0.7+clinic=0.3")
    assert shown.code == 0, shown.err
    assert "static is law=0.7 + clinic=0.3" in shown.out
    assert "near" in shown.out
    assert "The gate is" in shown.out


def test_the_gate_is_judged_as_its_merged_rows_would_be(lorchestra, asked, tiny_dir, notes, tmp_path):
    """The loss of one domain, against mixtures by ``eval``'s own scoring: a gate that is static."""
    told = lorchestra(*asked, "--activation", "linear", "--epochs", 0, "--json")
    assert told.code == 0, told.err
    gate = load(tmp_path / "chooser")
    gate.last.weight.zero_()
    gate.last.bias.copy_(gate.last.bias.new_tensor([0.7, -0.2]))
    from lorchestra.gate.store import save

    save(gate, tmp_path / "chooser")
    ours = lorchestra(
        "gate", "eval", tiny_dir, "chooser", "law", "clinic", "--data", notes, "--dtype", "float32", "--json",
        "--static", "law=0.7+clinic=-0.2",
    )  # fmt: skip
    assert ours.code == 0, ours.err
    theirs = lorchestra(
        "eval", tiny_dir, "-a", "law=0.7", "-a", "clinic=-0.2", "--data", notes, "--dtype", "float32", "--json"
    )
    wanted = {row["model"]: row["estimate"] for row in json.loads(theirs.out)["rows"] if row["metric"] == "nll"}
    found = {
        row["model"]: row["estimate"]
        for row in json.loads(ours.out)["evaluation"]["rows"]
        if row["metric"] == "nll" and row["domain"] == "notes"
    }
    mixture = next(value for model, value in wanted.items() if model != "base")
    assert found["gate"] == pytest.approx(mixture, rel=1e-5)
    assert found["static"] == pytest.approx(mixture, rel=1e-5)
    assert found["base"] == pytest.approx(wanted["base"], rel=1e-6)


def test_what_is_printed_for_people(lorchestra, asked):
    told = lorchestra(*asked, "--none", "--top-k", 1)
    assert told.code == 0, told.err
    for words in ("2 domains", "oracle", "began", "mean coefficient", "contracts", "in chooser"):
        assert words in told.out
    assert "score the adapters" in told.err


def test_other_adapters_bases_and_no_gates_are_refused(
    lorchestra, asked, tiny_dir, other_base, make_adapter, notes, tmp_path
):
    assert lorchestra(*asked).code == 0
    data = ("--data", notes, "--dtype", "float32")
    make_adapter(tmp_path / "other", 9)
    lorchestra("gate", "eval", tiny_dir, "chooser", "law", *data).refused("'clinic' is not there")
    lorchestra("gate", "eval", tiny_dir, "chooser", "law", "clinic=other", *data).refused(
        "trained with another 'clinic'"
    )
    lorchestra("gate", "eval", other_base, "chooser", "law", "clinic", *data).refused("whose weights are not those of")
    lorchestra("gate", "eval", tiny_dir, "chooser", "law", "clinic", "other", *data).refused(
        "the gate chooses among law, clinic; leave out other"
    )
    lorchestra("gate", "eval", tiny_dir, "nowhere", "law", *data).refused("nowhere", "there is no such file")
    lorchestra("gate", "eval", tiny_dir, "law", "law", *data).refused("gate.json")
    weights = tmp_path / "chooser" / "gate.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    lorchestra("gate", "eval", tiny_dir, "chooser", "law", "clinic", *data).refused("damaged")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--activation", "softmx"), ("--activation 'softmx' is unknown", "did you mean softmax?")),
        (("--task", "rlhf"), ("--task 'rlhf' is unknown",)),
        (("--beta", 0), ("--beta 0 is not above 0",)),
        (("--top-k", 3), ("top_k is 3, and there are 2 adapters",)),
        (("--activation", "sigmoid", "--none"), ("none belongs to softmax",)),
        (("--layers", 5), ("features of 5 layers were asked for",)),
        (("--static", "law=0.5+art=0.5"), ("write NAME=λ+NAME=λ", "law, clinic")),
        (("--static", "law=much+clinic=1"), ("is not a finite number",)),
        (("--name", "auto"), ("reserved",)),
        (("-o", "law"), ("--output_dir law is adapter 'law'",)),
        (("-o", "notes.jsonl"), ("is a file; choose a directory for the gate",)),
        (("-o", "."), ("is not empty and holds no gate",)),
        (("--data", "empty.jsonl"), ("empty.jsonl",)),
        (("--data", "few.jsonl"), ("--data few leaves",)),
        (("--data", "same.jsonl"), ("--data same leaves", "all of them are one group")),
        (("--groups", 3), ("groups is 3, and the adapters change 2 layers",)),
    ],
    ids=str,
)
def test_mistakes_are_told(lorchestra, asked, tmp_path, changed, words):
    (tmp_path / "empty.jsonl").write_text("")
    write(tmp_path / "few.jsonl", [{"prompt": "a", "completion": "b"}])
    write(tmp_path / "same.jsonl", [{"prompt": "a", "completion": f"b {i}"} for i in range(20)])
    lorchestra(*asked, *changed).refused(*words)
    assert not (tmp_path / "chooser").exists()


def test_one_adapter_needs_a_rival(lorchestra, tiny_dir, adapters, notes):
    one = ("gate", "fit", tiny_dir, "law", "--data", notes, "-o", "chooser", "--dtype", "float32")
    lorchestra(*one).refused("softmax over 'law' alone is always 1")
    assert lorchestra(*one, "--none", "--epochs", 0).code == 0


def test_the_same_seed_writes_the_same_bytes(lorchestra, asked, tmp_path):
    written = []
    for _ in range(2):
        assert lorchestra(*asked).code == 0
        written.append({path.name: path.read_bytes() for path in (tmp_path / "chooser").iterdir()})
    assert written[0] == written[1]


def test_tab_offers_gates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "chooser").mkdir(parents=True)
    (tmp_path / "runs" / "chooser" / "gate.json").touch()
    assert gates("r") == ["runs/chooser"]
