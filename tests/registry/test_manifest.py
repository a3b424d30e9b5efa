"""The manifest: one canonical form, which reads back as it was; nothing that cannot be kept; what a lineage tells."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lorchestra.errors import UserError
from lorchestra.registry.describing import direction, measured
from lorchestra.registry.manifest import Manifest, Metric
from lorchestra.registry.mistakes import RegistryError

HEX = "0123456789abcdef"
digests = st.text(HEX, min_size=64, max_size=64).map("sha256:{}".format)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
counts = st.integers(0, 2**53 - 1)
parents = st.lists(st.fixed_dictionaries({"name": texts, "digest": texts, "coefficient": numbers}), max_size=3)
manifests = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True).filter(lambda name: name != "auto"),
        "number": st.integers(0, 10**9 - 1),
        "digest": digests,
        "files": st.dictionaries(
            texts, st.fixed_dictionaries({"sha256": digests, "size": counts}), min_size=1, max_size=3
        ),
        "base": st.fixed_dictionaries({"name": texts, "weights": texts}),
        "ranks": st.dictionaries(texts, counts, max_size=3),
        "scales": st.dictionaries(texts, numbers, max_size=3),
        "parameters": counts,
        "made_by": texts,
        "stage": texts,
        "task": texts,
        "recipe": st.dictionaries(texts, plain, max_size=3),
        "settings": st.dictionaries(texts, plain, max_size=3),
        "data": st.dictionaries(texts, texts, max_size=2),
        "parents": parents,
        "context": parents,
        "metrics": st.dictionaries(
            texts, st.fixed_dictionaries({"value": numbers, "n": st.none() | counts}), max_size=2
        ),
        "tools": st.dictionaries(texts, texts, max_size=2),
        "note": texts,
        "tags": st.lists(texts, max_size=3, unique=True),
        "created": texts,
        "created_by": texts,
    }
)


def sample(**changes):
    """A manifest's fields."""
    return {
        "format": 1, "name": "clinic", "number": 2, "digest": "sha256:" + "1" * 64,
        "files": {"adapter_config.json": {"sha256": "sha256:" + "2" * 64, "size": 3}},
        "base": {"name": "tiny", "weights": "", "tokenizer": "", "template": ""}, "ranks": {"q": 2},
        "scales": {"q": 1.0}, "parameters": 44, "made_by": "stage", "stage": "sft", "task": "sft", "recipe": {},
        "settings": {"lr": 0.1}, "data": {}, "parents": [], "context": [], "metrics": {}, "tools": {}, "serving": {},
        "note": "", "tags": [], "created": "2026-01-01T00:00:00.000+00:00", "created_by": "me", **changes,
    }  # fmt: skip


@given(manifests)
def test_the_canonical_form_reads_back_and_is_the_same_again(fields):
    manifest = Manifest(**fields)
    written = manifest.canonical()
    back = Manifest.parse(written)
    assert back == manifest
    assert back.canonical() == written
    assert manifest.manifest_digest == "sha256:" + hashlib.sha256(written).hexdigest()
    shuffled = json.dumps(dict(reversed(json.loads(written).items())), indent=3)
    assert Manifest.parse(shuffled).canonical() == written, "however it was written"
    assert b"\n" not in written.replace(b"\\n", b"")


@given(manifests, st.sampled_from(["note", "created", "task", "stage", "made_by"]))
def test_any_change_changes_the_digest(fields, field):
    manifest = Manifest(**fields)
    assert Manifest(**fields).manifest_digest == manifest.manifest_digest
    changed = manifest.model_copy(update={field: getattr(manifest, field) + "x"})
    assert changed.manifest_digest != manifest.manifest_digest


def test_the_form_that_is_kept_does_not_change_from_release_to_release():
    """Digests of manifests are in audit logs: another form would break every chain."""
    assert Manifest(**sample()).manifest_digest == (
        "sha256:" + hashlib.sha256(json.dumps(sample(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    )
    manifest = Manifest(**sample())
    assert manifest.reference == "clinic@v2"
    files = json.dumps({"adapter_config.json": ["sha256:" + "2" * 64, 3]}, separators=(",", ":"))
    assert manifest.content == "sha256:" + hashlib.sha256(files.encode()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"digest": "sha256:12"}, "digest"),
        ({"files": {}}, "names no file"),
        ({"files": {"a": {"sha256": "md5:1", "size": 1}}}, "files.a.sha256"),
        ({"files": {"a": {"sha256": "sha256:" + "1" * 64, "size": -1}}}, "files.a.size"),
        ({"name": "../up"}, "no name for an adapter"),
        ({"number": -1}, "number"),
        ({"extra": 1}, "extra"),
        ({"tags": ["a", "a"]}, "twice"),
        ({"note": "\0"}, "note"),
        ({"metrics": {"loss": {"value": 1, "low": 2, "high": 1}}}, "upside down"),
        ({"ranks": {"q": "two"}}, "ranks.q"),
        ({"format": 0}, "format"),
    ],
)
def test_what_is_no_manifest_is_refused_by_its_field(changes, told):
    with pytest.raises(UserError, match=told):
        Manifest.parse(json.dumps(sample(**changes)))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"format": 1}', "\xff", "x" * (9 << 20)])
def test_any_text_is_a_manifest_or_a_clear_refusal(text):
    with pytest.raises(UserError):
        Manifest.parse(text)
    with pytest.raises(UserError):
        Manifest.parse(text.encode("latin-1"))


def test_a_newer_format_says_to_update():
    with pytest.raises(RegistryError, match=r"format 2; .* Update lorchestra"):
        Manifest.parse(json.dumps(sample(format=2, news="x")))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value):
    with pytest.raises(ValidationError):
        Metric(value=value)
    with pytest.raises(ValidationError):
        Manifest(**sample(settings={"deep": [{"x": value}]}))
    with pytest.raises(UserError):
        Manifest.parse(json.dumps(sample(scales={"q": value})))


def test_a_lineage_s_metrics_are_kept_with_direction_interval_and_split():
    told = {
        "validation_loss": 1.5,
        "best_step": 20,
        "missing": None,
        "broken": math.nan,
        "flag": True,
        "accuracy": {
            "metric": "accuracy",
            "groups": 40,
            "base": {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": 40},
            "delivered": {"estimate": 0.8, "low": 0.7, "high": None, "n": 40},
            "sealed": "sha256:t",
        },
        "nll": {"estimate": 1.2, "low": 1.0, "high": 1.4, "n": 10},
        "perplexity": {"value": 3.0, "split": "sealed"},
        "words": {"a": "b"},
    }
    assert measured(told) == {
        "validation_loss": Metric(value=1.5, better="lower", split="validation"),
        "accuracy": Metric(value=0.8, low=0.7, n=40, better="higher", split="sealed", sealed="sha256:t"),
        "nll": Metric(value=1.2, low=1.0, high=1.4, n=10, better="lower"),
        "perplexity": Metric(value=3.0, better="lower", split="sealed"),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nll", "lower"), ("loss_ratio", "lower"), ("accuracy", "higher"), ("preference_accuracy_normalised", "higher")],
)
def test_directions_are_those_of_our_own_metrics(name, expected):
    assert direction(name) == expected


def test_a_manifest_of_every_release_is_read():
    for path in sorted((Path(__file__).parent / "fixtures").glob("manifest-*.json")):
        written = path.read_bytes()
        assert Manifest.parse(written).canonical() == written.strip(), path.name
    assert Manifest.parse((Path(__file__).parent / "fixtures" / "manifest-1.json").read_bytes()).number == 2
