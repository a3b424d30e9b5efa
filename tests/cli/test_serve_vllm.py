"""``lorchestra serve --engine vllm`` from the command line to the official client."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

import httpx2
import openai
import pytest
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.serve.vllm_world import PROMPT, Like, greedy, mixed, peft_adapter
from typer.testing import CliRunner

from lorchestra.cli.app import app
from lorchestra.serve.vllm_process import _free_port


def test_print_command_prints_what_starts_a_vllm_for_us(tiny_dir, tmp_path):
    asked = [
        "serve",
        str(tiny_dir),
        "--engine",
        "vllm",
        "--print-command",
        "--max-length",
        "100",
        "--vllm-python",
        "py",
    ]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0
    words = shlex.split(told.stdout)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in words
    assert words[words.index("--model") + 1] == str(tiny_dir)
    assert words[words.index("--max-model-len") + 1] == "100"
    config = tmp_path / "serve.yaml"
    config.write_text(f"base: {tiny_dir}\nengine: vllm\nvllm_arguments: [--max-lora-rank, '20', --seed, '1']\n")
    told = CliRunner().invoke(app, ["serve", "--config", str(config), "--print-command"])
    words = shlex.split(told.stdout)
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert words[-2:] == ["--seed", "1"]


@pytest.mark.slow
def test_the_official_client_gets_a_mixture_through_us_from_vllm(tiny_dir, tmp_path):
    base, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    merged = [peft_adapter(base, tmp_path / name, 4, seed) for seed, name in enumerate(("a", "b"))]
    like = Like(tiny_dir)
    port = _free_port()
    command = [sys.executable, "-m", "lorchestra", "serve", str(tiny_dir), "--engine", "vllm", "--vllm-url", like.url,
               "--adapter", f"a={tmp_path / 'a'}", "--adapter", f"b={tmp_path / 'b'}", "--port", str(port)]  # fmt: skip
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(900):
            assert server.poll() is None
            try:
                if httpx2.get(f"{url}/ready", trust_env=False).status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=None, max_retries=0)
        asked = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        answer = client.completions.create(model="a=0.6+b=-0.4", **asked)
        assert answer.choices[0].text == greedy(mixed(base, merged, (0.6, -0.4)), tokenizer)[0]
        assert (answer.model, answer.usage.completion_tokens) == ("a=0.6+b=-0.4", 6)
        parts = client.completions.create(model="b", stream=True, **asked)
        assert "".join(part.choices[0].text for part in parts if part.choices) == greedy(merged[1], tokenizer)[0]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="c", **asked)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
        like.stop()
