"""Coefficients for a part of the modules: by groups of layers, or by patterns of names.

A member is cut into sub-adapters, each with some of its modules; as members of a fusion, a bank or a core space each
has a λ of its own. Their sum is the member.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import UserError

# The group of modules without a layer number: embeddings, head.
OTHER = "other"
_LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Rule:
    """λ of some members for the modules of one pattern.

    Args:
        pattern: ``layers.3`` or ``layers.0-9`` (numbers of layers, both ends included), or a pattern of module paths
            with ``*``, ``?`` and ``[…]`` (``*.q_proj``, ``lm_head``); one without a dot also means the last part of
            a path (``q_proj``).
        weights: member → λ.
    """

    pattern: str
    weights: Mapping[str, float]


def layer_of(path: str) -> int | None:
    """The layer that a module belongs to: the first number in its path (``model.layers.12.mlp.experts.3.w1`` → 12)."""
    return next((int(part) for part in path.split(".") if part.isascii() and part.isdigit()), None)


def layer_groups(paths: Iterable[str], count: int) -> dict[str, tuple[str, ...]]:
    """Label → module paths: consecutive layers in ``count`` groups whose sizes differ by one at most.

    Labels are patterns of :class:`Rule` (``layers.0-9``, ``layers.10``), in the order of the layers; modules without
    a layer number are a group of their own, ``other``, at the end. With fewer layers than ``count`` each is a group.

    Raises:
        UserError: ``count`` is below 1.
    """
    if count < 1:
        raise UserError(f"layers can be cut into 1 group or more; got {count}")
    by_layer: dict[int | None, list[str]] = {}
    for path in sorted(paths):
        by_layer.setdefault(layer_of(path), []).append(path)
    rest = by_layer.pop(None, [])
    layers = sorted(number for number in by_layer if number is not None)
    count = min(count, len(layers))
    groups: dict[str, tuple[str, ...]] = {}
    for i in range(count):
        part = layers[i * len(layers) // count : (i + 1) * len(layers) // count]
        label = f"layers.{part[0]}" + (f"-{part[-1]}" if len(part) > 1 else "")
        groups[label] = tuple(path for layer in part for path in by_layer[layer])
    if rest:
        groups[OTHER] = tuple(rest)
    return groups


def by_layer_groups(adapter: Adapter, count: int) -> dict[str, Adapter]:
    """Label → the adapter over the modules of that group (:func:`layer_groups`); their sum is ``adapter``.

    Base and lineage are the whole adapter's, the digests are the parts' own.
    """
    return {label: part_of(adapter, paths) for label, paths in layer_groups(adapter.modules, count).items()}


def members_by_layer_groups(members: Mapping[str, Adapter], count: int) -> dict[tuple[str, str], Adapter]:
    """``(member, label)`` → sub-adapter, cut at the same layers for all members; groups that a member lacks are absent.

    At most K × (count + 1) of them, in the order of the members, then of the groups.
    """
    groups = layer_groups({path for adapter in members.values() for path in adapter.modules}, count)
    out = {}
    for name, adapter in members.items():
        for label, paths in groups.items():
            here = [path for path in paths if path in adapter.modules]
            if here:
                out[name, label] = part_of(adapter, here)
    return out


def part_of(adapter: Adapter, paths: Iterable[str]) -> Adapter:
    """The adapter over ``paths`` alone."""
    kept = set(paths)
    return replace(adapter, modules={path: update for path, update in adapter.modules.items() if path in kept})


def is_group(label: str) -> bool:
    """Whether it is a label of :func:`layer_groups`: ``layers.0-9``, ``layers.10`` or ``other``."""
    return label == OTHER or _LAYERS.fullmatch(label) is not None


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern of a :class:`Rule` means ``path``."""
    numbers = _LAYERS.fullmatch(pattern)
    if numbers:
        layer, first = layer_of(path), int(numbers[1])
        return layer is not None and first <= layer <= int(numbers[2] or first)
    if pattern == OTHER:
        return layer_of(path) is None
    if "." not in pattern and fnmatchcase(path.rsplit(".", 1)[-1], pattern):
        return True
    return pattern == path or fnmatchcase(path, pattern)


def by_rules(
    members: Mapping[str, Adapter], weights: Mapping[str, float], rules: Sequence[Rule]
) -> tuple[dict[str, Adapter], dict[str, float]]:
    """Members cut so that every part has one λ: that of the last rule that names its member and matches its modules,
    else the member's own in ``weights``.

    Returns:
        Name → part and name → λ. A part is called as its member is, with a number from the second on (``clinic#2``).

    Raises:
        UserError: a rule that names no member, matches no module of the members that it names, or whose λ is not
            finite.
    """
    for rule in rules:
        _check(rule, members)
    parts: dict[str, Adapter] = {}
    part_weights: dict[str, float] = {}
    for name, adapter in members.items():
        by_weight: dict[float, list[str]] = {}
        for path in adapter.modules:
            weight = weights.get(name, 0.0)
            for rule in rules:
                if name in rule.weights and matches(rule.pattern, path):
                    weight = rule.weights[name]
            by_weight.setdefault(float(weight), []).append(path)
        for number, (weight, paths) in enumerate(by_weight.items(), 1):
            label = name if number == 1 else _unused(f"{name}#{number}", members)
            parts[label], part_weights[label] = part_of(adapter, paths), weight
    return parts, part_weights


def _unused(label: str, members: Mapping[str, Adapter]) -> str:
    while label in members:
        label += "'"
    return label


def _check(rule: Rule, members: Mapping[str, Adapter]) -> None:
    for name, weight in rule.weights.items():
        if name not in members:
            raise UserError(
                f"weights for {rule.pattern!r} name {name!r}, which is no member; members: {', '.join(members)}"
            )
        if not math.isfinite(weight):
            raise UserError(f"the weight of {name!r} for {rule.pattern!r} is {weight}; give a finite number")
        if not any(matches(rule.pattern, path) for path in members[name].modules):
            example = next(iter(members[name].modules))
            raise UserError(
                f"no module of {name!r} matches {rule.pattern!r}; write layers.0-9, a path or a pattern of paths "
                f"({example!r} is one of its modules)"
            )
