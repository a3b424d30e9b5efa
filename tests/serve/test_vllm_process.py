"""The command line that vLLM is started with, and which engine is the default."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from lorchestra.errors import UserError
from lorchestra.serve.vllm_process import (
    Launch,
    command_line,
    default_engine,
    printed,
    slot_rank,
)


def test_the_rank_is_rounded_up_to_one_that_vllm_takes(tmp_path):
    assert [slot_rank(rank) for rank in (1, 2, 8, 9, 200, 512)] == [1, 8, 8, 16, 256, 512]
    for rank in (0, 513):
        with pytest.raises(UserError, match=f"got {rank}"):
            Launch(tmp_path, max_rank=rank)
    with pytest.raises(UserError, match="9 and 8"):
        Launch(tmp_path, max_loras=9, max_cpu_loras=8)


def test_vllms_own_arguments_say_how_much_room_there_is(tmp_path):
    launch = Launch.read(tmp_path, ["--max-loras", "90", "--max-lora-rank=64", "--x", "1"], python="p")
    assert (launch.max_loras, launch.max_cpu_loras, launch.max_rank) == (90, 90, 64)
    assert (launch.arguments, launch.python) == (("--x", "1"), "p")
    assert Launch.read(tmp_path, []) == Launch(tmp_path)
    for arguments in (["--max-loras", "many"], ["--max-lora-rank", "1000"], ["--port", "1"], ["--served_model_name=x"]):
        with pytest.raises(UserError):
            Launch.read(tmp_path, arguments)


def test_the_command_can_be_pasted_into_a_shell(tmp_path):
    base = tmp_path / "a base's directory"
    base.mkdir()
    launch = Launch(base, python=sys.executable, max_rank=20, max_length=100, arguments=["--x", "a b"],
                    environment={"Y": "it's"})  # fmt: skip
    line = printed(launch, 1234)
    script = "import os,sys;print(os.environ['Y'],os.environ['VLLM_ALLOW_RUNTIME_LORA_UPDATING'],*sys.argv[1:],sep='|')"
    shown = line.replace("-m vllm.entrypoints.openai.api_server", f"-c {shlex.quote(script)}")
    out = subprocess.run(shown, shell=True, capture_output=True, text=True, check=True).stdout.strip().split("|")
    assert out == ["it's", "True", *command_line(launch, 1234)[3:]]
    assert out[out.index("--max-lora-rank") + 1] == "32"
    assert out[out.index("--model") + 1] == str(base)


def test_vllm_is_the_default_only_where_it_is_and_cuda_is():
    import importlib.util

    import torch

    both = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()
    assert default_engine() == ("vllm" if both else "embedded")
