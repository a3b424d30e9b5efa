"""The one judge of all sides in ``benchmarks/train.py``: plain transformers and PEFT, float32, one item at a time.

::

    python benchmarks/peers/scorer.py JOB ADAPTER [ADAPTER …]

Each ``ADAPTER`` is a PEFT directory on the job's base (its weights rounded to bfloat16, as they were trained on). For
SFT: mean negative log-likelihood of a supervised token, in nats. For DPO: mean sigmoid loss of a pair against the bare
base. The last line printed is a JSON list, ``{"train": …, "validation": …}`` for each adapter. Nothing of lorchestra is
imported.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

Item = Mapping[str, Any]


def main() -> None:
    """Score, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("job", type=Path)
    options.add_argument("adapters", type=Path, nargs="+")
    options.add_argument("--items", type=int, default=32, help="the first so many of training, and of validation")
    options.add_argument("--threads", type=int, default=2)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    job = json.loads(asked.job.read_text(encoding="utf-8"))
    parts = {"train": job["items"][: asked.items], "validation": job["validation"][: asked.items]}
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.bfloat16).float().eval()
    found = []
    with torch.no_grad():
        if job["task"] == "dpo":
            bare = {part: [sums(base, item) for item in items] for part, items in parts.items()}
        for adapter in asked.adapters:
            model = PeftModel.from_pretrained(base, adapter).eval()
            if job["task"] == "sft":
                found.append({part: sft_loss(model, items) for part, items in parts.items()})
            else:
                beta = job["objective"]["beta"]
                found.append({part: dpo_loss(model, items, bare[part], beta) for part, items in parts.items()})
            base = model.unload()
    print(json.dumps(found))


def sums(model: Any, item: Item) -> list[float]:
    """Σ log p of each answer's supervised tokens."""
    out = []
    for answer, mask in zip(item["answers"], item["supervised"], strict=True):
        ids = torch.tensor([item["prompt"] + answer])
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        out.append(float((picked.double() * torch.tensor(mask)).sum()))
    return out


def sft_loss(model: Any, items: Sequence[Item]) -> float:
    """−Σ log p over supervised tokens, divided by their number."""
    return -sum(sum(sums(model, item)) for item in items) / sum(sum(map(sum, item["supervised"])) for item in items)


def dpo_loss(model: Any, items: Sequence[Item], bare: Sequence[Sequence[float]], beta: float) -> float:
    """Mean of −log σ(β·((chosen − rejected) − the bare base's))."""
    total = 0.0
    for item, reference in zip(items, bare, strict=True):
        chosen, rejected = sums(model, item)
        margin = (chosen - rejected) - (reference[0] - reference[1])
        total -= float(torch.nn.functional.logsigmoid(torch.tensor(beta * margin, dtype=torch.float64)))
    return total / len(items)


if __name__ == "__main__":
    main()
