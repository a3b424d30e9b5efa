"""Strategies on quadratics whose minimum is known: how near they come, what they try, and that they can be resumed."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import UserError
from lorchestra.events import Silent
from lorchestra.fusion.search import STRATEGIES, Space, search, weights_key
from lorchestra.fusion.search.designs import LEAST, MOST, grid_size, simplex_grid, spread
from lorchestra.fusion.search.problem import SLOPE
from lorchestra.fusion.search.strategies import BEYOND

BEST = np.array([0.7, 0.1, 1.2, 0.4, 0.9])


def member(seed, context=()):
    generator = torch.Generator().manual_seed(seed)
    update = LowRank(torch.randn(3, 1, generator=generator), torch.randn(1, 4, generator=generator))
    parents = tuple(Parent(name, adapter.digest, weight) for name, adapter, weight in context)
    return Adapter({"q": update}, lineage=Lineage(made_by="stage", context=parents))


def independent(K):
    return {f"m{i}": member(i) for i in range(K)}


def staged():
    general = member(0)
    clinic = member(1, [("general", general, 1.0)])
    return {
        "general": general,
        "clinic": clinic,
        "late": member(2, [("general", general, 0.5), ("clinic", clinic, 1.0)]),
    }


class Quadratic:
    """½ (λ − best)ᵀ H (λ − best), and everything that was asked of it."""

    def __init__(self, best, seed=0):
        self.best = np.asarray(best, dtype=np.float64)
        M = np.random.default_rng(seed).normal(size=(self.best.size, self.best.size))
        self.H = M @ M.T + 0.3 * np.eye(self.best.size)
        self.asked, self.slopes = [], []

    def at(self, point):
        d = np.array(list(point.values())) - self.best
        return float(0.5 * d @ self.H @ d)

    def values(self, points):
        self.asked += [weights_key(point) for point in points]
        return [self.at(point) for point in points]

    def slope(self, point):
        self.slopes.append(weights_key(point))
        d = np.array(list(point.values())) - self.best
        return self.at(point), dict(zip(point, self.H @ d, strict=True))


FIXED = ("stack", "single", "drop", "uniform", "base")


class TestStrategies:
    @pytest.mark.parametrize("name", STRATEGIES)
    @pytest.mark.parametrize("K", [2, 3])
    def test_reaches_at_least_the_best_fixed_point_within_its_budget(self, name, K):
        objective = Quadratic(BEST[:K])
        found = search(Space(independent(K)), objective, strategy=name, seed=3)
        fixed = min(c.score for c in found.candidates if c.origin in FIXED)
        assert found.chosen.score == min(c.score for c in found.candidates) <= fixed
        assert all(c.score == objective.at(c.weights) for c in found.candidates)
        assert len(objective.asked) == len(set(objective.asked)) == len(found.candidates)
        if name != "grid":
            fixed = sum(c.origin in FIXED for c in found.candidates)
            assert len(objective.asked) + SLOPE * len(objective.slopes) <= fixed + BEYOND

    @pytest.mark.parametrize(("name", "K", "share"), [
        ("gradient", 1, 1e-4), ("gradient", 3, 1e-4), ("gradient", 5, 1e-3),
        ("surrogate", 1, 1e-4), ("surrogate", 3, 0.01), ("surrogate", 5, 0.01),
        ("tpe", 3, 0.1), ("cmaes", 3, 0.2), ("grid", 3, 0.8),
    ])  # fmt: skip
    def test_comes_near_the_minimum(self, name, K, share):
        """What is left of the best fixed point's distance to the minimum, in the loss."""
        budget = None if name == "grid" else 32
        found = search(Space(independent(K)), Quadratic(BEST[:K], seed=K), strategy=name, budget=budget)
        fixed = min(c.score for c in found.candidates if c.origin in FIXED)
        assert found.chosen.score <= share * fixed

    @pytest.mark.parametrize("name", ["gradient", "surrogate"])
    def test_with_budget_enough_it_is_the_minimum(self, name):
        found = search(Space(independent(3)), Quadratic(BEST[:3], seed=3), strategy=name, budget=90)
        assert tuple(found.chosen.weights.values()) == pytest.approx(BEST[:3], abs=0.02)

    @pytest.mark.parametrize("name", ["gradient", "surrogate", "tpe", "cmaes"])
    def test_nothing_is_proposed_outside_the_box(self, name):
        found = search(Space(independent(2), low=-0.2, high=0.9), Quadratic([-1.0, 2.0]), strategy=name)
        proposed = [w for c in found.candidates if c.origin not in FIXED for w in c.weights.values()]
        assert proposed
        assert min(proposed) >= -0.2
        assert max(proposed) <= 0.9

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_the_seed_alone_decides(self, name):
        one, two = (search(Space(staged()), Quadratic(BEST[:3]), strategy=name, seed=5) for _ in range(2))
        assert one == two

    @pytest.mark.parametrize("name", ["sobol", "tpe", "cmaes"])
    def test_other_seeds_try_other_points(self, name):
        one, two = (search(Space(staged()), Quadratic(BEST[:3]), strategy=name, seed=s) for s in (0, 1))
        assert {weights_key(c.weights) for c in one.candidates} != {weights_key(c.weights) for c in two.candidates}

    def test_a_region_without_finite_scores_is_avoided(self):
        class Broken(Quadratic):
            def at(self, point):
                return math.nan if sum(point.values()) > 1.5 else super().at(point)

        for name in ("gradient", "surrogate", "tpe", "cmaes", "sobol"):
            found = search(Space(independent(2)), Broken([0.9, 0.9]), strategy=name)
            assert math.isfinite(found.chosen.score)
            assert all(c.score == math.inf for c in found.candidates if sum(c.weights.values()) > 1.5)

    def test_one_member_has_no_covariance(self):
        with pytest.raises(UserError, match="cmaes needs 2 members"):
            search(Space(independent(1)), Quadratic([0.5]), strategy="cmaes")


