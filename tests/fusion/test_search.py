"""The candidates, the heuristics, and a search that only calls back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import UserError
from lorchestra.events import Silent
from lorchestra.fusion.search import (
    HEURISTICS,
    LEAST,
    MOST,
    Candidate,
    candidates,
    context_warnings,
    heuristic,
    search,
    stack_of,
    weights_key,
)  # fmt: skip


def member(seed, context=()):
    generator = torch.Generator().manual_seed(seed)
    update = LowRank(torch.randn(3, 1, generator=generator), torch.randn(1, 4, generator=generator))
    parents = tuple(Parent(name, adapter.digest, weight) for name, adapter, weight in context)
    return Adapter({"q": update}, lineage=Lineage(made_by="stage", context=parents))


def staged():
    """The article's three stages, each trained on all before it."""
    general = member(0)
    clinic = member(1, [("general", general, 1.0)])
    preference = member(2, [("general", general, 0.5), ("clinic", clinic, 1.0)])
    return {"general": general, "clinic": clinic, "preference": preference}


def independent(K):
    return {f"m{i}": member(i) for i in range(K)}


def by_origin(points, origin):
    return [dict(p.weights) for p in points if p.origin == origin]


class TestCandidates:
    def test_every_fixed_point_is_there(self):
        points = candidates(staged(), budget=20)
        names = ("general", "clinic", "preference")
        vectors = {p.origin: [] for p in points}
        for point in points:
            assert tuple(point.weights) == names
            vectors[point.origin].append(tuple(point.weights.values()))
        assert set(vectors["stack"]) == {(0.5, 1.0, 1.0), (1.0, 1.0, 0.0)}
        assert set(vectors["single"]) == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}
        assert vectors["uniform"] == [pytest.approx((1 / 3, 1 / 3, 1 / 3))]
        assert vectors["base"] == [(0.0, 0.0, 0.0)]
        assert len(points) == 20

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(K=st.integers(1, 5), budget=st.integers(0, 40), seed=st.integers(0, 2**31))
    def test_no_repetition_and_the_same_for_the_same_seed(self, K, budget, seed):
        members = independent(K)
        points = candidates(members, budget, seed)
        keys = [weights_key(p.weights) for p in points]
        assert len(set(keys)) == len(keys)
        fixed = K + (K > 1) + 1
        assert max(fixed, budget - 1) <= len(points) <= max(fixed, budget)
        assert points == candidates(members, budget, seed)
        assert [p.origin for p in points[:fixed]].count("simplex") == 0

    def test_the_fixed_points_are_tried_even_above_the_budget(self):
        assert len(candidates(staged(), budget=1)) == 2 + 3 + 1 + 1

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 2**31))
    def test_drawn_points_are_total_scale_times_simplex(self, seed):
        """Totals from half an average to a quarter beyond the largest stack, in every direction of the simplex."""
        drawn = by_origin(candidates(staged(), budget=200, seed=seed), "simplex")
        totals = [sum(weights.values()) for weights in drawn]
        assert all(weight >= 0 for weights in drawn for weight in weights.values())
        assert min(totals) >= LEAST - 1e-3
        assert max(totals) <= MOST * 2.5 + 1e-3
        assert min(totals) < LEAST + 0.2
        assert max(totals) > MOST * 2.5 - 0.2, "the largest stack (Σ = 2.5) lies inside"
        for name in ("general", "clinic", "preference"):
            shares = [weights[name] / total for weights, total in zip(drawn, totals, strict=True)]
            assert min(shares) < 0.05
            assert max(shares) > 0.8
            assert sum(shares) / len(shares) == pytest.approx(1 / 3, abs=0.05)

    def test_drawn_totals_of_independent_members_surround_the_average(self):
        totals = [sum(w.values()) for w in by_origin(candidates(independent(3), budget=100), "simplex")]
        assert LEAST - 1e-3 <= min(totals) < 1 < max(totals) <= MOST + 1e-3

    def test_other_seeds_draw_other_points(self):
        one, two = (by_origin(candidates(independent(3), 20, seed), "simplex") for seed in (0, 1))
        assert not {weights_key(w) for w in one} & {weights_key(w) for w in two}

    def test_one_member(self):
        points = candidates({"only": member(0)}, budget=5)
        assert [p.origin for p in points] == ["single", "base", "simplex", "simplex", "simplex"]


