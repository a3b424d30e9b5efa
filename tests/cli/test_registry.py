"""``lorchestra registry``: the commands as people type them, from a push to a rollback, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import typer.main

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Parent
from lorchestra.cli.app import app
from lorchestra.registry.manifest import Metric
from lorchestra.registry.registry import Registry


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An empty registry, named by the environment."""
    monkeypatch.setenv("LORCHESTRA_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("LORCHESTRA_ACTOR", "tester")
    with Registry.open(str(tmp_path / "registry"), create=True) as opened:
        yield opened


@pytest.fixture
def filled(registry, make_adapter, tmp_path):
    terms = make_adapter(tmp_path / "terms", 1, data={"terms.jsonl": "sha256:" + "d" * 64})
    registry.push(terms, "terms")
    parent = (Parent("terms", Adapter.load(terms).digest, 0.5),)
    registry.push(make_adapter(tmp_path / "one", 2, made_by="fusion", parents=parent), "clinic")
    registry.promote("clinic@v1")
    registry.push(make_adapter(tmp_path / "two", 3, rank=3, made_by="fusion", parents=parent), "clinic", tags=["sft"])
    return registry


def verbs(group=None, before=()):
    """Every verb, as words."""
    group = group or typer.main.get_command(app).commands["registry"]
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, (*before, name))
        else:
            yield (*before, name), command


def test_every_verb_has_an_example_and_names_the_registry():
    found = dict(verbs())
    assert {("push",), ("hub", "push"), ("canary", "start"), ("derive",)} <= set(found)
    for words, command in found.items():
        assert "**Example" in command.help, words
        assert "lorchestra registry " + " ".join(words) in " ".join(command.help.split()), words
        options = {option for param in command.params for option in param.opts}
        assert "--registry" in options, words


PRINTS_DATA = [("list",), ("show", "clinic"), ("lineage", "clinic"), ("diff", "clinic@v1", "clinic@v2"), ("history",),
               ("verify",), ("gc",)]  # fmt: skip


@pytest.mark.parametrize("argv", PRINTS_DATA)
def test_what_prints_data_prints_json_too(filled, lorchestra, argv):
    told = lorchestra("registry", *argv, "--json")
    assert (told.code, told.err) == (0, "")
    json.loads(told.out)


@pytest.mark.parametrize(
    "argv", [("list",), ("push", ".", "a"), ("backup", "-o", "x"), ("gc",), ("hub", "pull", "a/b", "c")]
)
def test_without_a_registry_one_message_says_how(lorchestra, monkeypatch, argv):
    monkeypatch.delenv("LORCHESTRA_REGISTRY", raising=False)
    lorchestra("registry", *argv).refused(
        "no registry is named. Add --registry DIR", "LORCHESTRA_REGISTRY", "lorchestra registry init DIR"
    )


def test_a_registry_that_is_not_there(lorchestra, tmp_path):
    lorchestra("registry", "list", "--registry", tmp_path / "none").refused("there is no registry at", "init")
    assert not (tmp_path / "none").exists()


def test_passwords_are_not_printed(lorchestra):
    told = lorchestra("registry", "list", "--registry", "postgresql://me:hunter2@127.0.0.1:9/db?blobs=/nowhere")
    assert told.code == 1
    assert "hunter2" not in told.out + told.err


