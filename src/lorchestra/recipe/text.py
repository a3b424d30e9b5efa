"""A recipe as text: YAML with line numbers, dotted overrides, and errors that point at the line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorchestra.errors import RecipeError
from lorchestra.recipe.words import Location, Problem, near, shown

SHOWN = 8  # problems in one message
MOST = 20_000  # values of a recipe: aliases of aliases grow without end

# What the YAML reader says → what it means; {mark} is the character it names.
_DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")
_YAML = (
    ("'\\t'", "there is a tab here; YAML is indented with spaces"),
    ("cannot start any token", "a text that begins with this character must stand in quotes"),
    ("mapping values are not allowed", "a second ': ' on this line; put a text with a colon in quotes"),
    ("could not find expected ':'", "a key is followed by a colon and a space (key: value); here it is not"),
    ("expected ',' or '}'", "the { that opens here is not closed, or a comma is missing"),
    ("expected ',' or ']'", "the [ that opens here is not closed, or a comma is missing"),
    ("unexpected end of stream", "the quote that opens here is not closed"),
    ("expected <block end>", "this line is not indented like its neighbours"),
    ("undefined alias", "a text that begins with * must stand in quotes"),
    ("another document", "a second document begins here (---); a recipe is one"),
)
# Of these the reader notices the end, and the beginning is where to look.
_FROM_THE_START = ("could not find expected", "expected ',' or", "unexpected end of stream")


@dataclass
class Document:
    """Plain values, and where each stands: ``recipe.yaml:12``, or the override that set it."""

    name: str
    text: str
    values: dict[str, Any]
    places: dict[Location, str]

    @classmethod
    def read(cls, path: Path, holds: str = "a recipe is a mapping (name:, base:, stages:)") -> Document:
        """Parse a YAML file.

        Args:
            path: of the file.
            holds: what should be in it, for the message where it is something else.

        Raises:
            RecipeError: it cannot be read, is not YAML, has a key twice, or is no mapping.
        """
        from ruamel.yaml import YAML
        from ruamel.yaml.constructor import DuplicateKeyError
        from ruamel.yaml.error import MarkedYAMLError, YAMLError

        if path.suffix.lower() in _DATA and path.is_file():
            raise RecipeError(f"{path} is data, not a recipe; `lorchestra init --data {path}` writes a recipe for it")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe {path}; `lorchestra init` writes one") from None
        except IsADirectoryError:
            raise RecipeError(_directory(path)) from None
        except UnicodeDecodeError:
            raise RecipeError(f"{path} is not a text file in UTF-8; a recipe is YAML") from None
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from None
        try:
            tree = YAML(typ="rt").load(text)
        except DuplicateKeyError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 0
            key = str(error.problem).split('"')[1]
            raise RecipeError(f"{path}:{line}: the key {key!r} is here a second time; keep one of them") from None
        except MarkedYAMLError as error:
            raise RecipeError(_yaml_problem(path, error)) from None
        except YAMLError as error:
            raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        if path.suffix.lower() == ".json" and not (isinstance(tree, dict) and {"stages", "base"} & tree.keys()):
            raise RecipeError(f"{path} is data, not a recipe; `lorchestra init --data {path}` writes a recipe for it")
        if not isinstance(tree, dict):
            what = "empty" if tree is None else "a list" if isinstance(tree, list) else f"the text {shown(tree)}"
            raise RecipeError(f"{path}: {holds}; this is {what}")
        places: dict[Location, str] = {}
        return cls(str(path), text, _plain_values(tree, (), str(path), places), places)

    @classmethod
    def of(cls, values: dict[str, Any], name: str = "recipe") -> Document:
        """Values that have no file; messages call them ``name``."""
        return cls(name, "", values, {})

    def override(self, override: str) -> Location:
        """Apply ``stages.0.train.epochs=1`` (or ``stages.NAME.…``); the value is YAML. Returns the place.

        Raises:
            RecipeError: no ``=``, or a path through something that is not a mapping or list.
        """
        dotted, sign, text = override.partition("=")
        parts = dotted.strip().split(".")
        if not sign or not all(parts):
            raise RecipeError(f"--set {override}: write key.path=value, for example --set stages.0.epochs=1")
        value = _value(text, override)
        place = f"--set {dotted}=…" if "://" in text else f"--set {override}"  # a URL may hold a password
        here: Any = self.values
        path: Location = ()
        for part in parts[:-1]:
            here, step = _step(here, part, override, path)
            path = (*path, step)
            self.places.setdefault(path, place)
        last: str | int = parts[-1]
        if isinstance(here, list):
            last = _index(here, parts[-1], override)
        elif not isinstance(here, dict):
            raise RecipeError(_not_inside(override, path, here))
        here[last] = value
        path = (*path, last)
        self.forget(path)
        self.places[path] = place
        return path

    def forget(self, path: Location) -> None:
        """What stood at ``path`` in the file, or under it, stands there no more."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]

    def listed(self, problems: Sequence[Problem]) -> str:
        """``recipe.yaml:12: stages.0.epoch: unknown key; did you mean 'epochs'?``, one line a problem."""
        unique = list(dict.fromkeys(problems))
        shown = []
        for path, text in unique[:SHOWN]:
            written = self._written(path)
            dotted = ".".join(map(str, written))
            shown.append(": ".join(part for part in (self.place(written), dotted, text) if part))
        if len(unique) > SHOWN:
            shown.append(f"… and {len(unique) - SHOWN} more")
        return "\n".join(shown)

    def place(self, path: Location) -> str:
        """Where the key stands, or the nearest key above it; the document's name if nothing is known."""
        while path:
            if path in self.places:
                return self.places[path]
            path = path[:-1]
        return self.name

    def _written(self, path: Location) -> Location:
        """The path as the user wrote it: ``epochs`` may stand on the stage itself, one entry without its list."""
        if len(path) > 1 and path not in self.places and (*path[:-2], path[-1]) in self.places:
            return (*path[:-2], path[-1])
        while path and path[-1] == 0 and path not in self.places and path[:-1] in self.places:
            path = path[:-1]
        return path


