"""A method by its name, with every option that it takes, and nothing given that it would ignore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Parent
from lorchestra.errors import UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.fusion.bounds import Bounds
from lorchestra.fusion.groups import Rule, by_rules
from lorchestra.fusion.methods.low_rank import Fused, check_density, compressed
from lorchestra.fusion.methods.table import Method, method_named


def apply(
    method: str,
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    *,
    rules: Sequence[Rule] = (),
    bounds: Bounds | None = None,
    density: float | None = None,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "fused",
    reporter: Reporter = SILENT,
) -> Fused:
    """Fuse ``members`` by a method of :data:`lorchestra.fusion.methods.table.METHODS`.

    Args:
        method: its name.
        members: name → adapter.
        weights: name → λ; a missing name counts as zero.
        rules: λ for parts of the modules; the last that matches counts.
        bounds: of the result's size. Methods whose result is exact are compressed within them; ``svd`` needs one.
        density: share of entries kept, for methods that thin out.
        seed: for methods with chance in them.
        dtype: of the arithmetic, float32 or float64.
        name: of the result, for its lineage.
        reporter: progress, of the methods that take long.

    Raises:
        UserError: an unknown method, an option that it does not take or lacks; and as the method itself.
        AdapterError: as the method itself.
    """
    row, bounds = method_named(method), bounds or Bounds()
    check_options(row, bounds, density, seed, rules)
    if row.name == "linear" and bounds.given:  # the same, without stacking the factors first
        row = method_named("svd")
    parts, part_weights = by_rules(members, weights, rules) if rules else (dict(members), dict(weights))
    options: dict[str, Any] = {"name": name}
    if row.home != "exact":
        options["dtype"] = dtype
    if density is not None:
        options["density"] = density
    if seed is not None:
        options["seed"] = seed
    if row.name == "svd":
        options |= {"rank": bounds.rank, "energy": bounds.energy, "budget": bounds.budget}
    elif row.home == "elementwise":
        options |= {"rank": bounds.rank, "reporter": reporter}
    found = row.function(parts, part_weights, **options)
    fused = Fused(found) if isinstance(found, Adapter) else found
    if row.name != "svd" and (bounds.energy or bounds.budget or (bounds.rank and row.home != "elementwise")):
        fused = _within(fused, bounds, dtype)
    return _as_asked(fused, members, weights, rules) if rules else fused


def check_options(
    row: Method,
    bounds: Bounds,
    density: float | None = None,
    seed: int | None = None,
    rules: Sequence[Rule] = (),
) -> None:
    """Whether a method takes the options that are given, and has those that it needs.

    Raises:
        UserError: it does not.
    """
    if density is not None:
        if row.density is None:
            raise UserError(f"{row.name} thins nothing out, so it takes no density")
        check_density(density)
    if seed is not None and not row.seeded:
        raise UserError(f"there is no chance in {row.name}, so it takes no seed")
    if row.name == "svd" and not bounds.given:
        raise UserError("svd needs to know how much to keep: give a rank, an energy or a budget")
    if rules and not row.parts:
        raise UserError(f"{row.name} has one weight for each adapter; for weights by module use linear")


def _within(fused: Fused, bounds: Bounds, dtype: torch.dtype) -> Fused:
    """``fused`` compressed; shares kept before and after multiply, because both are orthogonal projections."""
    done = compressed(fused.adapter, bounds.rank, bounds.energy, bounds.budget, dtype)
    shares = {path: share * fused.per_module.get(path, 1.0) for path, share in done.per_module.items()}
    retained = done.retained * fused.retained
    lineage = done.adapter.lineage
    settings = {**lineage.settings, "retained": retained}
    return Fused(replace(done.adapter, lineage=replace(lineage, settings=settings)), retained, shares)


def _as_asked(
    fused: Fused, members: Mapping[str, Adapter], weights: Mapping[str, float], rules: Sequence[Rule]
) -> Fused:
    """The lineage names the members, not their parts, and keeps the rules."""
    lineage = fused.adapter.lineage
    named = {name for rule in rules for name, weight in rule.weights.items() if weight}
    parents = tuple(
        Parent(name, adapter.digest, float(weights.get(name, 0.0)))
        for name, adapter in members.items()
        if weights.get(name, 0.0) or name in named
    )
    asked = [{"pattern": rule.pattern, "weights": dict(rule.weights)} for rule in rules]
    made = replace(lineage, parents=parents, settings={**lineage.settings, "weights_for": asked})
    return replace(fused, adapter=replace(fused.adapter, lineage=made))
