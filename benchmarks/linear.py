"""A frozen weight laid out once against torch's plain product: ``lorchestra.serve.embedded.linear`` on this CPU.

The four matrices of a SmolLM2-135M layer and its head, 1 to 256 rows, in the number format that ``auto`` chooses here.
Both sides in turn, in one process; medians of the processor time of one thread. Prints a table and writes
``benchmarks/results/linear.json``::

    python benchmarks/linear.py            # half a minute
    python benchmarks/linear.py --short    # for CI; writes nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from lorchestra.base.load import choose_device, choose_dtype
from lorchestra.serve.embedded.linear import Linear

RESULTS = Path(__file__).parent / "results" / "linear.json"
SHAPES = {"q, k, v": (960, 576), "o": (576, 576), "gate, up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
ROWS = (1, 4, 8, 16, 57, 256)


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path, default=RESULTS, help="where the figures go, as JSON")
    options.add_argument("--short", action="store_true", help="two shapes, two rounds; writes nothing")
    asked = options.parse_args()
    torch.set_num_threads(1)  # a thread's own time is of that thread alone
    dtype = choose_dtype(choose_device("cpu"))
    shapes = dict(list(SHAPES.items())[:2]) if asked.short else SHAPES
    rounds = 2 if asked.short else asked.rounds
    found = []
    for name, (m, n) in shapes.items():
        weight = torch.randn(m, n).to(dtype)
        laid_out = Linear(weight, None)
        for b in ROWS:
            x = torch.randn(b, n).to(dtype)
            sides: dict[str, Callable[[], object]] = {
                "plain": lambda x=x, weight=weight: linear(x, weight),
                "laid out": lambda x=x, laid_out=laid_out: laid_out(x),
            }
            times: dict[str, list[float]] = {side: [] for side in sides}
            with torch.inference_mode():
                for _ in range(rounds + 2):
                    for side, call in sides.items():
                        begun = time.thread_time()
                        call()
                        times[side].append(time.thread_time() - begun)
            ms = {side: 1e3 * statistics.median(values[2:]) for side, values in times.items()}
            found.append({"matrix": name, "m": m, "n": n, "rows": b, "milliseconds": ms,
                          "gflop_per_second": 2e-6 * b * m * n / min(ms.values())})  # fmt: skip
    print(f"{dtype}, {torch.backends.cpu.get_cpu_capability()}, oneDNN {'used' if laid_out.packed else 'not used'}\n")
    print("| matrix | rows | plain, ms | laid out, ms | ratio | best, GFLOP/s |\n|---|---|---|---|---|---|")
    for row in found:
        ms = row["milliseconds"]
        print(f"| {row['matrix']} | {row['rows']} | {ms['plain']:.2f} | {ms['laid out']:.2f} | "
              f"{ms['plain'] / ms['laid out']:.2f} | {row['gflop_per_second']:.0f} |")  # fmt: skip
    if not asked.short:
        about = {"dtype": str(dtype), "cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
        asked.out.write_text(json.dumps(about | {"rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
