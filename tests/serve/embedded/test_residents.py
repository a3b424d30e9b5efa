"""The adapters in memory: least recently used out first, one read for all who ask at the same time."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.serve.tenants import write_adapter

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError
from lorchestra.serve.adapter_files import served
from lorchestra.serve.embedded.residents import Residents, read_verified
from lorchestra.serve.engine import Served, StoppingError


@dataclass(frozen=True)
class Value:
    name: str
    bytes: int


class Heard:
    def __init__(self):
        self.loads, self.evictions = [], []

    def waited(self, members, seconds):
        raise AssertionError("nobody waits here")

    def loaded(self, adapter, seconds):
        assert seconds >= 0
        self.loads.append(adapter.key)

    def evicted(self, adapter):
        self.evictions.append(adapter.key)


def adapter(name) -> Served:
    return Served(name, "sha256:" + "0" * 64, Path("nowhere"))


def key(name) -> str:
    return adapter(name).key


SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8, "large": 11}  # the budget is 10
OP = st.tuples(st.sampled_from(["get", "start", "start", "start", "drop"]), st.sampled_from([*SIZES, "broken"]))


@settings(deadline=None, max_examples=200)
@given(st.lists(OP, max_size=40))
def test_the_least_recently_used_go_first_and_no_more_than_needed(ops):
    heard = Heard()

    def read(served):
        if served.name == "broken":
            raise AdapterError("broken")
        return Value(served.name, SIZES[served.name])

    residents = Residents(read, 10, heard)
    order: list[str] = []  # the model: names, the last one used last
    loads, evictions = [], []
    for what, name in ops:
        if what == "drop":
            assert residents.drop(key(name)) == (name in order)
            if name in order:
                order.remove(name)
                evictions.append(key(name))
        elif what == "get":
            found = residents.get(adapter(name))
            assert (found is not None) == (name in order)
            if name in order:
                assert found == Value(name, SIZES[name])
                order = [other for other in order if other != name] + [name]
        else:
            future = residents.start(adapter(name))
            if name in ("broken", "large"):
                with pytest.raises(AdapterError, match="broken" if name == "broken" else "--memory"):
                    future.result(10)
            else:
                assert future.result(10) == Value(name, SIZES[name])
                if name not in order:
                    loads.append(key(name))
                    while sum(SIZES[other] for other in order) + SIZES[name] > 10:
                        evictions.append(key(order.pop(0)))
                order = [other for other in order if other != name] + [name]
        assert residents.keys() == tuple(map(key, order))
        assert residents.used == sum(SIZES[other] for other in order) <= 10
        assert (heard.loads, heard.evictions) == (loads, evictions)
    residents.close()


def test_sixty_four_threads_and_three_adapters_are_three_reads():
    begun, reads = threading.Event(), Counter()

    def read(served):
        assert begun.wait(10)
        reads[served.name] += 1
        return Value(served.name, 1)

    residents = Residents(read, 10)
    gate = threading.Barrier(64)

    def ask(i):
        gate.wait(10)
        return residents.start(adapter("abc"[i % 3]))

    with ThreadPoolExecutor(64) as pool:
        futures = list(pool.map(ask, range(64)))
    begun.set()
    values = [future.result(10) for future in futures]
    assert [value.name for value in values] == ["abc"[i % 3] for i in range(64)]
    assert reads == {"a": 1, "b": 1, "c": 1}
    assert len({id(value) for value in values}) == 3
    residents.close()


def test_under_traffic_from_many_threads_the_budget_holds_and_the_accounts_balance():
    heard, seen = Heard(), []

    def read(served):
        seen.append(residents.used)
        return Value(served.name, 1 + int(served.name) % 4)

    residents = Residents(read, 12, heard)

    def ask(i):
        for step in range(60):
            name = str((i * 7 + step * step) % 11)
            if step % 13 == 0:
                residents.drop(key(name))
            assert residents.start(adapter(name)).result(10).name == name
            seen.append(residents.used)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))
    left = residents.keys()
    assert max(seen) <= 12
    assert residents.used == sum(1 + int(k.partition("@")[0]) % 4 for k in left)
    assert Counter(heard.loads) - Counter(heard.evictions) == Counter(left)
    assert Counter(heard.evictions) <= Counter(heard.loads)
    residents.close()


class Paused:
    """A ``read`` that waits to be let go."""

    def __init__(self):
        self.begun, self.go, self.reads = threading.Event(), threading.Event(), []

    def __call__(self, served):
        self.begun.set()
        assert self.go.wait(10)
        self.reads.append(served.name)
        return Value(served.name, 1)


def test_one_that_is_dropped_while_it_is_read_goes_to_those_who_wait_and_is_not_kept():
    read, heard = Paused(), Heard()
    residents = Residents(read, 10, heard)
    before = residents.start(adapter("a"))
    assert read.begun.wait(10)
    assert not residents.drop(key("a"))
    read.go.set()
    assert before.result(10).name == "a"
    assert (residents.keys(), residents.used, heard.loads, heard.evictions) == ((), 0, [], [])
    residents.close()


def test_asked_for_again_after_a_drop_it_is_read_again_and_kept():
    read, heard = Paused(), Heard()
    residents = Residents(read, 10, heard)
    before = residents.start(adapter("a"))
    assert read.begun.wait(10)
    residents.drop(key("a"))
    after = residents.start(adapter("a"))
    read.go.set()
    assert wait([before, after], 10).not_done == set()
    assert read.reads == ["a", "a"]
    assert (residents.keys(), residents.used, heard.loads) == ((key("a"),), 1, [key("a")])
    residents.close()


def test_a_failed_read_is_told_to_all_who_wait_and_the_next_one_reads_again():
    go, answers = threading.Event(), [AdapterError("no such module"), Value("a", 1)]

    def read(served):
        assert go.wait(10)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    residents = Residents(read, 10)
    waiting = [residents.start(adapter("a")) for _ in range(5)]
    go.set()
    for future in waiting:
        with pytest.raises(AdapterError, match="no such module"):
            future.result(10)
    assert residents.keys() == ()
    assert residents.start(adapter("a")).result(10) == Value("a", 1)
    residents.close()


def test_what_nobody_expected_is_told_by_its_kind_and_logged(caplog):
    def read(served):
        raise RuntimeError("/srv/secret/a holds what nobody expected")

    residents = Residents(read, 10)
    with pytest.raises(AdapterError, match=r"adapter 'a' cannot be read \(RuntimeError\); the server's log says why$"):
        residents.start(adapter("a")).result(10)
    assert "holds what nobody expected" in caplog.text
    residents.close()


def test_one_who_no_longer_waits_takes_nothing_from_the_others():
    read = Paused()
    residents = Residents(read, 10)
    first, queued = residents.start(adapter("a")), residents.start(adapter("b"))
    assert not queued.cancel()
    read.go.set()
    assert (first.result(10).name, residents.start(adapter("b")).result(10).name) == ("a", "b")
    residents.close()


def test_one_larger_than_the_budget_puts_nothing_out():
    residents = Residents(lambda served: Value(served.name, SIZES[served.name]), 10)
    residents.start(adapter("e")).result(10)
    with pytest.raises(AdapterError, match=r"'large' takes 11 bytes in memory, more than the 10 .* --memory"):
        residents.start(adapter("large")).result(10)
    assert residents.keys() == (key("e"),)
    residents.close()


def test_closing_forgets_all_and_lets_nobody_wait():
    read = Paused()
    residents = Residents(read, 10)
    threads = {thread.name for thread in threading.enumerate()}
    under_way, queued = residents.start(adapter("a")), residents.start(adapter("b"))
    assert read.begun.wait(10)
    closing = threading.Thread(target=residents.close)
    closing.start()
    waiting = [queued]
    while not waiting[-1].done():  # until it has begun to close
        residents.drop(key("c"))
        waiting.append(residents.start(adapter("c")))
    read.go.set()
    closing.join(10)
    assert under_way.result(10).name == "a"
    for refused in (*waiting, residents.start(adapter("a"))):
        with pytest.raises(StoppingError, match="stopping"):
            refused.result(10)
    assert (residents.keys(), residents.used, read.reads) == ((), 0, ["a"])
    assert {thread.name for thread in threading.enumerate()} <= threads
    residents.close()


BASE = BaseId("/srv/bases/secret", weights="sha256:" + "a" * 64)


@pytest.fixture
def directory(tmp_path) -> Path:
    noise = torch.Generator().manual_seed(0)
    B, A = torch.randn(8, 2, generator=noise), torch.randn(2, 6, generator=noise)
    return Adapter({"l.q": LowRank(B, A)}, base=BASE).save(tmp_path / "place" / "team-a")


def test_what_was_registered_is_read(directory):
    known = served("team", directory)
    for base in (BASE, None, BaseId()):
        found = read_verified(known, base)
        assert found.digest == known.digest
        assert torch.equal(found.modules["l.q"].B, Adapter.load(directory).modules["l.q"].B)


def test_an_adapter_that_names_no_base_is_read_on_any(tmp_path):
    known = served("team", write_adapter(tmp_path / "x", 1))
    assert read_verified(known, BASE).digest == known.digest


def refusal(known, base=BASE, largest=None) -> str:
    with pytest.raises(AdapterError) as caught:
        read_verified(known, base, largest)
    error = caught.value
    message = str(error)
    assert error.__cause__ is None
    assert "'team'" in message
    for secret in (str(known.directory), str(known.directory.parent), known.directory.name, "/srv", "secret"):
        assert secret not in message, message
    return message


def test_other_weights_than_those_that_were_registered_are_refused(directory):
    known = served("team", directory)
    assert "other weights" in refusal(replace(known, digest="sha256:" + "1" * 64))
    Adapter({"l.q": LowRank(torch.ones(8, 2), torch.ones(2, 6))}).save(directory)  # a whole other adapter
    assert "other weights" in refusal(known)


def test_weights_of_another_base_are_refused(directory):
    message = refusal(served("team", directory), BaseId("/srv/bases/other", weights="sha256:" + "b" * 64))
    assert "another" not in message
    assert "sha256:" + "a" * 16 in message
    assert "sha256:" + "b" * 16 in message


def test_a_file_that_is_too_large_is_refused_unread(directory):
    known = served("team", directory)
    size = (directory / "adapter_model.safetensors").stat().st_size
    read_verified(known, BASE, size)
    (directory / "adapter_config.json").write_text("{")  # nobody looks
    assert "--memory" in refusal(known, largest=size - 1)


def change(directory: Path, what: str) -> None:
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    if what == "gone":
        shutil.rmtree(directory)
    elif what == "no config":
        config.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "config is no JSON":
        config.write_text("{")
    elif what == "a config of another kind":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    elif what == "weights are cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "a damaged sidecar":
        (directory / "lorchestra.json").write_text('{"schema": 1}')
    else:
        tensors = load_file(weights)
        name = sorted(tensors)[0]
        if what == "not finite":
            tensors[name][0, 0] = float("nan")
        elif what == "changed":
            tensors[name][0, 0] += 1
        elif what == "half is missing":
            del tensors[name]
        elif what == "integers":
            tensors[name] = tensors[name].int()
        elif what == "another shape":
            tensors[name] = tensors[name][:1].clone()
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("gone", "No such file"),
        ("no weights", "No such file"),
        ("no config", "not a PEFT adapter"),
        ("config is no JSON", "adapter_config.json cannot be read"),
        ("a config of another kind", "DoRA"),
        ("weights are cut", "adapter_model.safetensors is damaged"),
        ("a damaged sidecar", "lorchestra.json is damaged"),
        ("not finite", "NaN"),
        ("changed", "changed or damaged"),
        ("half is missing", "incomplete"),
        ("integers", "floating-point"),
        ("another shape", "low-rank factors"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_adapters_name_alone(directory, what, says):
    known = served("team", directory)
    change(directory, what)
    assert says in refusal(known)
