"""Every benchmark runs from end to end in its short form, prints its table, and leaves the committed figures alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# What stands in the table of each.
ROWS = {
    "fusion": ("| PEFT linear | rsLoRA |", "| lorchestra, applied by PEFT | LoRA |", "lorchestra from the optimum"),
    "gate": (
        "| gate |", "| router, nearest prototype |", "| naive Bayes on words |", "| static |", "| oracle |",
        "| 1.000 |", "The gate is ", "| 512 |", "| 10 |",
    ),
    "linear": ("| q, k, v | 57 |", "| o | 256 |"),
    "merge": ("| lorchestra |", "| PEFT |", "| yes, all 21 |"),
    "search": ("| PEFT `cat`, scored plainly |", "| gradient |", "| grid |"),
    "serve": (
        "| lorchestra | an adapter each |", "| PEFT | an adapter each |", "| transformers | the base alone |",
        "| lorchestra, first use |", "| lorchestra | Zipf, exponent 1 |",
    ),
    "train": ("| sft | bound |", "| sft | lorchestra |", "| dpo | bound |", "| dpo | lorchestra |"),
}  # fmt: skip


def committed(benchmarks):
    return {path: path.read_bytes() for path in (benchmarks / "results").rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_short_form(name, benchmarks, tmp_path):
    figures = committed(benchmarks)
    command = [sys.executable, str(benchmarks / f"{name}.py"), "--short", "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    for row in ROWS[name]:
        assert row in done.stdout
    assert committed(benchmarks) == figures
    if name == "train":
        assert "TRL is left out: --peer-python names no python that has it" in done.stderr
        assert "TRL" not in done.stdout.replace("× TRL", "")
