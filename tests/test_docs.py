"""The documentation holds for the code: recipes load, keys and defaults are the schema's, commands exist, links lead
somewhere, imports work."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import SETTLED
from lorchestra.serve.config import ServeConfig
from lorchestra.serve.wire import check_defaults
from lorchestra.sweep.spec import SweepSpec

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md"]
SECTIONS = {"Recipe": "Top of the recipe", "DataEntry": "`data`", "ContextMember": "`context`"}
SHELLS = ("console", "bash", "sh", "shell")


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """Line, language and text of every fenced block."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start()].count("\n") + 1, found[1], found[2]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def of(found: list[typing.Any], what: str) -> list[typing.Any]:
    """``found``, which must hold something: a search that finds nothing tests nothing."""
    assert found, f"the documentation holds no {what}"
    return found


# ---- recipes


def recipes() -> list[typing.Any]:
    found = []
    for page in PAGES:
        for line, language, text in blocks(page):
            if language == "yaml":
                values = YAML(typ="safe").load(text)
                if isinstance(values, dict) and {"stages", "base"} <= set(values):
                    found.append(pytest.param(text, id=f"{page.name}:{line}"))
    return of(found, "whole recipe")


@pytest.mark.parametrize("text", recipes())
def test_a_whole_recipe_loads(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    assert Recipe.load(file).stages


def yaml_blocks() -> list[typing.Any]:
    found = [(page, line, text) for page in PAGES for line, language, text in blocks(page) if language == "yaml"]
    return [pytest.param(text, id=f"{page.name}:{line}") for page, line, text in of(found, "yaml")]


@pytest.mark.parametrize("text", yaml_blocks())
def test_a_part_of_a_recipe_loads(text, tmp_path):
    """Put where it belongs, every fragment is valid too."""
    values = YAML(typ="safe").load(text)
    if "sampling" in values:  # beside an adapter
        check_defaults(values["sampling"], "an adapter")
        assert values.keys() <= {"system_prompt", "sampling"}
        return
    if "adapters_dirs" in values:
        assert ServeConfig.model_validate(values)
        return
    if "recipe" in values:
        assert SweepSpec.from_dict({"name": "x", **values}, tmp_path)
        return
    whole: dict[str, typing.Any] = {"name": "x", "base": "b", "stages": [{"name": "terms", "data": "d.jsonl"}]}
    known = set(Recipe.model_fields)
    if set(values) <= known:
        whole |= values
    else:  # keys of a stage
        whole["stages"].append({"name": "other", "data": "d.jsonl", **values})
    assert Recipe.from_dict(whole, tmp_path)


# ---- keys and defaults of the recipe


def models(model: type[BaseModel] = Recipe) -> dict[str, tuple[str, type[BaseModel]]]:
    """Class name → (key it stands under, class), of all settings in the recipe."""
    found: dict[str, tuple[str, type[BaseModel]]] = {"Recipe": ("", Recipe)} if model is Recipe else {}
    for key, field in model.model_fields.items():
        stack = [field.annotation]
        while stack:
            annotation = stack.pop()
            stack += typing.get_args(annotation)
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                found.setdefault(annotation.__name__, (key, annotation))
                found |= {name: value for name, value in models(annotation).items() if name not in found}
    return found


def documented(heading: str) -> dict[str, str]:
    """Key → default cell of the table under the heading that begins with ``heading``."""
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"recipe.md has no section {heading}"
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", found[0], re.MULTILINE))


@pytest.mark.parametrize("name", list(models()))
def test_every_key_of_the_recipe_is_documented_with_its_default(name):
    key, model = models()[name]
    rows = documented(SECTIONS.get(name, f"`{key}`"))
    assert set(rows) == set(model.model_fields)
    for field_name, field in model.model_fields.items():
        cell, default = rows[field_name], field.get_default(call_default_factory=True)
        if field.is_required():
            assert cell == "required", field_name
        elif isinstance(default, BaseModel):
            assert cell == "see below", field_name
        elif field_name in SETTLED.get(key, ()):
            assert cell == "`auto`", field_name
        elif default is None:
            assert cell == "none", field_name
        else:
            plain = list(default) if isinstance(default, tuple) else default
            written = YAML(typ="safe").load(cell.strip("`"))
            assert written == plain or float(written) == plain, field_name


def test_every_key_of_a_sweep_is_documented_with_its_default():
    text = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    section = re.search(r"^## The specification.*?(?=^## )", text, re.MULTILINE | re.DOTALL)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section[0] if section else "", re.MULTILINE))
    assert set(rows) == set(SweepSpec.model_fields)
    plain = SweepSpec.from_dict({"recipe": "r", "name": "x"}).model_dump(mode="json")
    for key, cell in rows.items():
        required = SweepSpec.model_fields[key].is_required()
        written = YAML(typ="safe").load(cell.strip("`"))
        assert written == ("required" if required else "none" if plain[key] is None else plain[key]), key


