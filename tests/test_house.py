"""The house: imports go down, rooms stay light, modules stay short."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
LONGEST = 400


def in_a_fresh_process(program, *arguments):
    """What ``program`` prints, run at the root of the repository."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ROOMS_AT_WORK = """
import importlib, json, pathlib, pkgutil, sys
import lorchestra
for room in ("adapter", "fusion", "stats"):
    package = importlib.import_module(f"lorchestra.{room}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

import numpy, torch
from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.adapter.peft_format import effective_scales
from lorchestra.fusion.methods import compress, fuse
from lorchestra.fusion.search import Space, search
from lorchestra.fusion.stream import merge
from lorchestra.stats import intervals
from safetensors.torch import save_file

here = pathlib.Path(sys.argv[1])
a = Adapter({"model.q": LowRank(torch.randn(4, 2), torch.randn(2, 3))})
a.save(here / "a")
a = Adapter.load(here / "a")
effective_scales(here / "a")
small, _ = compress(fuse([a, a], [0.5, -1.0]), rank=1)
class Sum:
    def values(self, points):
        return [sum(point.values()) for point in points]
    def slope(self, point):
        return sum(point.values()), dict.fromkeys(point, 1.0)
search(Space({"a": a, "b": small}), Sum())
(here / "base").mkdir()
(here / "base" / "config.json").write_text("{}")
save_file({"model.q.weight": torch.ones(4, 3)}, here / "base" / "model.safetensors")
merge(here / "base", small, here / "out")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_the_algebra_and_the_statistics_run_without_the_heavy_libraries(tmp_path):
    loaded = json.loads(in_a_fresh_process(ROOMS_AT_WORK, tmp_path))
    assert {"torch", "numpy", "safetensors", "lorchestra"} <= set(loaded), "the rooms were at work"
    assert not set(loaded) & {"transformers", "peft", "accelerate", "datasets", "trl", "pandas", "typer"}


HELP_OF_EVERY_VERB = """
import json, sys, typer.main
from typer.testing import CliRunner
from lorchestra.cli.app import app
said = {}
verbs = [[]]
group = typer.main.get_command(app)
while verbs:
    verb = verbs.pop()
    command = group
    for name in verb:
        command = command.commands[name]
    verbs += [[*verb, name] for name in getattr(command, "commands", {})]
    result = CliRunner().invoke(app, [*verb, "--help"])
    said[" ".join(verb)] = [result.exit_code, "Usage" in result.output]
print(json.dumps({"said": said, "loaded": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_help_of_every_verb_imports_nothing_heavy():
    """``lorchestra --help`` answers in under half a second; torch alone takes longer to import."""
    found = json.loads(in_a_fresh_process(HELP_OF_EVERY_VERB))
    assert {"", "run", "ft", "dpo", "merge-lora"} <= set(found["said"])
    assert [verb for verb, said in found["said"].items() if said != [0, True]] == []
    heavy = {
        "torch", "transformers", "peft", "accelerate", "datasets", "pandas", "numpy", "scipy",
        "gguf", "safetensors", "huggingface_hub", "jinja2",
    }  # fmt: skip
    assert heavy & set(found["loaded"]) == set()


def test_importing_the_package_costs_nothing():
    loaded = json.loads(in_a_fresh_process("import json, sys, lorchestra\nprint(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "pydantic", "typer", "numpy"} & set(loaded)


def test_import_linters_contracts():
    said = in_a_fresh_process("from importlinter.cli import lint_imports_command as main; main()", "--no-cache")
    assert " 0 broken" in said


def texts():
    return {path.relative_to(ROOT / "src"): path.read_text(encoding="utf-8") for path in SOURCES}


def test_modules_are_short():
    lengths = {str(path): len(text.splitlines()) for path, text in texts().items()}
    assert len(lengths) > 50, "the sources were found"
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_modules_are_named_for_what_they_hold():
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [str(path) for path in texts() if vague & {*path.parts, path.stem}] == []


def test_modules_begin_with_what_they_are():
    assert [str(path) for path, text in texts().items() if text.strip() and not text.startswith('"""')] == []


def test_nothing_unfinished_or_unsafe():
    unwanted = re.compile(r"TODO|FIXME|XXX\b|import pickle|torch\.(load|save)\(|trust_remote_code=True")
    assert [str(path) for path, text in texts().items() if unwanted.search(text)] == []
