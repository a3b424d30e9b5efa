"""Routing against float64 written out: whose prompt it is, that none is meant, and that nothing else has a say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.gate.synthetic import adapter, plain

from lorchestra.errors import UserError
from lorchestra.gate.background import Background
from lorchestra.gate.features import FeatureSpec
from lorchestra.gate.prototypes import AXES, FEATURES, Prototype, of_prompts
from lorchestra.gate.router import FARTHEST, LEAST, POOLED, PRIOR, SHRINKAGE, TEMPERATURE, UNLIKELY, Router

N = 24


def background(n=N, seed=0, norm=None):
    noise = torch.Generator().manual_seed(seed)
    return Background(plain(32, n, noise), torch.ones(n) if norm is None else norm)


def known(count, n=N, seed=1, prompts=60):
    """Adapters with prompts about a place of their own; name → (prototype, features of its prompts)."""
    noise = torch.Generator().manual_seed(seed)
    out = {}
    for i in range(count):
        x = 3 * torch.randn(1, n, generator=noise) + plain(prompts, n, noise)
        out[f"a{i:04}"] = of_prompts(adapter(n, seed=1000 + i), x), x
    return out


def covariance(prototypes, plain_x):
    """Σ, dense, in float64: pooled scatter shrunk towards its diagonal, of adapters spread evenly over all, and of
    plain prompts.
    """
    step = max(1.0, len(prototypes) / POOLED)
    chosen = [prototypes[int(i * step)] for i in range(min(len(prototypes), POOLED))]
    d = (plain_x - plain_x.mean(dim=0)).double().numpy()
    values, vectors = np.linalg.eigh(d.T @ d / len(d))
    kept = vectors[:, -AXES:] * np.sqrt(np.maximum(values[-AXES:], 0))
    total = np.mean([(d**2).mean(axis=0), *(one.variance.double().numpy() for one in chosen)], axis=0)
    scatters = [kept @ kept.T, *(one.axes.double().numpy().T @ one.axes.double().numpy() for one in chosen)]
    pooled = np.mean(scatters, axis=0)
    rest = np.maximum(total - (1 - SHRINKAGE) * np.diag(pooled), total.mean() * 1e-3)
    return (1 - SHRINKAGE) * pooled + np.diag(rest)


def expected(prototypes, plain_x, x, k):
    """The router's answer by dense algebra, an adapter at a time."""
    names = sorted(prototypes)
    inverse = np.linalg.inv(covariance([prototypes[name] for name in names], plain_x))
    here = x.double().numpy()

    def squared(centre):
        d = here - centre
        return float(d @ inverse @ d)

    found = {}
    for name in names:
        one = prototypes[name]
        scatter = one.axes.double().numpy().T @ one.axes.double().numpy()
        scatter = scatter + np.diag(np.maximum(one.variance.double().numpy() - np.diag(scatter), 0))
        nearest = min(squared(c) for c in one.centroids.double().numpy())
        own = one.prompts * float(np.trace(inverse @ scatter)) + PRIOR * len(x)
        found[name] = nearest, own / (one.prompts - len(one.centroids) + PRIOR)
    nearest = sorted((d, name) for name, (d, _) in found.items())[:k]
    nearest = [(d, name) for d, name in nearest if d <= FARTHEST * found[name][1]]
    if not nearest or squared(plain_x.double().mean(dim=0).numpy()) < nearest[0][0]:
        return {}
    shares = {name: math.exp((nearest[0][0] - d) / (2 * TEMPERATURE)) for d, name in nearest}
    kept = {name: share for name, share in shares.items() if share / sum(shares.values()) >= LEAST}
    return {name: share / sum(kept.values()) for name, share in kept.items()}


@pytest.mark.parametrize("k", [1, 3])
def test_a_thousand_adapters_are_told_apart_as_float64_does(k):
    world, behind = known(1000), background()
    prototypes = {name: prototype for name, (prototype, _) in world.items()}
    router = Router(prototypes, behind)
    noise = torch.Generator().manual_seed(7)
    names = sorted(world)
    asked = [world[names[i]][0].centroids[0] + 0.5 * torch.randn(N, generator=noise) for i in range(0, 1000, 40)]
    asked += [*plain(5, N, noise), *(9 * torch.randn(5, N, generator=noise))]
    chosen = 0
    for x in asked:
        found, wanted = dict(router.route(x, k)), expected(prototypes, behind.x, x, k)
        assert list(found) == list(wanted)
        assert found == pytest.approx(wanted, rel=1e-3)
        assert len(found) <= k
        assert not found or sum(found.values()) == pytest.approx(1)
        chosen += bool(found)
    assert 20 <= chosen < len(asked)