class TestGrid:
    @pytest.mark.parametrize(("K", "step", "count"), [(3, 0.1, 66), (2, 0.25, 5), (4, 0.5, 10), (1, 0.1, 1)])
    def test_is_exactly_the_simplex(self, K, step, count):
        points = list(simplex_grid(K, step))
        n = round(1 / step)
        every = {tuple(c / n for c in counts) for counts in product(range(n + 1), repeat=K) if sum(counts) == n}
        assert set(points) == every
        assert len(points) == count == grid_size(K, step)

    def test_is_tried_whole_at_every_total(self):
        objective = Quadratic(BEST[:3])
        found = search(Space(independent(3), totals=(1.0, 2.0)), objective, strategy="grid")
        totals = [round(sum(c.weights.values()), 6) for c in found.candidates if c.origin == "grid"]
        assert (totals.count(1.0), totals.count(2.0)) == (63, 66), "the three singles are fixed points"

    def test_a_budget_below_its_size_is_refused_before_anything_is_scored(self):
        objective = Quadratic(BEST[:3])
        with pytest.raises(UserError, match=r"66 points .* more than the budget of 30"):
            search(Space(independent(3)), objective, strategy="grid", budget=30)
        assert objective.asked == []

    @pytest.mark.parametrize("step", [0.3, 0.0, -0.5, 2.0])
    def test_a_step_that_does_not_divide_one(self, step):
        with pytest.raises(UserError, match="does not reach 1"):
            list(simplex_grid(3, step))


class TestHeuristics:
    def test_are_the_articles_points_once(self):
        found = search(Space(staged()), Quadratic(BEST[:3]), strategy="heuristics")
        tried = {c.origin: tuple(c.weights.values()) for c in found.candidates}
        assert tried["heuristic later"] == pytest.approx((1 / 6, 2 / 6, 3 / 6))
        assert tried["heuristic specialised"] == pytest.approx((0.2, 0.4, 0.4))
        assert not {"heuristic equal", "heuristic last"} & set(tried), "they are the uniform point and the stack"