def test_from_push_to_rollback(lorchestra, make_adapter, monkeypatch, tmp_path):
    monkeypatch.setenv("LORCHESTRA_ACTOR", "tester")
    monkeypatch.setenv("LORCHESTRA_REGISTRY", str(tmp_path / "registry"))

    def said(*argv) -> str:
        told = lorchestra("registry", *argv)
        assert told.code == 0, told.err
        return told.out

    one, two = make_adapter(tmp_path / "one", 1), make_adapter(tmp_path / "two", 2)
    assert "0 names" in said("init")
    assert "clinic@v1 is new" in said("push", one, "clinic", "--metric", "loss=1.3[1.2,1.4]", "--note", "first")
    assert "clinic@v1 was there already: the same weights" in said("push", one, "clinic")
    full = said("push", one, "medical_notes_v2_20250315", "--alias", "production").splitlines()
    assert full[0].startswith("medical_notes@v2 is new")
    assert full[1] == "medical_notes@production → medical_notes@v2"
    assert "medical_notes@v2 was there already" in said("push", one, "medical_notes_v2_20250315")
    assert said("promote", "clinic@v1") == "clinic@production → clinic@v1\n"
    said("push", two, "clinic", "--metric", "loss=1.1", "--metric", "+hits=0.9", "--tag", "sft", "--alias", "staging")
    refused = lorchestra("registry", "promote", "clinic@v2", "--gate", "loss<=1.0")
    assert refused.code == 1
    assert "loss<=1" in refused.err
    assert "1.1" in refused.err
    assert said("promote", "clinic@v2", "--gate", "loss<=1.2") == "clinic@production → clinic@v2 (was clinic@v1)\n"
    rows = [line.split() for line in said("list", "clinic", "--metric", "loss").splitlines()]
    assert rows[0] == ["version", "aliases", "state", "base", "rank", "loss", "tags", "pushed", "by"]
    assert rows[1][:4] == ["clinic@v2", "production,", "staging", "ready"]
    assert said("rollback", "clinic", "--why", "it burns") == "clinic@production → clinic@v1 (was clinic@v2)\n"
    assert said("alias", "clinic@staging", "clinic@v1") == "clinic@staging → clinic@v1\n"
    assert said("unalias", "clinic@staging", "--yes") == "clinic@staging leads nowhere\n"
    assert said("revoke", "clinic@v2", "--why", "wrong", "--yes") == "clinic@v2 is revoked\n"
    assert "revoked" in said("show", "clinic@v2")
    assert said("reinstate", "clinic@v2", "--why", "right") == "clinic@v2 is ready\n"
    assert "clinic@v1" in said("pull", "clinic@production", "-o", tmp_path / "out")
    assert Adapter.load(tmp_path / "out").digest == Adapter.load(one).digest
    log = json.loads(said("history", "clinic", "--alias", "production", "--json"))
    assert [(e["action"], e["before"], e["after"]) for e in log] == [
        ("promote", "", "clinic@v1"), ("promote", "clinic@v1", "clinic@v2"), ("rollback", "clinic@v2", "clinic@v1")
    ]  # fmt: skip
    assert {entry["actor"] for entry in log} == {"tester"}
    assert "all as it was written" in said("verify")


def test_metrics_on_the_command_line(registry, lorchestra, make_adapter, tmp_path):
    source = make_adapter(tmp_path / "one", 1)
    argv = ["--metric", "loss=1.25[1.2,1.3]", "--metric", "accuracy=0.9", "--metric", "+hits=3"]
    assert lorchestra("registry", "push", source, "a", *argv).code == 0
    found = registry.resolve("a").manifest.metrics
    assert (found["loss"].value, found["loss"].low, found["loss"].high, found["loss"].better) == (
        1.25,
        1.2,
        1.3,
        "lower",
    )
    assert (found["accuracy"].better, found["hits"].better) == ("higher", "higher")
    for text in ("loss", "=1", "loss=", "loss=x", "loss=nan", "loss=1[2]", "loss=1[1,2", "loss=1[3,2]", "+=1"):
        lorchestra("registry", "push", source, "a", "--metric", text).refused(f"--metric {text!r}", "as in loss=1.2")


def test_lineage_is_a_tree_and_a_graph(filled, lorchestra):
    digest = filled.resolve("terms").manifest.digest[7:19]
    told = lorchestra("registry", "lineage", "clinic@v2").out.splitlines()
    assert told[0].startswith("clinic@v2 ")
    assert told[1:] == [f"└─ 0.5 · terms@v1 {digest}  stage terms (sft)"]
    down = lorchestra("registry", "lineage", "terms", "--descendants").out.splitlines()
    assert [line[:3] for line in down[1:]] == ["├─ ", "└─ "]
    assert lorchestra("registry", "lineage", "clinic", "--graph", "dot").out.startswith("digraph lineage {")
    assert lorchestra("registry", "lineage", "clinic", "--graph", "mermaid").out.startswith("flowchart LR")
    lorchestra("registry", "lineage", "clinic", "--graph", "png").refused("there are dot and mermaid")


def test_diff(filled, lorchestra):
    told = lorchestra("registry", "diff", "clinic@v1", "clinic@v2").out
    assert ["ranks", "2", "3"] in [line.split() for line in told.splitlines()]
    assert "‖ΔW₁ − ΔW₂‖/‖ΔW₁‖" in told
    assert "the weights are the same" in lorchestra("registry", "diff", "clinic@v1", "clinic@v1").out
    found = json.loads(lorchestra("registry", "diff", "clinic@v1", "clinic@v2", "--json").out)
    assert found["distance"]["relative"] > 0


def test_filters(filled, lorchestra):
    def references(*argv) -> list[str]:
        return [one["reference"] for one in json.loads(lorchestra("registry", "list", *argv, "--json").out)]

    assert references() == ["clinic@v2", "clinic@v1", "terms@v1"]
    assert references("clinic", "--limit", 1) == ["clinic@v2"]
    assert references("--tag", "sft") == ["clinic@v2"]
    assert references("--alias", "production") == ["clinic@v1"]
    assert references("--since", "2999-01-01") == references("--state", "revoked") == []
    assert "no version is like that" in lorchestra("registry", "list", "--tag", "none").out