def test_prompts_are_routed_to_the_adapter_that_was_trained_on_their_like():
    world = known(4, prompts=120)
    fitted = {name: of_prompts(adapter(N, seed=i), x[:80]) for i, (name, (_, x)) in enumerate(world.items())}
    router = Router(fitted, background())
    right = sum(router.route(row)[:1] == ((name, 1.0),) for name, (_, x) in world.items() for row in x[80:])
    assert right >= 0.97 * 4 * 40


def test_plain_prompts_and_those_from_far_away_are_for_nobody():
    router = Router({name: prototype for name, (prototype, _) in known(50).items()}, background())
    noise = torch.Generator().manual_seed(3)
    assert sum(router.route(x) == () for x in plain(40, N, noise)) >= 38
    assert all(router.route(40 * torch.randn(N, generator=noise)) == () for _ in range(20))


def test_scores_are_distances_in_units_of_the_adapters_own_prompts():
    world = known(6, prompts=200)
    router = Router({name: prototype for name, (prototype, _) in world.items()}, background())
    for name, (_, x) in world.items():
        mean = sum(router.scores(row)[name] for row in x) / len(x)
        assert mean == pytest.approx(1, rel=0.15)  # beyond the axes, its scatter is known as a diagonal alone


def test_an_adapter_of_which_only_weights_are_known_is_chosen_where_its_delta_w_answers_unusually_strongly():
    norm = torch.linspace(0.5, 2, N)
    behind = background(norm=norm)
    foreign = {f"f{i}": Prototype(f"sha256:{i}", FEATURES, torch.nn.functional.normalize(torch.eye(N)[[i]], dim=1))
               for i in range(5)}  # fmt: skip
    router = Router(foreign, behind)
    for i in range(5):
        x = 0.01 * torch.randn(N, generator=torch.Generator().manual_seed(i))
        x[i] = 5
        responses = {name: [math.log(float(one.directions[0].double() @ (norm.double() * row / row.norm())) ** 2)
                            for row in [*behind.x.double(), x.double()]] for name, one in foreign.items()}  # fmt: skip
        unlikely = {name: (r[-1] - np.mean(r[:-1])) / np.std(r[:-1], ddof=1) for name, r in responses.items()}
        best = max(unlikely, key=unlikely.get)
        assert router.route(x) == (((best, 1.0),) if unlikely[best] >= UNLIKELY else ())
    assert all(router.route(row) == () for row in behind.x)


def test_prompts_count_before_weights():
    world = {name: prototype for name, (prototype, _) in known(3).items()}
    foreign = Prototype("sha256:f", FEATURES, torch.nn.functional.normalize(torch.ones(1, N), dim=1))
    alone, both = Router(world, background()), Router({**world, "foreign": foreign}, background())
    for prototype in world.values():
        x = prototype.centroids[0]
        assert both.route(x) == alone.route(x) != ()


def test_names_and_their_order_change_nothing():
    world = {name: prototype for name, (prototype, _) in known(5).items()}
    first, second = Router(world, background()), Router(dict(reversed(world.items())), background())
    for prototype in world.values():
        assert first.route(prototype.centroids[0], 2) == second.route(prototype.centroids[0], 2)


def test_nothing_to_choose_from_is_none():
    router = Router({}, background())
    assert router.names == ()
    assert router.route(torch.ones(N)) == ()


@pytest.mark.parametrize("bad", [torch.full((N,), math.nan), torch.full((N,), math.inf), torch.ones(N + 1)])
def test_features_that_are_none_are_refused(bad):
    with pytest.raises(UserError, match="finite numbers"):
        Router({}, background()).route(bad)


def test_a_prototype_of_another_base_is_refused():
    with pytest.raises(UserError, match="'a0000' has 8 features; this base has 24"):
        Router({name: prototype for name, (prototype, _) in known(1, n=8).items()}, background())


def test_a_background_of_nonsense_is_refused():
    with pytest.raises(UserError, match="at least 2 prompts"):
        Background(torch.ones(1, 3), torch.ones(3))
    with pytest.raises(UserError, match="damaged"):
        Background(torch.full((2, 3), math.nan), torch.ones(3))


def test_prompts_that_never_vary_divide_by_nothing():
    flat = of_prompts(adapter(N), torch.ones(1, N))
    router = Router({"flat": flat}, background())
    assert router.route(torch.ones(N)) == (("flat", 1.0),)
    assert router.route(-torch.ones(N)) == ()
    assert FeatureSpec() != FEATURES
