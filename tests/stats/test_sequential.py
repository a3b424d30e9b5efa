"""Tests that may be looked at any time: false alarms by simulation, E against integrals, intervals against E."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats

from lorchestra.stats.sequential import (
    BETS,
    Sample,
    limit_evidence,
    mean_difference,
    mean_evidence,
    rate_difference,
    rate_evidence,
    rate_interval,
)

ALPHA = 0.05
STREAMS = 10_000
SPAN = 10.0


def most(alpha: float, streams: int) -> float:
    """The share of false alarms that a test of exactly ``alpha`` passes but once in 10,000 runs."""
    return float(stats.binom.ppf(1 - 1e-4, streams, alpha)) / streams


def false_alarms(evidence, values, arms, alpha=ALPHA, bound=None):
    """The share of streams ``[streams, T]`` that are refused at one look or another, looking after every value.

    E is a minimum over all pairs that the hypothesis allows; ``bound`` is its value at one of them, by the formula
    written out here. Only where that is large enough has the minimum to be looked for.
    """
    sums = {}
    for name, chosen in (("candidate", arms), ("stable", ~arms)):
        sums[name] = [np.cumsum(np.where(chosen, x, 0.0), axis=1) for x in (np.ones_like(values), values, values**2)]
    refused = np.zeros(len(values), bool)
    for t in range(values.shape[1]):
        seen = [np.stack([total[:, t] for total in sums[name]]) for name in ("candidate", "stable")]
        open_ = np.flatnonzero(~refused if bound is None else ~refused & (bound(*seen) >= math.log(1 / alpha)))
        if open_.size:
            refused[open_] = evidence(*(Sample(*one[:, open_]) for one in seen)) >= math.log(1 / alpha)
    return refused.mean()


def at_one_pair_of_rates(margin):
    """log E at the pair of rates a margin apart that is nearest to the pooled one."""

    def bound(candidate, stable):
        n, k = candidate[0] + stable[0], candidate[1] + stable[1]
        p = np.clip((k - margin * candidate[0]) / n, 1e-9, 1 - margin - 1e-9)
        total = 0.0
        for (count, hits, _), rate in ((candidate, p + margin), (stable, p)):
            mixed = special.betaln(hits + 0.5, count - hits + 0.5) - special.betaln(0.5, 0.5)
            total = total + mixed - special.xlogy(hits, rate) - special.xlog1py(count - hits, -rate)
        return total

    return bound


def at_the_common_mean(candidate, stable):
    """log E at the pair of equal means that is the mean of all values."""
    mean = (candidate[1] + stable[1]) / (candidate[0] + stable[0])
    total = 0.0
    for n, sum_, squares in (candidate, stable):
        first = np.abs(sum_ - n * mean) / SPAN
        second = np.maximum(squares - 2 * mean * sum_ + n * mean**2, 0) / SPAN**2
        logs = np.stack([bet * first + (bet + math.log(1 - bet)) * second for bet in BETS])
        total = total + special.logsumexp(logs, axis=0) - math.log(2 * len(BETS))
    return total


# ---- one arm: the expectation of E is 1, exactly


@pytest.mark.parametrize("p", [0.003, 0.2, 0.5, 0.97])
@pytest.mark.parametrize("n", [1, 2, 30, 400])
def test_the_evidence_against_the_true_rate_is_one_on_average(n, p):
    """Σ over all k of its probability times E at the truth."""
    k = np.arange(n + 1)
    log_at_truth = stats.betabinom.logpmf(k, n, 0.5, 0.5) - stats.binom.logpmf(k, n, p)
    assert np.exp(stats.binom.logpmf(k, n, p) + log_at_truth).sum() == pytest.approx(1)
    found, above = limit_evidence(Sample(n, k), p), k > n * p
    assert found[above] == pytest.approx(log_at_truth[above], abs=1e-6)
    assert (found[~above] <= log_at_truth[~above] + 1e-6).all(), "any lower rate is allowed too"


def test_the_evidence_of_two_arms_is_at_most_one_on_average():
    """Every outcome of 25 and 40 observations, weighted by its probability."""
    kc, ks = np.meshgrid(np.arange(26), np.arange(41), indexing="ij")
    for margin in (0.0, 0.1):
        found = np.exp(rate_evidence(Sample(25.0 + 0 * kc, kc), Sample(40.0 + 0 * ks, ks), margin))
        for p in (0.02, 0.3, 0.8):
            chance = stats.binom.pmf(kc, 25, p + margin) * stats.binom.pmf(ks, 40, p)
            assert 0 < float((chance * found).sum()) <= 1


# ---- two arms, at one look: against integrals and an optimiser


def log_mixed(n, k):
    return math.log(
        integrate.quad(lambda u: math.sin(u) ** (2 * k) * math.cos(u) ** (2 * (n - k)), 0, math.pi / 2, epsabs=0)[0]
        * 2
        / math.pi  # p = sin² u makes Beta(½, ½) flat
    )


@pytest.mark.parametrize(
    ("nc", "kc", "ns", "ks", "margin"),
    [(40, 9, 60, 3, 0.0), (40, 9, 60, 3, 0.05), (12, 12, 30, 0, 0.2), (50, 30.5, 20, 4.25, 0.1), (30, 2, 90, 0, -0.2)],
)
def test_the_evidence_of_two_rates(nc, kc, ns, ks, margin):
    def logs(p):
        q = p + margin
        return -(
            kc * math.log(q) + (nc - kc) * math.log1p(-q) + ks * math.log(p or 1e-300) + (ns - ks) * math.log1p(-p)
        )

    low, high = max(0, -margin) + 1e-15, min(1, 1 - margin) - 1e-13
    least = optimize.minimize_scalar(logs, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).fun
    expected = log_mixed(nc, kc) + log_mixed(ns, ks) + least
    assert float(rate_evidence(Sample(nc, kc), Sample(ns, ks), margin)) == pytest.approx(expected, abs=1e-5)


def log_bets(values, mu, sign):
    """log of the mixture of Π (1 + λξ), the wealth of whoever bets: an e-process by construction."""
    xi = sign * (np.asarray(values) - mu) / SPAN
    wealth = [np.log1p(bet * xi).sum() for bet in BETS]
    return np.logaddexp.reduce(wealth) - math.log(len(BETS))


def sums(values):
    values = np.asarray(values, dtype=float)
    return Sample(len(values), values.sum(), (values**2).sum())


between = st.lists(st.floats(-SPAN / 2, SPAN / 2), min_size=1, max_size=40)


@given(between, between, st.floats(-1, 2), st.floats(-SPAN / 2, SPAN / 2))
def test_the_evidence_of_two_means_is_never_above_a_bettors(one, other, margin, mu):
    """At every pair of means that the hypothesis allows, by the values themselves instead of their sums."""
    both = (max(log_bets(values, at, +1), log_bets(values, at, -1)) for values, at in ((one, mu + margin), (other, mu)))
    if abs(mu + margin) <= SPAN / 2:
        found = float(mean_evidence(sums(one), sums(other), margin, SPAN))
        assert found <= sum(both) + 1e-2  # of the search for the least


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_the_evidence_of_two_means(margin):
    """The formula written out, and its least value by trying 4,000 means."""
    chance = np.random.default_rng(0)
    one, other = chance.normal(1.5, 0.5, 300), chance.normal(0, 1, 40)
    least = math.inf
    for mu in np.linspace(other.mean(), one.mean() - margin, 4_000):
        total = 0.0
        for values, at in ((one, mu + margin), (other, mu)):
            first, second = abs((values - at).sum()) / SPAN, ((values - at) ** 2).sum() / SPAN**2
            logs = [bet * first + (bet + math.log(1 - bet)) * second for bet in BETS]
            total += np.logaddexp.reduce(logs) - math.log(2 * len(BETS))
        least = min(least, total)
    assert float(mean_evidence(sums(one), sums(other), margin, SPAN)) == pytest.approx(least, abs=2e-3)


# ---- the intervals are what the tests do not refuse

samples = st.integers(0, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@settings(deadline=None, max_examples=20)
@given(samples, samples, st.sampled_from([0.1, 0.01, 0.0004]))
def test_the_interval_of_rates_is_what_is_not_refused(one, other, alpha):
    candidate, stable = Sample(*one), Sample(*other)
    found = rate_difference(candidate, stable, alpha)
    assert -1 <= found.low <= found.high <= 1
    if one[0] and other[0]:
        assert found.low <= one[1] / one[0] - other[1] / other[0] <= found.high
        assert found.n == one[0] + other[0]
    for margin in np.linspace(-0.95, 0.95, 9):
        if abs(margin - found.low) > 1e-6:
            refused = rate_evidence(candidate, stable, float(margin)) >= math.log(1 / alpha)
            assert refused == (found.low > margin)
        if abs(margin - found.high) > 1e-6:  # the other way round: the arms change places
            refused = rate_evidence(stable, candidate, float(-margin)) >= math.log(1 / alpha)
            assert refused == (found.high < margin)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2000), st.integers(0, 2000), st.floats(0, 2), st.sampled_from([0.1, 0.01]))
def test_the_interval_of_means_is_what_is_not_refused(nc, ns, shift, alpha):
    chance = np.random.default_rng(nc + ns)
    candidate, stable = sums(chance.normal(shift, 0.5, nc)), sums(chance.normal(0, 1, ns))
    found = mean_difference(candidate, stable, alpha, SPAN)
    assert found.low <= found.high
    for margin in (-3.0, -0.4, 0.0, 0.3, 1.0, 5.0):
        if abs(margin - found.low) > 1e-3:
            refused = mean_evidence(candidate, stable, margin, SPAN) >= math.log(1 / alpha)
            assert refused == (found.low > margin)


@pytest.mark.parametrize("n", [1, 3, 30, 1000])
def test_the_evidence_grows_with_the_distance(n):
    """So that what is not refused is one interval."""
    chance = np.random.default_rng(n)
    for spread in (0.0, 0.3, 3.0):
        one, other = sums(np.clip(chance.normal(0, spread, n), -5, 5)), sums(np.clip(chance.normal(0, 1, 50), -5, 5))
        found = [float(mean_evidence(one, other, margin, SPAN)) for margin in np.linspace(-SPAN, 0, 200)]
        assert (np.diff(found) <= 1e-2).all()


@pytest.mark.parametrize("shift", [-30.0, 4.0])
def test_means_may_be_anywhere_and_in_any_unit(shift):
    chance = np.random.default_rng(1)
    one, other = chance.normal(0.5, 1, 2000), chance.normal(0, 1, 3000)
    there = mean_difference(sums(one), sums(other), 0.01, SPAN)
    moved = mean_difference(sums(one + shift), sums(other + shift), 0.01, SPAN)
    scaled = mean_difference(sums(1000 * one), sums(1000 * other), 0.01, 1000 * SPAN)
    assert math.isfinite(there.low)
    assert (moved.low, moved.high) == pytest.approx((there.low, there.high), abs=1e-4)
    assert (scaled.low, scaled.high) == pytest.approx((1000 * there.low, 1000 * there.high), rel=1e-4)


@given(samples, st.sampled_from([0.1, 0.01]))
def test_the_interval_of_one_rate(seen, alpha):
    found = rate_interval(Sample(*seen), alpha)
    assert 0 <= found.low <= found.high <= 1
    for limit in (0.02, 0.3, 0.9):
        if abs(limit - found.low) > 1e-6:
            assert (limit_evidence(Sample(*seen), limit) >= math.log(1 / alpha)) == (found.low > limit)


def test_nothing_seen_says_nothing():
    nothing, some = Sample(0, 0), Sample(500, 480, 480)
    for one, other in ((nothing, nothing), (nothing, some), (some, nothing)):
        assert float(rate_evidence(one, other)) <= 0
        assert float(mean_evidence(one, other, 0.0, SPAN)) <= 0
        found = rate_difference(one, other, 0.05)
        assert math.isnan(found.estimate)
        assert found.low < 0 < found.high
        assert mean_difference(one, other, 0.05, SPAN).low == -math.inf


@given(samples, samples, st.sampled_from([0.0, 0.1]))
def test_the_value_at_one_pair_is_never_below_the_least(one, other, margin):
    """What the simulations below leave out is left out rightly."""
    if one[0] + other[0]:
        seen = [np.array([[n], [k], [k]], dtype=float) for n, k in (one, other)]
        least = rate_evidence(*(Sample(*arm) for arm in seen), margin)
        assert at_one_pair_of_rates(margin)(*seen) >= least - 1e-6
        means = mean_evidence(*(Sample(*arm) for arm in seen), 0.0, SPAN)
        assert at_the_common_mean(*seen) >= means - 1e-2


# ---- false alarms and findings


@pytest.mark.parametrize(("p", "share"), [(0.5, 0.5), (0.1, 0.1)])
def test_equal_rates_raise_no_alarm_more_often_than_alpha(p, share):
    chance = np.random.default_rng(2)
    arms = chance.random((STREAMS, 150)) < share
    x = (chance.random(arms.shape) < p).astype(float)
    found = false_alarms(rate_evidence, x, arms, bound=at_one_pair_of_rates(0.0))
    assert found <= most(ALPHA, STREAMS)


def test_a_fixed_test_that_is_looked_at_often_does_raise_them():
    """What all this is for: the same streams, with the usual z-test at 5 %."""
    chance = np.random.default_rng(2)
    arms = chance.random((2000, 150)) < 0.5
    x = (chance.random(arms.shape) < 0.5).astype(float)

    def z_test(candidate, stable):
        pooled = (candidate.total + stable.total) / (candidate.n + stable.n)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (candidate.mean - stable.mean) / np.sqrt(pooled * (1 - pooled) * (1 / candidate.n + 1 / stable.n))
        enough = np.minimum(candidate.n, stable.n) >= 10
        return np.where(enough & (z > stats.norm.ppf(1 - ALPHA)), np.inf, -np.inf)

    assert false_alarms(z_test, x, arms) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p", "share", "margin"),
    [(0.01, 0.5, 0.0), (0.3, 0.05, 0.0), (0.9, 0.9, 0.0), (0.05, 0.5, 0.05), (0.4, 0.2, 0.1)],
)
def test_rates_at_the_margin_raise_no_alarm_more_often_than_alpha(p, share, margin):
    """The candidate is worse by exactly what is allowed: the hardest case."""
    chance = np.random.default_rng(3)
    arms = chance.random((STREAMS, 1000)) < share
    x = chance.random(arms.shape) < np.where(arms, p + margin, p)
    found = false_alarms(
        lambda *seen: rate_evidence(*seen, margin), x.astype(float), arms, bound=at_one_pair_of_rates(margin)
    )
    assert found <= most(ALPHA, STREAMS)


def test_scores_between_0_and_1_raise_no_alarm_more_often_than_alpha():
    chance = np.random.default_rng(4)
    arms = chance.random((STREAMS, 60)) < 0.5
    x = np.where(arms, chance.beta(0.2, 0.2, arms.shape), chance.choice([0.0, 0.5, 1.0], arms.shape))
    assert false_alarms(rate_evidence, x, arms) <= most(ALPHA, STREAMS)


def test_one_rate_at_its_limit():
    chance = np.random.default_rng(5)
    x = (chance.random((STREAMS, 150)) < 0.5).astype(float)
    found = false_alarms(lambda seen, _: limit_evidence(seen, 0.5), x, np.ones_like(x, bool))
    assert 0 < found <= most(ALPHA, STREAMS)


LATENCIES = {  # logarithms
    "normal": lambda chance, shape: chance.normal(0, 1, shape),
    "of an exponential": lambda chance, shape: np.log(chance.exponential(1, shape)),
    "long tail above": lambda chance, shape: chance.exponential(1, shape),
    "a tenth is twenty times slower": lambda chance, shape: (
        chance.normal(0, 0.1, shape) + 3 * (chance.random(shape) < 0.1)
    ),
    "one in fifty is a hundred times slower": lambda chance, shape: (
        chance.normal(0, 0.02, shape) + 4.6 * (chance.random(shape) < 0.02)
    ),
    "either bound": lambda chance, shape: SPAN * (chance.random(shape) < 0.5) - SPAN / 2,
}


def latency_alarms(latency, streams, length, share, seed):
    chance = np.random.default_rng(seed)
    x = np.clip(LATENCIES[latency](chance, (streams, length)), -SPAN / 2, SPAN / 2)
    arms = chance.random(x.shape) < share
    return false_alarms(lambda *seen: mean_evidence(*seen, 0.0, SPAN), x, arms, bound=at_the_common_mean)


@pytest.mark.parametrize("latency", LATENCIES)
def test_equal_latencies_raise_no_alarm_more_often_than_alpha(latency):
    """1,000 short streams; more and longer ones in the slow form below."""
    assert latency_alarms(latency, 1000, 40, 0.5, 6) <= most(ALPHA, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("latency", LATENCIES)
def test_equal_latencies_raise_no_alarm_in_long_streams(latency, share):
    """The hardest for tests that trust the variance seen so far: few stable answers, none of the slow ones among them.
    There (a tenth twenty times slower, a share of 0.9) a sequential t-test raised alarms in 14 % of these streams."""
    assert latency_alarms(latency, STREAMS, 400, share, 7) <= most(ALPHA, STREAMS)


def test_unequal_spreads_are_no_difference_of_means():
    """Few observations of the wider arm, many of the narrow one: where a pooled variance fails."""
    chance = np.random.default_rng(8)
    arms = chance.random((1000, 80)) < 0.1
    x = np.clip(chance.normal(0, np.where(arms, 5.0, 0.5)), -SPAN / 2, SPAN / 2)
    found = false_alarms(lambda *seen: mean_evidence(*seen, 0.0, SPAN), x, arms, bound=at_the_common_mean)
    assert found <= most(ALPHA, 1000)


@pytest.mark.parametrize("n", [100, 100_000])
def test_twenty_failures_of_twenty_are_refused_at_once(n):
    assert float(rate_evidence(Sample(20, 20), Sample(n, n // 100))) > math.log(1000)
    assert float(limit_evidence(Sample(20, 20), 0.5)) > math.log(1000)
    assert float(rate_evidence(Sample(2, 2), Sample(n, n // 2))) < math.log(20)


def test_a_slower_arm_is_found_and_the_difference_narrowed_down():
    """Twice as slow with a spread of 0.5: 2,000 answers of each are more than enough."""
    chance = np.random.default_rng(9)
    for _ in range(20):
        one, other = chance.normal(0.69, 0.5, 2000), chance.normal(0, 0.5, 2000)
        found = mean_difference(sums(one), sums(other), 0.01, SPAN)
        assert found.low <= 0.69 <= found.high
        assert found.low > 0.4
        assert found.high < 1.0


# ---- bad input


@pytest.mark.parametrize(
    "sample", [Sample(3, 4), Sample(-1, 0), Sample(3, -1), Sample(3, math.nan), Sample(math.inf, 1)]
)
def test_counts_that_cannot_be(sample):
    good = Sample(5, 1)
    for one, other in ((sample, good), (good, sample)):
        with pytest.raises(ValueError, match="a rate needs"):
            rate_evidence(one, other)
    with pytest.raises(ValueError, match="a rate needs"):
        rate_interval(sample, 0.05)


@pytest.mark.parametrize("sample", [Sample(-1, 0, 0), Sample(3, math.inf, 1), Sample(3, 1, math.nan), Sample(3, 1, -1)])
def test_sums_that_cannot_be(sample):
    with pytest.raises(ValueError, match="a mean needs"):
        mean_evidence(sample, Sample(2, 1, 1), 0.0, SPAN)


def test_levels_margins_and_limits_that_are_none():
    good = Sample(5, 1, 1)
    for alpha in (0, 1, math.nan):
        with pytest.raises(ValueError, match="alpha between"):
            rate_difference(good, good, alpha)
        with pytest.raises(ValueError, match="alpha between"):
            mean_difference(good, good, alpha, SPAN)
        with pytest.raises(ValueError, match="alpha between"):
            rate_interval(good, alpha)
    for margin in (-1, 1, math.nan):
        with pytest.raises(ValueError, match="margin of a rate"):
            rate_evidence(good, good, margin)
    for limit in (0, 1, math.nan):
        with pytest.raises(ValueError, match="limit of a rate"):
            limit_evidence(good, limit)
    for span in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="span of a mean"):
            mean_evidence(good, good, 0.0, span)


# ---- how many of the candidate's requests it takes (docs/canary.md has this table)

EACH = ALPHA / 20  # four guards, five steps
OFTEN = np.unique(np.geomspace(5, 5000, 120).astype(int))  # of the candidate's requests, when it is looked


def coin(p):
    return lambda chance, shape: (chance.random(shape) < p).astype(float)


def seconds(times):
    return lambda chance, shape: np.clip(chance.normal(math.log(times), 0.5, shape), math.log(0.01), math.log(100))


def errors(candidate, stable):
    return rate_evidence(candidate, stable, 0.01)


def latency(candidate, stable):
    return mean_evidence(candidate, stable, math.log(1.25), math.log(1e4))


def score(candidate, stable):
    return rate_evidence(stable, candidate, 0.05)


def requests_until(evidence, candidate, stable, runs=200):
    """Median and 90 % quantile of the requests that a candidate with 5 % of the traffic answers before the alarm."""
    chance, at = np.random.default_rng(10), np.full(runs, np.inf)
    seen = {"candidate": np.zeros((3, runs)), "stable": np.zeros((3, runs))}
    for new, n in zip(np.diff(OFTEN, prepend=0), OFTEN, strict=True):
        for arm, draw, count in (("candidate", candidate, new), ("stable", stable, 19 * new)):
            x = draw(chance, (runs, count))
            seen[arm] += np.array([np.full(runs, count), x.sum(axis=1), (x**2).sum(axis=1)])
        refused = evidence(Sample(*seen["candidate"]), Sample(*seen["stable"])) >= math.log(1 / EACH)
        at = np.where(refused & np.isinf(at), n, at)
    return np.quantile(at, [0.5, 0.9], method="higher")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evidence", "candidate", "stable", "half", "most"),
    [
        pytest.param(errors, coin(0.04), coin(0.01), 2300, 3700, id="errors 1 % to 4 %"),
        pytest.param(errors, coin(0.06), coin(0.01), 600, 1000, id="errors 1 % to 6 %"),
        pytest.param(errors, coin(0.11), coin(0.01), 150, 250, id="errors 1 % to 11 %"),
        pytest.param(errors, coin(0.5), coin(0.01), 12, 20, id="errors 1 % to 50 %"),
        pytest.param(latency, seconds(1.5), seconds(1), 900, 1000, id="half as slow again"),
        pytest.param(latency, seconds(2), seconds(1), 280, 320, id="twice as slow"),
        pytest.param(latency, seconds(3), seconds(1), 150, 170, id="three times as slow"),
        pytest.param(score, coin(0.6), coin(0.8), 290, 480, id="thumbs up 80 % to 60 %"),
        pytest.param(score, coin(0.4), coin(0.8), 50, 80, id="thumbs up 80 % to 40 %"),
    ],
)
def test_how_many_requests_it_takes(evidence, candidate, stable, half, most):
    median, ninety = requests_until(evidence, candidate, stable)
    assert 0.6 * half <= median <= half
    assert 0.6 * most <= ninety <= most
