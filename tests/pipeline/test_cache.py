"""The step cache: made once, whole or not there, checked when reused; one run at a time in a directory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tests.pipeline.test_prepare import adapter_of

from lorchestra.errors import DataError, StorageError, UserError
from lorchestra.pipeline.cache import (
    LINKED_FROM,
    StepCache,
    discard,
    outputs,
    place,
    run_lock,
    step_digest,
    storage,
    sweep,
    write_json,
)

DIGEST = step_digest("stage", 1, {"rank": 8}, {"base": "sha256:1"})


@pytest.fixture
def cache(tmp_path):
    return StepCache(tmp_path / "steps")


def make(work):
    (work / "adapter").mkdir()
    (work / "adapter" / "weights").write_bytes(b"weights")
    write_json(work / "training.json", {"loss": [1.0, 0.5]})
    return {"seconds": 3.0}


class TestDigest:
    def test_what_matters(self):
        other = {
            step_digest("merge", 1, {"rank": 8}, {"base": "sha256:1"}),
            step_digest("stage", 2, {"rank": 8}, {"base": "sha256:1"}),
            step_digest("stage", 1, {"rank": 4}, {"base": "sha256:1"}),
            step_digest("stage", 1, {"rank": 8}, {"base": "sha256:2"}),
            step_digest("stage", 1, {"rank": 8, "alpha": 1}, {"base": "sha256:1"}),
        }
        assert len(other | {DIGEST}) == 6

    def test_the_order_of_keys_does_not(self):
        a = step_digest("stage", 1, {"rank": 8, "alpha": 16.0}, {"x": "1", "y": "2"})
        assert a == step_digest("stage", 1, {"alpha": 16.0, "rank": 8}, {"y": "2", "x": "1"})

    def test_of_a_stage(self, tiny_dir, tmp_path):
        """Names, logging and what another setting switches off are ignored; what changes the adapter counts."""
        from lorchestra.pipeline.prepare import prepare
        from lorchestra.pipeline.training import context_of, stage_digest, stage_inputs
        from lorchestra.recipe.recipe import Recipe

        rows = [json.dumps({"prompt": f"question {i}?", "completion": f"answer {i}."}) for i in range(40)]
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        (tmp_path / "b.jsonl").write_text("\n".join(row.replace("answer", "reply") for row in rows))

        def digest(
            dtype="float32", seeds=None, data="a.jsonl", lora=None, name="one", split=None, defaults=None, **train
        ):
            values = {
                "name": "x", "base": str(tiny_dir), "seeds": seeds or {}, "split": split or {},
                "train": defaults or {},
                "stages": [{"name": name, "data": data, "train": train, "lora": lora or {}}],
                "fusion": {"weights": "equal"},
            }  # fmt: skip
            prepared = prepare(Recipe.from_dict(values, tmp_path))
            stage = prepared.recipe.stages[0]
            inputs = stage_inputs(prepared, stage, context_of(prepared.recipe, stage, {}))
            return stage_digest(prepared, inputs, "cpu", dtype)

        plain = digest()
        assert digest(report_to=["tensorboard"], checkpoint_every=7) == plain
        settled = {"rank": 8, "alpha": 16, "dropout": 0.1}
        by_hand = digest(lora=settled, epochs=6, patience=3, learning_rate=5e-4, batch_size=8)
        assert by_hand == plain, "the defaults and what the examples settle, written out"
        (tmp_path / "renamed.jsonl").write_text("\n".join(rows))
        assert digest(name="other", data="renamed.jsonl") == plain, "names"
        assert digest(lora={"sigma": 0.5}) == plain, "kaiming has no sigma"
        keep_apart = {"mode": "off", "weight": 3.0, "against_context": True}
        assert digest(lora={"orthogonality": keep_apart}) == plain
        assert digest(eval_limit=1000) == plain, "more than there are"
        assert digest(max_steps=5, defaults={"epochs": 3.0}) == digest(max_steps=5)
        assert digest(scheduler="constant", warmup_ratio=0.5) == digest(scheduler="constant")
        some, other = {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["v_proj", "q_proj", "v_proj"]}
        assert digest(lora=some) == digest(lora=other)
        whole = {"train": 1, "validation": 0, "test": 0}
        assert digest(split=whole, patience=3, eval_every=2) == digest(split=whole), "nothing to validate on"

        penalty = {"orthogonality": {"mode": "penalty"}}
        others = [
            digest(lora=penalty), digest(lora={"orthogonality": {"mode": "penalty", "weight": 3.0}}),
            digest(lora={"init": "rescaled", "sigma": 0.5}), digest(lora=some), digest(eval_limit=2),
            digest(eval_every=2), digest(scheduler="constant"), digest(warmup_ratio=0.5), digest(split=whole),
            digest(learning_rate=1e-4), digest(batch_size=4), digest(patience=1), digest(epochs=2), digest(max_steps=5),
            digest(lora={"rank": 4}), digest(lora={"dropout": 0.2}), digest(lora={"init": "rescaled"}),
            digest(seeds={"init": 1}), digest(seeds={"data": 1}), digest(data="b.jsonl"), digest(dtype="bfloat16"),
        ]  # fmt: skip
        assert len({plain, *others}) == 1 + len(others)

    @pytest.mark.parametrize(
        ("changes", "same"),
        [
            ({"context": {"old": {"weight": 0.5, "to": 0.25, "start": 0.5, "end": 0.75}}}, True),
            ({"context": {"old": {"weight": 0.5, "schedule": "linear", "to": 0.5}}}, True),
            ({"context": {"old": {"weight": 0.5, "schedule": "linear", "to": 0.25}}}, False),
            ({"context": {"old": 0.25}}, False),
            ({"context": {}}, False),
            ({"loss": "ipo"}, False),
            ({"beta": 0.2}, False),
            ({"label_smoothing": 0.1}, False),
        ],
    )
    def test_of_a_context_and_an_objective(self, changes, same, tiny_dir, tiny_model, tmp_path):
        from lorchestra.pipeline.prepare import prepare
        from lorchestra.pipeline.training import context_of, stage_digest, stage_inputs
        from lorchestra.recipe.recipe import Recipe

        rows = [{"prompt": f"question {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(40)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        adapter_of(tiny_model).save(tmp_path / "old")

        def digest(**changes):
            stage = {"name": "p", "task": "dpo", "data": "pairs.jsonl", "context": {"old": 0.5}} | changes
            values = {"name": "x", "base": str(tiny_dir), "adapters": {"old": "old"}, "stages": [stage]}
            prepared = prepare(Recipe.from_dict(values, tmp_path))
            stage = prepared.recipe.stages[0]
            inputs = stage_inputs(prepared, stage, context_of(prepared.recipe, stage, prepared.adapters))
            return stage_digest(prepared, inputs, "cpu", "float32")

        assert (digest(**changes) == digest()) is same


class TestBuild:
    def test_made_once(self, cache):
        first = cache.build("stage", DIGEST, make)
        assert not first.cached
        assert first.info == {"seconds": 3.0}
        assert set(outputs(first.directory)) == {"adapter/weights", "training.json", "done.json"}
        second = cache.build("stage", DIGEST, forbidden)
        assert (second.cached, second.directory, second.info) == (True, first.directory, {"seconds": 3.0})
        assert cache.lookup("stage", DIGEST) == second
        assert cache.lookup("merge", DIGEST) is None

    def test_nothing_stands_under_the_name_until_all_is_there(self, cache):
        def watching(work):
            assert not cache.path("stage", DIGEST).exists()
            return make(work)

        directory = cache.build("stage", DIGEST, watching).directory
        assert (directory / "done.json").exists()
        assert [p.name for p in cache.root.iterdir() if p.is_dir()] == [directory.name]

    def test_a_failed_try_leaves_its_scratch_and_nothing_else_to_the_next(self, cache):
        def failing(work):
            assert [p.name for p in work.iterdir()] == ["scratch"]
            (work / "scratch" / "step-1").mkdir()
            make(work)
            raise DataError("broken off")

        with pytest.raises(DataError):
            cache.build("stage", DIGEST, failing)
        assert cache.lookup("stage", DIGEST) is None
        assert not cache.path("stage", DIGEST).exists()

        def going_on(work):
            assert [p.name for p in work.iterdir()] == ["scratch"]
            assert [p.name for p in (work / "scratch").iterdir()] == ["step-1"]
            return make(work)

        step = cache.build("stage", DIGEST, going_on)
        assert set(outputs(step.directory)) == {"adapter/weights", "training.json", "done.json"}
        assert not (step.directory / "scratch").exists()

    def test_a_kill_between_the_marker_and_the_rename_costs_nothing(self, cache):
        step = cache.build("stage", DIGEST, make)
        work = step.directory.with_name(step.directory.name + ".work")
        step.directory.rename(work)
        (work / "scratch").mkdir()
        (work / "scratch" / "half-removed").write_text("")
        again = cache.build("stage", DIGEST, forbidden)
        assert again.info == {"seconds": 3.0}
        cache.verify(again)
        assert not (again.directory / "scratch").exists()

    def test_a_directory_without_its_marker_is_nobodys(self, cache):
        final = cache.path("stage", DIGEST)
        final.mkdir(parents=True)
        (final / "half").write_text("")
        cache.build("stage", DIGEST, make)
        assert not (final / "half").exists()

    def test_one_of_many_makes_it(self, cache, tmp_path):
        def slowly(work):
            with (tmp_path / "made").open("a") as stream:
                stream.write("once\n")
            return make(work)

        with ThreadPoolExecutor(8) as pool:
            steps = list(pool.map(lambda _: cache.build("stage", DIGEST, slowly), range(16)))
        assert (tmp_path / "made").read_text() == "once\n"
        assert sum(not step.cached for step in steps) == 1
        assert len({step.directory for step in steps}) == 1

    def test_a_finished_step_has_no_lock_file(self, cache):
        step = cache.build("stage", DIGEST, make)
        assert list(cache.root.iterdir()) == [step.directory]
        left = step.directory.with_name(step.directory.name + ".lock")
        left.touch()  # as earlier versions left them, or a second process that had to wait
        cache.build("stage", DIGEST, forbidden)
        assert list(cache.root.iterdir()) == [step.directory]

    def test_the_lock_of_a_try_that_failed_stays_for_the_next(self, cache):
        def failing(work):
            raise DataError("broken off")

        with pytest.raises(DataError):
            cache.build("stage", DIGEST, failing)
        assert sorted(path.suffix for path in cache.root.iterdir()) == [".lock", ".work"]
        step = cache.build("stage", DIGEST, make)
        assert list(cache.root.iterdir()) == [step.directory]


def forbidden(work):
    raise AssertionError("the step is made again")


class TestVerify:
    @pytest.mark.parametrize("name", ["adapter/weights", "training.json"])
    def test_what_was_changed_or_removed_is_found_when_the_step_is_reused(self, cache, name):
        step = cache.build("stage", DIGEST, make)
        cache.verify(step)
        whole = (step.directory / name).read_bytes()
        (step.directory / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for check in (lambda: cache.verify(step), lambda: cache.build("stage", DIGEST, forbidden)):
            with pytest.raises(StorageError, match=f"{name} is missing or was changed; delete {step.directory}"):
                check()
        (step.directory / name).unlink()
        with pytest.raises(StorageError, match="is missing or was changed"):
            cache.build("stage", DIGEST, forbidden)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": 1}'])
    def test_a_damaged_marker(self, cache, text):
        step = cache.build("stage", DIGEST, make)
        (step.directory / "done.json").write_text(text)
        with pytest.raises(StorageError, match=f"is damaged .*; delete {step.directory}"):
            cache.lookup("stage", DIGEST)

    def test_another_step_under_this_name(self, cache):
        step = cache.build("stage", DIGEST, make)
        note = json.loads((step.directory / "done.json").read_text())
        write_json(step.directory / "done.json", note | {"digest": "0" * 64})
        with pytest.raises(StorageError, match="holds another step"):
            cache.build("stage", DIGEST, forbidden)


class TestStorage:
    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (OSError(errno.ENOSPC, "x", "a/b"), "the disk is full: a/b. Free some space and run again"),
            (OSError(errno.EDQUOT, "x", "a/b"), "the disk quota is used up: a/b. Free"),
            (OSError(errno.EFBIG, "x"), r"a file is larger than allowed here \(ulimit -f.*: somewhere. Free"),
            (PermissionError(errno.EACCES, "x", "a/b"), "no permission: a/b. Choose a directory"),
            (
                OSError(errno.EROFS, "x", "a/b"),
                "the file system is read-only: a/b. Choose .*LORCHESTRA_HOME.*--run-dir",
            ),
            (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full: somewhere"),
        ],
    )
    def test_what_it_explains(self, error, says):
        with pytest.raises(StorageError, match=says) as caught, storage(Path("somewhere")):
            raise error
        assert caught.value.exit_code == 1

    @pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), ValueError("x"), DataError("x")])
    def test_what_it_lets_pass(self, error):
        with pytest.raises(type(error)) as caught, storage(Path("somewhere")):
            raise error
        assert caught.value is error


@pytest.fixture
def closed(tmp_path, request):
    """A directory that nobody may write to; permission bits do not bind root, a read-only mount does."""
    place = tmp_path / "closed"
    place.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid():
        place.chmod(0o555)
        yield place
        place.chmod(0o755)
        return
    yield request.getfixturevalue("mounted")(place, "ro")


class TestClosed:
    def test_the_cache(self, closed):
        with pytest.raises(StorageError, match=r"(no permission|read-only): .*Choose a directory"):
            StepCache(closed / "steps").build("stage", DIGEST, make)

    @pytest.mark.parametrize("what", ["directory", "home"])
    def test_a_run(self, closed, what, tiny_dir, tmp_path, monkeypatch):
        from lorchestra.pipeline.execute import run
        from lorchestra.recipe.recipe import Recipe

        if what == "home":
            monkeypatch.setenv("LORCHESTRA_HOME", str(closed))
        rows = [json.dumps({"prompt": f"question {i}?", "completion": f"answer {i}."}) for i in range(40)]
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        recipe = Recipe.from_dict(
            {"name": "x", "base": str(tiny_dir), "stages": [{"name": "a", "data": "a.jsonl"}]}, tmp_path
        )
        with pytest.raises(StorageError, match=r"(no permission|read-only): .*Choose a directory"):
            run(recipe, directory=closed / "run" if what == "directory" else tmp_path / "run")
        assert list(closed.iterdir()) == []


class TestPlace:
    def fill(self, directory, **files):
        directory.mkdir(parents=True)
        for name, data in files.items():
            (directory / name).write_bytes(data)
        return directory

    def test_in_place_of_what_was_there(self, tmp_path):
        source = self.fill(tmp_path / "cache", a=b"1", b=b"2")
        self.fill(source / "inner" / "most", c=b"3")
        target = self.fill(tmp_path / "final" / "adapter", old=b"0")
        place(source, target)
        assert outputs(target) == outputs(source)
        assert [p.name for p in target.parent.iterdir()] == ["adapter"]

    def test_what_people_edit_is_a_copy_and_weights_are_shared(self, tmp_path):
        source = self.fill(tmp_path / "cache", config=b"{}", weights=b"\0" * LINKED_FROM)
        place(source, tmp_path / "final")
        with (tmp_path / "final" / "config").open("ab") as stream:
            stream.write(b"edited")
        assert (source / "config").read_bytes() == b"{}"
        assert (tmp_path / "final" / "weights").stat().st_ino == (source / "weights").stat().st_ino

    def test_what_is_there_already_is_left_alone_and_what_was_changed_comes_back(self, tmp_path):
        source = self.fill(tmp_path / "cache", note=b"{}", config=b"{}", weights=b"\0" * LINKED_FROM)
        target, told = tmp_path / "final", {"note": {"made": "here"}}
        place(source, target, told)
        first = outputs(target), target.stat().st_ino
        assert json.loads((target / "note").read_text()) == told["note"]
        assert (source / "note").read_bytes() == b"{}"
        place(source, target, told)
        assert (outputs(target), target.stat().st_ino) == first
        for change in (
            lambda: (target / "config").write_text("edited"),
            lambda: (target / "note").write_bytes(b"\xff"),
            lambda: (target / "weights").unlink(),
            lambda: (target / "more").write_text("added"),
        ):
            change()
            place(source, target, told)
            assert outputs(target) == first[0]
        place(source, target, {"note": {"made": "elsewhere"}})
        assert json.loads((target / "note").read_text()) == {"made": "elsewhere"}

    def test_leftovers_of_a_kill_are_removed(self, tmp_path):
        source = self.fill(tmp_path / "cache", a=b"1")
        self.fill(tmp_path / "final" / ".adapter.partial", half=b"")
        self.fill(tmp_path / "final" / ".adapter.old", half=b"")
        place(source, tmp_path / "final" / "adapter")
        assert [p.name for p in (tmp_path / "final").iterdir()] == ["adapter"]
        (tmp_path / "final" / ".report.html.x7.partial").write_text("half")
        sweep(tmp_path / "final")
        assert [p.name for p in (tmp_path / "final").iterdir()] == ["adapter"]

    def test_discard(self, tmp_path):
        discard(tmp_path / "none")
        discard(self.fill(tmp_path / "final" / "model", a=b"1"))
        assert list((tmp_path / "final").iterdir()) == []


HOLD = """
import sys
from pathlib import Path
from lorchestra.pipeline.cache import run_lock
for line in sys.stdin:
    with run_lock(Path(sys.argv[1]), False, print):
        print("held", flush=True)
        sys.stdin.readline()
    print("released", flush=True)
"""


def test_one_run_at_a_time(tmp_path):
    """Another process runs in the directory: a second one refuses, or waits; a killed one does not block."""
    directory = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as other:

        def hold():
            other.stdin.write("hold\n")
            assert other.stdout.readline() == "held\n"

        hold()
        with pytest.raises(UserError) as caught, run_lock(directory, False, print):
            raise AssertionError("two at once")
        assert f"{directory} is in use by process {other.pid}; wait for it, or use --wait" in str(caught.value)
        assert caught.value.exit_code == 2
        with run_lock(tmp_path / "elsewhere", False, print):
            pass
        said = []

        def waiting(text):
            said.append(text)
            other.stdin.write("release\n")

        with run_lock(directory, True, waiting):
            assert other.stdout.readline() == "released\n"
        assert said == [f"{directory} is in use by process {other.pid}; waiting for it to end"]
        hold()
        other.kill()
        other.wait()
        with run_lock(directory, False, print):
            assert (directory / ".lock.owner").read_text() == f"process {os.getpid()}\n"
        assert not (directory / ".lock.owner").exists()
