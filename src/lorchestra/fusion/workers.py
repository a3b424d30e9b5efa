"""Threads for work that comes in many small pieces."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_each(name: str) -> Iterator[Executor]:
    """As many threads as torch would use, each of which computes alone: a piece is too small to share.

    Two threads that share a small product wait for each other at its end; on a busy machine that takes longer than the
    product. Pieces also come out the same bit for bit, however many threads there are.

    Args:
        name: of the threads.
    """
    count = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, name)
    torch.set_num_threads(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)
