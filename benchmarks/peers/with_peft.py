"""The side of transformers and PEFT in ``benchmarks/serve.py``: ``generate``, a mixed batch, loading an adapter.

It runs where lorchestra runs, in a process of its own, and is asked line by line::

    python benchmarks/peers/with_peft.py JOB [--threads N]
    {"do": "generate", "prompts": [[…]], "new": 48}                     one after the other, the base alone
    {"do": "mixed", "prompts": [[…], …], "adapters": ["a0000", …], "new": 48}   one batch, a row each its own adapter
    {"do": "load", "adapters": ["a0000", …], "low": true}                seconds of each ``load_adapter``
    {"do": "switch", "adapters": [...]}                                  seconds of each ``set_adapter``

``JOB`` is what ``benchmarks/serve_parts.py`` writes. Every answer is a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer until the input ends."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("job", type=Path)
    options.add_argument("--threads", type=int, default=2)
    asked = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(asked.threads)
    side = Side(json.loads(asked.job.read_text(encoding="utf-8")))
    answer({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        answer(getattr(side, order.pop("do"))(**order))


def answer(value: Any) -> None:
    """A line for the one who asked."""
    print(json.dumps(value), flush=True)


class Side:
    """A base in bfloat16, and PEFT's model around it as soon as an adapter is loaded."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.adapters = Path(job["adapters"])
        self.base: Any = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.bfloat16).eval()
        self.model: Any = None

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
        """One stream after the other, greedy."""
        if self.model is not None:
            raise SystemExit("the base is wrapped already; ask for this before an adapter is loaded")
        rows = [self._timed(self.base, [prompt], new) for prompt in prompts]
        return {"rows": rows, "new": new}

    def mixed(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str], new: int) -> dict[str, Any]:
        """One batch; row i with adapter i (PEFT's ``adapter_names``)."""
        row = self._timed(self.model, prompts, new, adapter_names=list(adapters))
        return {"rows": [row], "new": new, "batch": len(prompts)}

    def load(self, adapters: Sequence[str], low: bool = False) -> list[float]:
        """``low``: PEFT's ``low_cpu_mem_usage``, which does not draw weights that are read anyway."""
        from peft import PeftModel

        seconds = []
        for name in adapters:
            started = time.perf_counter()
            place = str(self.adapters / name)
            if self.model is None:
                self.model = PeftModel.from_pretrained(self.base, place, adapter_name=name, low_cpu_mem_usage=low)
            else:
                self.model.load_adapter(place, adapter_name=name, low_cpu_mem_usage=low)
            seconds.append(time.perf_counter() - started)
        self.model.eval()
        return seconds

    def switch(self, adapters: Sequence[str]) -> list[float]:
        """``set_adapter`` of each in turn."""
        seconds = []
        for name in adapters:
            started = time.perf_counter()
            self.model.set_adapter(name)
            seconds.append(time.perf_counter() - started)
        return seconds

    def _timed(self, model: Any, prompts: Sequence[Sequence[int]], new: int, **more: Any) -> dict[str, Any]:
        """Seconds from the call to every token, by a stopping criterion that stops nothing."""
        import torch
        from transformers import StoppingCriteria

        times: list[float] = []

        class Clock(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
                times.append(time.perf_counter())
                return torch.zeros(ids.shape[0], dtype=torch.bool)

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0, stopping_criteria=[Clock()], **more,
            )  # fmt: skip
        seconds = time.perf_counter() - started
        if out.shape[1] != longest + new:
            raise SystemExit(f"generate made {out.shape[1] - longest} tokens, and {new} were asked for")
        return {"seconds": seconds, "tokens": [moment - started for moment in times]}


if __name__ == "__main__":
    main()
