"""The benchmarks are scripts, not a package: they are loaded by their path."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def benchmarks():
    """Their directory."""
    return BENCHMARKS


@pytest.fixture(scope="session")
def script():
    """``script("peers/scorer")`` is that script as a module; its ``main`` has not run."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name.replace("/", "_"), BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
