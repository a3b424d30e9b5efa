# ruff: noqa: E501  (a message in one line is easier to read)
"""``run``, ``plan`` and ``check`` as a person types them, mistakes included."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorchestra.cli.app import app

RECIPE = """\
name: tiny
base: {base}
dtype: float32
max_length: 96
split: {{train: 0.6, validation: 0.2, test: 0.2}}
lora: {{rank: 2, alpha: 4}}
train: {{max_steps: 4, batch_size: 4, learning_rate: 5.0e-3}}
stages:
  - name: general
    data: general.jsonl
  - name: preference
    task: dpo
    data: pairs.jsonl
    context: {{general: 1.0}}
fusion: {{candidates: 6, validation_limit: 4}}
evaluate: {{test_limit: 4, samples: 1, sample_tokens: 2}}
"""


def write_recipe(directory: Path, base: Path) -> None:
    chance = random.Random(0)
    words = ["fever", "cough", "pain", "rash", "nausea", "swelling", "fatigue", "headache"]
    with (directory / "general.jsonl").open("w") as out:
        for i in range(50):
            ask = f"{i}: {chance.choice(words)} {chance.choice(words)}?"
            out.write(json.dumps({"prompt": ask, "completion": "Yes." if i % 2 else "No."}) + "\n")
    with (directory / "pairs.jsonl").open("w") as out:
        for i in range(50):
            ask = f"pair {i}: {chance.choice(words)}?"
            out.write(json.dumps({"prompt": ask, "chosen": "Noted.", "rejected": "lol ok"}) + "\n")
    (directory / "recipe.yaml").write_text(RECIPE.format(base=base))


@pytest.fixture
def recipe(tmp_path, tiny_dir) -> Path:
    write_recipe(tmp_path, tiny_dir)
    return tmp_path / "recipe.yaml"


def test_plan_run_plan_and_talk_to_the_result(lorchestra, recipe, tmp_path):
    before = lorchestra("plan", "recipe.yaml")
    assert before.code == 0, before.err
    assert "23,840 parameters" in before.out
    assert "rough to a factor of two" in before.out

    told = lorchestra("run", "recipe.yaml")
    assert told.code == 0, told.err
    report = json.loads((tmp_path / "runs" / "tiny" / "report.json").read_text())
    assert report["verdict"]["sentence"] in " ".join(told.out.split())
    # The table: every model, with the loss that the report holds.
    losses = {
        (row["model"], row["domain"]): row["estimate"] for row in report["evaluation"]["rows"] if row["metric"] == "nll"
    }
    rows = {line.split()[0]: line.split() for line in told.out.splitlines() if line.strip()}
    for model in report["evaluation"]["models"]:
        assert rows[model][1] == f"{losses[model, 'general']:.3f}"
        assert rows[model][2] == f"{losses[model, 'preference']:.3f}"
    # Why these weights, and who is unbeaten on λ-validation.
    for reason in report["search"]["selection"]["reasons"]:
        assert reason in " ".join(told.out.split())
    chosen = report["search"]["candidates"][report["search"]["selection"]["chosen"]]
    (line,) = [line for line in told.out.splitlines() if line.endswith("chosen") and f"{chosen['score']:.4f}" in line]
    assert chosen["origin"] in line
    for place in ("runs/tiny/final/adapter", "runs/tiny/final/model", "runs/tiny/report.html"):
        assert (tmp_path / place).exists()
        assert place in told.out
    assert "lorchestra chat runs/tiny/final/model" in told.out
    # What happened meanwhile is on standard error.
    assert "train general: step 4/4, training loss" in told.err
    assert "search weights: pass" in told.err
    assert "sealed test: item" in told.err
    assert "merge: 0.1 MB/0.1 MB" in told.err

    after = lorchestra("plan", "recipe.yaml", "--json")
    found = json.loads(after.out)
    assert {step["state"] for step in found["steps"]} == {"here", "each run", "cached"}
    answer = lorchestra("chat", "runs/tiny/final/model", "--prompt", "fever?", "--max-new-tokens", 3)
    assert answer.code == 0, answer.err


def test_what_is_settled_is_told_everywhere(lorchestra, recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("lora: {rank: 2, alpha: 4}\n", "lora: {alpha: 4}\n"))
    few = ("--set", "fusion.weights=equal", "--set", "deliver.merged=false", "--set", "evaluate.samples=0")
    lines = []
    for verb in ("check", "plan", "run"):
        told = lorchestra(verb, "recipe.yaml", *few)
        assert told.code == 0, told.err
        shown = [" ".join(line.split()) for line in (told.out + told.err).splitlines()]
        start = shown.index("not set, so settled from the examples (set a key to choose otherwise):")
        lines.append(" ".join(shown[start : start + 12]))
        for stage in ("general", "preference"):
            assert f"{stage}: lora.rank 8 (" in lines[-1], verb
            assert f"{stage}: lora.dropout 0.1 (" in lines[-1], verb
        assert "lora.alpha" not in lines[-1], "it is set"
        assert "learning_rate" not in lines[-1], "it is set"
        found = json.loads(lorchestra(verb, "recipe.yaml", "--json", *few).out)["suggestions"]
        assert [row["key"] for row in found["general"]] == ["lora.rank", "lora.dropout", "folds"]
    report = json.loads((tmp_path / "runs" / "tiny" / "report.json").read_text())
    assert [stage["lora"]["rank"] for stage in report["stages"]] == [8, 8]
    assert report["settings"]["lora"]["rank"] == "auto"
    assert report["settings"]["stages"][0]["lora"] == {"rank": 8, "dropout": 0.1}
    assert report["settled"]["general"]["lora.rank"].startswith("8 (")
    assert "settled.general.lora.rank" in (tmp_path / "runs" / "tiny" / "report.html").read_text()
    untold = lorchestra("plan", "recipe.yaml", "--set", "lora.rank=2", "--set", "lora.dropout=0")
    assert "lora.rank" not in untold.out
    assert "not set" not in untold.out


def test_run_prints_json(lorchestra, recipe, tmp_path):
    told = lorchestra("run", "recipe.yaml", "--run-dir", "elsewhere", "--json", "--set", "stages.0.max_steps=2",
                      "--set", "deliver.merged=false", "--set", "fusion.weights=last")  # fmt: skip
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert found["directory"] == str(tmp_path / "elsewhere")
    assert found["merged"] is None
    assert found["weights"] == {"general": 1.0, "preference": 1.0}
    assert set(found["digests"]) == {"general", "preference", "fused"}
    assert not (tmp_path / "elsewhere" / "final" / "model").exists()
    history = json.loads((tmp_path / "elsewhere" / "report.json").read_text())["stages"][0]["history"]
    assert len(history) == 2


def test_check_shows_the_data_as_training_sees_it(lorchestra, recipe, tmp_path):
    with (tmp_path / "general.jsonl").open("a") as out:
        first = (tmp_path / "general.jsonl").read_text().splitlines()[0]
        out.write(first + "\n")
        out.write(json.dumps({"prompt": "Escape \x1b[31m?", "completion": "x" * 200}) + "\n")
    told = lorchestra("check", "recipe.yaml")
    assert told.code == 0, told.err
    data = json.loads(lorchestra("check", "recipe.yaml", "--json").out)
    stage = data["stages"]["general"]
    rows = {" ".join(line.split()[:-3]): line.split()[-3:] for line in told.out.splitlines()[:8] if line.strip()}
    assert rows["examples"] == [str(stage["counts"][part]) for part in ("train", "validation", "test")]
    assert rows["groups"] == [str(stage["groups"][part]) for part in ("train", "validation", "test")]
    assert rows["tokens to learn"] == [str(stage["supervised"][part]) for part in ("train", "validation", "test")]
    assert sum(stage["counts"].values()) == 51
    assert "repeated and left out: 1;" in told.out
    assert "cut to max_length: 1 example, 1 answer" in told.out
    assert "an answer ends with <|im_end|>" in told.out
    assert "⟦Yes.<|im_end|>⟧" in told.out
    assert "⟦Noted.<|im_end|>⟧" in told.out
    assert "⟦lol ok<|im_end|>⟧" in told.out
    assert "\x1b" not in told.out
    for warning in data["warnings"]:
        assert warning in " ".join(told.out.split())


def test_plan_before_anything_is_fetched_says_why_it_knows_so_little(lorchestra, recipe):
    recipe.write_text(recipe.read_text().replace("base: ", "base: pip:nobody==1/nothing.gguf  # "))
    told = lorchestra("plan", "recipe.yaml")
    assert told.code == 0, told.err
    lines = told.out.splitlines()
    assert lines[1].startswith("Not here yet")
    assert lines[2] == "  base: 'pip:nobody==1/nothing.gguf' has not been fetched yet"
    heads = [line.split() for line in lines if line.startswith(("step ", "stage "))]
    assert heads == [["step", "after", "state"], ["stage", "examples", "steps", "scale"]]
    assert not any(line != line.rstrip() for line in lines)


def test_check_refuses_data_that_teaches_nothing(lorchestra, recipe, tmp_path):
    (tmp_path / "general.jsonl").write_text(json.dumps({"prompt": "a?", "completion": "b"}) + "\n")
    lorchestra("check", "recipe.yaml").refused("stage general: the", "part is empty")
    (tmp_path / "general.jsonl").write_text('{"prompt": "a?"')
    lorchestra("check", "recipe.yaml").refused("error: general.jsonl:1")


@pytest.mark.parametrize("verb", ["run", "plan", "check"])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_length", "max_lenght", "recipe.yaml:4: max_lenght: unknown key 'max_lenght'; did you mean 'max_length'?"),
        ("rank: 2", "rank: two", "recipe.yaml:6: lora.rank: expected a whole number, got 'two'"),
        ("{general: 1.0}", "{preference: 1}", "recipe.yaml:14: stages.1.context.preference: stage 'preference' cannot be"),
        ("{general: 1.0}", "{genral: 1}", "names no earlier stage or adapter; did you mean 'general'?"),
        ("max_length: 96", "max_length: 96\nmax_length: 9", "recipe.yaml:5: the key 'max_length' is here a second time"),
        ("lora: {rank: 2", "lora: {{rank: 2", "recipe.yaml:6: "),
        ("data: general.jsonl", "data: generl.jsonl", "recipe.yaml:10: stages.0.data: source 'generl.jsonl': there is no"),
        ("data: general.jsonl", "data: ${AWS_SECRET}/x", "recipe.yaml:10: stages.0.data: ${AWS_SECRET} may not be used"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe(verb, old, new, message, lorchestra, recipe):
    # A base that would have to be fetched: the mistake is found before that is tried.
    text = recipe.read_text().replace(old, new)
    assert text != recipe.read_text()
    recipe.write_text(text.replace("base: ", "base: hf:nobody/nothing  # "))
    told = lorchestra(verb, "recipe.yaml")
    told.refused(f"error: {message}" if message.startswith("recipe.yaml") else message)
    assert "fetch" not in told.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "nowhere.yaml"], ["there is no recipe nowhere.yaml; `lorchestra init` writes one"]),
        (["run", "."], ["is a directory; name the recipe in it (recipe.yaml)"]),
        (["run", "home"], ["there is no recipe home"]),
        (["plan", "general.jsonl"], ["general.jsonl is data, not a recipe; `lorchestra init --data general.jsonl` writes"]),
        (["run", "recipe.yaml", "--set", "stages.0.epoch=1"], ["--set stages.0.epoch=1: stages.0.epoch: unknown key 'epoch'; did you mean 'epochs'?"]),
        (["plan", "recipe.yaml", "--set", "epochs"], ["write key.path=value"]),
        (["run", "recipe.yaml", "--set", "device=cuda:0", "--set", "base=hf:nobody/nothing"], ["device 'cuda:0' is not available here"]),
        (["plan", "recipe.yaml", "--set", "device=cuda:0"], ["device 'cuda:0' is not available here"]),
        (["plan", "recipe.yaml", "--set", "lora.target_modules=[q_pro]"], ["did you mean 'q_proj'?"]),
        (["run"], ["Missing argument 'RECIPE'"]),
        (["run", "recipe.yaml", "--sett", "a=1"], ["No such option: --sett", "--set"]),
        (["rnu", "recipe.yaml"], ["No such command 'rnu'", "run"]),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line(argv, words, lorchestra, recipe, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lorchestra(*argv).refused(*words)


def test_a_run_directory_in_use_is_refused(lorchestra, recipe, tmp_path):
    from filelock import FileLock

    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    with FileLock(tmp_path / "runs" / "tiny" / ".lock"):
        lorchestra("run", "recipe.yaml").refused("is in use by", "--wait or another --run-dir")


def test_ctrl_c_says_how_to_go_on(lorchestra, recipe, tmp_path):
    events = tmp_path / "runs" / "tiny" / "events.jsonl"
    done = threading.Event()

    def interrupt():
        while not done.is_set():
            if events.exists() and '"train_step"' in events.read_text():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        argv = ("run", "recipe.yaml", "--set", "train.max_steps=2000", "--set", "train.checkpoint_every=1")
        told = lorchestra(*argv)
    finally:
        done.set()
        watcher.join()
    assert told.code == 130
    assert told.out == ""
    assert "the same command goes on from there" in told.err.splitlines()[-1]
    assert "Traceback" not in told.err
    again = lorchestra("plan", *argv[1:], "--json")
    assert next(s for s in json.loads(again.out)["steps"] if s["name"] == "general")["state"] in ("begun", "to do")


VERBS = sorted(str(command.name) for command in app.registered_commands)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_examples(verb, lorchestra):
    told = lorchestra(verb, "--help")
    assert told.code == 0
    assert "Example" in told.out
    assert f"lorchestra {verb}" in told.out


def test_without_a_verb_there_is_help(lorchestra):
    told = lorchestra()
    assert told.code in (0, 2)
    for verb in VERBS:
        assert f" {verb} " in told.out + told.err


def shell(*argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_a_real_process_refuses_a_recipe_quickly_and_plainly(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("rank", "rnak"))
    ended = shell("-X", "importtime", "-m", "lorchestra", "run", "recipe.yaml", cwd=tmp_path)
    assert ended.returncode == 2
    said = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
    assert said == ["error: recipe.yaml:6: lora.rnak: unknown key 'rnak'; did you mean 'rank'?"]
    assert ended.stdout == ""
    for heavy in ("torch", "transformers", "numpy", "datasets"):
        assert not any(line.rstrip().endswith(f"| {heavy}") for line in ended.stderr.splitlines())


def test_a_terminal_without_unicode_gets_the_message_all_the_same(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("rank", "räng"))
    ended = shell("-m", "lorchestra", "run", "recipe.yaml", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: recipe.yaml:6: lora.r?ng: unknown key 'r?ng'")


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, lorchestra.cli.app as a\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pandas', 'datasets', 'pydantic', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = shell("-c", code, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_tab_completes_verbs_and_options(tmp_path):
    def complete(words: str) -> str:
        asked = {"_LORCHESTRA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        code = "from lorchestra.cli.app import app; app(prog_name='lorchestra')"
        return shell("-c", code, cwd=tmp_path, **asked).stdout

    assert {"merge", "merge-lora"} <= set(complete("lorchestra mer").split())
    assert "--run-dir" in complete("lorchestra run --").split()
