"""The parts of ``benchmarks/train.py`` that need torch, each run in a process of its own: render, bound, ours.

A *job* is one JSON file: the base, the items as token ids, and every setting. All sides read the same file, so that
they train on the same tokens::

    {"task": "sft" | "dpo", "base": DIR, "pad": ID, "lora": {…}, "train": {…}, "objective": {…},
     "items": [{"prompt": [ids], "answers": [[ids], …], "supervised": [[0 | 1], …]}, …], "validation": [the same]}
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SWEEPS = 5  # over all layers, of which the first warms up


def main() -> None:
    """Do one part; the last line printed is its result, as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=("render", "tiny", "bound", "ours"))
    options.add_argument("first", type=Path, help="render, tiny: the recipe; bound, ours: the job")
    options.add_argument("out", type=Path, help="render, tiny: directory of the jobs; bound, ours: of the result")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=2)
    asked = options.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.part in ("render", "tiny"):
        recipe = tiny_recipe(asked.out) if asked.part == "tiny" else asked.first
        found: Any = render(recipe, asked.out)
    else:
        job = json.loads(asked.first.read_text(encoding="utf-8"))
        found = bound(job) if asked.part == "bound" else ours(job, asked.out, asked.seed)
    print(json.dumps(found))


# ---- the data, rendered once


def render(recipe_path: Path, out: Path) -> dict[str, str]:
    """Write a job for each stage of the recipe; returns stage → its file."""
    from lorchestra.pipeline.prepare import prepare
    from lorchestra.recipe.recipe import Recipe

    here = out / "recipe.yaml"  # a copy: a recipe's lock file is written beside it
    if recipe_path != here:
        shutil.copy(recipe_path, here)
    prepared = prepare(Recipe.load(here))
    jobs = {}
    for stage in prepared.recipe.stages:
        items = prepared.data[stage.name].rendered
        pad = prepared.tokenizer.pad_token_id
        job = {
            "task": stage.task,
            "base": str(prepared.directory),
            "pad": prepared.tokenizer.eos_token_id if pad is None else pad,
            "lora": prepared.recipe.lora_of(stage).model_dump(mode="json"),
            "train": prepared.recipe.train_of(stage).model_dump(mode="json"),
            "objective": stage.objective.model_dump(mode="json"),
            "items": [as_json(item) for item in items["train"]],
            "validation": [as_json(item) for item in items["validation"]],
        }
        path = out / f"{stage.name}.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        jobs[stage.name] = str(path)
    return jobs


def as_json(item: Any) -> dict[str, Any]:
    """A ``Rendered`` as the job holds it."""
    return {
        "prompt": list(item.prompt),
        "answers": [list(branch.ids) for branch in item.branches],
        "supervised": [list(map(int, branch.supervised)) for branch in item.branches],
    }


def as_rendered(item: Mapping[str, Any]) -> Any:
    """The ``Rendered`` that :func:`as_json` was given."""
    from lorchestra.data.render import Branch, Rendered

    pairs = zip(item["answers"], item["supervised"], strict=True)
    return Rendered(tuple(item["prompt"]), tuple(Branch(tuple(ids), tuple(map(bool, counts))) for ids, counts in pairs))


# ---- the bound


