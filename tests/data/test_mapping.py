"""``fields``: which sets of parts make an example, what a cell or template gives, what is refused and how."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest

from lorchestra.data.formats import Draft
from lorchestra.data.load import DataSpec, load_examples
from lorchestra.data.mapping import KINDS, TARGETS, FieldMapping, read_cell
from lorchestra.errors import DataError


def test_exactly_the_named_sets_of_parts_make_an_example() -> None:
    accepted = {frozenset(needed): kind for kind, needed in KINDS.items()}
    for size in range(len(TARGETS) + 1):
        for parts in combinations(TARGETS, size):
            core = frozenset(parts) - {"system", "group"}
            if core in accepted:
                assert FieldMapping(dict.fromkeys(parts, "column")).kind == accepted[core]
            else:
                with pytest.raises(DataError, match=r"fields: got .*; expected one of these sets: .*\(preference\)"):
                    FieldMapping(dict.fromkeys(parts, "column"))


def test_an_unknown_part_is_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"unknown part 'choice'; expected system, .*Did you mean 'choices'\?"):
        FieldMapping({"prompt": "a", "completion": "b", "choice": "c"})
    with pytest.raises(DataError, match=r"unknown part 'xyzzy'; expected [^?]*$"):
        FieldMapping({"xyzzy": "a"})


@pytest.mark.parametrize("text", ["{{ a", "{% if a %}", "{{ a | nosuchfilter }}"])
@pytest.mark.parametrize("part", ["prompt", "system", "group", "choices"])
def test_a_template_that_does_not_compile_is_told_before_any_row(part: str, text: str) -> None:
    fields = {"prompt": "q", "completion": "a", "choices": "o"} | {part: text}
    with pytest.raises(DataError, match=rf"fields\.{part}: .*is not valid Jinja2"):
        FieldMapping(fields)


def test_a_missing_column_is_told_with_the_nearest_one_and_how_to_write_a_text() -> None:
    read = read_cell("qestion", "fields.prompt")
    with pytest.raises(DataError) as error:
        read({"question": "q", "answer": "a"})
    assert str(error.value) == (
        "fields.prompt: there is no column 'qestion'. Did you mean 'question'? The row has the columns question, "
        "answer; a text of your own with columns in it is written with {{ column }}."
    )


def test_a_column_whose_name_is_no_identifier_is_read_by_its_name_or_by_row() -> None:
    row = {"Patient's question?": "q", "a": "x"}
    by_name = FieldMapping({"prompt": "Patient's question?", "completion": "a"})
    by_row = FieldMapping({"prompt": '{{ row["Patient\'s question?"] }}', "completion": "a"})
    assert by_name.convert(row) == by_row.convert(row)
    assert by_name.convert(row).prompt[0].content == "q"


def choice(**fields: str) -> FieldMapping:
    return FieldMapping({"prompt": "q", "choices": "o", "completion": "a"} | fields)


def test_a_choice_keeps_the_options_as_written_and_its_gold_among_them() -> None:
    draft = choice().convert({"q": "Q", "o": "A. x\nB. y", "a": "B"})
    assert (draft.gold, draft.choices) == ("B. y", ("A. x", "B. y"))
    separate = choice(choices="{{ [o1, o2, o3] }}").convert({"q": "Q", "o1": "x\nx", "o2": "", "o3": "y", "a": 2})
    assert (separate.gold, separate.choices) == ("y", ("x\nx", "y"))


def test_an_answer_that_is_no_option_names_the_field() -> None:
    with pytest.raises(DataError, match=r"column 'fields\.completion': the answer str 'z' is none of the options"):
        choice().convert({"q": "Q", "o": ["x", "y"], "a": "z"})
    with pytest.raises(DataError, match=r"column 'fields\.choices': expected a list of options"):
        choice().convert({"q": "Q", "o": 5, "a": "z"})


def test_system_goes_before_the_prompt_and_an_empty_one_nowhere() -> None:
    mapping = FieldMapping({"prompt": "q", "completion": "a", "system": "s"})
    assert [turn.role for turn in mapping.convert({"q": "Q", "a": "A", "s": "S"}).prompt] == ["system", "user"]
    assert [turn.role for turn in mapping.convert({"q": "Q", "a": "A", "s": " "}).prompt] == ["user"]
    item = choice(system="s").convert({"q": "Q", "o": ["x", "y"], "a": "x", "s": "S"})
    assert [turn.role for turn in item.prompt] == ["system", "user"]


def test_a_column_mapped_to_two_parts_serves_both() -> None:
    draft = FieldMapping({"prompt": "text", "completion": "text"}).convert({"text": "t"})
    assert isinstance(draft, Draft)
    assert (draft.prompt[0].content, draft.gold) == ("t", "t")


def groups(tmp_path: Any, rows: list[dict[str, Any]], **fields: str) -> list[str]:
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = DataSpec("f.jsonl", fields={"prompt": "q", "completion": "a", **fields})
    return [example.group for example in load_examples(spec, "sft", relative_to=tmp_path).examples]


def test_rows_without_a_group_are_not_one_group(tmp_path: Any) -> None:
    """An empty cell falls back to the question; otherwise all such rows would land in one part of the split."""
    rows = [{"q": f"Q{i}", "a": "A", "p": p} for i, p in enumerate([None, None, "", " ", "P1", 7, 7])]
    assert groups(tmp_path, rows, group="p") == ["q0", "q1", "q2", "q3", "p1", "7", "7"]
    assert groups(tmp_path, rows, group="{{ p or '' }}") == ["q0", "q1", "q2", "q3", "p1", "7", "7"]
    assert groups(tmp_path, rows) == [f"q{i}" for i in range(7)]


def test_a_group_that_is_no_text_is_told_with_its_row(tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:1: column 'group': expected text, got list"):
        groups(tmp_path, [{"q": "Q", "a": "A", "p": ["x"]}], group="p")