# ---- commands


def commands() -> list[tuple[str, list[str]]]:
    """(where, words) of every ``lorchestra …`` in shell blocks and in code within the text."""
    found = []
    for page in PAGES:
        for line, language, text in blocks(page):
            if language in SHELLS:
                for command in text.replace("\\\n", " ").splitlines():
                    for part in re.split(r"&&|;", command):
                        words = shlex.split(part.removeprefix("$ "), comments=True)
                        if words and Path(words[0]).name == "lorchestra":
                            found.append((f"{page.name}:{line}", words[1:]))
        for code in re.findall(r"`lorchestra ([^`]+)`", prose(page)):
            found.append((page.name, shlex.split(code)))
    return of(found, "command")


@pytest.fixture(scope="module")
def verbs() -> dict[str, set[str]]:
    """Verb → its options, long and short, with ``_`` for ``-``."""
    import typer

    from lorchestra.cli.app import app

    return options_of(typer.main.get_command(app))


def options_of(group: typing.Any, before: str = "") -> dict[str, set[str]]:
    """Command → its options; those of a group within as ``registry push``."""
    found = {}
    for name, command in group.commands.items():
        options = {option_name(opt) for param in command.params for opt in (*param.opts, *param.secondary_opts)}
        found[before + name] = options | {"--help", "-h"}
        if hasattr(command, "commands"):
            found |= options_of(command, f"{before}{name} ")
    return found


def option_name(word: str) -> str:
    dashes = "--" if word.startswith("--") else "-"
    return dashes + word.removeprefix(dashes).partition("=")[0].replace("-", "_")


def test_every_command_in_the_documentation_exists(verbs):
    import typer

    from lorchestra.cli.serve_keys import app as keys

    verbs = verbs | options_of(typer.main.get_command(keys), "serve keys ")
    wrong = []
    for where, words in commands():
        for length in (3, 2):  # the verb of a group
            if " ".join(words[:length]) in verbs and len(words) >= length:
                words = [" ".join(words[:length]), *words[length:]]
                break
        verb = words[0] if words else "--help"
        if verb in ("VERB", "--help", "--version", "--install-completion"):
            continue
        if verb not in verbs:
            wrong.append(f"{where}: lorchestra {verb}")
            continue
        options = [w for w in words[1:] if re.match(r"--?[A-Za-z]", w)]
        wrong += [f"{where}: {verb} {w}" for w in options if option_name(w) not in verbs[verb]]
    assert not wrong


def test_the_page_of_commands_has_every_verb_and_only_its_options(verbs):
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    seen = set()
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        named = [word for word in re.findall(r"`([\w-]+)`", heading) if word in verbs]
        seen |= set(named)
        there = set().union(*(options for verb, options in verbs.items() if verb.split()[0] in named))
        if named:
            options = {option_name(word) for word in re.findall(r"(?<=`)--?[A-Za-z][\w-]*", section)}
            assert options <= there, heading
    assert seen == {verb for verb in verbs if " " not in verb}


# ---- links and imports


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_between_pages_resolve():
    wrong = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if "://" in target or target.startswith("mailto:"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                wrong.append(f"{page.name}: {target}")
            elif anchor:
                headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
                if anchor not in [slug(heading) for heading in headings]:
                    wrong.append(f"{page.name}: {target}")
    assert not wrong


def python_blocks() -> list[typing.Any]:
    found = [(page, line, text) for page in PAGES for line, language, text in blocks(page) if language == "python"]
    return [pytest.param(text, id=f"{page.name}:{line}") for page, line, text in of(found, "python")]


@pytest.mark.parametrize("text", python_blocks())
def test_python_parses_and_our_names_are_there(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lorchestra":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", ["training.md", "zh.md"])
def test_the_articles_python_runs(page, tiny_model, capsys):
    names: dict[str, typing.Any] = {"base_model": tiny_model}
    texts = [text for _, language, text in blocks(ROOT / "docs" / page) if language == "python"]
    for text in sorted(texts, key=lambda text: "get_peft_model(" not in text):
        exec(text, names)
    stds = {p.std().item() for n, p in names["model"].named_parameters() if "lora_A" in n}
    rescaled_twice = page == "training.md"  # its last loop rescales again, as the page says
    assert stds
    assert all(std == pytest.approx(0.02 / 8**0.5 / (8**0.5 if rescaled_twice else 1), rel=0.25) for std in stds)
    assert ("std=0.00" in capsys.readouterr().out) == rescaled_twice