def bound(job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of the model's own bfloat16 matrix products: every adapted weight, forward and gradient of the input.

    All layers have weights of their own, as in training, so that no weight waits in a processor's cache. Rows are the
    tokens of a mean batch.
    """
    import torch

    from lorchestra.pipeline.estimate import empty_model
    from lorchestra.train.lora import target_paths

    shapes = list(target_paths(empty_model(Path(job["base"])), "all-linear").values())
    rows = rows_of_a_batch(job)
    noise = torch.Generator().manual_seed(0)
    weights = [torch.randn(m, n, generator=noise).bfloat16() for m, n in shapes]
    inputs = {width: torch.randn(rows, width, generator=noise).bfloat16() for shape in shapes for width in shape}
    seconds, processor = [], []
    with torch.no_grad():
        for _ in range(SWEEPS):
            started, used = time.perf_counter(), time.process_time()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            for weight in reversed(weights):
                inputs[weight.shape[0]] @ weight
            seconds.append(time.perf_counter() - started)
            processor.append(time.process_time() - used)
    parameters = sum(m * n for m, n in shapes)
    return {
        "rows": rows,
        "parameters": parameters,
        "lora_parameters": sum(job["lora"]["rank"] * (m + n) for m, n in shapes),
        "flop": 4 * parameters * rows,
        "seconds": statistics.median(seconds[1:]),
        "processor_seconds": statistics.median(processor[1:]),
    }


def rows_of_a_batch(job: Mapping[str, Any]) -> int:
    """Tokens of a mean batch, a pair's prompt counted once."""
    tokens = sum(len(item["prompt"]) + sum(map(len, item["answers"])) for item in job["items"])
    batch: int = job["train"]["batch_size"]
    return round(tokens * batch / len(job["items"]))


# ---- our side


def ours(job: Mapping[str, Any], out: Path, seed: int) -> dict[str, Any]:
    """Train a stage as ``lorchestra run`` does; seconds are those of ``train_stage`` from call to return."""
    from importlib.metadata import version

    import accelerate  # noqa: F401  # train_stage would: imports are not what is timed, on no side

    from lorchestra.base.load import load_base
    from lorchestra.train.settings import LoraSettings, Objective, TrainSettings
    from lorchestra.train.stage import StageInputs, train_stage

    base = load_base(Path(job["base"]), device="cpu", dtype=job.get("dtype", "bfloat16"))
    inputs = StageInputs(
        name=job["task"],
        objective=Objective(**job["objective"]),
        lora=LoraSettings(**job["lora"]),
        train=TrainSettings(**job["train"]),
        items=[as_rendered(item) for item in job["items"]],
        validation=(),
        context={},
        init_seed=seed,
        data_seed=seed,
    )
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        started, used = time.perf_counter(), time.process_time()
        result = train_stage(base.model, base.id, base.pad_id, inputs, Path(scratch))
        seconds, processor = time.perf_counter() - started, time.process_time() - used
    result.adapter.save(out / "adapter")
    history: Sequence[Mapping[str, Any]] = result.progress.history
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "seconds_in_steps": result.progress.seconds,
        "steps": result.steps,
        "losses": [row["loss"] for row in history],
        "first_loss": history[0]["loss"],
        "versions": {name: version(name) for name in ("lorchestra", "torch", "transformers")},
    }


# ---- a tiny base and tiny data, for --short


def tiny_recipe(directory: Path) -> Path:
    """A random Llama of two layers with a byte tokenizer, a few sums to learn, and a recipe of the same two stages."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base = directory / "base"
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.1,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    rows = [{"prompt": f"{a} + {b} = ?", "completion": str(a + b)} for a in range(3, 9) for b in range(4, 11)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "I do not know."} for row in rows]
    for name, lines in (("sums", rows), ("pairs", pairs)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe = directory / "recipe.yaml"
    recipe.write_text(
        "name: train-benchmark-short\n"
        "base: base\n"
        "split: {train: 0.6, validation: 0.4, test: 0}\n"
        "lora: {rank: 8, alpha: 16, scaling: rslora, init: kaiming, dropout: 0.0}\n"
        "train: {batch_size: 8, learning_rate: 1.0e-3, scheduler: cosine, warmup_ratio: 0.1, max_steps: 3}\n"
        "stages:\n"
        "  - {name: sft, task: sft, data: sums.jsonl}\n"
        "  - {name: dpo, task: dpo, data: pairs.jsonl, beta: 0.1}\n",
        encoding="utf-8",
    )
    return recipe


if __name__ == "__main__":
    main()