class TestSobol:
    @pytest.mark.parametrize("seed", range(8))
    def test_drawn_points_are_total_scale_times_simplex(self, seed):
        """Totals from half an average to a quarter beyond the largest stack, in every direction of the simplex."""
        drawn = spread(3, 200, 2.5, seed)
        totals = [sum(point) for point in drawn]
        assert all(weight >= 0 for point in drawn for weight in point)
        assert min(totals) + 1e-9 >= LEAST
        assert max(totals) <= MOST * 2.5 + 1e-9
        assert min(totals) < LEAST + 0.2
        assert max(totals) > MOST * 2.5 - 0.2, "the largest stack (Σ = 2.5) lies inside"
        for k in range(3):
            shares = [point[k] / total for point, total in zip(drawn, totals, strict=True)]
            assert min(shares) < 0.05
            assert max(shares) > 0.8
            assert sum(shares) / len(shares) == pytest.approx(1 / 3, abs=0.05)


class TestLayerGroups:
    def space(self, shrinkage):
        parts = {"m0": ("m0:a", "m0:b"), "m1": ("m1:a", "m1:b")}
        return Space(independent(2), parts, shrinkage=shrinkage)

    def test_groups_find_their_own_weights_when_nothing_draws_them(self):
        objective = Quadratic([0.2, 0.8, 1.0, 0.5])
        found = search(self.space(shrinkage=0.0), objective, budget=120)
        assert tuple(found.chosen.weights) == ("m0:a", "m0:b", "m1:a", "m1:b")
        assert tuple(found.chosen.weights.values()) == pytest.approx((0.2, 0.8, 1.0, 0.5), abs=0.05)
        assert found.chosen.origin == "layer groups"

    def test_shrinkage_draws_them_to_the_common_weight(self):
        def apart(shrinkage):
            found = search(self.space(shrinkage), Quadratic([0.2, 0.8, 1.0, 0.5]), budget=120)
            (w,) = [c.weights for c in found.candidates if c.origin == "layer groups"] or [found.chosen.weights]
            return abs(w["m0:a"] - w["m0:b"]) + abs(w["m1:a"] - w["m1:b"])

        assert apart(0.0) > 2 * apart(10.0)
        assert apart(1e4) < 0.01

    def test_fixed_points_and_strategies_keep_parts_together(self):
        found = search(self.space(0.1), Quadratic([0.2, 0.8, 1.0, 0.5]), strategy="sobol", budget=40)
        for candidate in found.candidates:
            if candidate.origin != "layer groups":
                assert candidate.weights["m0:a"] == candidate.weights["m0:b"]
        assert {"single", "uniform", "base", "sobol", "layer groups"} == {c.origin for c in found.candidates}


class TestSearch:
    def test_fixed_points_come_first_and_win_ties(self):
        found = search(
            Space(staged()), type("Flat", (Quadratic,), {"at": lambda self, p: 1.0})(BEST[:3]), strategy="tpe"
        )
        assert [c.origin for c in found.candidates[:2]] == ["stack", "stack"]
        assert found.chosen == found.candidates[0]

    def test_fixed_points_are_tried_even_above_the_budget(self):
        objective = Quadratic(BEST[:3])
        found = search(Space(staged()), objective, budget=1)
        assert {c.origin for c in found.candidates} == set(FIXED)
        assert objective.slopes == []

    def test_progress_is_told(self):
        heard, bars = [], []

        class Listening(Silent):
            def event(self, kind, /, **fields):
                heard.append((kind, fields["score"], fields["origin"]))

            def task(self, name, total=None, unit="it"):
                bars.append((name, total, unit))
                return super().task(name, total, unit)

        found = search(Space(staged()), Quadratic(BEST[:3]), strategy="heuristics", budget=20, reporter=Listening())
        assert heard == [("candidate", c.score, c.origin) for c in found.candidates]
        assert bars == [("search weights", 20, "pass")]

    def test_nothing_finite(self):
        with pytest.raises(UserError, match="no candidate has a finite score"):
            search(Space(staged()), type("Bad", (Quadratic,), {"at": lambda self, p: math.nan})(BEST[:3]))

    def test_an_unknown_strategy_names_the_nearest(self):
        with pytest.raises(UserError, match="did you mean 'cmaes'"):
            search(Space(staged()), Quadratic(BEST[:3]), strategy="cma-es")
