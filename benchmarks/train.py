"""Training side by side: TRL's SFTTrainer and DPOTrainer, ms-swift, lorchestra, and the bound of the matrix products.

Same base, same token ids, same batch, rank, targets, learning rate, schedule, steps and number format; what they are
stands in ``benchmarks/train.yaml``. Prints one table and writes ``benchmarks/results/train.json``::

    python3 -m venv .venv-trl
    .venv-trl/bin/pip install 'torch>=2.6,<2.14' trl==1.16.0 peft==0.21.2 transformers==5.23.0
    python benchmarks/train.py --peer-python .venv-trl/bin/python     # most of the time is TRL's
    python benchmarks/train.py --peer-python … --swift-python …       # ms-swift too (benchmarks/peers/with_swift.py)
    python benchmarks/train.py                                        # ours and the bound
    python benchmarks/train.py --short                                # a tiny random base, three steps: for CI

Every training has a process of its own, one at a time; a round is bound, TRL, ms-swift (in the first round
only), lorchestra for each task, with a seed of its own, and the table has the medians over the rounds. What is counted:

- tokens: of the data, without padding, a preference pair's prompt once; times epochs. The same for every row.
- seconds: ours is ``train_stage`` from call to return (mounting, hashing the frozen base before and after, reference
  log-probabilities, steps, a checkpoint); a peer's is ``trainer.train()`` from call to return, and precomputing
  references. Imports, loading the base, tokenising and saving the adapter are in neither.
- bound: 4 FLOP a token and weight of the adapted modules (forward, gradient of the input), 6 a token and weight of the
  LoRA; for DPO 2 more a token and weight for the reference, once. No attention, no output embedding, no elementwise
  work. Divided by the FLOP/s of those very products, measured in the same round.
- losses: by ``benchmarks/peers/scorer.py``, plain transformers and PEFT in float32, on the same items for all.
- clock: ``wall``; or ``processor``, on a machine that has other work: the processor time of all threads, divided by
  their number, while threads that wait for each other do not spin (``OMP_WAIT_POLICY=passive``, on all sides).
- memory: the largest resident set of the training process, imports and the loading of the base included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS, PEERS = HERE / "train_parts.py", HERE / "peers"
RESULTS = HERE / "results" / "train.json"


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peer-python", type=Path, help="python of an environment with TRL; without it, no TRL rows")
    options.add_argument("--swift-python", type=Path, help="python of an environment with ms-swift")
    options.add_argument("--recipe", type=Path, default=HERE / "train.yaml")
    options.add_argument("--task", choices=("sft", "dpo"), help="only this one")
    options.add_argument("--rounds", type=int, default=2, help="one seed each")
    options.add_argument("--scored", type=int, default=32, help="items of training, and of validation, that are scored")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument(
        "--short", action="store_true", help="tiny random base, three steps, one round; writes nothing"
    )
    options.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor: on a busy machine")
    options.add_argument("--out", type=Path, default=RESULTS, help="where the figures go, as JSON")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = measure(Path(work), asked)
    if not asked.short:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def measure(work: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """All rounds, then all scores."""
    kind, recipe = ("tiny", work / "recipe.yaml") if asked.short else ("render", asked.recipe)
    jobs = run([sys.executable, PARTS, kind, recipe, work], asked.threads)["result"]
    tasks = {name: Path(job) for name, job in jobs.items() if asked.task in (None, name)}
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"), "command": command(asked), "machine": machine(),
        "threads": asked.threads, "clock": asked.clock, "load": os.getloadavg()[1],
        "rounds": 1 if asked.short else asked.rounds, "tasks": {},
    }  # fmt: skip
    passive = asked.clock == "processor"
    for seed in range(found["rounds"]):
        for task, path in tasks.items():
            rows = found["tasks"].setdefault(task, {"bound": [], "sides": {}})
            rows["bound"].append(run([sys.executable, PARTS, "bound", path, work], asked.threads, passive)["result"])
            for side, program in programs(asked, seed).items():
                out = work / f"{task}-{side}-{seed}"
                done = run([*program, path, out, "--seed", seed], asked.threads, passive)
                row = done["result"] | {"peak_mb": done["peak_mb"], "processor": done["processor"], "seed": seed}
                rows["sides"].setdefault(side, []).append(row)
                spent = f"{row['seconds']:.1f} s, {row['processor_seconds']:.1f} s of processors"
                print(f"{task}, {side}, seed {seed}: {spent}, {row['peak_mb']:.0f} MB", file=sys.stderr)
    for task, path in tasks.items():
        rows = found["tasks"][task]
        rows |= counted(json.loads(path.read_text(encoding="utf-8")))
        places = [
            work / f"{task}-{side}-{row['seed']}" / "adapter" for side in rows["sides"] for row in rows["sides"][side]
        ]
        scores = run([sys.executable, PEERS / "scorer.py", path, *places, "--items", asked.scored], asked.threads)[
            "result"
        ]
        flat = [row for side in rows["sides"].values() for row in side]
        for row, score in zip(flat, scores, strict=True):
            row["scored"] = score
        rows["summary"] = summary(rows, asked.clock, asked.threads)
    if asked.peer_python is None:
        print("TRL is left out: --peer-python names no python that has it", file=sys.stderr)
    return found


def programs(asked: argparse.Namespace, seed: int) -> dict[str, list[Any]]:
    """Side → what trains it, in the order of round ``seed``."""
    found: dict[str, list[Any]] = {}
    if asked.peer_python is not None:
        found["TRL"] = [asked.peer_python, PEERS / "with_trl.py"]
    if asked.swift_python is not None and seed == 0:
        found["ms-swift"] = [asked.swift_python, PEERS / "with_swift.py"]
    return found | {"lorchestra": [sys.executable, PARTS, "ours"]}


def command(asked: argparse.Namespace) -> str:
    """What was called, without the places of this machine."""
    words = [f"--{key.replace('_', '-')} PYTHON" for key in ("peer_python", "swift_python") if getattr(asked, key)]
    words += [f"--task {asked.task}"] * bool(asked.task)
    return " ".join(
        [
            "python benchmarks/train.py",
            *words,
            f"--rounds {asked.rounds} --threads {asked.threads} --clock {asked.clock}",
        ]
    )


def run(command: Sequence[Any], threads: int, passive: bool = False) -> dict[str, Any]:
    """One process: the JSON of its last line, its peak memory and its processor time.

    This process stays small, because a child's peak begins with what its parent held at the fork.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if passive:
        environment["OMP_WAIT_POLICY"] = "passive"
    words = [*map(str, command), "--threads", str(threads)]
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            complaints.seek(0)
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{complaints.read()[-4000:]}")
    return {
        "result": json.loads(said.strip().splitlines()[-1]),
        "peak_mb": usage.ru_maxrss / 1024,
        "processor": usage.ru_utime + usage.ru_stime,
    }