class TestStack:
    def test_at_the_final_weights_of_the_context(self):
        members = staged()
        assert stack_of("preference", members) == {"general": 0.5, "clinic": 1.0, "preference": 1.0}
        assert stack_of("general", members) == {"general": 1.0, "clinic": 0.0, "preference": 0.0}

    def test_members_are_known_by_digest_not_by_name(self):
        members = staged()
        renamed = {"g": members["general"], "c": members["clinic"]}
        assert stack_of("c", renamed) == {"g": 1.0, "c": 1.0}

    def test_another_version_of_the_context_is_not_the_stack(self):
        members = {**staged(), "general": member(9)}
        assert stack_of("clinic", members) is None
        assert by_origin(candidates(members, 10), "stack") == []

    def test_a_member_that_is_left_out(self):
        members = {name: adapter for name, adapter in staged().items() if name != "general"}
        assert stack_of("preference", members) is None

    def test_a_context_that_had_faded_out_is_not_missed(self):
        members = {"later": member(1, [("gone", member(0), 0.0), ("kept", member(2), 0.5)]), "kept": member(2)}
        assert stack_of("later", members) == {"later": 1.0, "kept": 0.5}


class TestSearch:
    def test_the_lowest_wins_and_ties_go_to_the_earlier(self):
        points = candidates(staged(), 12)
        found = search(points, lambda w: (w["general"] - 1) ** 2 + (w["clinic"] - 1) ** 2 + w["preference"] ** 2)
        assert found.chosen.weights == {"general": 1.0, "clinic": 1.0, "preference": 0.0}
        assert (found.chosen.origin, found.chosen.score) == ("stack", 0.0)
        assert [dict(c.weights) for c in found.candidates] == [dict(p.weights) for p in points]
        assert search(points, lambda w: 1.0).chosen.weights == points[0].weights

    @pytest.mark.parametrize(
        ("best", "origin"), [((0, 1, 0), "single"), ((1 / 3, 1 / 3, 1 / 3), "uniform"), ((0, 0, 0), "base")]
    )
    def test_no_search_is_needed_where_a_fixed_point_is_best(self, best, origin):
        found = search(candidates(staged(), 30), lambda w: math.dist(tuple(w.values()), best))
        assert found.chosen.origin == origin

    def test_every_score_is_heard_once(self):
        points, heard = candidates(staged(), 12), []
        search(points, lambda w: sum(w.values()), on_score=lambda key, value: heard.append((key, value)))
        assert heard == [(weights_key(p.weights), sum(p.weights.values())) for p in points]

    @pytest.mark.parametrize("stop", [1, 5, 11])
    def test_an_interrupted_search_calls_nothing_twice(self, stop):
        points, calls, kept = candidates(staged(), 12), [], {}

        def score(weights):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(weights_key(weights))
            return sum((w - 0.7) ** 2 for w in weights.values())

        with pytest.raises(KeyboardInterrupt):
            search(points, score, on_score=kept.__setitem__)
        assert list(kept) == calls
        again = []

        def counted(weights):
            again.append(weights_key(weights))
            return sum((w - 0.7) ** 2 for w in weights.values())

        resumed = search(points, counted, known=kept, on_score=kept.__setitem__)
        assert calls + again == [weights_key(p.weights) for p in points]
        straight = search(points, lambda w: sum((x - 0.7) ** 2 for x in w.values()))
        assert resumed == straight
        assert search(points, lambda w: pytest.fail("all are known"), known=kept) == straight

    def test_a_score_that_is_not_finite_never_wins(self):
        points = candidates(staged(), 12)
        heard = {}
        found = search(points, lambda w: math.nan if sum(w.values()) else 3.0, on_score=heard.__setitem__)
        assert (found.chosen.origin, found.chosen.score) == ("base", 3.0)
        assert sorted(set(heard.values())) == [3.0, math.inf]

    def test_progress_is_told(self):
        heard = []

        class Listening(Silent):
            def event(self, kind, /, **fields):
                heard.append((kind, fields["score"], fields["origin"]))

        search([Candidate({"a": 1.0}, "single"), Candidate({"a": 0.0}, "base")], lambda w: w["a"], reporter=Listening())
        assert heard == [("candidate", 1.0, "single"), ("candidate", 0.0, "base")]

    def test_nothing_to_choose_from(self):
        with pytest.raises(UserError, match="at least one candidate"):
            search([], lambda w: 0.0)
        with pytest.raises(UserError, match="no candidate has a finite score"):
            search(candidates(staged(), 8), lambda w: math.inf)


