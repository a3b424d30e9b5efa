"""The naming convention: one way to write a name, one way to read it."""

from __future__ import annotations

from datetime import date
from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorchestra.errors import UserError
from lorchestra.registry.naming import TAGS, FullName, as_reference
from lorchestra.registry.reference import LONGEST, Reference, check_name

TAG_WORDS = {"pt", "sft", "dpo", "tuned", "rslora", "fused", "compressed", "merged", "quantized"}
words = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True).filter(
    lambda word: word.isascii() and word not in TAG_WORDS and not (word[0] == "v" and word[1:].isdigit())
)
tags = st.sampled_from([chosen for count in range(4) for chosen in combinations(TAGS, count)])
full_names = st.builds(
    FullName,
    words,
    st.lists(words, min_size=1, max_size=3).map(tuple),
    st.none() | st.integers(0, 10**9 - 1),
    st.none() | st.dates(),
    tags,
)
# Pieces that a name may have, in any order and number: many of these texts are names, most are not.
pieces = st.lists(
    st.sampled_from(
        ["medical", "legal", "x1", "v2", "v0", "v02", "v", "20250315", "20240229", "20250229", "2025", "00000101",
         "dpo", "tuned", "sft", "pt", "rslora", "fused", "merged", "", "Medical", "é", "-"]
    ),
    max_size=7,
).map("_".join)  # fmt: skip


def written(name: FullName) -> str:
    """The text of a name, put together here."""
    day = "" if name.date is None else f"_{name.date.year:04}{name.date.month:02}{name.date.day:02}"
    version = "" if name.version is None else f"_v{name.version}"
    return f"{name.domain}_{'_'.join(name.task)}{version}{day}{''.join(f'_{tag}' for tag in name.tags)}"


@given(full_names)
def test_what_is_rendered_parses_to_the_same_name(name):
    assert str(name) == written(name)
    assert FullName.parse(str(name)) == name


@given(st.text(max_size=30) | pieces)
def test_what_parses_is_rendered_to_the_same_text_and_is_a_name_of_the_registry(text):
    try:
        name = FullName.parse(text)
    except UserError:
        return
    assert str(name) == text
    check_name(text)


@given(full_names)
def test_a_name_means_the_same_version_however_it_is_written(name):
    reference = name.reference()
    assert as_reference(str(name)) == as_reference(str(reference)) == reference
    again = FullName.parse(reference.name)
    assert (again.domain, again.task, again.tags) == (name.domain, name.task, name.tags)
    assert (again.version, again.date) == (None, None)
    assert reference.version == name.version


def test_the_names_of_the_article():
    first = FullName.parse("medical_diagnosis_v2_20250315")
    assert first == FullName("medical", ("diagnosis",), 2, date(2025, 3, 15))
    assert first.reference() == Reference("medical_diagnosis", "v2")
    assert first.labels == ("20250315",)
    second = FullName.parse("legal_contract_review_dpo_tuned")
    assert second == FullName("legal", ("contract", "review"), tags=("dpo_tuned",))
    assert second.reference() == Reference("legal_contract_review_dpo_tuned")
    assert second.labels == ("dpo_tuned",)


def test_tags_part_lines_of_versions_and_dates_do_not():
    assert as_reference("a_b_v2_20250315_sft_rslora") == Reference("a_b_sft_rslora", "v2")
    assert as_reference("a_b_20250315") == Reference("a_b")
    assert as_reference("a_b_20250315@production") == Reference("a_b", "production")
    assert as_reference("a_b_v2@v2") == Reference("a_b", "v2")
    assert FullName.parse("a_b_v2_20250315_sft_rslora").labels == ("20250315", "sft", "rslora")


@pytest.mark.parametrize("plain", ["clinic", "clinic@v2", "clinic-v1.5", "Clinic_Notes_v2", "a__b_v2", "v2", "x_v2"])
def test_other_names_are_what_they_were(plain):
    assert str(as_reference(plain)) == plain