def test_a_list_is_a_page_and_json_is_everything(registry, lorchestra, make_adapter, tmp_path, monkeypatch):
    from lorchestra.cli import registry_view

    monkeypatch.setattr(registry_view, "PAGE", 2)
    for seed in range(5):
        registry.push(make_adapter(tmp_path / f"p{seed}", seed), "a", metrics={"loss": Metric(value=seed, low=seed)})

    def rows(*argv):
        told = lorchestra("registry", "list", *argv)
        return [line.split()[0] for line in told.out.splitlines()[1:]], told.err

    assert rows() == (["a@v5", "a@v4"], "note: 1 to 2 of 5; --offset 2 goes on, --limit 0 shows all\n")
    assert rows("--offset", 2)[0] == ["a@v3", "a@v2"]
    assert rows("--offset", 4) == (["a@v1"], "")
    assert rows("--limit", 0) == ([f"a@v{k}" for k in (5, 4, 3, 2, 1)], "")
    assert rows("--limit", 5)[1] == "", "all of them are shown"
    assert "none after the first 9" in lorchestra("registry", "list", "--offset", 9).out
    laid_out = lorchestra("registry", "list", "--limit", 0, "--metric", "loss").out
    monkeypatch.setattr(registry_view, "MANY", 1)
    assert [
        line.split() for line in lorchestra("registry", "list", "--limit", 0, "--metric", "loss").out.splitlines()
    ] == [line.split() for line in laid_out.splitlines()], "a long table says the same"
    told = json.loads(lorchestra("registry", "list", "--json").out)
    assert [one["reference"] for one in told] == [f"a@v{k}" for k in (5, 4, 3, 2, 1)]
    manifest = registry.resolve("a@v5").manifest
    assert told[0]["metrics"] == {"loss": manifest.metrics["loss"].model_dump()}
    assert (told[0]["digest"], told[0]["base_weights"]) == (manifest.digest, manifest.base.weights)
    cut = lorchestra("registry", "list", "--json", "--limit", 1)
    assert len(json.loads(cut.out)) == 1
    assert "1 to 1 of 5" in cut.err


def test_what_would_puzzle_a_newcomer_is_said(registry, lorchestra, make_adapter, tmp_path):
    make_adapter(tmp_path / "runs" / "one", 1)
    make_adapter(tmp_path / "run" / "final" / "adapter", 2)
    lorchestra("registry", "push", tmp_path / "runs", "a").refused(f"did you mean {tmp_path / 'runs' / 'one'}?")
    inside = tmp_path / "run" / "final" / "adapter"
    lorchestra("registry", "push", tmp_path / "run", "a").refused(f"so it is no adapter; did you mean {inside}?")
    pushed = lorchestra("registry", "push", inside, "medical_notes_v2_20250630_dpo")
    assert pushed.out.startswith("medical_notes_v2_20250630_dpo@v1 is new")
    assert "plain name" in pushed.err
    assert "did you mean dpo_tuned" in pushed.err
    full = lorchestra("registry", "push", inside, "medical_notes_v2_20250630_dpo_tuned", "--alias", "production")
    assert (full.out.split()[0], full.err) == ("medical_notes_dpo_tuned@v2", "")
    assert lorchestra("registry", "push", inside, "clinic-v1.5").err == ""
    again = lorchestra("registry", "promote", "medical_notes_dpo_tuned")
    assert again.out == "medical_notes_dpo_tuned@production leads to medical_notes_dpo_tuned@v2 already\n"
    lorchestra("registry", "canary", "start", "a", "a@v2", "--steps", "25,5").refused("got 25 %, 5 %")


# ---- what cannot be undone is asked first


def test_nothing_is_removed_unasked(filled, lorchestra):
    filled.blobs.put_bytes(b"nobody's")
    told = lorchestra("registry", "gc", "--older-than", "0")
    assert told.code == 0
    assert "nothing needs 1 blob (8 bytes)" in told.out
    assert "nothing was removed; --yes does it" in told.err
    assert len(filled.gc(older_than=timedelta()).blobs) == 1
    assert "removed: 1 blob" in lorchestra("registry", "gc", "--older-than", "0", "--yes").out
    assert "nothing to remove" in lorchestra("registry", "gc", "--older-than", "0").out


@pytest.mark.parametrize("argv", [("revoke", "clinic@v1", "--why", "x"), ("unalias", "clinic@production")])
def test_off_a_terminal_yes_has_to_be_said(filled, lorchestra, argv):
    before = filled.generation()
    lorchestra("registry", *argv).refused("add --yes to do it. Nothing was changed", "clinic@production")
    assert filled.generation() == before


