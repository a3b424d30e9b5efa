"""What one burst of sequences leaves in memory that is kept, the next one does not see."""

from __future__ import annotations

import pytest
import torch

from lorchestra.serve.embedded.cache import CacheShape
from lorchestra.serve.embedded.slots import Slots

SHAPE = CacheShape(layers=1, heads=2, width=16)
LONG = 300  # positions: another store than SHORTEST


def slots(budget=10**9):
    return Slots(SHAPE, budget, 1024, torch.float32, "cpu")


def begun(held, row, keys, values, length=200):
    """A sequence whose prompt has these ``[L, h, d]``."""
    held.take(row, len(keys), length)
    step = held.reading([row], [0], [len(keys)])
    step.put(0, keys[None], values[None])
    step.keep()
    held.begin(row)


def attended(held, q, k, v):
    """One step of all."""
    return held.decoding().attend(0, q[:, None, :, None], k[:, None], v[:, None])[:, 0, :, 0]


def expected(q, keys, values):
    """Of one sequence: q ``[h, d]``, keys and values ``[L, h, d]``."""
    weights = torch.softmax(torch.einsum("hd,lhd->hl", q.double(), keys.double()) / 4, dim=-1)
    return torch.einsum("hl,lhd->hd", weights, values.double())


def drawn(*shape, seed=0):
    return torch.randn(*shape, 2, 16, generator=torch.Generator().manual_seed(seed))


def test_a_burst_after_a_burst_of_what_is_no_number():
    held = slots()
    for row in range(5):
        begun(held, row, torch.full((90, 2, 16), torch.nan), torch.full((90, 2, 16), torch.nan))
    attended(held, drawn(5), drawn(5), drawn(5))
    for row in range(5):
        held.release(row)
    assert held.order() == []
    assert held.reserved == 0
    lengths = {10: 4, 11: 70, 12: 2}
    kept = {row: (drawn(n, seed=row), drawn(n, seed=-row)) for row, n in lengths.items()}
    for row, (keys, values) in kept.items():
        begun(held, row, keys, values)
    order = held.order()
    q, k, v = drawn(3, seed=1), drawn(3, seed=2), drawn(3, seed=3)
    found = attended(held, q, k, v)
    for i, row in enumerate(order):
        keys, values = kept[row]
        right = expected(q[i], torch.cat((keys, k[i : i + 1])), torch.cat((values, v[i : i + 1])))
        torch.testing.assert_close(found[i].double(), right, rtol=1e-5, atol=1e-5)


def test_the_next_burst_takes_no_new_memory_and_one_of_another_length_frees_it():
    held = slots()
    for row in range(4):
        begun(held, row, drawn(3), drawn(3))
    memory = held._stores[256].data.data_ptr()
    for row in range(4):
        held.release(row)
    begun(held, 7, drawn(3), drawn(3))
    assert held._stores[256].data.data_ptr() == memory
    held.release(7)
    begun(held, 8, drawn(3), drawn(3), length=LONG)
    assert list(held._stores) == [512]
    assert held.order() == [8]


def test_an_empty_store_is_no_part_of_a_step():
    held = slots()
    begun(held, 0, drawn(3), drawn(3))
    begun(held, 1, drawn(5, seed=5), drawn(5, seed=6), length=LONG)
    held.release(0)
    q, k, v = drawn(1, seed=1), drawn(1, seed=2), drawn(1, seed=3)
    right = expected(q[0], torch.cat((drawn(5, seed=5), k)), torch.cat((drawn(5, seed=6), v)))
    torch.testing.assert_close(attended(held, q, k, v)[0].double(), right, rtol=1e-5, atol=1e-5)
    held.release(1)
    assert held.order() == []


def test_what_is_kept_stays_within_the_budget():
    """A burst of short ones, then long ones that take all of it: nothing of the first is held beside them."""
    slot = SHAPE.bytes(256, torch.float32)
    held = slots(budget=8 * slot)
    for row in range(8):
        begun(held, row, drawn(3), drawn(3))
    assert not held.fits(200)
    assert held._held <= 8 * slot  # doubled to eight, not beyond
    for row in range(8):
        held.release(row)
    assert held.reserved == 0
    for row in (8, 9):
        assert held.fits(1000)
        held.take(row, 1000, 1024)
        assert held._held <= 8 * slot
    assert list(held._stores) == []
    for row in (8, 9):
        held.release(row)
    begun(held, 10, drawn(3), drawn(3))
    assert held.order() == [10]


def test_room_grows_to_the_budget_and_no_further():
    held = slots(budget=5 * SHAPE.bytes(256, torch.float32))
    for row in range(5):
        begun(held, row, drawn(3), drawn(3))
    assert held._stores[256].room == 5


def test_a_sequence_that_finds_no_memory_still_has_its_prompt(monkeypatch):
    held = slots()
    begun(held, 0, drawn(3), drawn(3))
    held.take(1, 3, 200)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr("lorchestra.serve.embedded.cache.Store.append", full)
    with pytest.raises(MemoryError):
        held.begin(1)
    held.release(1)
    assert held.order() == [0]
    assert held.reserved == SHAPE.bytes(256, torch.float32)
