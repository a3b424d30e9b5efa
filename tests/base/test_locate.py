"""Paths, pins, the lock file of a recipe; ``hf:`` and ``pip:`` have their own tests."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorchestra.base.home import home
from lorchestra.base.locate import SourceLock, content_sha256, locate
from lorchestra.errors import NotHereError, SourceError, StorageError
from lorchestra.events import Silent

ROWS = b'{"prompt": "a"}\n'
PIN = hashlib.sha256(ROWS).hexdigest()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(ROWS)
    return tmp_path


def test_a_path_is_relative_to_the_recipe(folder):
    assert locate("data/train.jsonl", relative_to=folder) == folder / "data" / "train.jsonl"
    assert locate(str(folder / "data")) == folder / "data"
    assert locate("data", relative_to=folder) == folder / "data"


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert locate("~/data/train.jsonl") == folder / "data" / "train.jsonl"
    monkeypatch.setenv("LORCHESTRA_HOME", "~/cache")
    assert home() == folder / "cache"


def test_org_slash_name_that_exists_here_is_a_path(folder):
    (folder / "org" / "name").mkdir(parents=True)
    assert locate("org/name", relative_to=folder) == folder / "org" / "name"


@pytest.mark.parametrize("text", ["data/trian.jsonl", "./data/trian.jsonl", "data/train"])
def test_a_near_miss_is_named(folder, text):
    with pytest.raises(SourceError, match=r"there is no .*; did you mean 'train\.jsonl'\?"):
        locate(text, relative_to=folder)


def test_nothing_near(folder):
    with pytest.raises(SourceError) as caught:
        locate("elsewhere/quite.jsonl", relative_to=folder)
    assert str(caught.value) == f"source 'elsewhere/quite.jsonl': there is no {folder}/elsewhere/quite.jsonl"


@pytest.mark.parametrize(("text", "hinted"), [
    ("smollm", True), ("Qwen2.5-0.5B", True), ("train", False), ("questions.jsonl", False), ("./smollm", False),
])  # fmt: skip
def test_a_bare_word_may_be_meant_for_the_hub_or_a_package(folder, text, hinted):
    with pytest.raises(SourceError) as caught:
        locate(text, relative_to=folder / "data")
    assert (f"hf:org/{text}" in str(caught.value)) == hinted
    assert ("pip:distribution==version/path/inside" in str(caught.value)) == hinted


def test_pins_of_paths(folder):
    assert locate(f"data/train.jsonl#sha256={PIN.upper()}", relative_to=folder).read_bytes() == ROWS
    with pytest.raises(SourceError, match=f"sha256 is {PIN}, the pin says {'0' * 64}"):
        locate(f"data/train.jsonl#sha256={'0' * 64}", relative_to=folder)
    with pytest.raises(SourceError, match="pins a file, but this is a directory"):
        locate(f"data#sha256={PIN}", relative_to=folder)


def test_a_cache_that_cannot_be_written(folder, monkeypatch, pip_environment):
    (folder / "file").write_text("")
    monkeypatch.setenv("LORCHESTRA_HOME", str(folder / "file"))
    with pytest.raises(StorageError, match="LORCHESTRA_HOME"):
        locate("pip:some-data==1.0")


def test_what_a_directory_holds(folder):
    before = content_sha256(folder / "data")
    assert content_sha256(folder / "data" / "train.jsonl") == PIN
    (folder / "data" / "train.jsonl").rename(folder / "data" / "other.jsonl")
    renamed = content_sha256(folder / "data")
    (folder / "data" / "other.jsonl").write_bytes(ROWS.replace(b"a", b"b"))
    assert len({before, renamed, content_sha256(folder / "data")}) == 3


class Listener(Silent):
    """Keeps what it was told."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


@contextmanager
def closed(directory):
    """``directory`` as one that may be read and not written; permissions do not bind root, so root becomes nobody."""
    root = os.geteuid() == 0
    directory.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        directory.chmod(0o755)


