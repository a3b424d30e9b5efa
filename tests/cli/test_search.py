"""``search``: what it writes, that the sealed test stays sealed, and how it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.cli.search import RULES, STRATEGIES
from lorchestra.evaluate.selection import RULES as KNOWN_RULES
from lorchestra.fusion.search import STRATEGIES as KNOWN_STRATEGIES


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def adapters(make_adapter, tmp_path):
    return [make_adapter(tmp_path / name, seed, size=0.15) for seed, name in enumerate("abc")]


@pytest.fixture
def notes(tmp_path):
    return write(
        tmp_path / "notes.jsonl", [{"prompt": f"fever {i}?", "completion": f"rest {i % 7}"} for i in range(24)]
    )


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"pain {i}?", "chosen": f"ice {i}", "rejected": f"run {i % 5}"} for i in range(20)]
    return write(tmp_path / "pairs.jsonl", rows)


def test_the_tables_here_are_the_real_ones():
    assert tuple(KNOWN_STRATEGIES) == STRATEGIES
    assert set(RULES) == set(KNOWN_RULES)


def test_writes_the_adapter_that_it_chose_and_a_page(lorchestra, tiny_dir, adapters, notes, tmp_path):
    asked = ("search", tiny_dir, "a", "b", "c", "--data", notes, "-o", "out", "--dtype", "float32", "--budget", 14)
    told = lorchestra(*asked, "--rule", "minimum", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert json.loads((tmp_path / "out" / "search.json").read_text("utf-8"))["search"] == found["search"]
    chosen = found["search"]["chosen"]
    scores = {json.dumps(c["weights"]): c["score"] for c in found["search"]["candidates"]}
    adapters_only = [c["score"] for c in found["search"]["candidates"] if c["origin"] != "base"]
    assert scores[json.dumps(chosen)] == min(adapters_only)
    fused = Adapter.load(tmp_path / "out")
    members = {name: Adapter.load(tmp_path / name) for name in "abc"}
    for path in members["a"].modules:
        dense = sum(chosen[name] * members[name].modules[path].dense(torch.float64) for name in "abc")
        torch.testing.assert_close(fused.modules[path].dense(torch.float64), dense, rtol=1e-4, atol=1e-6)
    assert {p.name: p.coefficient for p in fused.lineage.parents} == {k: v for k, v in chosen.items() if v}
    assert fused.digest == found["fusion"]["digest"]
    page = (tmp_path / "out" / "search.html").read_text("utf-8")
    assert "Search for the weights" in page
    assert "://" not in page, "the page needs no network"
    shown = lorchestra(*asked, "--rule", "minimum")
    assert "search weights" not in shown.err, "the same search is answered from the cache"
    assert "No test was sealed" in shown.out
    assert f"λ {chosen['a']:g}" in shown.out


def test_the_search_never_sees_the_sealed_test(lorchestra, tiny_dir, adapters, notes, pairs, tmp_path, monkeypatch):
    from lorchestra.pipeline import search_alone, searching

    seen, sealed = set(), set()

    def prompts(domains):
        return {item.prompt for domain in domains.values() for item in domain.items}

    searched, measured = searching._Validation._measured, search_alone.verify

    def measuring(self, points):
        seen.update(prompts(self.domains))
        return searched(self, points)

    def verifying(base, members, data, *rest):
        assert seen == prompts(data.validation)
        sealed.update(prompts(data.test))
        return measured(base, members, data, *rest)

    monkeypatch.setattr(searching._Validation, "_measured", measuring)
    monkeypatch.setattr(search_alone, "verify", verifying)
    data = ("--data", f"talk={notes}", "--data", pairs, "--test-share", 0.4)
    asked = ("search", tiny_dir, "a", "b", *data, "-o", "out", "--budget", 6, "--dtype", "float32")
    told = lorchestra(*asked, "--json")
    assert told.code == 0, told.err
    assert sealed
    assert not seen & sealed
    assert len(seen) + len(sealed) == 44
    found = json.loads(told.out)
    assert found["evaluation"]["domains"] == ["talk", "pairs"]
    assert found["evaluation"]["models"] == ["base", "a", "b", "uniform", "delivered"]
    assert found["verdict"]["sentence"]
    assert [row["reads"] for row in found["evaluation"]["ledger"]] == [1, 1]
    assert (
        "Sealed test"
        in lorchestra("search", tiny_dir, "a", "b", *data, "-o", "out", "--budget", 6, "--dtype", "float32").out
    )


def test_layer_groups_have_weights_of_their_own(lorchestra, tiny_dir, adapters, notes, tmp_path):
    told = lorchestra(
        "search", tiny_dir, "a", "b", "--data", notes, "-o", "out", "--layer-groups", 2, "--shrinkage", 0,
        "--rule", "minimum", "--budget", 40, "--dtype", "float32", "--json",
    )  # fmt: skip
    assert told.code == 0, told.err
    found = json.loads(told.out)["search"]
    assert set(found["chosen"]) == {f"{name}:layers.{k}" for name in "ab" for k in (0, 1)}
    fused = Adapter.load(tmp_path / "out")
    for path, update in fused.modules.items():
        layer = path.split(".")[2]
        parts = [
            found["chosen"][f"{name}:layers.{layer}"] * Adapter.load(tmp_path / name).modules[path].dense(torch.float64)
            for name in "ab"
        ]
        torch.testing.assert_close(update.dense(torch.float64), sum(parts), rtol=1e-4, atol=1e-6)
    assert fused.lineage.settings["layer_groups"].keys() == {"a", "b"}
    assert {parent.digest for parent in fused.lineage.parents} <= {Adapter.load(tmp_path / n).digest for n in "ab"}


def test_names_goals_and_rank(lorchestra, tiny_dir, adapters, notes, pairs, tmp_path):
    told = lorchestra(
        "search", tiny_dir, "one=a", "two=b", "--data", f"talk={notes}", "--data", f"taste={pairs}",
        "--goal", "talk=3,taste=1", "--tolerance", 0.5, "--strategy", "heuristics", "--rank", 1, "-o", "out", "--json",
    )  # fmt: skip
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert found["search"]["members"] == ["one", "two"]
    assert "talk 3, taste 1" in found["search"]["selection"]["goal"]
    assert found["fusion"]["rank"] == 1
    assert 0 < found["fusion"]["retained"] <= 1


def test_an_adapter_trained_on_the_data_is_told(lorchestra, tiny_dir, make_adapter, notes, tmp_path):
    from lorchestra.data.load import DataSpec, load_examples

    digest = load_examples(DataSpec(str(notes)), "sft").digest
    make_adapter(tmp_path / "a", 1, data={"notes.jsonl": digest})
    told = lorchestra("search", tiny_dir, "a", "--data", notes, "-o", "out", "--budget", 4)
    assert told.code == 0, told.err
    assert "a was trained on the source of notes" in told.err


def test_wrong_input(lorchestra, tiny_dir, adapters, notes, pairs, other_base, make_adapter, tmp_path):
    def refused(*more, words):
        lorchestra("search", tiny_dir, "a", "b", *more).refused(*words)
        assert not (tmp_path / "out").exists()

    ok = ("--data", notes, "-o", "out")
    refused(*ok, "--strategy", "gradiant", words=("--strategy 'gradiant'", "did you mean gradient"))
    refused(*ok, "--rule", "best", words=("--rule 'best'", "one_se, minimum"))
    refused(*ok, "--goal", "median", words=("--goal 'median'", "mean, worst"))
    refused(*ok, "--goal", "chat=1", words=("'chat', which is no --data", "notes"))
    refused(*ok, "--goal", "notes=-1", words=("--goal", "0 or more"))
    refused(*ok, "--strategy", "grid", "--budget", 5, words=("11 points", "budget of 5"))
    refused(*ok, "--strategy", "grid", "--step", 0.3, words=("does not reach 1",))
    refused(*ok, "--low", 2, "--high", 1, words=("--low 2 is not below --high 1",))
    refused(*ok, "--task", "rank", words=("--task 'rank'",))
    refused("--data", notes, "--data", notes, "-o", "out", words=("two --data are called 'notes'",))
    refused("--data", "nothere.jsonl", "-o", "out", words=("nothere.jsonl",))
    refused("--data", "x=", "-o", "out", words=("write NAME=FILE",))
    few = write(tmp_path / "few.jsonl", [{"prompt": "fever?", "completion": "rest"}])
    refused("--data", few, "-o", "out", words=("leaves 1 group", "2 at least"))
    mixed = write(
        tmp_path / "mixed.jsonl",
        [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}],
    )
    refused("--data", f"all={notes},{mixed}", "-o", "out", words=("mixes preference pairs",))
    lorchestra("search", tiny_dir, "a", "a", *ok).refused("given twice")
    lorchestra("search", tiny_dir, "a", "--data", notes, "-o", "a").refused("which is needed as it is")
    lorchestra("search", tiny_dir, "a", *ok, "--strategy", "cmaes").refused("needs 2 members")
    make_adapter(tmp_path / "foreign", 1, base=other_base)
    lorchestra("search", tiny_dir, "a", "foreign", *ok).refused("foreign")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("keep")
    lorchestra("search", tiny_dir, "a", "--data", notes, "-o", "taken").refused("holds no adapter")
    lorchestra("search", tiny_dir).refused("--data")