# ---- what is counted


def counted(job: Mapping[str, Any]) -> dict[str, Any]:
    """Items and tokens of a job; a pair's prompt counts once."""
    items = job["items"]
    return {
        "task": job["task"],
        "items": len(items),
        "held_out": len(job["validation"]),
        "tokens": sum(len(item["prompt"]) + sum(map(len, item["answers"])) for item in items),
        "supervised": sum(sum(map(sum, item["supervised"])) for item in items),
        "batch_size": job["train"]["batch_size"],
        "lora": job["lora"],
        "train": job["train"],
    }


def epochs(rows: Mapping[str, Any]) -> float:
    """How often every item was seen."""
    steps = {row["steps"] for side in rows["sides"].values() for row in side}
    if len(steps) != 1:
        raise SystemExit(f"the sides made different numbers of steps: {sorted(steps)}")
    return float(steps.pop() / -(-rows["items"] // rows["batch_size"]))


def seconds_of(row: Mapping[str, Any], clock: str, threads: int) -> float:
    """What the clock says of a run."""
    return float(row["seconds"] if clock == "wall" else row["processor_seconds"] / threads)


def bound_tokens_per_second(task: str, tokens: int, times: float, bound: Mapping[str, Any], rate: float) -> float:
    """As the module's docstring counts FLOP: ``tokens`` of the data, each seen ``times``, at ``rate`` FLOP/s."""
    flop = tokens * times * (4 * bound["parameters"] + 6 * bound["lora_parameters"])
    if task == "dpo":
        flop += tokens * 2 * bound["parameters"]
    return float(tokens * times * rate / flop)


def summary(rows: Mapping[str, Any], clock: str, threads: int) -> dict[str, Any]:
    """Medians over the rounds; ratios are taken within a round."""
    times = epochs(rows)
    seen = rows["tokens"] * times
    rates = [bound["flop"] / seconds_of(bound, clock, threads) for bound in rows["bound"]]
    bounds = [
        bound_tokens_per_second(rows["task"], rows["tokens"], times, bound, rate)
        for bound, rate in zip(rows["bound"], rates, strict=True)
    ]
    out: dict[str, Any] = {
        "bound": {"tokens_per_second": statistics.median(bounds), "gflop_per_second": statistics.median(rates) / 1e9}
    }
    theirs = {row["seed"]: seconds_of(row, clock, threads) for row in rows["sides"].get("TRL", ())}
    for side, runs in rows["sides"].items():
        seconds = [seconds_of(row, clock, threads) for row in runs]
        speeds = [seen / spent for spent in seconds]
        out[side] = {
            "tokens_per_second": statistics.median(speeds),
            "of_the_bound": statistics.median(
                speed / bounds[row["seed"]] for speed, row in zip(speeds, runs, strict=True)
            ),
            "seconds": statistics.median(seconds),
            "peak_mb": max(row["peak_mb"] for row in runs),
            "first_loss": [row["first_loss"] for row in runs],
        }
        for part in ("train", "validation"):
            losses = [row["scored"][part] for row in runs]
            out[side][part] = {"mean": statistics.fmean(losses), "spread": max(losses) - min(losses)}
        if theirs:
            out[side]["times_trl"] = statistics.median(
                theirs[row["seed"]] / spent for spent, row in zip(seconds, runs, strict=True)
            )
    return out


def machine() -> dict[str, Any]:
    """Processor, how many, memory, system."""
    model = platform.processor() or platform.machine()
    memory = None
    if sys.platform.startswith("linux"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"processor": model, "cpus": os.cpu_count(), "memory_gb": memory, "system": platform.system()}


# ---- the table


def table(result: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    head = (
        "task", "", "tokens/s", "× TRL", "of the bound", "training loss", "validation loss", "peak memory", "training"
    )  # fmt: skip
    lines = []
    for task, rows in result["tasks"].items():
        lora, train = rows["lora"], rows["train"]
        lines.append(
            f"{task}: {rows['items']} items, {rows['tokens']:,} tokens ({rows['supervised']:,} supervised), "
            f"{epochs(rows):g} epochs in batches of {rows['batch_size']}; rank {lora['rank']}, {lora['scaling']}, "
            f"learning rate {train['learning_rate']:g}"
        )
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for task, rows in result["tasks"].items():
        for side, row in rows["summary"].items():
            if side == "bound":
                lines.append(
                    f"| {task} | bound | {row['tokens_per_second']:.0f} | | 1 | | | | "
                    f"{row['gflop_per_second']:.0f} GFLOP/s |"
                )
                continue
            times = f"{row['times_trl']:.2f}" if "times_trl" in row else ""
            losses = [f"{row[part]['mean']:.4f} ± {row[part]['spread'] / 2:.4f}" for part in ("train", "validation")]
            lines.append(
                f"| {task} | {side} | {row['tokens_per_second']:.0f} | {times} | {row['of_the_bound']:.2f} | "
                f"{' | '.join(losses)} | {row['peak_mb']:,.0f} MB | {row['seconds']:.1f} s |"
            )
    said = "one round" if result["rounds"] == 1 else f"medians of {result['rounds']} rounds, a seed each"
    said += f"; {result['threads']} threads, {result['clock']} time"
    lines += ["", f"{said}; losses: mean over the seeds ± half their range"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