def test_weights_key():
    assert weights_key({"b": 0.5, "a": 1.0, "c": 0.0}) == "a=1,b=0.5"
    assert weights_key({"a": 1.0, "b": 0.5}) == weights_key({"b": 0.5 + 1e-9, "a": 1.0, "z": -0.0})
    assert weights_key({"a": -0.25}) == "a=-0.25"
    assert weights_key({"a": 0.0}) == weights_key({}) == ""


class TestHeuristics:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("equal", (1 / 3, 1 / 3, 1 / 3)),
            ("later", (1 / 6, 2 / 6, 3 / 6)),
            ("specialised", (0.2, 0.4, 0.4)),
            ("last", (0.5, 1.0, 1.0)),
        ],
    )
    def test_the_articles_rules(self, name, expected):
        found = heuristic(name, staged())
        assert list(found) == ["general", "clinic", "preference"]
        assert tuple(found.values()) == pytest.approx(expected)
        assert name in HEURISTICS

    @pytest.mark.parametrize("name", HEURISTICS)
    def test_one_member(self, name):
        assert heuristic(name, {"only": member(0)}) == {"only": 1.0}

    @pytest.mark.parametrize("K", [2, 5])
    @pytest.mark.parametrize("name", ["equal", "later", "specialised"])
    def test_they_are_averages(self, name, K):
        assert sum(heuristic(name, independent(K)).values()) == pytest.approx(1.0)

    def test_unknown(self):
        with pytest.raises(UserError, match="unknown heuristic 'best'; there are equal, later, specialised, last"):
            heuristic("best", staged())

    def test_last_without_its_whole_context(self):
        members = {name: adapter for name, adapter in staged().items() if name != "general"}
        with pytest.raises(UserError, match="'preference' was trained beside general, clinic, which are not all"):
            heuristic("last", members)


class TestContextWarnings:
    def test_the_stack_is_silent(self):
        members = staged()
        assert context_warnings(members, stack_of("preference", members) | {"general": 1.0, "preference": 0.0}) == []
        assert context_warnings(members, dict.fromkeys(members, 0.0)) == []
        assert context_warnings(independent(3), {"m0": 0.2, "m1": 3.0, "m2": -1.0}) == []

    def test_a_scaled_stack_is_silent(self):
        members = {name: adapter for name, adapter in staged().items() if name != "preference"}
        assert context_warnings(members, {"general": 0.5, "clinic": 0.5}) == []

    def test_the_articles_weights_are_not_the_stack(self):
        """0.3, 0.5, 0.2: clinic was trained beside general at 1, so beside its 0.5 it wants 0.5, not 0.3."""
        found = context_warnings(staged(), {"general": 0.3, "clinic": 0.5, "preference": 0.2})
        assert len(found) == 3
        assert "clinic was trained beside general at 1" in found[0]
        assert "0.5" in found[0]
        assert "0.3" in found[0]
        assert "preference was trained beside general at 0.5" in found[1]
        assert "preference was trained beside clinic at 1" in found[2]

    def test_a_context_that_is_left_out(self):
        members = staged()
        (dropped,) = context_warnings({"clinic": members["clinic"]}, {"clinic": 1.0})
        assert "trained beside general at 1" in dropped
        assert "no member" in dropped
        (zero,) = context_warnings({k: members[k] for k in ("general", "clinic")}, {"clinic": 1.0})
        assert "trained beside general at 1" in zero

    def test_a_namesake_is_not_the_context(self):
        members = {"general": member(9), "clinic": staged()["clinic"]}
        (found,) = context_warnings(members, {"general": 1.0, "clinic": 1.0})
        assert "no member" in found

    def test_a_context_that_had_faded_out_asks_for_nothing(self):
        general = member(0)
        clinic = member(1, [("general", general, 0.0)])
        assert context_warnings({"general": general, "clinic": clinic}, {"general": 0.0, "clinic": 1.0}) == []
        (found,) = context_warnings({"general": general, "clinic": clinic}, {"general": 0.5, "clinic": 1.0})
        assert "general at 0" in found
