"""From push to rollback over both databases: what is there afterwards, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import AdapterError, LorchestraError, StorageError, UserError
from lorchestra.registry.gates import parse_gate
from lorchestra.registry.manifest import Metric
from lorchestra.registry.mistakes import (
    DamagedError,
    NeededError,
    NoRegistryError,
    PromotionRefused,
    RegistryError,
    RevokedError,
    TakenError,
    UnknownReferenceError,
)
from lorchestra.registry.registry import Registry
from lorchestra.registry.sql.schema import rollouts

NOW = timedelta(0)


def test_what_was_pushed_is_pulled_bit_for_bit(registry, make, tmp_path):
    source = make(1)
    (source / "serve.yaml").write_text("system_prompt: be kind\n")
    version = registry.push(source, "clinic", note="first", tags=["sft", "good"], why="a start")
    manifest = version.manifest
    loaded = Adapter.load(source)
    assert (version.reference, manifest.digest) == ("clinic@v1", loaded.digest)
    assert manifest.ranks == {path: update.rank for path, update in loaded.modules.items()}
    assert set(manifest.scales.values()) == {1.0}
    assert manifest.parameters == loaded.parameters == sum(m.B.numel() + m.A.numel() for m in loaded.modules.values())
    assert (manifest.base.weights, manifest.base.template) == (loaded.base.weights, loaded.base.template)
    assert (manifest.made_by, manifest.stage, manifest.task) == ("stage", "sft", "sft")
    assert manifest.metrics["validation_loss"] == Metric(value=1.5, better="lower", split="validation")
    assert manifest.tags == ["good", "sft"]
    assert manifest.serving == {"has_template": False, "serve.yaml": "system_prompt: be kind\n"}
    assert manifest.created_by == "tester"
    assert registry.pull("clinic", tmp_path / "out") == version
    assert _files(tmp_path / "out") == _files(source)
    assert {name: entry.sha256 for name, entry in manifest.files.items()} == _files(source)
    with pytest.raises(StorageError, match="not empty"):
        registry.pull("clinic", tmp_path / "out")
    assert registry.verify() == []


def test_a_full_name_is_a_name_a_version_and_tags(registry, make):
    version = registry.push(make(1), "medical_diagnosis_v2_20250315")
    assert (version.reference, version.manifest.tags) == ("medical_diagnosis@v2", ["20250315"])
    tuned = registry.push(make(2), "legal_contract_review_dpo_tuned", tags=["good"])
    assert (tuned.reference, tuned.manifest.tags) == ("legal_contract_review_dpo_tuned@v1", ["dpo_tuned", "good"])
    for text in ("medical_diagnosis_v2", "medical_diagnosis@v2", "medical_diagnosis_v2_20250315", "medical_diagnosis"):
        assert registry.resolve(text) == version, text
    assert registry.promote("medical_diagnosis_v2").version == version.target
    assert registry.resolve("medical_diagnosis_20250315@production") == version
    with pytest.raises(UserError, match="names v2 and v3"):
        registry.resolve("medical_diagnosis_v2@v3")
    with pytest.raises(UserError, match="is version 2, and version 3 is asked for"):
        registry.push(make(3), "medical_diagnosis_v2", number=3)
    with pytest.raises(TakenError):
        registry.push(make(3), "medical_diagnosis_v2")
    assert registry.names() == ["legal_contract_review_dpo_tuned", "medical_diagnosis"]


def test_a_foreign_adapters_scale_is_told(registry, make):
    source = make(2, rank=2)
    (source / "lorchestra.json").unlink()
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"lora_alpha": 16, "use_rslora": True}
    (source / "adapter_config.json").write_text(json.dumps(config))
    manifest = registry.push(source, "foreign").manifest
    assert manifest.made_by == "foreign"
    assert list(manifest.scales.values()) == [pytest.approx(16 / 2**0.5)] * 2
    assert manifest.base.weights == ""


def test_the_same_content_is_one_version_and_its_blobs_are_kept_once(registry, make):
    source = make(1)
    first = registry.push(source, "clinic", tags=["sft"])
    generation = registry.generation()
    assert registry.push(source, "clinic") == first
    assert registry.push(source, "clinic", tags=["sft"]) == first
    assert registry.generation() == generation, "nothing was changed"
    for asked in ({"number": 4}, {"note": "other"}, {"tags": ["other"]}, {"metrics": {"loss": Metric(value=1)}}):
        with pytest.raises(TakenError, match="never changes"):
            registry.push(source, "clinic", **asked)
    other = registry.push(source, "ward")
    assert other.manifest.content == first.manifest.content
    assert len(list(registry.blobs.all())) == len(first.manifest.files)
    assert registry.push(source, "ward", alias="production").id == other.id
    assert registry.resolve("ward@production").id == other.id


def test_numbers_go_up_and_none_is_given_twice(registry, make):
    registry.push(make(1), "clinic")
    assert registry.push(make(2), "clinic", number=7).reference == "clinic@v7"
    assert registry.push(make(3), "clinic").reference == "clinic@v8"
    with pytest.raises(TakenError, match="next free one is v9"):
        registry.push(make(4), "clinic", number=7)
    registry.gc(dry_run=False, versions=["clinic@v8"], why="a mistake")
    assert registry.push(make(5), "clinic").reference == "clinic@v9", "v8 is not given again"
    assert registry.verify() == []


def test_references_lead_where_they_should(registry, make):
    one, two, three = (registry.push(make(seed), "clinic") for seed in (1, 2, 3))
    assert registry.resolve("clinic").id == three.id, "without production the latest"
    registry.alias("clinic", "production", "clinic@v1")
    assert registry.resolve("clinic").id == one.id
    assert registry.resolve("clinic@production").id == one.id
    assert registry.resolve("clinic@v2").id == two.id
    assert registry.resolve(f"clinic@{two.manifest.digest}").id == two.id
    assert registry.resolve(f"clinic@{two.manifest.digest[:19]}").id == two.id
    registry.unalias("clinic", "production")
    registry.revoke("clinic@v3", "bad")
    assert registry.resolve("clinic").id == two.id, "the latest that is not revoked"
    assert registry.resolve("clinic@v3").state == "revoked"
    registry.revoke("clinic@v1", "bad")
    registry.revoke("clinic@v2", "bad")
    with pytest.raises(UnknownReferenceError, match="every version of clinic was revoked"):
        registry.resolve("clinic")


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("clinik", "nearest are clinic"),
        ("clinic@v12", "clinic@v1"),
        ("clinic@prodction", "clinic@production"),
        ("clinic@sha256:000000000000", "there is no clinic@sha256:000000000000"),
    ],
)
def test_what_leads_nowhere_is_told_with_the_nearest(registry, make, reference, told):
    registry.push(make(1), "clinic", alias="production")
    with pytest.raises(UnknownReferenceError, match=told):
        registry.resolve(reference)


def test_an_empty_registry_says_so(registry):
    with pytest.raises(UnknownReferenceError, match="it is empty"):
        registry.resolve("clinic")
    assert (registry.names(), registry.versions(), registry.aliases(), registry.history()) == ([], [], [], [])
    assert registry.generation() == 0
    assert registry.verify() == []


def test_filters_are_those_of_a_list_comprehension(registry, make):
    other = BaseId("other", "sha256:" + "e" * 64)
    for seed, name, base, tags, loss in [
        (1, "clinic", None, ["sft"], 1.5),
        (2, "clinic", other, ["dpo"], 1.1),
        (3, "ward", None, ["sft", "dpo"], 0.9),
        (4, "ward", other, [], None),
    ]:
        source = make(seed, metrics={"loss": loss}, **({"base": base} if base else {}))
        registry.push(source, name, tags=tags)
    registry.alias("clinic", "production", "clinic@v1")
    registry.revoke("ward@v1", "bad")
    everything = registry.versions()
    assert [version.reference for version in everything] == ["ward@v2", "ward@v1", "clinic@v2", "clinic@v1"]

    def asked(**filters):
        found = [version.reference for version in registry.versions(**filters)]
        assert [line.reference for line in registry.summaries(**filters)] == found, "a list shows the same"
        return found

    def expected(condition):
        return [version.reference for version in everything if condition(version.manifest)]

    assert asked(name="clinic") == expected(lambda m: m.name == "clinic")
    assert asked(base="other") == expected(lambda m: m.base.name == "other")
    assert asked(base="sha256:" + "e" * 12) == expected(lambda m: m.base.weights == other.weights)
    assert asked(tag="dpo") == expected(lambda m: "dpo" in m.tags)
    assert asked(metric="loss") == expected(lambda m: "loss" in m.metrics)
    assert asked(metric="loss<=1.1") == expected(lambda m: "loss" in m.metrics and m.metrics["loss"].value <= 1.1)
    assert asked(metric="loss>1.1") == ["clinic@v1"]
    assert asked(state="revoked") == ["ward@v1"]
    assert asked(alias="production") == ["clinic@v1"]
    assert asked(name="ward", tag="sft", state="ready") == []
    assert asked(since="2999-01-01") == []
    assert len(asked(since=datetime.now(UTC).date().isoformat())) in (0, 4), "0 at midnight"
    assert len(asked(since="2020-01-01T00:00:00+02:00")) == 4
    assert asked(limit=2) == ["ward@v2", "ward@v1"]
    assert [line.reference for line in registry.summaries(limit=2, offset=1)] == ["ward@v1", "clinic@v2"]
    assert registry.names() == ["clinic", "ward"]
    for bad in ({"state": "lost"}, {"since": "yesterday"}):
        with pytest.raises(UserError):
            registry.versions(**bad)


def test_a_list_reads_no_manifest(registry, make):
    from sqlalchemy import event

    for seed in (1, 2):
        registry.push(make(seed, metrics={"loss": float(seed)}), "clinic", tags=["sft"], alias="production")
    asked = []
    event.listen(registry.catalog.engine, "before_cursor_execute", lambda *told: asked.append(told[2]))
    lines = registry.summaries(tag="sft", metric="loss<=1.5", base="tiny", alias="", state="ready")
    assert [line.reference for line in lines] == ["clinic@v1"]
    assert registry.measured([line.id for line in registry.summaries()], "loss").keys() == {1, 3}
    assert (registry.count("clinic"), registry.names(), len(registry.aliases())) == (2, ["clinic"], 1)
    assert len(asked) > 5
    assert [statement for statement in asked if "manifests" in statement] == []


def test_what_was_measured_is_told_with_its_interval(registry, make):
    loss = Metric(value=1.2, low=1.1, high=1.3, n=40, split="sealed", sealed="sha256:" + "e" * 64)
    hits = Metric(value=0.5, better="higher")
    version = registry.push(make(1, metrics={}), "clinic", metrics={"loss": loss, "hits": hits})
    other = registry.push(make(2, metrics={}), "clinic")
    found = registry.measured([version.id, other.id])
    assert found.keys() == {version.id}
    assert {name: values._asdict() for name, values in found[version.id].items()} == {
        "loss": loss.model_dump(), "hits": hits.model_dump()
    }  # fmt: skip
    assert registry.measured([version.id], "hits")[version.id].keys() == {"hits"}
    assert registry.measured([], "hits") == {}


def test_a_line_of_a_list_tells_what_the_manifest_tells(registry, make):
    version = registry.push(make(1), "clinic", tags=["b", "a"], alias="production")
    registry.alias("clinic", "candidate", "clinic@v1")
    (line,) = registry.summaries()
    manifest = version.manifest
    assert line._asdict() == {
        "id": version.id,
        "name": "clinic",
        "number": 1,
        "digest": manifest.digest,
        "base_name": "tiny",
        "base_weights": manifest.base.weights,
        "made_by": "stage",
        "task": "sft",
        "rank": 2,
        "parameters": manifest.parameters,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "created": manifest.created,
        "created_by": "tester",
        "state": "ready",
        "aliases": ("candidate", "production"),
        "tags": ("a", "b"),
    }


def test_aliases_move_and_the_log_tells(registry, make):
    one, two = registry.push(make(1), "clinic"), registry.push(make(2), "clinic")
    registry.alias("clinic", "production", "clinic@v1", why="begin")
    generation = registry.generation()
    assert registry.alias("clinic", "production", "clinic@v1").version.id == one.id
    assert registry.generation() == generation, "it was there already"
    moved = registry.promote("clinic@v2", why="better")
    assert (moved.version.id, moved.by, moved.generation) == (two.id, "tester", registry.generation())
    assert registry.aliases() == [moved]
    registry.unalias("clinic", "production", why="enough")
    assert registry.aliases("clinic") == []
    told = [(entry.action, entry.before, entry.after, entry.why) for entry in registry.history("clinic", "production")]
    assert told == [
        ("unalias", "clinic@v2", "", "enough"),
        ("promote", "clinic@v1", "clinic@v2", "better"),
        ("alias", "", "clinic@v1", "begin"),
    ]
    assert [entry.action for entry in registry.history(limit=1)] == ["unalias"]
    with pytest.raises(UserError, match="there is no alias"):
        registry.unalias("clinic", "production")


def test_an_alias_leads_to_versions_of_its_own_name_alone(registry, make):
    registry.push(make(1), "clinic")
    registry.push(make(2), "ward")
    with pytest.raises(UserError, match="versions of clinic"):
        registry.alias("clinic", "production", "ward@v1")
    for word in ("v2", "sha256:000000000000", "", "Production", "a b", "x" * 65):
        with pytest.raises(UserError):
            registry.alias("clinic", word, "clinic@v1")
    with pytest.raises(UnknownReferenceError):
        registry.alias("clinic", "production", "clinic@v9")


def test_two_rollbacks_are_two_versions_back(registry, make):
    for seed in (1, 2, 3, 4):
        registry.push(make(seed), "clinic")
        registry.promote(f"clinic@v{seed}")
    assert registry.rollback("clinic", why="slow").version.reference == "clinic@v3"
    assert registry.rollback("clinic").version.reference == "clinic@v2", "and not back to v4"
    registry.promote("clinic@v4")
    assert registry.rollback("clinic").version.reference == "clinic@v2"
    assert registry.rollback("clinic").version.reference == "clinic@v1"
    with pytest.raises(UserError, match="nothing to roll back to"):
        registry.rollback("clinic")
    assert registry.rollback("clinic", to="v3").version.reference == "clinic@v3"
    assert registry.resolve("clinic").reference == "clinic@v3"
    assert registry.verify() == []


def test_a_rollback_goes_to_no_version_that_was_revoked_removed_or_never_there(registry, make):
    for seed in (1, 2, 3):
        registry.push(make(seed), "clinic")
        registry.promote(f"clinic@v{seed}")
    registry.push(make(4), "clinic")
    registry.revoke("clinic@v2", "poisoned")
    with pytest.raises(RevokedError, match="--to clinic@v1"):
        registry.rollback("clinic")
    assert registry.resolve("clinic").reference == "clinic@v3", "nothing was moved"
    with pytest.raises(RevokedError):
        registry.rollback("clinic", to="clinic@v2")
    with pytest.raises(UserError, match="never been at clinic@v4"):
        registry.rollback("clinic", to="clinic@v4")
    assert registry.rollback("clinic", to="clinic@v1").version.reference == "clinic@v1"
    with pytest.raises(UnknownReferenceError, match="nearest"):
        registry.rollback("clinix")


def test_a_revoked_version_is_neither_pulled_nor_promoted_until_it_is_reinstated(registry, make, tmp_path):
    registry.push(make(1), "clinic", alias="production")
    for empty in ("", "  "):
        with pytest.raises(UserError, match="reason"):
            registry.revoke("clinic@v1", empty)
        with pytest.raises(UserError, match="reason"):
            registry.reinstate("clinic@v1", empty)
    revoked = registry.revoke("clinic@production", "leaks names")
    assert (revoked.state, revoked.revoked.by, revoked.revoked.why) == ("revoked", "tester", "leaks names")
    assert registry.resolve("clinic") == revoked, "who asks learns that it is revoked, and gets no other in its stead"
    for use in (
        lambda: registry.pull("clinic", tmp_path / "out"),
        lambda: registry.materialise(registry.resolve("clinic"), tmp_path / "cache"),
        lambda: registry.promote("clinic@v1", "candidate"),
        lambda: registry.push(make(1), "ward") and registry.alias("clinic", "candidate", "clinic@v1"),
    ):
        with pytest.raises(RevokedError, match="leaks names"):
            use()
    assert not (tmp_path / "out").exists()
    generation = registry.generation()
    registry.revoke("clinic@v1", "again")
    assert registry.generation() == generation, "it was revoked already"
    assert registry.reinstate("clinic@v1", "checked").revoked is None
    registry.pull("clinic", tmp_path / "out")
    assert registry.verify() == []


def test_gates_decide_inside_the_promotion_and_are_logged(registry, make):
    for seed, loss in ((1, 1.0), (2, 1.4)):
        sealed = {"loss": Metric(value=loss, low=loss - 0.1, high=loss + 0.1, sealed="sha256:t", split="sealed")}
        registry.push(make(seed), "clinic", metrics=sealed)
    gates = [parse_gate("loss<=1.2"), parse_gate("not-worse:loss")]
    registry.promote("clinic@v1", gates=gates)
    generation = registry.generation()
    with pytest.raises(
        PromotionRefused, match=r"loss<=1.2: refused; measured 1.4 .*\n.*not-worse:loss: refused"
    ) as told:
        registry.promote("clinic@v2", gates=gates)
    assert [outcome.passed for outcome in told.value.outcomes] == [False, False]
    assert isinstance(told.value, LorchestraError)
    assert told.value.exit_code == 1
    assert registry.generation() == generation
    with pytest.raises(UserError, match="reason"):
        registry.promote("clinic@v2", gates=gates, force=True)
    registry.promote("clinic@v2", gates=gates, force=True, why="the old one is down")
    details = registry.history("clinic")[0].details
    assert details["forced"]
    assert [gate["passed"] for gate in details["gates"]] == [False, False]
    assert registry.verify() == []


def test_bases_are_the_same_or_answered_for(registry, make):
    own = BaseId("tiny", "sha256:" + "a" * 64, "sha256:" + "b" * 64, "sha256:" + "c" * 64)
    manifest = registry.push(make(1, base=own), "clinic").manifest
    assert registry.allowed_base(manifest, own).ok
    assert registry.allowed_base(manifest, own).why == ""
    awq = BaseId("tiny-awq", "sha256:" + "1" * 64, own.tokenizer, own.template)
    refused = registry.allowed_base(manifest, awq)
    assert not refused.ok
    assert "registry derive" in refused.why
    registry.derive(own.weights, awq, "awq", {"perplexity": 0.02}, "measured on notes")
    check = registry.allowed_base(manifest, awq)
    assert (check.ok, check.drift) == (True, {"perplexity": 0.02})
    generation = registry.generation()
    registry.derive(own.weights, awq, "awq", {"perplexity": 0.02}, "again")
    assert registry.generation() == generation
    with pytest.raises(UserError, match="other words"):
        registry.derive(own.weights, awq, "awq", {"perplexity": 0.5}, "again")
    templated = BaseId("tiny", own.weights, own.tokenizer, "sha256:" + "9" * 64)
    assert "accept clinic --kind template" in registry.allowed_base(manifest, templated).why
    registry.accept("clinic", "template", templated, "a typing error mended")
    assert registry.allowed_base(manifest, templated).ok
    ward = registry.push(make(2, base=own), "ward").manifest
    assert not registry.allowed_base(ward, templated).ok, "accepted for clinic alone"
    registry.accept("", "template", templated, "for all")
    assert registry.allowed_base(ward, templated).ok
    assert "not" not in registry.allowed_base(ward, own).why
    assert "shapes alone" in registry.allowed_base(manifest, BaseId("unknown")).why
    assert registry.verify() == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r, b: r.accept("clinic", "weights", b, "x"),
        lambda r, b: r.accept("clinic", "template", b, ""),
        lambda r, b: r.accept("clinic", "template", BaseId("bare"), "x"),
        lambda r, b: r.derive(b.weights, b, "awq", {"loss": 1}, "x"),
        lambda r, b: r.derive("", b, "awq", {"loss": 1}, "x"),
        lambda r, b: r.derive("sha256:0", b, "", {"loss": 1}, "x"),
        lambda r, b: r.derive("sha256:0", b, "awq", {}, "x"),
        lambda r, b: r.derive("sha256:0", b, "awq", {"loss": float("nan")}, "x"),
        lambda r, b: r.derive("sha256:0", b, "awq", {"loss": 1}, " "),
    ],
)
def test_bases_are_not_answered_for_by_halves(local, wrong):
    with pytest.raises(UserError):
        wrong(local, BaseId("tiny", "sha256:" + "a" * 64, "sha256:" + "b" * 64, "sha256:" + "c" * 64))
    assert local.generation() == 0


def test_gc_takes_what_nothing_needs_and_tells_before(registry, make, tmp_path):
    registry.push(make(1), "clinic", alias="production")
    kept = {stored.digest for stored in registry.blobs.all()}
    stray, _ = registry.blobs.put_bytes(b"nobody's")
    assert registry.gc().blobs == (), "put a moment ago: a push may be under way"
    plan = registry.gc(older_than=NOW)
    assert (plan.blobs, plan.done) == (((stray, 8),), False)
    assert registry.blobs.has(stray)
    done = registry.gc(dry_run=False, older_than=NOW, why="tidy")
    assert (done.blobs, done.done, done.bytes) == (plan.blobs, True, 8)
    assert {stored.digest for stored in registry.blobs.all()} == kept
    assert registry.history()[0].details == {"blobs": 1, "bytes": 8}
    assert registry.gc(dry_run=False, older_than=NOW).blobs == ()
    assert registry.verify() == []
    registry.pull("clinic", tmp_path / "out")


def test_gc_removes_no_version_that_something_needs(registry, make):
    one = registry.push(make(1), "clinic")
    registry.push(make(2), "clinic")
    registry.push(make(3), "clinic")
    registry.push(make(9, parents=[one.manifest]), "fused")
    registry.promote("clinic@v2")
    registry.promote("clinic@v3")
    for reference, told in [
        ("clinic@v3", "clinic@production leads to clinic@v3"),
        ("clinic@v2", "rollback of clinic@production would go to clinic@v2"),
        ("clinic@v1", "fused@v1 descends from clinic@v1"),
    ]:
        with pytest.raises(NeededError, match=told):
            registry.gc(dry_run=False, versions=[reference])
    assert len(registry.versions()) == 4
    plan = registry.gc(versions=["fused@v1", "clinic@v1"], older_than=NOW)
    assert set(plan.versions) == {"fused@v1", "clinic@v1"}, "together they can go"
    assert len(registry.versions()) == 4
    done = registry.gc(dry_run=False, versions=["fused@v1", "clinic@v1"], older_than=NOW, why="old")
    assert done.blobs == plan.blobs
    assert len(done.blobs) > 0
    with pytest.raises(UnknownReferenceError):
        registry.resolve("fused")
    assert registry.verify() == []
    told = [(entry.before, entry.why) for entry in registry.history() if entry.action == "gc" and entry.before]
    assert sorted(told) == [("clinic@v1", "old"), ("fused@v1", "old")]


def test_gc_leaves_the_versions_of_a_canary(registry, make):
    one, two = registry.push(make(1), "clinic"), registry.push(make(2), "clinic")
    row = {
        "name": "clinic", "alias": "production", "stable_version": one.id, "candidate_version": two.id, "salt": "s",
        "share": 0.1, "step": 0, "state": "running", "plan": {}, "guards": {}, "started": "", "stepped": "", "by": "",
        "why": "",
    }  # fmt: skip
    with registry.catalog.transaction() as held:
        held.execute(rollouts.insert(), row)
    for version in (one, two):
        with pytest.raises(NeededError, match="canary"):
            registry.gc(versions=[version.reference])
    with pytest.raises(RegistryError, match="would break"), registry.catalog.transaction() as held:
        held.execute(rollouts.insert(), row)  # one at a time
    registry.alias("clinic", "production", "clinic@v1")
    with pytest.raises(UserError, match="canary runs on clinic@production"):
        registry.unalias("clinic", "production")
    with registry.catalog.transaction() as held:
        held.execute(rollouts.update().values(ended="now"))
    assert registry.gc(dry_run=False, versions=["clinic@v2"]).versions == ("clinic@v2",)


def test_nothing_is_removed_while_somebody_holds_it_off(registry):
    stray, _ = registry.blobs.put_bytes(b"nobody's")
    with registry.catalog.lease("backup"):
        with pytest.raises(RegistryError, match="backup by tester"):
            registry.gc(dry_run=False, older_than=NOW)
        assert registry.blobs.has(stray)
    with registry.catalog.lease("backup", seconds=-1) as lease:
        assert registry.gc(dry_run=False, older_than=NOW).blobs == ((stray, 8),), "its holder has died"
        lease.renew()
    assert registry.generation() == 1, "a hold is no change of the catalog"


def test_a_push_whose_blobs_are_taken_meanwhile_stores_them_again(registry, make, monkeypatch):
    from lorchestra.registry.store.contents import Contents

    store, seen = Contents.store, []

    def robbed(self, blobs):
        files = store(self, blobs)
        if not seen:  # as a gc would that does not know of the push yet
            seen.append(registry.gc(dry_run=False, older_than=NOW).blobs)
        return files

    monkeypatch.setattr(Contents, "store", robbed)
    version = registry.push(make(1), "clinic")
    assert len(seen[0]) == len(version.manifest.files)
    assert registry.verify() == []


def test_a_copy_is_made_once_shared_and_made_anew_when_it_is_damaged(registry, make, tmp_path):
    source = make(1)
    version = registry.push(source, "clinic")
    cache = tmp_path / "cache"
    copy = registry.materialise(version, cache)
    assert copy.parent == cache
    assert _files(copy) == _files(source)
    weights = copy / "adapter_model.safetensors"
    before = weights.stat().st_ino
    assert registry.materialise(version, cache) == copy
    assert weights.stat().st_ino == before, "the same files"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert registry.materialise(version, cache) == copy
    assert _files(copy) == _files(source)
    (copy / "extra.json").write_text("{}")
    (cache / f"{copy.name}.verified").unlink()
    assert _files(registry.materialise(version, cache)) == _files(source)


def test_a_copy_that_is_whole_needs_no_store_and_one_that_is_not_is_never_given(local, make, tmp_path):
    version = local.push(make(1), "clinic")
    cache = tmp_path / "cache"
    copy = local.materialise(version, cache)
    os.rename(local.blobs.shown, tmp_path / "away")
    assert local.materialise(version, cache) == copy
    (cache / f"{copy.name}.verified").unlink()  # as after the machine was started again
    assert local.materialise(version, cache) == copy
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(DamagedError):
        local.materialise(version, cache)


def test_a_missing_or_damaged_blob_is_told_and_nothing_is_written(registry, make, tmp_path):
    version = registry.push(make(1), "clinic")
    digest = version.manifest.files["adapter_model.safetensors"].sha256
    registry.blobs.delete(digest)
    with pytest.raises(DamagedError) as told:
        registry.pull("clinic", tmp_path / "out")
    assert told.value.subject == digest
    assert not (tmp_path / "out").exists()


def test_a_version_made_elsewhere_is_entered_as_it_is(registry, make, new_url):
    with Registry.open(new_url("sqlite"), create=True, actor="elsewhere") as other:
        manifest = other.push(make(1), "clinic", number=3).manifest
        with pytest.raises(DamagedError, match="not in the store"):
            registry.admit(manifest)
        for entry in manifest.files.values():
            registry.blobs.put_bytes(other.blobs.read(entry.sha256))
    version = registry.admit(manifest, why="from a bundle", details={"bundle": "x"})
    assert version.manifest == manifest
    assert registry.admit(manifest) == version
    assert registry.push(make(2), "clinic").reference == "clinic@v4"
    with pytest.raises(TakenError):
        registry.admit(manifest.model_copy(update={"number": 4, "files": dict(list(manifest.files.items())[:1])}))
    assert registry.history()[-1].action == "import"
    assert registry.verify() == []


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("../clinic", {}),
        ("", {}),
        ("auto", {}),
        ("clinic", {"tags": ["Not A Tag"]}),
        ("clinic", {"number": -1}),
        ("clinic", {"number": 10**9}),
        ("clinic", {"alias": "v2"}),
        ("clinic", {"note": "\0"}),
        ("clinic", {"note": "x" * 20_000}),
        ("clinic", {"why": "\ud800"}),
        ("clinic", {"recipe": {"x": float("nan")}}),
        ("clinic", {"recipe": {"x": "a\ud800b"}}),
        ("clinic", {"recipe": {"x": object()}}),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_entered(registry, make, name, asked):
    with pytest.raises(UserError):
        registry.push(make(1), name, **asked)
    assert registry.versions() == []
    assert registry.verify() == []


def test_what_is_no_adapter_is_not_pushed(registry, tmp_path):
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(AdapterError):
            registry.push(directory, "clinic")
    assert list(registry.blobs.all()) == []


def test_a_registry_that_is_not_there_is_not_made_by_asking(new_url, tmp_path):
    for kind in ("sqlite", "postgresql"):
        url = new_url(kind)
        with pytest.raises(NoRegistryError, match="registry init"):
            Registry.open(url)
        with Registry.open(url, create=True), Registry.open(url) as again:
            assert again.names() == []


def test_who_works_is_told_by_the_environment_first(local, monkeypatch, make):
    monkeypatch.setenv("LORCHESTRA_ACTOR", "pipeline-7")
    with Registry.open(str(local.location), actor="somebody") as other:
        other.push(make(1), "clinic")
    assert local.history()[0].actor == "pipeline-7"


def test_to_read_a_registry_takes_no_torch(local, make):
    local.push(make(1), "clinic", alias="production")
    script = (
        "import sys\n"
        "from lorchestra.registry.registry import Registry\n"
        "with Registry.open(sys.argv[1]) as registry:\n"
        "    registry.resolve('clinic'), registry.versions(), registry.summaries(), registry.history()\n"
        "    registry.promote('clinic@v1', 'candidate'), registry.rollback('clinic', to='v1')\n"
        "    registry.gc(), registry.verify()\n"
        "print({'torch', 'transformers', 'alembic', 'fsspec'} & set(sys.modules))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(local.location)], capture_output=True, text=True, check=True
    )
    assert told.stdout == "set()\n"


def _files(directory):
    return {path.name: "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
