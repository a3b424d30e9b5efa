"""The split: users stay, shares grow, shares are met, and nobody is taken for another."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorchestra.errors import UserError
from lorchestra.registry.canary.traffic import arm_of, number_of, pseudonym

words = st.text(max_size=20)
shares = st.floats(0, 1)


@given(words, words, words, shares)
def test_who_asks_again_is_answered_by_the_same(salt, tenant, user, share):
    assert arm_of(share, salt, tenant, user) == arm_of(share, salt, tenant, user)


@given(words, words, words, shares, shares)
def test_a_growing_share_only_adds_users(salt, tenant, user, one, other):
    less, more = sorted((one, other))
    if arm_of(less, salt, tenant, user) == "candidate":
        assert arm_of(more, salt, tenant, user) == "candidate"


@given(words, words, words)
def test_nobody_and_everybody(salt, tenant, user):
    assert arm_of(0.0, salt, tenant, user) == "stable"
    assert arm_of(1.0, salt, tenant, user) == "candidate"


@given(st.tuples(words, words, words), st.tuples(words, words, words))
def test_only_the_same_three_have_the_same_number(one, other):
    """Joined without their lengths, ('a', 'bc') and ('ab', 'c') would be one user."""
    assert (number_of(*one) == number_of(*other)) == (one == other)


@given(st.text(min_size=1, max_size=9), st.text(min_size=1, max_size=9), st.text(min_size=1, max_size=9))
def test_letters_that_change_sides_make_another_user(salt, tenant, user):
    assert number_of(salt, tenant + user[0], user[1:]) != number_of(salt, tenant, user)
    assert number_of(salt + tenant[0], tenant[1:], user) != number_of(salt, tenant, user)


@given(words, words)
def test_without_a_user_the_tenant_is_one(salt, tenant):
    assert number_of(salt, tenant) == number_of(salt, tenant, "")


def test_the_hash_is_the_documented_one():
    """Computed by another program: b2sum of coreutils, on bytes written out by hand."""
    written = b"\0" * 7 + b"\x01s" + b"\0" * 7 + b"\x04acme" + b"\0" * 7 + b"\x05z\xc3\xbc 1"
    said = subprocess.run(["b2sum", "-l", "64"], input=written, capture_output=True, check=True).stdout
    assert number_of("s", "acme", "zü 1") == int(said.split()[0], 16)


def test_the_number_does_not_depend_on_the_process():
    code = "from lorchestra.registry.canary.traffic import number_of; print(number_of('s', 'acme', 'ann'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) == number_of("s", "acme", "ann")


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5, 0.93])
def test_shares_are_met(share):
    """20,000 users: outside of these bounds once in a million, of a fair draw."""
    count = sum(arm_of(share, "salt", "acme", f"user-{i}") == "candidate" for i in range(20_000))
    low, high = stats.binom.interval(1 - 1e-6, 20_000, share)
    assert low <= count <= high


def test_numbers_are_uniform():
    numbers = [number_of("salt", f"tenant-{i}") / 2**64 for i in range(5000)]
    assert stats.kstest(numbers, "uniform").pvalue > 1e-4


def test_another_salt_draws_independently():
    """In both samples at 30 % are 9 %, and knowing one says nothing of the other."""
    table = [[0, 0], [0, 0]]
    for i in range(10_000):
        one, other = (arm_of(0.3, salt, "acme", f"u{i}") == "candidate" for salt in ("first", "second"))
        table[one][other] += 1
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan, math.inf, 5])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(UserError, match="between 0 and 1"):
        arm_of(share, "s", "t")


@given(words, words, words)
def test_a_pseudonym_stands_for_one_name_in_one_registry(realm, one, other):
    assert (pseudonym(realm, one) == pseudonym(realm, other)) == (one == other)
    if one:
        assert len(pseudonym(realm, one)) == 32
        assert pseudonym(realm, one) != pseudonym(realm + "x", one)


def test_nobody_has_no_pseudonym():
    assert pseudonym("r", "") == ""