def _yaml_problem(path: Path, error: Any) -> str:
    said = str(error.problem or "not YAML").strip()
    start = any(words in said for words in _FROM_THE_START)
    mark = (error.context_mark if start else None) or error.problem_mark or error.context_mark
    return f"{path}:{mark.line + 1}: {_meaning(said)}" if mark else f"{path}: {_meaning(said)}"


def _directory(path: Path) -> str:
    """What to do with a directory in place of a recipe."""
    inside = sorted(file.name for ending in ("*.yaml", "*.yml") for file in path.glob(ending))
    if inside:
        return f"{path} is a directory; name the recipe in it ({path / inside[0]})"
    if (path / "adapter_config.json").exists():
        return f"{path} is an adapter, not a recipe; see it with `lorchestra inspect {path}`"
    return f"{path} is a directory without a recipe; `lorchestra init {path}` writes one"


def _meaning(said: str) -> str:
    return next((meaning for words, meaning in _YAML if words in said), said)


def _value(text: str, override: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text) if text.strip() else None
    except YAMLError as error:
        if text.lstrip()[:1] in tuple("{['\""):
            said = _meaning(str(getattr(error, "problem", error)))
            raise RecipeError(
                f"--set {override}: the value is not YAML: {said}. A value with brackets or spaces stands in quotes "
                "for the shell: --set 'fusion.weights={a: 1}'"
            ) from None
        return text


def _plain_values(node: Any, path: Location, name: str, places: dict[Location, str]) -> Any:
    if len(places) > MOST:
        raise RecipeError(f"{name}: a recipe may hold {MOST:,} values; this one's aliases (*name) make it larger")
    mark: Any = getattr(node, "lc", None)  # ruamel's line and column of a mapping's keys, a list's items
    if isinstance(node, dict):
        own = mark.data or {}  # keys merged in by << have no line of their own
        for key in node:
            places[(*path, key)] = f"{name}:{(mark.key(key)[0] if key in own else mark.line) + 1}"
        return {key: _plain_values(value, (*path, key), name, places) for key, value in node.items()}
    if isinstance(node, list):
        for i in range(len(node)):
            places[(*path, i)] = f"{name}:{mark.item(i)[0] + 1}"
        return [_plain_values(value, (*path, i), name, places) for i, value in enumerate(node)]
    if type(node).__name__ in ("TaggedScalar", "CommentedSet"):
        raise RecipeError(f"{places.get(path, name)}: {'.'.join(map(str, path))}: a recipe has no YAML tags (!…)")
    for kind in (bool, int, float, str):  # ruamel's scalars carry their spelling; plain ones are wanted
        if isinstance(node, kind):
            return kind(node)
    return node


def _step(here: Any, part: str, override: str, path: Location) -> tuple[Any, str | int]:
    if isinstance(here, list):
        index = _index(here, part, override)
        return here[index], index
    if isinstance(here, dict):
        if here.get(part) is None:
            here[part] = {}
        return here[part], part
    raise RecipeError(_not_inside(override, path, here))


def _not_inside(override: str, path: Location, value: Any) -> str:
    where = ".".join(map(str, path))
    return (
        f"--set {override}: {where} is {shown(value)} in the recipe; nothing can be set inside it. Set the whole: "
        f"--set {where}=…"
    )


def _index(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [str(name) for name in names if name]
    there = ", ".join(known) or "none"
    if not known and items:
        there = f"0 to {len(items) - 1}"
    raise RecipeError(f"--set {override}: there is no {part!r} in the list; there are {there}{near(part, known)}")
