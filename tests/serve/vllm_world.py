"""For the tests of the vLLM path: adapters, their references by PEFT alone, and a server that speaks as vLLM does."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.serve import wire
from lorchestra.serve.engine import Call, Served, Target
from lorchestra.serve.vllm_process import _free_port

LIKE = Path(__file__).parent / "vllm_like"
PROMPT = "Fever and cough"
TOKENS = 6


def peft_adapter(model, directory, rank, seed, rslora=False, alpha=None):
    """A directory that PEFT itself writes, B not zero; and the model with it merged by PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha or rank, use_rslora=rslora, target_modules="all-linear")
    peft = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    peft.save_pretrained(directory)
    return peft.eval().merge_and_unload()


def served(name, directory, **more):
    return Served(name, Adapter.load(directory).digest, Path(directory), **more)


def mixed(base, merged, weights):
    """W + Σ λᵢ (Wᵢ − W) in float64, back in a model."""
    out = copy.deepcopy(base)
    state = base.state_dict()
    found = [model.state_dict() for model in merged]
    sums = {
        name: (
            value.double()
            + sum(w * (state_i[name].double() - value.double()) for w, state_i in zip(weights, found, strict=True))
        ).float()
        for name, value in state.items()
    }
    out.load_state_dict(sums)
    return out


@torch.no_grad()
def greedy(model, tokenizer, prompt=PROMPT, count=TOKENS, whole=False):
    """Text and log-probabilities of ``count`` likeliest tokens; each a text of its own, or the ``whole``."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    words, probabilities = [], []
    for _ in range(count):
        spread = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
        ids.append(int(spread.argmax()))
        words.append(tokenizer.decode(ids[-1:]))
        probabilities.append(float(spread.max()))
    return tokenizer.decode(ids[-count:]) if whole else "".join(words), probabilities


def completion(target, tenant="t", **fields):
    asked = {"model": target.asked, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1} | fields
    return Call("r", tenant, target, wire.parse(wire.CompletionRequest, asked))


def chat(target, tenant="t", **fields):
    asked = {"model": target.asked, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3} | fields
    return Call("r", tenant, target, wire.parse(wire.ChatRequest, asked))


class Like:
    """A running server that speaks as vLLM does."""

    def __init__(self, base, **variables):
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "PYTHONPATH": str(LIKE), **{k: str(v) for k, v in variables.items()}}
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"),
                *("--port", str(port), "--model", str(base), "--served-model-name", "tiny", "--max-lora-rank", "16"),
                *("--max-model-len", "256", "--enable-lora"),
            ],
            env=environment,
        )

    def wait(self):
        for _ in range(600):
            assert self.process.poll() is None, "it ended"
            try:
                httpx2.get(self.url + "/health", trust_env=False)
                return self
            except httpx2.TransportError:
                time.sleep(0.1)
        raise AssertionError("it does not answer")

    def get(self, path):
        return httpx2.get(self.url + path, trust_env=False).json()

    def log(self, what):
        return [entry for entry in self.get("/test/log") if entry["what"] == what]

    def stop(self):
        self.process.kill()
        self.process.wait()


def base_target():
    return Target("tiny")


def one(adapter):
    return Target(adapter.name, ((adapter, 1.0),))


def mixture(*members):
    return Target("+".join(f"{a.name}={w}" for a, w in members), tuple(members))
