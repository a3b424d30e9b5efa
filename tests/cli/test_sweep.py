"""``lorchestra sweep`` as a person types it, mistakes included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.sweep.conftest import write_colours

SPEC = "recipe: recipe.yaml\naxes: {lora.rank: [1, 2], lora.scaling: [rslora]}\nseeds: 2\ntest_limit: 6\n"


@pytest.fixture
def spec(tmp_path, tiny_dir):
    write_colours(tmp_path, tiny_dir)
    path = tmp_path / "ranks.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return path


def test_the_table_the_advice_and_one_line_a_training(lorchestra, spec, tmp_path):
    told = lorchestra("sweep", "ranks.yaml")
    assert told.code == 0, told.err
    table = told.out.splitlines()
    for word in ("rank", "scaling", "runs", "validation", "over seeds", "test accuracy", "95 %", "gap", "parameters"):
        assert word in table[0]
    assert [line.split()[:3] for line in table[1:3]] == [["1", "rslora", "2/2"], ["2", "rslora", "2/2"]]
    assert "before training: test accuracy" in told.out
    assert "take rank" in told.out or "No setting can be recommended" in told.out
    assert "It rests on 2 seeds" in told.out
    assert "sealed test: read 4 times so far" in told.out
    assert str(tmp_path / "sweeps" / "ranks" / "sweep.html") in told.out.replace("\n", "")
    lines = told.err.splitlines()
    assert [line for line in lines if line.startswith("1/4 rank 1 · scaling rslora · seed 0: validation loss")]
    assert sum("/4 rank" in line for line in lines) == 4
    assert not [line for line in lines if line.startswith(("train", "validate", "compare", "hash the frozen", "test:"))]
    assert sum(line.startswith("colours.jsonl:") for line in lines) == 2, "one for each stage that reads it"
    assert lines[-1].startswith("sweep ranks: cell 4/4")


def test_json(lorchestra, spec):
    told = lorchestra("sweep", "ranks.yaml", "--json", "--set", "seeds=1", "-o", "out")
    found = json.loads(told.out)
    assert [row["settings"]["lora.rank"] for row in found["rows"]] == [1, 2]
    assert found["advice"][0]["rests_on"].startswith("It rests on 1 seed,")
    assert found["readings"] == 2


def test_a_recipe_in_place_of_a_specification(lorchestra, spec, tmp_path):
    told = lorchestra(
        "sweep", "recipe.yaml", "--set", "seeds=1", "--set", "axes={lora.rank: [1]}", "--set", "test_limit=2"
    )
    assert told.code == 0, told.err
    assert (tmp_path / "sweeps" / "recipe" / "sweep.json").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nope.yaml"], ["there is no recipe nope.yaml"]),
        (["ranks.yaml", "--set", "seds=2"], ["unknown key 'seds'", "did you mean 'seeds'"]),
        (["ranks.yaml", "--set", "axes={lora.rnk: [2]}"], ["unknown key 'rnk'", "did you mean 'rank'"]),
        (["ranks.yaml", "--set", "seeds=none"], ["seeds", "'none'"]),
        (["ranks.yaml", "--executor", "rai"], ["expected local or ray", "did you mean 'ray'"]),
        (["ranks.yaml", "--jobs", "0"], ["--jobs", "greater than or equal to"]),
        (["ranks.yaml", "--set", "stage=colors"], ["no stage 'colors'"]),
        (["colours.jsonl"], ["is data, not a recipe"]),
        ([], ["SPEC"]),
    ],
)
def test_mistakes(lorchestra, spec, tmp_path, argv, words):
    lorchestra("sweep", *argv, *(["-o", "out"] if argv else [])).refused(*words)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "home").exists()


def test_help_and_completion(lorchestra, spec):
    told = lorchestra("sweep", "--help")
    assert told.code == 0
    assert "lorchestra sweep recipe.yaml" in told.out
    asked = {"_LORCHESTRA_COMPLETE": "complete_bash", "COMP_WORDS": "lorchestra sweep r --executor ", "COMP_CWORD": "4"}
    code = "from lorchestra.cli.app import app; app(prog_name='lorchestra')"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=spec.parent, env=os.environ | asked, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert set(ended.stdout.split()) == {"local", "ray"}


@pytest.mark.slow
def test_ctrl_c_ends_with_one_line_and_the_next_run_goes_on(spec, tmp_path):
    command = [sys.executable, "-m", "lorchestra", "sweep", str(spec), "-o", str(tmp_path / "out"), "--set", "seeds=6"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    end = time.monotonic() + 90
    while not (tmp_path / "out" / "sweep.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "stopped; finished cells are kept, and the same command goes on from there"
    assert "Traceback" not in err
    kept = len(json.loads((tmp_path / "out" / "sweep.json").read_text())["cells"])
    assert 1 <= kept < 12
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["cells"]) == 12, done.stderr


@pytest.mark.slow
def test_a_directory_in_use(spec, tmp_path):
    from lorchestra.pipeline.cache import run_lock

    with run_lock(tmp_path / "out", False, print):
        command = [sys.executable, "-m", "lorchestra", "sweep", str(spec), "-o", str(tmp_path / "out")]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "is in use by" in ended.stderr
    assert "--output_dir" in ended.stderr
