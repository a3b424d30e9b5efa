"""Keys: only their hashes are kept, who may do what, and files that are wrong are told of."""

from __future__ import annotations

import json
import threading

import pytest

from lorchestra.errors import UserError
from lorchestra.registry.access import (
    OPEN,
    Key,
    Keys,
    KeysFile,
    add_key,
    hashed,
    new_key,
    read_keys,
    remove_key,
)


def test_a_key_is_random_and_known_as_one():
    keys = {new_key() for _ in range(200)}
    assert len(keys) == 200
    assert all(key.startswith("lo-") and len(key) >= 43 + 3 for key in keys), "256 bits are 43 characters"


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_what_was_added_is_found_and_the_file_does_not_hold_it(tmp_path, name):
    path = tmp_path / name
    acme = add_key(path, "acme", adapters=["clinic", "audit"], rpm=60, concurrency=2)
    ops = add_key(path, "ops", adapters="all", role="operator")
    text = path.read_text()
    assert acme not in text
    assert ops not in text
    assert acme.removeprefix("lo-") not in text
    keys = read_keys(path)
    found = keys.find(acme)
    assert (found.name, found.role, found.rpm, found.concurrency) == ("acme", "user", 60, 2)
    assert found.may_use("clinic")
    assert not found.may_use("general")
    assert not found.operates
    assert keys.find(ops).operates
    assert keys.find(ops).may_use("anything")
    assert keys.find(acme + "x") is None
    assert keys.find("") is None
    assert keys.find(found.sha256) is None, "the hash is no key"
    assert (path.stat().st_mode & 0o777) == 0o600
    if name.endswith(".json"):
        json.loads(text)


def test_a_key_for_no_adapter_may_use_none(tmp_path):
    secret = add_key(tmp_path / "k.yaml", "bare")
    assert not read_keys(tmp_path / "k.yaml").find(secret).may_use("clinic")


def test_a_removed_key_is_known_no_more_by_a_server_that_runs(tmp_path):
    path, now = tmp_path / "keys.yaml", [0.0]
    one, two = add_key(path, "one"), add_key(path, "two")
    live = KeysFile(path, clock=lambda: now[0])
    assert live.find(one).name == "one"
    remove_key(path, "one")
    now[0] += 1.1
    assert live.find(one) is None
    assert live.find(two).name == "two"
    three = add_key(path, "three")
    now[0] += 1.1
    assert live.find(three).name == "three"


def test_while_the_file_is_broken_or_gone_nobody_is_known(tmp_path, caplog):
    path, now = tmp_path / "keys.yaml", [0.0]
    secret = add_key(path, "one")
    good = path.read_text()
    live = KeysFile(path, clock=lambda: now[0])
    for breaks in (lambda: path.write_text("keys: [{name: one}]"), path.unlink):
        breaks()
        now[0] += 2
        assert live.find(secret) is None
        assert "no key is valid until this is mended" in caplog.text
        caplog.clear()
        path.write_text(good)
        now[0] += 2
        assert live.find(secret).name == "one"


def test_two_at_once_lose_no_key(tmp_path):
    path = tmp_path / "keys.yaml"
    threads = [threading.Thread(target=add_key, args=(path, f"tenant{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.name for key in read_keys(path).keys) == [f"tenant{i}" for i in range(8)]


def test_a_name_has_one_key(tmp_path):
    add_key(tmp_path / "k.yaml", "acme")
    with pytest.raises(UserError, match="has a key of 'acme' already"):
        add_key(tmp_path / "k.yaml", "acme")
    with pytest.raises(UserError, match=r"no key of 'amce'; it has acme"):
        remove_key(tmp_path / "k.yaml", "amce")


@pytest.mark.parametrize("name", ["", "../x", "a b", "anonymous", "auto"])
def test_a_bad_name_writes_nothing(tmp_path, name):
    with pytest.raises(UserError):
        add_key(tmp_path / "k.yaml", name)
    assert not (tmp_path / "k.yaml").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "holds list"),
        ("keys: 3", "keys"),
        ("keyz: []", "keyz"),
        ("keys: [{name: a, sha256: lo-plain}]", "64 hexadecimal"),
        (f"keys: [{{name: a, sha256: '{'0' * 64}', rpm: 0}}]", "keys.0.rpm"),
        (f"keys: [{{name: a, sha256: '{'0' * 64}', adapters: clinic}}]", "keys.0.adapters"),
        (f"keys: [{{name: a, sha256: '{'0' * 64}', role: root}}]", "keys.0.role"),
        (f"keys: [{{name: a, sha256: '{'0' * 64}', adapters: [../x]}}]", "is no name"),
        (f"keys: [{{name: a, sha256: '{'0' * 64}'}}, {{name: a, sha256: '{'1' * 64}'}}]", "two keys"),
        ("keys: [", "not YAML or JSON"),
    ],
)
def test_a_keys_file_that_is_none_is_told_of(tmp_path, text, says):
    (tmp_path / "k.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_keys(tmp_path / "k.yaml")


def test_a_file_that_is_not_there_says_what_makes_one(tmp_path):
    with pytest.raises(UserError, match="keys add NAME"):
        read_keys(tmp_path / "k.yaml")


def test_every_key_is_compared_at_each_request(monkeypatch):
    seen = []
    import lorchestra.registry.access as access

    compare = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: seen.append(a) or compare(a, b))
    keys = Keys(tuple(Key(name=f"k{i}", sha256=hashed(f"s{i}")) for i in range(5)))
    for secret in ("s0", "s4", "nobody"):
        seen.clear()
        keys.find(secret)
        assert len(seen) == 5


def test_without_keys_everybody_operates():
    assert OPEN.operates
    assert OPEN.may_use("anything")
    assert OPEN.rpm is None
