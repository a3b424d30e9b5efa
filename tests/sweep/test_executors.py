"""Here, in processes, on a local Ray cluster: the same outcomes, the same errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from lorchestra.errors import DataError, DivergedError, LorchestraError, UserError
from lorchestra.events import SILENT
from lorchestra.sweep.cells import cells
from lorchestra.sweep.executors import _share, check_executor, executor
from lorchestra.sweep.worker import Work, Worker

EVERYWHERE = [("local", 1), ("local", 2), ("ray", 2)]


@dataclass(frozen=True)
class Doubles:
    """A worker that doubles numbers, refuses 13, and dies of 99."""

    def work(self, piece):
        if piece == 13:
            raise DataError("thirteen")
        if piece == 14:
            raise DivergedError("fourteen", 3, 9, ((0, 1.5),))
        if piece == 99:
            os._exit(1)
        return 2 * piece

    def elsewhere(self):
        return Doubles


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Other processes import the workers of this module."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.syspath_prepend(root)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "jobs"), EVERYWHERE)
def test_all_executors_do_the_same(kind, jobs):
    with executor(kind, Doubles(), jobs, SILENT) as run:
        assert dict(run.run(range(7))) == {k: 2 * k for k in range(7)}
        assert dict(run.run([])) == {}
        with pytest.raises(DataError, match=r"^thirteen$"):
            list(run.run([1, 13]))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "jobs"), EVERYWHERE)
def test_what_went_wrong_comes_back_whole(kind, jobs):
    with executor(kind, Doubles(), jobs, SILENT) as run, pytest.raises(DivergedError) as told:
        list(run.run([14]))
    assert (told.value.step, told.value.steps, told.value.validation) == (3, 9, ((0, 1.5),))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "word"), [("local", "fewer --jobs"), ("ray", "Ray worker is gone")])
def test_a_worker_that_dies_is_one_clear_failure(kind, word):
    with executor(kind, Doubles(), 2, SILENT) as run, pytest.raises(LorchestraError, match=word) as told:
        list(run.run([99]))
    assert told.value.exit_code == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "jobs"), EVERYWHERE[1:])
def test_cells_are_the_same_wherever_they_are_trained(make_spec, kind, jobs, tmp_path, monkeypatch, threads):
    threads(max(1, (os.cpu_count() or 1) // jobs))  # what each worker gets
    spec = make_spec(axes={"lora.rank": [1, 2], "data.noise": [0, 0.3]})
    work = [Work(cell) for cell in cells(spec)]
    here = {piece.cell: Worker(spec).work(piece) for piece in work}
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "elsewhere"))
    with executor(kind, Worker(spec), jobs, SILENT) as run:
        there = {piece.cell: outcome for piece, outcome in run.run(work)}
    assert list((tmp_path / "elsewhere" / "steps").glob("cell-*")), "they were trained again, and there"
    assert {cell: plain(outcome) for cell, outcome in there.items()} == {
        cell: plain(outcome) for cell, outcome in here.items()
    }


def plain(outcome):
    return {key: value for key, value in outcome.as_dict().items() if key != "seconds"}


def test_unknown_executors():
    with pytest.raises(UserError, match="did you mean 'ray'"):
        check_executor("rai")


def test_ray_that_is_not_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lorchestra\[ray\]'"):
        check_executor("ray")


def test_a_cluster_that_does_not_answer_is_one_clear_failure(monkeypatch):
    import ray

    def refuse(address, **options):
        assert address == "192.0.2.1:1"
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:1")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:1")
    with (
        pytest.raises(LorchestraError, match=r"192\.0\.2\.1:1; look at RAY_ADDRESS"),
        executor("ray", Doubles(), 2, SILENT),
    ):
        pass


@pytest.mark.parametrize(
    ("cores", "jobs", "share"),
    [([8], 1, 8), ([4, 4], 1, 4), ([8], 3, 2), ([6, 2], 2, 3), ([4, 4], 3, 2), ([1, 1], 2, 1), ([0, 2], 2, 1)],
)
def test_every_ray_worker_finds_a_place(cores, jobs, share):
    assert _share(cores, jobs) == share


def test_more_ray_workers_than_cores():
    with pytest.raises(UserError, match="--jobs 5: the Ray cluster has 4 cores"):
        _share([2, 2], 5)


@dataclass(frozen=True)
class Sleeps:
    """Notes its process, and sleeps."""

    place: str

    def work(self, piece):
        (Path(self.place) / str(os.getpid())).touch()
        time.sleep(60)

    def elsewhere(self):
        return partial(Sleeps, self.place)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_sweep(tmp_path, how):
    """Killed, or ended by Ctrl-C (which reaches all of them), without a traceback of theirs."""
    code = f"""
        from lorchestra.events import SILENT
        from lorchestra.sweep.executors import executor
        from tests.sweep.test_executors import Sleeps
        if __name__ == "__main__":
            try:
                with executor("local", Sleeps({str(tmp_path / "seen")!r}), 2, SILENT) as run:
                    list(run.run([1, 2]))
            except KeyboardInterrupt:
                print("stopped")
    """
    (tmp_path / "seen").mkdir()
    (tmp_path / "go.py").write_text(textwrap.dedent(code), encoding="utf-8")
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "go.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    until(lambda: len(list((tmp_path / "seen").iterdir())) == 2, 60)
    if how == signal.SIGKILL:
        parent.kill()
    else:
        os.killpg(parent.pid, how)
    out, err = parent.communicate(timeout=30)
    if how == signal.SIGINT:
        assert (out, "Traceback" in err) == ("stopped\n", False), err
    children = [int(path.name) for path in (tmp_path / "seen").iterdir()]
    until(lambda: not any(alive(pid) for pid in children), 10)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)
