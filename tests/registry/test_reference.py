"""The grammar of references and mixtures: what is written reads back, and nothing that is no name gets through."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.errors import UserError
from lorchestra.registry.reference import (
    LONGEST,
    MOST,
    Mixture,
    Reference,
    check_name,
    is_mixture,
    parse_mixture,
    parse_reference,
)

HEX = "0123456789abcdef"
names = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_-]|\.[A-Za-z0-9_-]){0,50}", fullmatch=True).filter(
    lambda name: name != "auto" and name.isascii()
)
selectors = st.one_of(
    st.just(""),
    st.integers(0, 10**9 - 1).map("v{}".format),
    st.from_regex(r"[a-u][a-z0-9_-]{0,20}", fullmatch=True).filter(str.isascii),
    st.text(HEX, min_size=12, max_size=64).map("sha256:{}".format),
)
references = st.builds(Reference, names, selectors)
weights = st.floats(allow_nan=False, allow_infinity=False)
mixtures = st.lists(st.tuples(references, weights), min_size=1, max_size=8, unique_by=lambda m: m[0]).map(
    lambda members: Mixture(tuple(members))
)


@given(references)
def test_what_is_rendered_parses_to_the_same_reference(reference):
    assert parse_reference(str(reference)) == reference


@given(mixtures)
def test_what_is_rendered_parses_to_the_same_mixture_to_the_last_bit(mixture):
    back = parse_mixture(str(mixture))
    assert back == mixture
    assert [w.hex() for _, w in back.members] == [w.hex() for _, w in mixture.members], "-0.0 is not 0.0"


@given(st.text(max_size=40))
def test_any_text_is_a_mixture_or_a_clear_refusal(text):
    try:
        mixture = parse_mixture(text)
    except UserError:
        return
    for reference, _ in mixture.members:
        assert not set(reference.name) & set("/\\:\0 \n%")
        assert ".." not in reference.name
        assert reference.name.isascii()


@given(mixtures)
def test_the_three_selectors_are_told_apart(mixture):
    for reference, _ in mixture.members:
        found = [reference.version is not None, bool(reference.digest), bool(reference.alias)]
        assert sum(found) == bool(reference.selector)


def test_a_mixture_of_the_design():
    mixture = parse_mixture("general=0.3+clinic@v2=0.5+preference=-0.2")
    assert mixture.members == (
        (Reference("general"), 0.3),
        (Reference("clinic", "v2"), 0.5),
        (Reference("preference"), -0.2),
    )
    assert parse_mixture("clinic") == Mixture(((Reference("clinic"), 1.0),))
    assert str(parse_mixture("clinic=1.0")) == "clinic"
    assert is_mixture("a=1")
    assert not is_mixture("clinic@v2")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "a..b", ".hidden", "a.", "-a", "a b", "a\n", "a\0b", "a%2fb", "клиника",
     "ａ", "٣", "auto", "a+b", "a=b", "a@b", "x" * (LONGEST + 1), "C:", "a\u200b"],
)  # fmt: skip
def test_what_is_no_name(name):
    with pytest.raises(UserError):
        check_name(name)
    with pytest.raises(UserError):
        Reference(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a@", "nothing follows"),
        ("a@v01", "without leading zeros"),
        ("a@v9999999999", "no version"),
        ("a@sha256:abc", "12 to 64"),
        ("a@sha256:" + "g" * 64, "hexadecimal"),
        ("a@sha256:" + "A" * 64, "hexadecimal"),
        ("a@Production", "small letters"),
        ("a@b@c", "no version, alias or digest"),
        ("a" * 10_000, "at most 8,192"),
    ],
)
def test_what_is_no_reference(text, says):
    with pytest.raises(UserError, match=says):
        parse_reference(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a=0.3+b", "'b' has no weight"),
        ("a+b", "'a' has no weight"),
        ("a=0.3+", "missing beside"),
        ("+a=0.3", "missing beside"),
        ("a=nan", "finite"),
        ("a=inf", "finite"),
        ("a=1e999", "finite"),
        ("a=0x10", "finite"),
        ("a=1_0", "finite"),
        ("a=", "finite"),
        ("a= 1", "no blanks"),
        ("a=٣", "finite"),
        ("=1", "name is empty"),
        ("a=1+a=2", "twice"),
        ("auto=1", "reserved"),
        ("a=1=2", "no name"),
        ("+".join(f"a{i}=1" for i in range(MOST + 1)), f"at most {MOST}"),
    ],
)
def test_what_is_no_mixture(text, says):
    with pytest.raises(UserError, match=says):
        parse_mixture(text)


def test_two_versions_of_one_name_may_be_mixed():
    assert len(parse_mixture("a@v1=0.5+a@v2=0.5").members) == 2


def test_what_others_reserve_is_refused_too():
    with pytest.raises(UserError, match="reserved"):
        check_name("smollm", reserved={"smollm"})


def test_the_room_knows_no_transformers():
    code = "import sys, lorchestra.registry.reference, lorchestra.registry.access; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
