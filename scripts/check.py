"""Check everything: style, types, import directions, tests. ``python scripts/check.py [quick]``.

``quick`` leaves out the tests marked ``slow`` and ``real``; those marked ``gpu`` are for ``pytest -m gpu``, those
marked ``vllm`` for ``scripts/vllm_tests.py``. Stops at the first check that fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def main() -> int:
    quick = sys.argv[1:] == ["quick"]
    if sys.argv[1:] and not quick:
        print(__doc__)
        return 2
    elsewhere = "not gpu and not vllm"
    tests = [sys.executable, "-m", "pytest", "-m", f"{elsewhere} and not slow and not real" if quick else elsewhere]
    # Several files at a time, one thread each: the tests wait for processes and servers about as long as they compute.
    tests += ["-n", str((os.cpu_count() or 1) + 1), "--dist", "loadfile", "--durations=40"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    checks = {
        "ruff": [str(BIN / "ruff"), "check", "."],
        "format": [str(BIN / "ruff"), "format", "--check", "."],
        "mypy": [str(BIN / "mypy")],
        "imports": [str(BIN / "lint-imports"), "--no-cache"],
        "tests": tests,
    }
    for name, command in checks.items():
        print(f"== {name}", flush=True)
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        print(f"== {name}: {'passed' if not done.returncode else 'FAILED'}, {time.monotonic() - started:.0f} s")
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
