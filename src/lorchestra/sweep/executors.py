"""Where cells are trained: in this process, in several of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorchestra.errors import LorchestraError, UserError
from lorchestra.events import Reporter
from lorchestra.sweep.cells import Cell
from lorchestra.sweep.outcome import Outcome

if TYPE_CHECKING:
    from lorchestra.sweep.spec import SweepSpec
    from lorchestra.sweep.worker import Worker

Work = tuple[Cell, "float | None"]  # a cell, and the share of its steps after which it pauses


class Executor(Protocol):
    """Runs cells; see :meth:`lorchestra.sweep.worker.Worker.run`."""

    def run(self, work: Sequence[Work]) -> Iterator[tuple[Work, Outcome]]:
        """Outcomes as they come in. What one cell raises ends it all; the others' finished steps are kept."""


class Here:
    """One after the other, in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def run(self, work: Sequence[Work]) -> Iterator[tuple[Work, Outcome]]:
        for cell, pause in work:
            yield (cell, pause), self.worker.run(cell, pause)


class Processes:
    """In ``jobs`` processes that share the processor's cores; each holds the base."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def run(self, work: Sequence[Work]) -> Iterator[tuple[Work, Outcome]]:
        waiting: dict[Future[dict[str, Any]], Work] = {
            self.pool.submit(_run_cell, cell, pause): (cell, pause) for cell, pause in work
        }
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), Outcome.from_dict(future.result())
        finally:
            for future in waiting:
                future.cancel()


class OnRay:
    """On a Ray cluster, one actor a worker. All of them see the same ``LORCHESTRA_HOME``, recipe and data by path."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = actors

    def run(self, work: Sequence[Work]) -> Iterator[tuple[Work, Outcome]]:
        from ray.util import ActorPool

        pool: Any = ActorPool(list(self.actors))
        todo = list(work)
        for place in range(len(todo)):
            pool.submit(lambda actor, at: actor.run.remote(at, *todo[at]), place)
        while pool.has_next():
            at, found = pool.get_next_unordered()
            yield todo[at], Outcome.from_dict(found)


@contextmanager
def executor(
    kind: str, spec: SweepSpec, folds: int | None, worker: Worker, jobs: int, reporter: Reporter
) -> Iterator[Executor]:
    """The executor that was asked for, until the block ends.

    Args:
        kind: ``local`` or ``ray``.
        spec: the specification.
        folds: K of a cross-validation.
        worker: of this process, for ``local`` with one job.
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
        with ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), _begin,
            (spec.model_dump(mode="json"), spec.directory, folds, threads),
        ) as pool:  # fmt: skip
            try:
                yield Processes(pool)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(getattr(pool, "_processes", {}).values()):
                    process.terminate()
                raise
    elif kind == "ray":
        with _cluster(spec, folds, jobs, reporter) as found:
            yield found
    else:
        raise UserError(f"--executor {kind!r}: expected local or ray")


_worker: Worker | None = None


def _begin(values: dict[str, Any], directory: Path, folds: int | None, threads: int) -> None:
    """In a new process: its worker, and its share of the cores."""
    global _worker
    import torch

    from lorchestra.sweep.spec import SweepSpec
    from lorchestra.sweep.worker import Worker

    torch.set_num_threads(threads)
    _worker = Worker(SweepSpec.from_dict(values, directory), folds)


def _run_cell(cell: Cell, pause: float | None) -> dict[str, Any]:
    if _worker is None:
        raise LorchestraError("a process of the sweep has not begun; run the sweep again")
    return _worker.run(cell, pause).as_dict()


@contextmanager
def _cluster(spec: SweepSpec, folds: int | None, jobs: int, reporter: Reporter) -> Iterator[OnRay]:
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
        yield OnRay(
            [actor.remote(spec.model_dump(mode="json"), str(spec.directory), folds, cores, home) for _ in range(jobs)]
        )
    finally:
        if started:
            ray.shutdown()


class _RayWorker:
    """A worker in an actor's process."""

    def __init__(
        self, values: dict[str, Any], directory: str, folds: int | None, threads: int, home: str | None
    ) -> None:
        if home is not None:
            os.environ["LORCHESTRA_HOME"] = home
        _begin(values, Path(directory), folds, threads)

    def run(self, at: int, cell: Cell, pause: float | None) -> tuple[int, dict[str, Any]]:
        return at, _run_cell(cell, pause)
