"""TRL's side of ``benchmarks/train.py``: SFTTrainer and DPOTrainer, in an environment of their own.

::

    python3 -m venv .venv-trl
    .venv-trl/bin/pip install 'torch>=2.6,<2.14' trl==1.16.0 peft==0.21.2 transformers==5.23.0
    .venv-trl/bin/python benchmarks/peers/with_trl.py JOB OUT [--seed N] [--threads N] [--no-autocast] [--checkpointing]

``JOB`` is what ``benchmarks/train.py`` writes (see ``benchmarks/train_parts.py``): the very token ids that lorchestra
trains on. The last line printed is the result, as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
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
    options.add_argument("--no-autocast", action="store_true", help="bf16=False: the bfloat16 base, no autocast")
    options.add_argument("--checkpointing", action="store_true", help="gradient_checkpointing=True, TRL's default")
    asked = options.parse_args()
    job = json.loads(asked.job.read_text(encoding="utf-8"))
    asked.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory(dir=asked.out) as cache:
        os.environ["HF_DATASETS_CACHE"] = cache  # reference log-probabilities are cached there: none of an earlier run
        import torch

        torch.set_num_threads(asked.threads)
        print(json.dumps(train(job, asked, cache)))


# ---- the same tokens (needs no library)


def sft_rows(items: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as SFTTrainer takes data that is already tokenised."""
    return [
        {
            "input_ids": item["prompt"] + item["answers"][0],
            "completion_mask": [0] * len(item["prompt"]) + item["supervised"][0],
            "length": len(item["prompt"]) + len(item["answers"][0]),
        }
        for item in items
    ]


def dpo_rows(items: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as DPOTrainer holds them after tokenising. It supervises every token of both answers.

    Raises:
        ValueError: an item that does not supervise all of its answers.
    """
    if not all(all(mask) for item in items for mask in item["supervised"]):
        raise ValueError("DPOTrainer supervises whole answers; an item here supervises a part of one")
    return [
        {
            "prompt_ids": item["prompt"],
            "chosen_ids": item["answers"][0],
            "rejected_ids": item["answers"][1],
            "length": len(item["prompt"]) + max(map(len, item["answers"])),
        }
        for item in items
    ]


def steps_of_an_epoch(job: Mapping[str, Any]) -> int:
    """Optimiser steps in which every item is seen once."""
    batches: int = math.ceil(len(job["items"]) / job["train"]["batch_size"])
    accumulation: int = job["train"]["gradient_accumulation"]
    return math.ceil(batches / accumulation)


def settings_of(job: Mapping[str, Any], seed: int, autocast: bool, checkpointing: bool) -> dict[str, Any]:
    """Arguments of SFTConfig and DPOConfig: the job's settings, and what is fastest here."""
    train, lora = job["train"], job["lora"]
    steps = train["max_steps"] or max(1, round(train["epochs"] * steps_of_an_epoch(job)))
    if lora["init"] != "kaiming" or lora["scaling"] == "constant" or lora["target_modules"] != "all-linear":
        raise ValueError(
            f"expected an adapter that PEFT's LoraConfig can say as all-linear kaiming; the job has {lora}"
        )
    return {
        "per_device_train_batch_size": train["batch_size"],
        "gradient_accumulation_steps": train["gradient_accumulation"],
        "max_steps": steps,
        "learning_rate": train["learning_rate"],
        "lr_scheduler_type": train["scheduler"],
        "warmup_steps": round(train["warmup_ratio"] * steps),
        "weight_decay": train["weight_decay"],
        "max_grad_norm": train["max_grad_norm"],
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "group_by_length",
        "gradient_checkpointing": checkpointing,
        "bf16": autocast,
        "max_length": None,  # the renderer has cut the items
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "use_cpu": True,
        "seed": seed,
        "model_init_kwargs": {"dtype": job.get("dtype", "bfloat16")},
    }


# ---- training


def train(job: Mapping[str, Any], asked: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """One training; seconds are those of ``trainer.train()`` and of precomputing references, from call to return."""
    from importlib.metadata import version

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    settings = settings_of(job, asked.seed, not asked.no_autocast, asked.checkpointing)
    lora = job["lora"]
    adapter = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        use_rslora=lora["scaling"] == "rslora",
        lora_dropout=lora["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    more: dict[str, Any] = {"processing_class": AutoTokenizer.from_pretrained(job["base"]), "peft_config": adapter}
    spent = [0.0, 0.0]

    class Pretokenised(DPOTrainer):  # type: ignore[misc]
        # It has no door for token ids, so they come in where its own tokenising would end.
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            started, used = time.perf_counter(), time.process_time()
            found = super()._precompute_ref_logps(*arguments)
            spent[:] = spent[0] + time.perf_counter() - started, spent[1] + time.process_time() - used
            return found

    trainer: Any
    if job["task"] == "sft":
        args = SFTConfig(scratch, completion_only_loss=True, remove_unused_columns=False, **settings)
        trainer = SFTTrainer(job["base"], args=args, train_dataset=Dataset.from_list(sft_rows(job["items"])), **more)
    else:
        objective = job["objective"]
        own = {
            "beta": objective["beta"],
            "loss_type": [objective["loss"]],
            "precompute_ref_log_probs": settings["max_steps"] > steps_of_an_epoch(job),
            "remove_unused_columns": False,
        }
        args = DPOConfig(scratch, **own, **settings)
        trainer = Pretokenised(job["base"], args=args, train_dataset=Dataset.from_list(dpo_rows(job["items"])), **more)
        settings |= own
    trainer.remove_callback(PrinterCallback)
    check_tokens(trainer, job)
    started, used = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, processor = time.perf_counter() - started + spent[0], time.process_time() - used + spent[1]
    trainer.model.save_pretrained(asked.out / "adapter")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "seconds_for_references": spent[0],
        "steps": trainer.state.global_step,
        "losses": losses,
        "first_loss": losses[0],
        "settings": settings,
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "peft")},
    }


def check_tokens(trainer: Any, job: Mapping[str, Any]) -> None:
    """What the trainer's own collator makes of its data set has as many tokens, and as many supervised, as the job.

    Raises:
        SystemExit: it has not.
    """
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    counted = batch["labels"].ne(-100) if job["task"] == "sft" else batch["completion_mask"]
    found = int(batch["attention_mask"].sum()), int(counted.sum())
    items = job["items"]
    tokens = sum(len(item["prompt"]) * len(item["answers"]) + sum(map(len, item["answers"])) for item in items)
    supervised = sum(sum(map(sum, item["supervised"])) for item in items)
    if found != (tokens, supervised):
        raise SystemExit(f"TRL holds {found} tokens and supervised tokens; the job has {(tokens, supervised)}")


if __name__ == "__main__":
    main()
