"""The fixed points of a search, the article's heuristics, and contexts that a mixture leaves out."""

from __future__ import annotations

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import UserError
from lorchestra.fusion.search import HEURISTICS, candidates, context_warnings, heuristic, stack_of, weights_key


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
    def test_every_fixed_point_is_there_once(self):
        points = candidates(staged())
        names = ("general", "clinic", "preference")
        vectors = {p.origin: [] for p in points}
        for point in points:
            assert tuple(point.weights) == names
            vectors[point.origin].append(tuple(point.weights.values()))
        assert vectors == {
            "stack": [(0.5, 1.0, 1.0), (1.0, 1.0, 0.0)],
            "single": [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)],
            "drop": [(0.0, 1.0, 1.0), (0.5, 0.0, 1.0), (0.5, 1.0, 0.0)],
            "uniform": [pytest.approx((1 / 3, 1 / 3, 1 / 3))],
            "base": [(0.0, 0.0, 0.0)],
        }
        assert points[0].weights == stack_of("preference", staged()), "the search starts where the stages were trained"

    def test_a_stack_of_two_without_one_is_a_single(self):
        members = {name: adapter for name, adapter in staged().items() if name != "preference"}
        assert [p.origin for p in candidates(members)] == ["stack", "single", "single", "uniform", "base"]

    @pytest.mark.parametrize("K", [1, 2, 5])
    def test_independent_members_have_no_stack(self, K):
        points = candidates(independent(K))
        assert [p.origin for p in points] == ["single"] * K + ["uniform"] * (K > 1) + ["base"]
        assert len({weights_key(p.weights) for p in points}) == len(points)


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
        assert by_origin(candidates(members), "stack") == []

    def test_a_member_that_is_left_out(self):
        members = {name: adapter for name, adapter in staged().items() if name != "general"}
        assert stack_of("preference", members) is None

    def test_a_context_that_had_faded_out_is_not_missed(self):
        members = {"later": member(1, [("gone", member(0), 0.0), ("kept", member(2), 0.5)]), "kept": member(2)}
        assert stack_of("later", members) == {"later": 1.0, "kept": 0.5}


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
