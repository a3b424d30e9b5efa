"""YAML with line numbers: what the reader refuses, said so that a newcomer can mend it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.errors import RecipeError
from lorchestra.recipe.text import Document

YAML_MISTAKES = {
    "tab": ("a:\n\tb: 1\n", "r.yaml:2: there is a tab here; YAML is indented with spaces"),
    "open brace": ("a: {b: 1\nc: 2\n", "r.yaml:1: the { that opens here is not closed, or a comma is missing"),
    "open bracket": ("a: [b, c\nd: 2\n", "r.yaml:1: the [ that opens here is not closed, or a comma is missing"),
    "open quote": ("a: 1\nb: 'c\n", "r.yaml:2: the quote that opens here is not closed"),
    "indent": ("a:\n    b: 1\n   c: 1\n", "r.yaml:3: this line is not indented like its neighbours"),
    "two colons": ("a: b: c\n", "r.yaml:1: a second ': ' on this line; put a text with a colon in quotes"),
    "no space": (
        "a: 1\nb:2\nc: 3\n",
        "r.yaml:2: a key is followed by a colon and a space (key: value); here it is not",
    ),
    "star": ("a: *b\n", "r.yaml:1: a text that begins with * must stand in quotes"),
    "at": ("a: @b\n", "r.yaml:1: a text that begins with this character must stand in quotes"),
    "second document": ("a: 1\n---\nb: 2\n", "r.yaml:2: a second document begins here (---); a recipe is one"),
    "key twice": ("a: 1\nb: 2\na: 3\n", "r.yaml:3: the key 'a' is here a second time; keep one of them"),
    "nested key twice": ("a:\n  b: 1\n  b: 2\n", "r.yaml:3: the key 'b' is here a second time; keep one of them"),
    "empty": ("# nothing\n", "r.yaml: a recipe is a mapping (name:, base:, stages:); this is empty"),
    "list": ("- a\n- b\n", "r.yaml: a recipe is a mapping (name:, base:, stages:); this is a list"),
    "text": ("hello\n", "r.yaml: a recipe is a mapping (name:, base:, stages:); this is the text 'hello'"),
}


@pytest.mark.parametrize("mistake", YAML_MISTAKES)
def test_yaml_that_cannot_be_read(mistake, tmp_path):
    text, message = YAML_MISTAKES[mistake]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        Document.read(tmp_path / "r.yaml")
    assert str(error.value).replace(f"{tmp_path}/", "") == message


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no recipe .*nowhere\.yaml; `lorchestra init` writes one"):
        Document.read(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match=r"is a directory without a recipe; `lorchestra init .*` writes one"):
        Document.read(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(RecipeError, match="is an adapter, not a recipe; see it with `lorchestra inspect"):
        Document.read(tmp_path / "adapter")
    (tmp_path / "my.yml").touch()
    with pytest.raises(RecipeError, match=r"is a directory; name the recipe in it \(.*my\.yml\)"):
        Document.read(tmp_path)
    for name, text in {
        "rows.jsonl": '{"prompt": "a"}',
        "rows.json": '[{"prompt": "a"}]',
        "row.json": '{"a": 1}',
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(
            RecipeError, match=f"{name} is data, not a recipe; `lorchestra init --data .*{name}` writes"
        ):
            Document.read(tmp_path / name)
    (tmp_path / "recipe.json").write_text('{"name": "x", "base": "b", "stages": []}')
    assert Document.read(tmp_path / "recipe.json").values["name"] == "x", "JSON is YAML"
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(RecipeError, match="is not a text file in UTF-8"):
        Document.read(tmp_path / "latin.yaml")
    (tmp_path / "zero.yaml").write_bytes(b"\x00\x01")
    with pytest.raises(RecipeError, match="not YAML"):
        Document.read(tmp_path / "zero.yaml")


keys = st.sampled_from(["alpha", "beta", "gamma"])
values = st.recursive(
    st.integers(-9, 9) | st.booleans() | st.none() | st.floats(-1, 1) | st.sampled_from(["x", "yes", "1e3", "a b"]),
    lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(keys, values, min_size=1, max_size=3))
def test_values_are_plain_and_every_key_has_its_line(tmp_path_factory, tree):
    from ruamel.yaml import YAML

    path = tmp_path_factory.mktemp("yaml") / "r.yaml"
    writer = YAML()
    writer.default_flow_style = False
    with path.open("w") as out:
        writer.dump(tree, out)
    document = Document.read(path)
    assert document.values == tree
    lines = path.read_text().splitlines()
    for place, where in document.places.items():
        if isinstance(place[-1], str):
            assert lines[int(where.rpartition(":")[2]) - 1].lstrip("- ").startswith(f"{place[-1]}:")


@given(st.dictionaries(keys, st.dictionaries(keys, st.integers(), min_size=1), min_size=1), st.integers())
def test_an_override_changes_its_key_and_no_other(tree, value):
    first = next(iter(tree))
    inner = next(iter(tree[first]))
    document = Document.of({key: dict(below) for key, below in tree.items()})
    document.override(f"{first}.{inner}={value}")
    assert document.values == {**tree, first: {**tree[first], inner: value}}
    assert document.place((first, inner)) == f"--set {first}.{inner}={value}"


def test_a_list_is_entered_by_position_or_by_name():
    document = Document.of({"stages": [{"name": "a"}, {"name": "b", "x": 1}]})
    assert document.override("stages.1.x=2") == ("stages", 1, "x")
    assert document.override("stages.b.x=3") == ("stages", 1, "x")
    document.override("stages.a.new.deep=4")
    assert document.values == {"stages": [{"name": "a", "new": {"deep": 4}}, {"name": "b", "x": 3}]}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1.5", 1.5), ("1e-3", 1e-3), ("true", True), ("null", None), ("", None), ("[a, 1]", ["a", 1]),
     ("{a: 1}", {"a": 1}), ("a b", "a b"), ("@b", "@b"), ("'1'", "1"), ("x=y", "x=y")],
)  # fmt: skip
def test_an_overrides_value_is_yaml_or_else_text(text, value):
    document = Document.of({})
    document.override(f"key={text}")
    assert document.values == {"key": value}
    assert type(document.values["key"]) is type(value)


def test_aliases_of_aliases_do_not_grow_without_end(tmp_path):
    """Ten lines that would be ten thousand million values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=r"recipe\.yaml: a recipe may hold 20,000 values; this one's aliases"):
        Document.read(tmp_path / "recipe.yaml")
