"""Requests a minute and at a time, by a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.serve.engine import OverloadedError
from lorchestra.serve.limits import Limits


@given(
    rpm=st.integers(1, 30),
    gaps=st.lists(st.floats(0, 20), min_size=1, max_size=80),
)
def test_in_any_stretch_of_time_no_more_get_through_than_the_bucket_holds_and_gains(rpm, gaps):
    now = [0.0]
    limits, passed = Limits(lambda: now[0]), []
    for gap in gaps:
        now[0] += gap
        try:
            with limits.admitted("a", rpm, None):
                passed.append(now[0])
        except OverloadedError as refused:
            # Who waits as long as was said gets through.
            now[0] += refused.retry_after + 1e-6
            with limits.admitted("a", rpm, None):
                passed.append(now[0])
    for i, start in enumerate(passed):
        for j in range(i, len(passed)):
            assert j - i + 1 <= rpm * (1 + (passed[j] - start) / 60) + 1e-6


def test_a_minutes_worth_may_come_at_once_and_no_more():
    limits = Limits(lambda: 5.0)
    for _ in range(60):
        with limits.admitted("a", 60, None):
            pass
    with pytest.raises(OverloadedError, match="60 requests a minute") as refused, limits.admitted("a", 60, None):
        pass
    assert refused.value.retry_after == pytest.approx(1.0)
    with limits.admitted("b", 60, None):
        pass


def test_at_a_time_is_counted_while_they_run_and_an_error_ends_one_too():
    limits = Limits()
    with limits.admitted("a", None, 2):
        with pytest.raises(RuntimeError), limits.admitted("a", None, 2):
            raise RuntimeError
        with limits.admitted("a", None, 2):
            with pytest.raises(OverloadedError, match="2 requests of yours run"), limits.admitted("a", None, 2):
                pass
            with limits.admitted("b", None, 2):
                pass
    with limits.admitted("a", None, 1):
        pass


def test_what_is_refused_for_concurrency_uses_no_token():
    limits = Limits(lambda: 0.0)
    with limits.admitted("a", 2, 1):
        for _ in range(10):
            with pytest.raises(OverloadedError, match="run"), limits.admitted("a", 2, 1):
                pass
    with limits.admitted("a", 2, 1):
        pass


def test_a_limit_that_was_lowered_holds_at_once():
    limits = Limits(lambda: 0.0)
    with limits.admitted("a", 100, None):
        pass
    with limits.admitted("a", 1, None):
        pass
    with pytest.raises(OverloadedError), limits.admitted("a", 1, None):
        pass
