"""The sampler, against one row at a time in float64 with sorts and loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from lorchestra.serve.embedded.generation import Sampling
from lorchestra.serve.embedded.sampler import Draws, NotFiniteError, choose, score

INF = math.inf
GREEDY = Sampling(max_tokens=99, temperature=0.0)
HOT = Sampling(max_tokens=99)


def make_logits(rows=1, size=300, seed=0, spread=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, size, generator=generator)).to(dtype)


def logprobs_of(logits, how):
    """log-softmax of one row after its bias, in float64."""
    x = logits.double()
    for token, bias in how.logit_bias.items():
        x[token] += bias
    return torch.log_softmax(x, -1)


def distribution(logits, how, generated=()):
    """Token → probability, of one row, by the definitions."""
    x = logits.double()
    for token, bias in how.logit_bias.items():
        x[token] += bias
    for token in set(generated):
        x[token] -= how.presence_penalty + how.frequency_penalty * list(generated).count(token)
    if len(generated) < how.min_tokens:
        x[sorted(how.stop_ids)] = -INF
    x = x.tolist()
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if how.temperature == 0:
        return {order[0]: 1.0}
    weight = {i: math.exp((x[i] - x[order[0]]) / how.temperature) for i in order}
    kept = [i for i in order if weight[i] >= how.min_p]
    kept = kept[: how.top_k] if how.top_k else kept
    whole, before, nucleus = math.fsum(weight[i] for i in kept), 0.0, []
    for i in kept:
        if before < how.top_p * whole or not nucleus:
            nucleus.append(i)
        before += weight[i]
    whole = math.fsum(weight[i] for i in nucleus)
    return {i: weight[i] / whole for i in nucleus if weight[i] > 0}


def draw(logits, how, times, seed=0):
    """Tokens of ``times`` rows with the same logits, each with a generator of its own."""
    draws = [Draws(replace(how, seed=seed + i), len(logits)) for i in range(times)]
    return [token.id for token in choose(logits.expand(times, -1), draws)]


def one(logits, how, generated=()):
    draws = Draws(how, logits.shape[-1])
    for token in generated:
        draws.add(token)
    return choose(logits.reshape(1, -1), [draws])[0]


FILTERS = [
    {}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 1}, {"top_k": 7}, {"top_k": 260}, {"top_k": 10_000},
    {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 1e-9}, {"top_p": 0.9999}, {"min_p": 0.1}, {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8}, {"top_k": 280, "top_p": 0.99}, {"top_p": 0.7, "min_p": 0.2, "temperature": 1.5},
    {"top_k": 5, "min_p": 0.01, "top_p": 0.95}, {"logit_bias": {3: 5.0, 9: -100.0}, "top_k": 4},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_tokens_come_as_often_as_their_probability_says(how, dtype):
    logits, how = make_logits(dtype=dtype)[0], replace(HOT, **how)
    expected, times = distribution(logits, how), 1500
    seen = torch.bincount(torch.tensor(draw(logits, how, times)), minlength=len(logits)).tolist()
    assert {i for i, n in enumerate(seen) if n} <= set(expected)
    # Tokens too rare for the test's approximation count together.
    often = [i for i, share in expected.items() if share * times >= 10]
    rest = [i for i in expected if i not in set(often)]
    counts = [seen[i] for i in often] + [sum(seen[i] for i in rest)] * bool(rest)
    wanted = [expected[i] * times for i in often] + [sum(expected[i] for i in rest) * times] * bool(rest)
    if len(wanted) > 1 and wanted[-1] > 1:
        assert chisquare(counts, wanted, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize(
    "how", [f for f in FILTERS if f not in ({}, {"temperature": 0.5}, {"temperature": 2.0})], ids=str
)
def test_exactly_the_tokens_that_the_filters_leave_can_come(how):
    logits, how = make_logits(size=100, spread=0.3, seed=1)[0], replace(HOT, **how)
    expected = distribution(logits, how)
    seen = set(draw(logits, how, 2000))
    assert seen <= set(expected)
    # Nearly flat: each allowed one comes ten times or more on average.
    if min(expected.values()) > 5e-3:
        assert seen == set(expected)


@pytest.mark.parametrize("size", [300, 5000, 20_000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_wide_and_narrow_sets_are_found_alike(size, spread):
    """The first leading tokens, more of them, or all: the set is the same as by sorting."""
    logits = make_logits(size=size, spread=spread, seed=2)[0]
    for how in (replace(HOT, top_p=0.95), replace(HOT, top_k=size - 7, top_p=0.99), replace(HOT, top_k=299)):
        expected = distribution(logits, how)
        tokens = draw(logits, how, 100)
        assert set(tokens) <= set(expected)
        # The highest number that a generator can give leads to the last token of the set.
        last = Draws(how, size)
        last.uniform = lambda: 1 - 2**-53
        assert choose(logits[None], [last])[0].id in list(expected)[-3:]


def test_equal_logits_come_lowest_id_first():
    logits = torch.zeros(1000)
    logits[500:] = 1.0
    assert one(logits, GREEDY).id == 500
    assert set(draw(logits, replace(HOT, top_k=5), 200)) == {500, 501, 502, 503, 504}
    assert set(draw(logits, replace(HOT, top_k=502), 1000)) - set(range(500, 1000)) <= {0, 1}
    token = one(logits, replace(GREEDY, logprobs=20))
    assert [i for i, _ in token.top] == list(range(500, 520))


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.builds(
            Sampling,
            max_tokens=st.just(99),
            temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
            top_p=st.sampled_from([1.0, 0.9, 0.2]),
            top_k=st.sampled_from([0, 1, 3, 280]),
            min_p=st.sampled_from([0.0, 0.05]),
            seed=st.integers(-(2**63), 2**63 - 1),
            logit_bias=st.dictionaries(
                st.integers(0, 299), st.sampled_from([-INF, -100.0, -1.0, 1.0, 100.0]), max_size=3
            ),
            presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
            frequency_penalty=st.sampled_from([0.0, 0.7]),
            logprobs=st.sampled_from([None, 0, 1, 5, 20]),
            stop_ids=st.frozensets(st.integers(0, 400), max_size=3),
            min_tokens=st.sampled_from([0, 2]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_is_the_same_alone_among_others_and_in_any_order(hows, shuffle, dtype):
    steps = [make_logits(len(hows), seed=step, dtype=dtype) for step in range(3)]
    alone = [[Draws(how, 300)] for how in hows]
    together = [Draws(how, 300) for how in hows]
    order = list(range(len(hows)))
    shuffle.shuffle(order)
    mixed = [Draws(hows[i], 300) for i in order]
    for logits in steps:
        before = logits.clone()
        wanted = [choose(logits[i : i + 1], alone[i])[0] for i in range(len(hows))]
        got = choose(logits, together)
        permuted = choose(logits[order], mixed)
        assert torch.equal(logits, before)
        for i, (token, expected) in enumerate(zip(got, wanted, strict=True)):
            close(token, expected)
            close(permuted[order.index(i)], expected)


def close(token, expected):
    assert token.id == expected.id
    assert (token.logprob is None) == (expected.logprob is None)
    if token.logprob is not None:
        assert token.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [i for i, _ in token.top] == [i for i, _ in expected.top]
    assert [v for _, v in token.top] == pytest.approx([v for _, v in expected.top], abs=1e-5)


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.dictionaries(st.integers(0, 299), st.sampled_from([-INF, -100.0, -1.5, 2.0, 100.0]), max_size=5),
    st.lists(st.integers(0, 299), max_size=6),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 0.3, 2.0]),
    st.integers(0, 20),
    st.integers(0, 8),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_log_probabilities_are_after_bias_and_before_the_rest(seed, bias, past, presence, frequency, n, least, dtype):
    logits = make_logits(seed=seed, dtype=dtype)[0]
    how = replace(
        GREEDY, logit_bias=bias, presence_penalty=presence, frequency_penalty=frequency, logprobs=n,
        stop_ids=frozenset({0, 5, int(logits.argmax()), 999}), min_tokens=least,
    )  # fmt: skip
    how = replace(how, stop_ids=how.stop_ids - {999})
    token = one(logits, replace(how, stop_ids=how.stop_ids | {999}), past)
    exact = logprobs_of(logits, how)
    likeliest = max(distribution(logits, how, past))
    assert token.id == likeliest
    assert token.logprob == pytest.approx(float(exact[token.id]), abs=1e-5)
    order = sorted(range(300), key=lambda i: (-float(exact[i]), i))[:n]
    assert [i for i, _ in token.top] == order
    assert [v for _, v in token.top] == pytest.approx([float(exact[i]) for i in order], abs=1e-5)
    assert list(token.top) == sorted(token.top, key=lambda entry: -entry[1])
    assert token.logprob == dict(token.top).get(token.id, token.logprob)  # to the bit


def test_penalties_by_hand():
    how = replace(GREEDY, presence_penalty=0.5, frequency_penalty=0.25)
    draws, logits = Draws(how, 3), torch.tensor([[1.0, 0.3, -0.6]])
    # Token 0 has 1.0, 0.25, 0, −0.25, −0.5, −0.75 after 0 to 5 times; token 1 has 0.3, −0.45, −0.7; token 2 −0.6.
    assert [choose(logits, [draws])[0].id for _ in range(8)] == [0, 1, 0, 0, 0, 1, 0, 2]
    assert draws.generated == 8


def test_a_bias_of_100_forces_and_forbids():
    logits = make_logits()[0]
    best = int(logits.argmax())
    assert set(draw(logits, replace(HOT, logit_bias={7: 100.0}), 50)) == {7}
    assert best not in draw(logits, replace(HOT, logit_bias={best: -100.0}), 2000)
    assert one(logits, replace(GREEDY, logit_bias={7: 100.0}, logprobs=0)).logprob == pytest.approx(0, abs=1e-5)


def test_stop_ids_wait_for_min_tokens():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    draws = Draws(replace(GREEDY, stop_ids=frozenset({0, 7}), min_tokens=2), 3)
    assert [choose(logits, [draws])[0].id for _ in range(3)] == [1, 1, 0]


def test_where_nothing_is_left_the_models_likeliest_is_taken():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    every = frozenset({0, 1, 2})
    for how in (GREEDY, HOT, replace(HOT, top_p=0.5), replace(HOT, top_k=2, min_p=0.5)):
        masked = one(logits, replace(how, stop_ids=every, min_tokens=1, logprobs=1))
        assert (masked.id, masked.top[0][0]) == (0, 0)
        assert masked.logprob == pytest.approx(-0.40760596)
        forbidden = one(logits, replace(how, logit_bias=dict.fromkeys(range(3), -INF), logprobs=2))
        assert (forbidden.id, forbidden.logprob) == (0, -INF)
        assert [value for _, value in forbidden.top] == [-INF, -INF]
        left = one(logits, replace(how, logit_bias={0: -INF, 1: -INF}, logprobs=3))
        assert (left.id, left.logprob, left.top[1:]) == (2, 0.0, ((0, -INF), (1, -INF)))


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_logits_that_are_not_finite_are_told_by_row_and_nothing_is_drawn(bad):
    logits = make_logits(4)
    logits[1, 17] = bad
    logits[3] = -INF
    draws = [Draws(replace(HOT, seed=i), 300) for i in range(4)]
    with pytest.raises(NotFiniteError, match="not finite") as caught:
        choose(logits, draws)
    assert caught.value.rows == (1, 3)
    assert [d.generated for d in draws] == [0] * 4
    rest = choose(logits[[0, 2]], [draws[0], draws[2]])
    assert rest == choose(logits[[0, 2]], [Draws(replace(HOT, seed=i), 300) for i in (0, 2)])
    with pytest.raises(NotFiniteError) as caught:
        score(logits, [0] * 4, HOT)
    assert caught.value.rows == (1, 3)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_bias_that_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match="logit_bias"):
        Draws(replace(HOT, logit_bias={1: bad}), 300)


@pytest.mark.parametrize("how", [HOT, replace(HOT, top_p=0.5), replace(HOT, top_k=9)], ids=["free", "top_p", "top_k"])
def test_extremes_of_temperature_and_size_of_logits(how):
    big = torch.tensor([[-3e38, 3e38, 0.0, 1e38] + [-3e38] * 400])
    for temperature in (1e-300, 1e-5, 1e-4, 2.0):
        assert one(big, replace(how, temperature=temperature)).id == 1
    assert one(torch.full((1, 400), -3e38), replace(how, top_k=1)).id == 0


def test_a_seed_is_a_sequence_of_numbers():
    def run(seed, times=40):
        draws = Draws(replace(HOT, seed=seed), 300)
        return [choose(make_logits(seed=i), [draws])[0].id for i in range(times)]

    assert run(5) == run(5)
    assert len({tuple(run(seed)) for seed in (0, 1, -1, 5, -5, 2**63 - 1, -(2**63))}) == 7
    assert run(None) != run(None)


def test_greedy_rows_take_no_number_and_sampled_ones_one_each():
    how = replace(HOT, seed=3)
    a, b = Draws(how, 300), Draws(how, 300)
    choose(make_logits(), [a])
    b.uniform()
    assert a.uniform() == b.uniform()
    c, d = Draws(replace(how, temperature=0.0), 300), Draws(how, 300)
    choose(make_logits(), [c])
    assert c.uniform() == d.uniform()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 5, 400])
def test_a_prompt_is_scored_as_the_model_says(n, dtype, monkeypatch):
    monkeypatch.setattr("lorchestra.serve.embedded.sampler._AT_A_TIME", 1000)  # three positions at a time
    logits = make_logits(10, dtype=dtype)
    how = replace(HOT, prompt_logprobs=n, logit_bias={4: 3.0}, presence_penalty=1.0)
    ids = [4, 4, 9, 200, 299, 0, 1, 2, 3, 4]
    before = logits.clone()
    for given_ids in (ids, torch.tensor(ids)):
        tokens = score(logits, given_ids, how)
        assert [token.id for token in tokens] == ids
        for row, token in zip(logits, tokens, strict=True):
            exact = logprobs_of(row, how)
            assert token.logprob == pytest.approx(float(exact[token.id]), abs=1e-5)
            order = sorted(range(300), key=lambda i: (-float(exact[i]), i))[:n]
            assert [i for i, _ in token.top] == order
            assert token.logprob == dict(token.top).get(token.id, token.logprob)
    assert torch.equal(logits, before)
    assert score(logits[:0], [], how) == []
