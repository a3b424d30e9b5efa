"""Where cells are trained: in this process, in several of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from lorchestra.errors import LorchestraError, UserError
from lorchestra.events import Reporter

W = TypeVar("W")  # one piece of work: a cell and where it pauses, a department
R = TypeVar("R", covariant=True)  # what became of it
KINDS = ("local", "ray")


class Works(Protocol[W, R]):
    """Does pieces of work, one after the other."""

    def work(self, piece: W) -> R:
        """What one piece came to; both are pickled on their way to another process and back."""

    def elsewhere(self) -> Callable[[], Works[W, R]]:
        """A function, which can be pickled, that makes the same worker in another process."""


class Executor(Protocol[W, R]):
    """Has pieces of work done."""

    def run(self, pieces: Sequence[W]) -> Iterator[tuple[W, R]]:
        """Outcomes as they come in. What one piece raises ends it all; the others' finished steps are kept."""


class Here(Generic[W, R]):
    """One after the other, in this process."""

    def __init__(self, worker: Works[W, R]) -> None:
        self.worker = worker

    def run(self, pieces: Sequence[W]) -> Iterator[tuple[W, R]]:
        for piece in pieces:
            yield piece, self.worker.work(piece)


class Processes(Generic[W, R]):
    """In ``jobs`` processes that share the processor's cores; each holds the base."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def run(self, pieces: Sequence[W]) -> Iterator[tuple[W, R]]:
        waiting: dict[Future[R], W] = {self.pool.submit(_do, piece): piece for piece in pieces}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        finally:
            for future in waiting:
                future.cancel()


class OnRay(Generic[W, R]):
    """On a Ray cluster, one actor a worker. All of them see the same ``LORCHESTRA_HOME``, recipe and data by path."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = actors

    def run(self, pieces: Sequence[W]) -> Iterator[tuple[W, R]]:
        from ray.util import ActorPool

        pool: Any = ActorPool(list(self.actors))
        todo = list(pieces)
        for place in range(len(todo)):
            pool.submit(lambda actor, at: actor.run.remote(at, todo[at]), place)
        while pool.has_next():
            at, found = pool.get_next_unordered()
            yield todo[at], found


@contextmanager
def executor(kind: str, worker: Works[W, R], jobs: int, reporter: Reporter) -> Iterator[Executor[W, R]]:
    """The executor that was asked for, until the block ends.

    Args:
        kind: ``local`` or ``ray``.
        worker: does the work, with ``local`` and one job; else its like, elsewhere.
        jobs: processes, or Ray workers.
        reporter: says where the work goes.

    Raises:
        UserError: an unknown kind, or Ray is not installed.
    """
    if kind == "local" and jobs == 1:
        yield Here(worker)
    elif kind == "local":
        import multiprocessing

        threads = max(1, (os.cpu_count() or 1) // jobs)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _begin, (worker.elsewhere(), threads)) as pool:
            try:
                yield Processes(pool)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(getattr(pool, "_processes", {}).values()):
                    process.terminate()
                raise
    elif kind == "ray":
        with _cluster(worker.elsewhere(), jobs, reporter) as found:
            yield found
    else:
        raise UserError(f"--executor {kind!r}: expected {' or '.join(KINDS)}")


_worker: Works[Any, Any] | None = None


def _begin(make: Callable[[], Works[Any, Any]], threads: int) -> None:
    """In a new process: its worker, and its share of the cores."""
    global _worker
    import torch

    torch.set_num_threads(threads)
    _worker = make()


def _do(piece: Any) -> Any:
    if _worker is None:
        raise LorchestraError("a process of the sweep has not begun; run the sweep again")
    return _worker.work(piece)


@contextmanager
def _cluster(make: Callable[[], Works[W, R]], jobs: int, reporter: Reporter) -> Iterator[OnRay[W, R]]:
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install 'lorchestra[ray]'") from None
    started = not ray.is_initialized()
    if started:  # RAY_ADDRESS names a cluster; without it one is started here
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        reporter.say(
            f"Ray: {jobs} workers on {int(resources.get('CPU', 0))} cores, {int(resources.get('GPU', 0))} GPUs"
        )
        cores = max(1, int(resources.get("CPU", 1)) // jobs)
        cards = resources.get("GPU", 0.0) / jobs
        actor: Any = ray.remote(num_cpus=cores, num_gpus=cards)(_RayWorker)
        home = os.environ.get("LORCHESTRA_HOME")
        yield OnRay([actor.remote(make, cores, home) for _ in range(jobs)])
    finally:
        if started:
            ray.shutdown()


class _RayWorker:
    """A worker in an actor's process."""

    def __init__(self, make: Callable[[], Works[Any, Any]], threads: int, home: str | None) -> None:
        if home is not None:
            os.environ["LORCHESTRA_HOME"] = home
        _begin(make, threads)

    def run(self, at: int, piece: Any) -> tuple[int, Any]:
        return at, _do(piece)