@pytest.mark.parametrize(("answer", "changed"), [("n\n", 0), ("y\n", 1)])
def test_on_a_terminal_it_asks(filled, tmp_path, answer, changed):
    """A real terminal: a pseudo-terminal is standard input."""
    before = filled.generation()
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lorchestra", "registry", "unalias", "clinic@production"],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.write(ours, answer.encode())
    out, err = process.communicate(timeout=60)
    os.close(ours), os.close(theirs)
    assert "take clinic@production away, which leads to clinic@v1? [y/N]" in err
    assert filled.generation() == before + changed
    assert process.returncode == 1 - changed
    assert ("nothing was changed" in err) == (not changed), out


def test_reasons_are_asked_for(filled, lorchestra):
    lorchestra("registry", "revoke", "clinic@v1", "--yes").refused("a revocation needs a reason", "--why")
    lorchestra("registry", "promote", "clinic@v2", "--force", "--gate", "loss<=1").refused("needs a reason")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("show", "clinc"), "clinic"),
        (("show", "clinic@v9"), "there is no clinic@v9"),
        (("alias", "clinic", "clinic@v1"), "write NAME@ALIAS"),
        (("alias", "clinic@v2", "clinic@v1"), "write NAME@ALIAS"),
        (("promote", "clinic@v2", "--gate", "nonsense"), "nonsense"),
        (("list", "--since", "yesterday"), "is no time"),
        (("list", "--state", "asleep"), "asleep"),
        (("pull", "clinic"), "--output"),
        (("accept", "weights", "--base", "x", "--why", "y"), "tokenizer and template can"),
        (
            ("derive", "--base", "x", "--derived", "y", "--method", "awq", "--drift", "kl", "--why", "z"),
            "as in kl=0.004",
        ),
    ],
)
def test_mistakes(filled, lorchestra, argv, says):
    before = filled.generation()
    lorchestra("registry", *argv).refused(says)
    assert filled.generation() == before


def test_verify_names_what_is_damaged_and_exits_1(filled, lorchestra):
    entry = filled.resolve("terms").manifest.files["adapter_model.safetensors"]
    filled.blobs.delete(entry.sha256)
    told = lorchestra("registry", "verify", "--shallow")
    assert told.code == 1
    assert entry.sha256[:19] in told.out
    found = json.loads(lorchestra("registry", "verify", "--json").out)
    assert any(entry.sha256 in finding["subject"] + finding["what"] for finding in found)


# ---- the whole of it


def test_backup_restore_export_import(filled, lorchestra, tmp_path):
    assert "3 versions" in lorchestra("registry", "backup", "-o", tmp_path / "b").out
    lorchestra("registry", "backup", "-o", tmp_path / "b").refused("something is there; choose another name")
    lorchestra("registry", "restore", tmp_path / "b").refused("is not empty")
    assert "3 versions" in lorchestra("registry", "restore", tmp_path / "b", "--registry", tmp_path / "again").out
    assert lorchestra("registry", "verify", "--registry", tmp_path / "again").code == 0
    told = lorchestra("registry", "export", "clinic@v2", "-o", tmp_path / "c", "--lineage")
    assert "2 versions in" in told.out
    lorchestra("registry", "import", tmp_path / "b").refused("it is a 'backup' and not a 'bundle'")
    lorchestra("registry", "init", tmp_path / "other")
    told = lorchestra("registry", "import", tmp_path / "c", "--registry", tmp_path / "other")
    assert told.out.splitlines() == ["terms@v1 is new", "clinic@v2 is new"]
    assert "clinic@v2 was there already" in lorchestra("registry", "import", tmp_path / "c").out


def test_accept_and_derive(filled, lorchestra, tiny_dir, other_base):
    said = lorchestra("registry", "accept", "template", "--base", tiny_dir, "--name", "clinic", "--why", "it moved")
    assert said.code == 0, said.err
    argv = ["--base", tiny_dir, "--derived", other_base, "--method", "awq", "--drift", "kl=0.004"]
    said = lorchestra("registry", "derive", *argv, "--why", "small GPUs")
    assert said.code == 0, said.err
    assert [entry.action for entry in filled.history()][:2] == ["derive", "accept"]
    assert '"kl":0.004' in str(filled.history()[0].details["drift"])


# ---- Tab


def complete(line: str, folder: Path) -> set[str]:
    asked = {"_LORCHESTRA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    code = "from lorchestra.cli.app import app; app(prog_name='lorchestra')"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=folder, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    return set(ended.stdout.split())


def test_tab_knows_names_versions_and_aliases(filled, tmp_path, monkeypatch):
    assert complete("lorchestra registry show clinic@", tmp_path) == {"clinic@v1", "clinic@v2", "clinic@production"}
    assert complete("lorchestra registry rollback c", tmp_path) == {"clinic@production"}
    monkeypatch.delenv("LORCHESTRA_REGISTRY")
    assert complete("lorchestra registry show c", tmp_path) == set(), "no registry, nothing to offer, no error"
    line = f"lorchestra registry show --registry {tmp_path / 'registry'} t"
    assert complete(line, tmp_path) == {"terms"}
