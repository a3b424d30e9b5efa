"""ms-swift's side of ``benchmarks/train.py``: ``swift sft`` and ``swift rlhf`` (DPO), in an environment apart.

::

    python3 -m venv .venv-swift
    .venv-swift/bin/pip install 'torch>=2.6,<2.14' ms-swift==4.6.0
    .venv-swift/bin/python benchmarks/peers/with_swift.py JOB OUT [--seed N] [--threads N]

``JOB`` is what ``benchmarks/train.py`` writes. ms-swift takes text, so the job's ids are turned back into text
that is rendered already; what it makes of it is compared with the job. The last line printed is the result, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> None:
    """Train; the adapter goes to ``OUT/adapter``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("job", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=2)
    asked = options.parse_args()
    job = json.loads(asked.job.read_text(encoding="utf-8"))
    asked.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "USE_HF": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory(dir=asked.out) as scratch:
        os.environ["HF_DATASETS_CACHE"] = scratch
        import torch

        torch.set_num_threads(asked.threads)
        print("\n" + json.dumps(train(job, asked, Path(scratch))))


def conversations(job: Mapping[str, Any], decode: Any) -> list[dict[str, Any]]:
    """The items as ms-swift takes them; its template ends an answer with the end-of-turn token, which is taken off."""
    rows = []
    for item in job["items"]:
        texts = [decode(ids[:-1]) for ids in item["answers"]]
        turns = [{"role": "user", "content": decode(item["prompt"])}, {"role": "assistant", "content": texts[0]}]
        rows.append({"messages": turns} | ({"rejected_response": texts[1]} if job["task"] == "dpo" else {}))
    return rows


def arguments(job: Mapping[str, Any], data: Path, out: Path, seed: int) -> dict[str, Any]:
    """Of the command line: the job's settings, and what is fastest here."""
    train, lora = job["train"], job["lora"]
    batches = -(-len(job["items"]) // train["batch_size"])
    steps = train["max_steps"] or max(1, round(train["epochs"] * batches))
    if lora["init"] != "kaiming" or lora["scaling"] == "constant" or train["gradient_accumulation"] != 1:
        raise ValueError(f"expected an adapter that starts as PEFT's does, and no accumulation; got {lora}, {train}")
    found = {
        "model": job["base"], "model_type": "llama", "template": "dummy", "dataset": data, "output_dir": out,
        "tuner_type": "lora", "target_modules": "all-linear", "torch_dtype": "bfloat16", "bf16": True,
        "lora_rank": lora["rank"], "lora_alpha": round(lora["alpha"]), "lora_dropout": lora["dropout"],
        "use_rslora": lora["scaling"] == "rslora", "max_steps": steps,
        "per_device_train_batch_size": train["batch_size"], "gradient_accumulation_steps": 1,
        "learning_rate": train["learning_rate"], "lr_scheduler_type": train["scheduler"],
        "warmup_steps": round(train["warmup_ratio"] * steps), "weight_decay": train["weight_decay"],
        "max_grad_norm": train["max_grad_norm"], "adam_beta2": 0.999, "gradient_checkpointing": False,
        "group_by_length": True, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
        "split_dataset_ratio": 0, "dataloader_num_workers": 0, "dataset_num_proc": 1, "report_to": "none",
        "max_length": 4096, "use_cpu": True, "seed": seed,
    }  # fmt: skip
    if job["task"] == "dpo":
        found |= {"rlhf_type": "dpo", "beta": job["objective"]["beta"], "loss_type": job["objective"]["loss"]}
    return found


def train(job: Mapping[str, Any], asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One training; seconds are those of ``trainer.train()``, from call to return."""
    from importlib.metadata import version

    from swift.pipelines.train.rlhf import SwiftRLHF
    from swift.pipelines.train.sft import SwiftSft
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    rows = conversations(job, tokenizer.decode)
    data = scratch / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = arguments(job, data, scratch / "out", asked.seed)
    spent: list[tuple[float, float]] = []
    trainers: list[Any] = []

    class Timed(SwiftSft if job["task"] == "sft" else SwiftRLHF):  # type: ignore[misc]
        def train(self, trainer: Any) -> Any:
            inner = trainer.train

            def timed(*positional: Any, **named: Any) -> Any:
                started, used = time.perf_counter(), time.process_time()
                result = inner(*positional, **named)
                spent.append((time.perf_counter() - started, time.process_time() - used))
                return result

            trainer.train = timed
            trainers.append(trainer)
            check_tokens(trainer, job)
            return super().train(trainer)

    Timed([word for key, value in settings.items() for word in (f"--{key}", str(value))]).main()
    (trainer,) = trainers
    trainer.model.save_pretrained(asked.out / "adapter")
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    return {
        "seconds": spent[0][0],
        "processor_seconds": spent[0][1],
        "steps": trainer.state.global_step,
        "losses": losses,
        "first_loss": losses[0],
        "settings": {
            key: str(value) for key, value in settings.items() if key not in ("model", "dataset", "output_dir")
        },
        "versions": {name: version(name) for name in ("ms-swift", "trl", "torch", "transformers", "peft")},
    }


def check_tokens(trainer: Any, job: Mapping[str, Any]) -> None:
    """What ms-swift made of the text is the job's ids.

    Raises:
        SystemExit: it is not.
    """
    found, wanted = [], []
    for row in trainer.train_dataset:
        keys = ("input_ids",) if job["task"] == "sft" else ("chosen_input_ids", "rejected_input_ids")
        found.append(tuple(tuple(row[key]) for key in keys))
    for item in job["items"]:
        wanted.append(tuple(tuple(item["prompt"] + ids) for ids in item["answers"]))
    if sorted(found) != sorted(wanted):
        raise SystemExit(f"ms-swift holds other token ids than the job: {found[0]}")


if __name__ == "__main__":
    main()
