"""The engine in front of a real vLLM, and the resolver inside it: ``python scripts/vllm_tests.py``.

One vLLM is started for all of it, and killed once; answers are compared with models that PEFT merged, in float32.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal

import httpx2
import pytest
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.serve.vllm_world import PROMPT, base_target, chat, completion, greedy, mixed, mixture, one, peft_adapter
from tests.serve.vllm_world import served as known

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import AdapterError
from lorchestra.serve.engine import RequestError, StoppingError
from lorchestra.serve.vllm import VllmEngine
from lorchestra.serve.vllm_process import Launch

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
WITHIN = 2e-3  # of a log-probability: sums in another order, float32
# Heads of a size that vLLM has kernels for.
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def python():
    """The python of vLLM's environment."""
    found = os.environ.get("LORCHESTRA_VLLM_PYTHON")
    if not found:
        pytest.skip("LORCHESTRA_VLLM_PYTHON is not set; run python scripts/vllm_tests.py")
    return found


@pytest.fixture(scope="module")
def world(python, tmp_path_factory):
    """A base, adapters by PEFT, targets and their greedy answers."""
    root = tmp_path_factory.mktemp("world")
    base, tokenizer = make_tiny_model(**SHAPE), make_tiny_tokenizer()
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    (root / "loras" / "team").mkdir(parents=True)
    merged = {
        "plain": peft_adapter(base, root / "plain", 4, 1),
        "strong": peft_adapter(base, root / "loras" / "team" / "strong", 4, 2, rslora=True, alpha=6),
    }
    plain, strong = known("plain", root / "plain"), known("strong", root / "loras" / "team" / "strong")
    targets = {
        "base": base_target(),
        "plain": one(plain),
        "strong": one(strong),
        "mixture": mixture((plain, 0.6), (strong, -0.4)),
    }
    models = {"base": base, **merged, "mixture": mixed(base, merged.values(), (0.6, -0.4))}
    answers = {name: greedy(model, tokenizer, whole=True) for name, model in models.items()}
    assert len({text for text, _ in answers.values()}) == 4, "answers that cannot be told apart"
    update = next(iter(Adapter.load(root / "plain").modules.values()))
    Adapter({"transformer.h.0.attn": update}).save(root / "loras" / "elsewhere")
    (root / "loras" / "broken").mkdir()
    (root / "loras" / "broken" / "adapter_config.json").write_text("{")
    return root, targets, answers


def test_a_real_vllm_answers_as_merged_models_do_and_goes_on_after_a_kill(python, world, tmp_path):
    root, targets, answers = world
    # Fewer slots than adapters: all are taken, the last one too, which vLLM's CPU kernels would give the base.
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "LORCHESTRA_LORA_ROOT": str(root / "loras")}
    launch = Launch(root / "base", python, max_loras=2, max_rank=8, max_length=256, dtype="float32",
                    environment=variables)  # fmt: skip
    it = VllmEngine(launch, BaseId("tiny"), root=tmp_path)

    async def compare():
        names = [name for name in targets for _ in range(3)]
        got = await asyncio.gather(*(it.answer(completion(targets[name], ignore_eos=True)) for name in names))
        for name, answer in zip(names, got, strict=True):
            text, logprobs = answers[name]
            # Half a character at the end is left out of the text.
            assert (name, answer.choices[0]["text"].rstrip("\ufffd")) == (name, text.rstrip("\ufffd"))
            assert answer.choices[0]["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=WITHIN)
            assert answer.usage.generated == 6

    async def beside():
        """Everything but the answers."""
        parts = [part async for part in it.stream(completion(targets["mixture"], stream=True, ignore_eos=True))]
        text = "".join(choice["text"] for part in parts for choice in part.choices)
        assert text.rstrip("\ufffd") == answers["mixture"][0].rstrip("\ufffd")
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                  "additionalProperties": False}  # fmt: skip
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        asked = chat(targets["strong"], response_format=form, max_tokens=60, temperature=0)
        assert json.loads((await it.answer(asked)).choices[0]["message"]["content"])["a"] in (1, 2)
        with pytest.raises(RequestError, match="maximum context length"):
            await it.answer(completion(targets["plain"], prompt="x" * 300))
        if it.servers[0].child.on_cpu:  # where vLLM would end
            with pytest.raises(RequestError, match="score a prompt"):
                await it.answer(completion(targets["plain"], echo=True))
        elsewhere = known("elsewhere", root / "loras" / "elsewhere")
        with pytest.raises(AdapterError, match="does not have"):
            await it.answer(completion(one(elsewhere)))

    async def resolved():
        """Our resolver, asked past the engine."""
        child = it.servers[0].child
        headers = {"Authorization": f"Bearer {child.api_key}"}
        asked = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        async with httpx2.AsyncClient(headers=headers, trust_env=False, timeout=60) as client:
            for name, status in (("team/strong", 200), ("elsewhere", 404), ("broken", 404), ("team/../broken", 404)):
                got = await client.post(child.url + "/v1/completions", json={**asked, "model": name})
                assert (name, got.status_code) == (name, status)
                if status == 200:
                    assert got.json()["choices"][0]["text"].rstrip("\ufffd") == answers["strong"][0].rstrip("\ufffd")
            assert (await client.get(child.url + "/health")).status_code == 200

    async def main():
        await it.start()
        try:
            await compare()
            await beside()
            await resolved()
            resident, child = it.resident(), it.servers[0].child
            running = asyncio.create_task(it.answer(completion(targets["plain"], max_tokens=230, ignore_eos=True)))
            await asyncio.sleep(0.3)
            os.kill(child.pid, signal.SIGKILL)
            with pytest.raises(StoppingError):
                await running
            while it.ready:
                await asyncio.sleep(0.05)
            while not it.ready:
                await asyncio.sleep(0.2)
            assert it.resident() == resident
            await compare()
            await it.unload(targets["plain"].single)
            assert it.resident() == [targets["strong"].single.key]
        finally:
            await it.stop(1.0)

    asyncio.run(asyncio.wait_for(main(), 600))
    assert not list(tmp_path.iterdir())