class TestSourceLock:
    def test_what_is_new_is_entered_and_what_is_known_is_held_to(self, tmp_path):
        lock = SourceLock(tmp_path / "recipe.lock.json")
        lock.check("hf:org/name", "sha256:1")
        lock.check("pip:x==1", "sha256:2")
        lock.check("hf:org/name", "sha256:1")
        assert lock.read() == {"hf:org/name": "sha256:1", "pip:x==1": "sha256:2"}
        with pytest.raises(SourceError) as caught:
            lock.check("hf:org/name", "sha256:3")
        text = str(caught.value)
        assert "'hf:org/name' has changed since recipe.lock.json was written (was sha256:1, is sha256:3)" in text
        assert f"Delete its line in {lock.path}" in text
        assert caught.value.exit_code == 2
        assert lock.read()["hf:org/name"] == "sha256:1", "a refusal changes nothing"
        value = json.loads(lock.path.read_text())
        del value["sources"]["hf:org/name"]
        lock.path.write_text(json.dumps(value))
        lock.check("hf:org/name", "sha256:3")
        assert lock.read()["hf:org/name"] == "sha256:3", "the way out works"

    def test_one_that_enters_nothing_holds_to_what_is_there(self, tmp_path):
        path = tmp_path / "recipe.lock.json"
        SourceLock(path, enters=False).check("hf:org/name", "sha256:1")
        assert not path.exists()
        SourceLock(path).check("hf:org/name", "sha256:1")
        with pytest.raises(SourceError, match="has changed"):
            SourceLock(path, enters=False).check("hf:org/name", "sha256:2")

    def test_a_directory_that_cannot_be_written(self):
        listener = Listener()
        with tempfile.TemporaryDirectory() as name:  # tmp_path would be closed to nobody altogether
            lock = SourceLock(Path(name) / "recipe.lock.json", listener)
            lock.check("hf:org/name", "sha256:1")
            assert listener.said == []
            with closed(Path(name)):
                lock.check("hf:org/name", "sha256:1")
                assert listener.said == [], "there is nothing to write"
                lock.check("pip:x==1", "sha256:2")
                lock.check("pip:y==1", "sha256:3")
                with pytest.raises(SourceError, match="has changed since"):
                    lock.check("hf:org/name", "sha256:3")
            assert [p.name for p in Path(name).iterdir()] == ["recipe.lock.json"]
            assert lock.read() == {"hf:org/name": "sha256:1"}
        assert len(listener.said) == 1, "once is enough"
        assert f"{lock.path} cannot be written (Permission denied)" in listener.said[0]
        assert "copy the recipe" in listener.said[0]

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sources": 3}', '{"sources": [1]}'])
    def test_a_damaged_lock(self, tmp_path, text):
        path = tmp_path / "recipe.lock.json"
        path.write_text(text)
        with pytest.raises(SourceError, match="is not a lock file"):
            SourceLock(path).check("hf:org/name", "sha256:1")

    def test_many_at_once_leave_a_whole_file(self, tmp_path):
        path = tmp_path / "recipe.lock.json"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: SourceLock(path).check(f"hf:org/{i % 4}", f"sha256:{i % 4}"), range(64)))
        found = SourceLock(path).read()
        assert set(found) <= {f"hf:org/{i}" for i in range(4)}
        assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_what_is_not_fetched_may_be_a_mistyped_path(folder):
    (folder / "bases" / "medical").mkdir(parents=True)
    with pytest.raises(NotHereError, match=r"not been fetched yet; it is taken for a name on the hub.*bases/medical"):
        locate("base/medicl", relative_to=folder, fetch=False)


def test_a_name_that_may_be_a_hubs_or_a_mistyped_paths(folder):
    (folder / "bases" / "medical").mkdir(parents=True)
    with pytest.raises(SourceError) as caught:
        locate("base/medicl", relative_to=folder)
    for way in (
        f"'base/medicl' was taken for a name on the hub, because there is no such path in {folder.resolve()}",
        f"did you mean '{folder / 'bases' / 'medical'}'?",
        "pip:distribution==version/path",
        "HF_ENDPOINT",
    ):
        assert way in str(caught.value)
    with pytest.raises(SourceError) as caught:
        locate("hf:base/medicl", relative_to=folder)
    assert "taken for" not in str(caught.value)
