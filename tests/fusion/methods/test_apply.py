"""A method by name: options that it takes, bounds on top, weights by module, and a lineage that says all of it."""

from __future__ import annotations

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import UserError
from lorchestra.fusion.bounds import Bounds
from lorchestra.fusion.groups import Rule
from lorchestra.fusion.methods import METHODS, apply, linear, ties
from lorchestra.fusion.methods.table import method_named

PATHS = tuple(f"model.layers.{i}.q_proj" for i in range(4))


def make(seed, rank=3):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            p: LowRank(torch.randn(12, rank, generator=generator), torch.randn(rank, 10, generator=generator))
            for p in PATHS
        }
    )


MEMBERS, WEIGHTS = {"a": make(0), "b": make(1)}, {"a": 0.6, "b": 0.9}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bounds", [Bounds(rank=2), Bounds(energy=0.8), Bounds(budget=130), Bounds(rank=4, budget=200)])
def test_bounds_hold_for_every_method_and_what_was_kept_is_told_right(method, bounds):
    """Shares kept by the method's own rank and by the bounds multiply to what the dense matrices say."""
    whole = apply(method, MEMBERS, WEIGHTS, bounds=Bounds(rank=10)).adapter
    found = apply(method, MEMBERS, WEIGHTS, bounds=bounds)
    assert all(update.rank <= (bounds.rank or 10) for update in found.adapter.modules.values())
    assert found.adapter.parameters <= (bounds.budget or 10**9)
    kept = size = 0.0
    for path in PATHS:
        dense = whole.modules[path].dense(torch.float64)
        update = found.adapter.modules.get(path)
        lost = float((update.dense(torch.float64) - dense).square().sum()) if update else float(dense.square().sum())
        here = float(dense.square().sum())
        assert found.per_module[path] == pytest.approx(1 - lost / here, abs=2e-5)
        kept, size = kept + here - lost, size + here
    assert found.retained == pytest.approx(kept / size, abs=2e-5)
    assert found.adapter.lineage.settings["retained"] == found.retained


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.parts])
def test_weights_by_module_are_weights_of_the_modules(method):
    """Layers 0 and 1 come out as with one mixture, 2 and 3 as with the other."""
    bounds = Bounds(rank=10)
    rules = [Rule("layers.0-1", {"a": 0.2, "b": -0.5})]
    made = apply(method, MEMBERS, WEIGHTS, rules=rules, bounds=bounds)
    low = apply(method, MEMBERS, {"a": 0.2, "b": -0.5}, bounds=bounds).adapter
    high = apply(method, MEMBERS, WEIGHTS, bounds=bounds).adapter
    seeded = METHODS[method].seeded
    for path, expected in zip(PATHS, (low, low, high, high), strict=True):
        if seeded and expected is high:
            continue  # these modules are parts with names of their own, and names are what chance comes from
        torch.testing.assert_close(
            made.adapter.modules[path].dense(), expected.modules[path].dense(), rtol=1e-4, atol=1e-4
        )
    lineage = made.adapter.lineage
    assert {p.name: (p.digest, p.coefficient) for p in lineage.parents} == {
        name: (adapter.digest, WEIGHTS[name]) for name, adapter in MEMBERS.items()
    }
    assert lineage.settings["weights_for"] == [{"pattern": "layers.0-1", "weights": {"a": 0.2, "b": -0.5}}]


def test_a_member_that_only_a_rule_brings_in_is_a_parent():
    made = apply("linear", MEMBERS, {"a": 1.0}, rules=[Rule("layers.3", {"b": 0.5})]).adapter
    assert [(parent.name, parent.coefficient) for parent in made.lineage.parents] == [("a", 1.0), ("b", 0.0)]


def test_defaults_are_those_of_the_functions():
    assert apply("linear", MEMBERS, WEIGHTS).adapter.digest == linear(MEMBERS, WEIGHTS).digest
    assert apply("ties", MEMBERS, WEIGHTS).adapter.digest == ties(MEMBERS, WEIGHTS).adapter.digest
    for row in METHODS.values():
        defaults = row.function.__kwdefaults__ or {}
        assert defaults.get("density") == row.density
        assert ("seed" in defaults) == row.seeded


def test_every_row_has_a_documented_function_and_an_address():
    for name, row in METHODS.items():
        assert row.name == name == row.function.__name__
        address = row.paper.rsplit(" ", 1)[-1]
        assert address in row.function.__doc__


class TestBadInput:
    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            ("tie", {}, r"'tie' is unknown; there are linear, .*; did you mean ties\?"),
            ("linear", {"density": 0.5}, "linear thins nothing out"),
            ("ties", {"seed": 1}, "no chance in ties"),
            ("svd", {}, "svd needs to know how much to keep"),
            ("dare", {"density": 2.0}, r"in \(0, 1\]; got 2\.0"),
            ("average", {"rules": [Rule("q_proj", {"a": 1.0})]}, "one weight for each adapter"),
            ("linear", {"rules": [Rule("v_proj", {"a": 1.0})]}, "no module of 'a' matches 'v_proj'"),
        ],
    )
    def test_options(self, method, options, message):
        with pytest.raises(UserError, match=message):
            apply(method, MEMBERS, WEIGHTS, **options)

    def test_rows(self):
        assert method_named("ties") is METHODS["ties"]
        with pytest.raises(UserError, match="unknown"):
            method_named("TIES")
