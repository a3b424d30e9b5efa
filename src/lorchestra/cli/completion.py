"""What Tab offers for a value: the words an option knows, recipes, adapters and models that lie about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

Completion = Callable[[str], list[str]]

DEEP = 4  # levels of directories that are looked into
MANY = 2_000  # entries, after which no more are looked at: Tab has to answer at once


def among(*words: str) -> Completion:
    """Those of ``words`` that begin as what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def listed_among(*words: str) -> Completion:
    """The same for the last of several words with commas between them."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + word for word in words if word.startswith(last)]

    return complete


def recipes(incomplete: str) -> list[str]:
    """YAML files, but for the lock files and settings of other tools in hidden directories."""
    return _paths(incomplete, lambda path: path.suffix in (".yaml", ".yml"))


def adapters(incomplete: str) -> list[str]:
    """Directories that hold an adapter."""
    return _paths(incomplete, lambda path: (path / "adapter_config.json").exists())


def gates(incomplete: str) -> list[str]:
    """Directories that hold a gate."""
    return _paths(incomplete, lambda path: (path / "gate.json").exists())


def listed_adapters(incomplete: str) -> list[str]:
    """The same for the last of several with commas between them."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + path for path in adapters(last)]


def models(incomplete: str) -> list[str]:
    """Directories that hold a model or an adapter, and GGUF files."""
    return _paths(
        incomplete,
        lambda path: (
            path.suffix == ".gguf" or (path / "config.json").exists() or (path / "adapter_config.json").exists()
        ),
    )


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Paths that begin as ``incomplete``, written as it is; nothing if there are none: then the shell offers files."""
    written, slash, _ = incomplete.rpartition("/")
    start = Path(f"{written}{slash}").expanduser()
    if not start.is_dir():
        return []
    names = (f"{written}{slash}{path.relative_to(start).as_posix()}" for path in _below(start) if wanted(path))
    return sorted(name for name in names if name.startswith(incomplete))


def _below(start: Path) -> Iterator[Path]:
    """What is in ``start`` and the directories in it, nearest first, without hidden ones."""
    level, seen = [start], 0
    for _ in range(DEEP):
        below: list[Path] = []
        for directory in level:
            for path in _entries(directory):
                seen += 1
                if seen > MANY:
                    return
                yield path
                if path.is_dir():
                    below.append(path)
        level = below


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except PermissionError:
        return []  # what may not be read is not offered
