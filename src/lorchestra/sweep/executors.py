"""Where cells are trained: in this process, in several of this machine, or on a Ray cluster."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lorchestra.errors import LorchestraError, UserError, counted
from lorchestra.events import Reporter
from lorchestra.recipe.words import near

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
        from concurrent.futures.process import BrokenProcessPool

        waiting: dict[Future[R], W] = {}
        try:
            waiting |= {self.pool.submit(_do, piece): piece for piece in pieces}
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise LorchestraError(
                "one of the processes was ended from outside, most likely for want of memory: each holds the base. "
                "Run again with fewer --jobs; what is finished is kept"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


class OnRay(Generic[W, R]):
    """On a Ray cluster, one actor a worker. All of them see the same ``LORCHESTRA_HOME``, recipe and data by path."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = actors

    def run(self, pieces: Sequence[W]) -> Iterator[tuple[W, R]]:
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool

        pool: Any = ActorPool(list(self.actors))
        todo = list(pieces)
        for place in range(len(todo)):
            pool.submit(lambda actor, at: actor.run.remote(at, todo[at]), place)
        try:
            while pool.has_next():
                at, found = pool.get_next_unordered()
                yield todo[at], found
        except RayTaskError as error:  # the worker's own error, in place of Ray's account of it
            raise error.cause from None
        except RayActorError as error:
            raise LorchestraError(
                f"a Ray worker is gone ({str(error).splitlines()[0]}); run again, what is finished is kept"
            ) from None


@contextmanager
def executor(kind: str, worker: Works[W, R], jobs: int, reporter: Reporter) -> Iterator[Executor[W, R]]:
    """The executor that was asked for, until the block ends.

    Args:
        kind: ``local`` or ``ray``.
        worker: does the work, with ``local`` and one job; else its like, elsewhere.
        jobs: processes, or Ray workers.
        reporter: says where the work goes.

    Raises:
        UserError: see :func:`check_executor`; or more workers than the cluster has cores.
    """
    check_executor(kind)
    if kind == "ray":
        with _cluster(worker.elsewhere(), jobs, reporter) as found:
            yield found
    elif jobs == 1:
        yield Here(worker)
    else:
        import multiprocessing

        threads = max(1, (os.cpu_count() or 1) // jobs)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, context, _begin_process, (worker.elsewhere(), threads))
        try:
            yield Processes(pool)
        except BaseException:
            processes = list((pool._processes or {}).values())  # the public way (terminate_workers) is Python 3.14's
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise
        pool.shutdown()


def check_executor(kind: str) -> None:
    """Before anything is fetched.

    Raises:
        UserError: an unknown kind, or Ray is not installed.
    """
    if kind not in KINDS:
        raise UserError(f"--executor {kind!r}: expected {' or '.join(KINDS)}{near(kind, KINDS)}")
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--executor ray needs Ray: pip install 'lorchestra[ray]'")


_worker: Works[Any, Any] | None = None


def _begin_process(make: Callable[[], Works[Any, Any]], threads: int) -> None:
    """In a new process of this machine: Ctrl-C is its parent's to answer, and it does not outlive it."""
    import multiprocessing
    import signal
    import threading

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()
    _begin(make, threads)


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
    import ray

    started = not ray.is_initialized()
    if started:  # RAY_ADDRESS names a cluster; without it one is started here
        try:
            address = os.environ.get("RAY_ADDRESS") or "local"  # else Ray takes whichever was started here last
            ray.init(address, log_to_driver=False, include_dashboard=False)
        except ConnectionError as error:
            raise LorchestraError(f"{error}; look at RAY_ADDRESS, and at what the cluster asks for (a token)") from None
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        cores = _share([int(node.get("CPU", 0)) for node in nodes], jobs)
        cards = sum(int(node.get("GPU", 0)) for node in nodes)
        told = f" and {counted(cards, 'GPU')}" if cards else ""
        reporter.say(
            f"Ray: {counted(jobs, 'worker')} with {counted(cores, 'core')} each, on "
            f"{counted(len(nodes), 'machine')}{told}"
        )
        card = 1 / math.ceil(jobs / cards) if cards else 0
        actor: Any = ray.remote(num_cpus=cores, num_gpus=card)(_RayWorker)
        home = os.environ.get("LORCHESTRA_HOME")
        where = None if home is None else str(Path(home).expanduser().absolute())
        yield OnRay([actor.remote(make, cores, where) for _ in range(jobs)])
    finally:
        if started:
            ray.shutdown()


def _share(cores: Sequence[int], jobs: int) -> int:
    """Cores of each of ``jobs`` workers, as many as they can have without one that finds no place.

    Raises:
        UserError: fewer cores than workers.
    """
    for share in range(max(cores, default=0), 0, -1):
        if sum(count // share for count in cores) >= jobs:
            return share
    raise UserError(f"--jobs {jobs}: the Ray cluster has {counted(sum(cores), 'core')}; ask for that many at most")


class _RayWorker:
    """A worker in an actor's process."""

    def __init__(self, make: Callable[[], Works[Any, Any]], threads: int, home: str | None) -> None:
        if home is not None:
            os.environ["LORCHESTRA_HOME"] = home
        _begin(make, threads)

    def run(self, at: int, piece: Any) -> tuple[int, Any]:
        return at, _do(piece)
