"""Threads that compute alone, and give torch's threads back."""

from __future__ import annotations

import pytest
import torch

from lorchestra.fusion.workers import one_thread_each


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_piece_is_computed_by_one_thread():
    with one_thread_each("x") as pool:
        seen = list(
            pool.map(
                lambda i: (i, (torch.ones(300, 300) @ torch.ones(300, 300)).sum(), torch.get_num_threads()), range(8)
            )
        )
    assert [(i, threads) for i, _, threads in seen] == [(i, 1) for i in range(8)]
    assert torch.get_num_threads() == 3


def test_the_threads_come_back_after_an_error():
    def fail(i):
        raise ValueError(i)

    with pytest.raises(ValueError, match="0"), one_thread_each("x") as pool:
        list(pool.map(fail, range(3)))
    assert torch.get_num_threads() == 3
