"""The virtual token counter: the paper's bound, and that a flood starves nobody."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.serve.engine import OverloadedError
from lorchestra.serve.fair import FairQueue


@dataclass(eq=False)
class Request:
    tenant: str
    prompt: int
    tokens: int
    generated: int = 0


def run(queue, capacity, steps, running, refill=lambda: None, after=lambda: None):
    """An engine of ``capacity`` tokens of cache: takes up while the next one fits, then one token for each."""
    order = []
    for _ in range(steps):
        held = sum(r.prompt + r.tokens for r in running)
        while (head := queue.peek()) is not None and held + head.prompt + head.tokens <= capacity:
            taken = queue.pop()
            assert taken is head
            queue.charge(taken.tenant, prompt_tokens=taken.prompt)
            held += taken.prompt + taken.tokens
            running.append(taken)
            order.append(taken)
            refill()
        for request in running:
            request.generated += 1
            queue.charge(request.tenant, generated_tokens=1)
        running[:] = [r for r in running if r.generated < r.tokens]
        after()
    return order


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=2, max_size=4),
    capacity=st.integers(70, 200),
    prompt_weight=st.sampled_from([1.0, 0.5]),
    token_weight=st.sampled_from([2.0, 1.0]),
)
def test_of_tenants_that_always_wait_none_is_served_more_than_the_bound_ahead(
    sizes, capacity, prompt_weight, token_weight
):
    """Lemma 4.3, of what was done (not of the queue's own counters); theorem 4.4 is its difference of two moments."""
    queue = FairQueue(prompt_weight=prompt_weight, token_weight=token_weight)
    sizes = dict(zip("abcd", sizes, strict=False))
    sent = {name: [] for name in sizes}
    bound = max(prompt_weight * max(p for p, _ in sizes.values()), token_weight * capacity)

    def refill():
        for name, (prompt, tokens) in sizes.items():
            while queue.waiting(name) < 2:  # one left, when the other goes: it waits all the time
                sent[name].append(Request(name, prompt, tokens))
                queue.push(name, sent[name][-1])

    def after():
        served = [
            sum(prompt_weight * r.prompt * (r.generated > 0) + token_weight * r.generated for r in requests)
            for requests in sent.values()
        ]
        assert max(served) - min(served) <= bound

    refill()
    run(queue, capacity, 50, [], refill, after)


@given(
    flood=st.integers(1, 200),
    before=st.integers(1, 30),
    late=st.tuples(st.integers(1, 40), st.integers(1, 30)),
)
def test_a_tenant_that_comes_while_another_floods_is_next(flood, before, late):
    queue = FairQueue()
    for _ in range(flood):
        queue.push("flood", Request("flood", 20, 10))
    running = []
    run(queue, 100, before, running)
    mine = Request("late", *late)
    queue.push("late", mine)
    assert queue.peek() is mine


def test_without_fairness_the_late_one_would_wait_for_the_whole_flood():
    queue = FairQueue()
    for _ in range(200):
        queue.push("flood", Request("flood", 20, 10))
    for _ in range(5):
        queue.push("small", Request("small", 20, 10))
    order = [request.tenant for request in run(queue, 100, 60, [])]
    assert len([name for name in order[: order.index("small") + 10] if name == "small"]) == 5, "they take turns"


def test_a_pause_saves_nothing_up():
    queue = FairQueue()
    for name in ("busy", "idle"):
        queue.push(name, Request(name, 1, 1))
    queue.pop(), queue.pop()
    queue.charge("busy", generated_tokens=500)
    queue.push("busy", Request("busy", 1, 1))
    queue.push("idle", Request("idle", 1, 1))
    assert queue.served("idle") == queue.served("busy") == 1000


def test_a_queue_that_ran_empty_lifts_to_the_last_that_left():
    queue = FairQueue()
    queue.push("first", Request("first", 1, 1))
    queue.pop()
    queue.charge("first", prompt_tokens=70)
    queue.push("second", Request("second", 1, 1))
    assert queue.served("second") == 70


def test_who_was_served_more_is_not_lowered_by_coming_back():
    queue = FairQueue()
    queue.charge("much", prompt_tokens=100)
    queue.push("little", Request("little", 1, 1))
    queue.push("much", Request("much", 1, 1))
    assert queue.served("much") == 100
    assert queue.pop().tenant == "little"


def test_within_a_tenant_who_came_first_goes_first():
    queue = FairQueue()
    sent = [Request("a", 1, 1) for _ in range(5)]
    for request in sent:
        queue.push("a", request)
    assert [queue.pop() for _ in range(5)] == sent
    assert queue.pop() is None
    assert queue.peek() is None


def test_equals_take_turns_even_before_they_are_charged():
    queue = FairQueue()
    for name in "aaabbbccc":
        queue.push(name, Request(name, 1, 1))
    assert "".join(queue.pop().tenant for _ in range(9)) == "abcabcabc"


def test_what_was_removed_is_never_popped():
    queue = FairQueue()
    one, two = Request("a", 1, 1), Request("a", 1, 1)
    queue.push("a", one)
    queue.push("a", two)
    assert queue.remove(one) is True
    assert queue.remove(one) is False
    assert len(queue) == queue.waiting("a") == 1
    assert queue.pop() is two
    assert queue.remove(two) is False
    assert len(queue) == queue.waiting("a") == 0


def test_a_tenants_own_bound_holds_and_frees_with_a_turn():
    now = [0.0]
    queue = FairQueue(per_tenant=2, total=100, clock=lambda: now[0])
    queue.push("a", Request("a", 1, 1))
    queue.push("a", Request("a", 1, 1))
    with pytest.raises(OverloadedError, match="2 requests of yours wait already") as caught:
        queue.push("a", Request("a", 1, 1))
    assert caught.value.retry_after == 1.0
    assert len(queue) == 2
    queue.pop()
    queue.push("a", Request("a", 1, 1))


def test_the_bound_in_all_holds_but_never_locks_a_tenant_out():
    queue = FairQueue(per_tenant=100, total=10, assured=2)
    for _ in range(10):
        queue.push("flood", Request("flood", 1, 1))
    with pytest.raises(OverloadedError, match="10 requests wait"):
        queue.push("flood", Request("flood", 1, 1))
    queue.push("other", Request("other", 1, 1))
    queue.push("other", Request("other", 1, 1))
    with pytest.raises(OverloadedError):
        queue.push("other", Request("other", 1, 1))
    assert len(queue) == 12


def test_retry_after_follows_the_pace_of_late():
    now = [0.0]
    queue = FairQueue(per_tenant=3, clock=lambda: now[0])
    for _ in range(8):
        queue.push("a", Request("a", 1, 1))
        queue.pop()
        now[0] += 7.0
    for _ in range(3):
        queue.push("a", Request("a", 1, 1))
    with pytest.raises(OverloadedError) as caught:
        queue.push("a", Request("a", 1, 1))
    assert caught.value.retry_after == pytest.approx(7.0)


def test_threads_lose_and_double_nothing():
    queue = FairQueue(per_tenant=10_000, total=10_000)
    sent = {name: [Request(name, 1, 1) for _ in range(500)] for name in "abcd"}
    got, lock = [], threading.Lock()

    def push(name):
        for request in sent[name]:
            queue.push(name, request)

    def pop():
        mine = []
        while len(mine) < 500:
            if (request := queue.pop()) is not None:
                mine.append(request)
                queue.charge(request.tenant, 1, 1)
        with lock:
            got.extend(mine)

    threads = [threading.Thread(target=push, args=name) for name in "abcd"]
    threads += [threading.Thread(target=pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2000
    assert {id(r) for r in got} == {id(r) for requests in sent.values() for r in requests}
    assert all(queue.served(name) >= 1500 for name in "abcd")