def test_one_reference_names_one_version():
    with pytest.raises(UserError, match=r"names v2 and v3; write a_b@v2 or a_b@v3"):
        as_reference("a_b_v2@v3")
    with pytest.raises(UserError, match="names v2 and production"):
        as_reference("a_b_v2@production")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "an empty part at the beginning"),
        ("medical", "a task, one word or more, should stand here"),
        ("medical_v2", "'v2': a task"),
        ("v2_diagnosis", "'v2': a domain"),
        ("20250315_medical_diagnosis", "'20250315': a domain"),
        ("sft_medical", "'sft': a domain"),
        ("medical_sft", "'sft': a task"),
        ("Medical_diagnosis", "'Medical': capital letters are not used; write medical"),
        ("medical__diagnosis", "an empty part after 'medical'"),
        ("medical_diagnosis_", "an empty part after 'medical_diagnosis'"),
        ("medical-diagnosis_v2", "'medical-diagnosis': a part has small letters"),
        ("medical_diagnosis_v02", "'v02': a version is v and a number"),
        ("medical_diagnosis_v9999999999", "a version is v and a number"),
        ("medical_diagnosis_v2_v3", "'v3': a second version"),
        ("medical_diagnosis_20250230", "'20250230': no day of the calendar"),
        ("medical_diagnosis_00000101", "no day of the calendar"),
        ("medical_diagnosis_202503", "'202503': a date has eight digits"),
        ("medical_diagnosis_20250315_20250316", "'20250316': a second date"),
        ("medical_diagnosis_20250315_v2", "'v2': the version stands before the date"),
        ("medical_diagnosis_sft_20250315", "'20250315': the date stands before the tags"),
        ("medical_diagnosis_sft_v2", "'v2': the version stands before"),
        ("medical_diagnosis_v2_notes", "'notes': no tag; tags are pt, sft,"),
        ("medical_diagnosis_v2_quantised", "'quantised': no tag; did you mean quantized"),
        ("medical_diagnosis_v2_dop_tuned", "'dop': no tag; did you mean dpo_tuned"),
        ("legal_review_dpo", "'dpo': no tag; did you mean dpo_tuned"),
        ("legal_review_tuned", "'tuned': no tag; did you mean dpo_tuned"),
        ("legal_review_dpo_sft", "'dpo': no tag; did you mean dpo_tuned"),
        ("legal_review_sft_sft", "'sft': a tag stands once"),
        ("legal_review_rslora_sft", "one order, here sft_rslora"),
        ("medical_diagnosis_v2_20250315\n", "a part has small letters"),
        ("medical_diagnosis_v٢", "a part has small letters"),
        ("mеdical_diagnosis", "a part has small letters"),  # the e is Cyrillic
        ("../medical_diagnosis", "a part has small letters"),
        ("medical_" + "x" * LONGEST, "at most 128"),
    ],
)
def test_what_is_wrong_is_named_with_the_form_that_was_expected(text, says):
    with pytest.raises(UserError) as caught:
        FullName.parse(text)
    assert says in str(caught.value)
    assert "Expected domain_task[_vN][_YYYYMMDD][_tag…], as in medical_diagnosis_v2_20250315" in str(caught.value)


@pytest.mark.parametrize(
    "parts",
    [
        ("medical", ()),
        ("medical", ("two_words",)),
        ("medical_notes", ("diagnosis",)),
        ("medical", ("diagnosis", "v2")),
        ("medical", ("diagnosis", "sft")),
        ("medical", ("diagnosis",), -1),
        ("medical", ("diagnosis",), None, None, ("rslora", "sft")),
        ("medical", ("diagnosis",), None, None, ("fast",)),
    ],
)
def test_parts_that_make_no_name_are_refused(parts):
    with pytest.raises(UserError):
        FullName(*parts)


@given(full_names, st.integers(0, 60), st.sampled_from("_Av0é- \0"))
def test_a_changed_letter_gives_another_name_or_a_refusal(name, place, letter):
    text = str(name)
    place %= len(text)
    changed = text[:place] + letter + text[place + 1 :]
    assume(changed != text)
    try:
        read = FullName.parse(changed)
    except UserError:
        return
    assert read != name


def test_every_tag_is_told_of_in_the_documentation_in_its_order():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "naming.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    assert rows == list(TAGS)
