"""Parts of adapters: together they are the whole, and a λ of their own acts on their modules alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Lineage
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import UserError
from lorchestra.fusion.groups import (
    Rule,
    by_layer_groups,
    by_rules,
    layer_groups,
    layer_of,
    matches,
    members_by_layer_groups,
)
from lorchestra.fusion.methods import fuse

laws = settings(max_examples=60, deadline=None, derandomize=True)


def adapter(paths, seed=0, transposed=()):
    generator = torch.Generator().manual_seed(seed)
    modules = {
        p: LowRank(torch.randn(4, 2, generator=generator), torch.randn(2, 3, generator=generator)) for p in paths
    }
    return Adapter(modules, BaseId("tiny", "sha256:1"), Lineage(name="whole"), frozenset(transposed))


def paths_of(layers, names=("q_proj", "mlp.down_proj"), extra=()):
    return [f"model.layers.{i}.{name}" for i in layers for name in names] + list(extra)


layer_sets = st.sets(st.integers(0, 200), min_size=1, max_size=40)


@laws
@given(layer_sets, st.integers(1, 50), st.booleans())
def test_groups_are_consecutive_layers_of_even_size_and_nothing_is_lost(layers, count, head):
    paths = paths_of(layers, extra=["lm_head"] if head else [])
    groups = layer_groups(paths, count)
    assert sorted(path for group in groups.values() for path in group) == sorted(paths)
    if head:
        assert list(groups)[-1] == "other"
        assert groups.pop("other") == ("lm_head",)
    assert len(groups) == min(count, len(layers))
    numbers = [sorted({layer_of(path) for path in group}) for group in groups.values()]
    assert [number for group in numbers for number in group] == sorted(layers)
    assert max(map(len, numbers)) - min(map(len, numbers)) <= 1
    for label, group in groups.items():
        assert set(group) == {path for path in paths if matches(label, path)}, "a label is a pattern for its group"


@laws
@given(layer_sets, st.integers(1, 8), st.integers(0, 2**31))
def test_the_sum_of_the_parts_is_the_whole_bit_for_bit(layers, count, seed):
    whole = adapter(paths_of(layers, extra=["lm_head"]), seed)
    parts = by_layer_groups(whole, count)
    assert fuse(list(parts.values()), [1.0] * len(parts)).digest == whole.digest
    assert all((part.base, part.lineage) == (whole.base, whole.lineage) for part in parts.values())


def test_members_are_cut_at_the_same_layers():
    members = {"a": adapter(paths_of(range(8))), "b": adapter(paths_of(range(4, 8), extra=["lm_head"]), 1)}
    parts = members_by_layer_groups(members, 2)
    assert list(parts) == [("a", "layers.0-3"), ("a", "layers.4-7"), ("b", "layers.4-7"), ("b", "other")]
    assert set(parts["b", "layers.4-7"].modules) == set(paths_of(range(4, 8)))


def test_flags_of_modules_go_with_their_modules():
    parts = by_layer_groups(adapter(["h.0.c_attn", "h.1.c_attn"], transposed=["h.0.c_attn", "h.1.c_attn"]), 2)
    assert [part.transposed for part in parts.values()] == [{"h.0.c_attn"}, {"h.1.c_attn"}]


@pytest.mark.parametrize(
    ("path", "layer"),
    [("model.layers.12.mlp.experts.3.w1", 12), ("transformer.h.0.attn.c_attn", 0), ("lm_head", None), ("x.²", None)],
)
def test_the_layer_is_the_first_number(path, layer):
    assert layer_of(path) == layer


@pytest.mark.parametrize(
    ("pattern", "path", "found"),
    [
        ("layers.0-9", "model.layers.9.q_proj", True), ("layers.0-9", "model.layers.10.q_proj", False),
        ("layers.0-9", "lm_head", False), ("layers.3", "transformer.h.3.c_attn", True),
        ("layers.3", "model.layers.30.q_proj", False), ("other", "lm_head", True), ("other", "model.layers.0.q", False),
        ("*.q_proj", "model.layers.3.self_attn.q_proj", True), ("q_proj", "model.layers.3.self_attn.q_proj", True),
        ("q_*", "model.layers.3.self_attn.q_proj", True), ("attn.q_proj", "model.layers.3.self_attn.q_proj", False),
        ("model.layers.?.mlp.*", "model.layers.3.mlp.up_proj", True), ("(a+)+$", "a" * 60, False),
    ],
)  # fmt: skip
def test_patterns(pattern, path, found):
    assert matches(pattern, path) is found


class TestRules:
    @property
    def members(self):
        return {"a": adapter(paths_of(range(4))), "b": adapter(paths_of(range(4)), 1)}

    def test_every_module_has_its_own_weight(self):
        rules = [Rule("layers.0-1", {"a": 0.25}), Rule("q_proj", {"a": -1.0, "b": 0.0})]
        parts, weights = by_rules(self.members, {"a": 0.5, "b": 2.0}, rules)
        fused = fuse(list(parts.values()), [weights[name] for name in parts])
        for path, update in fused.modules.items():
            a = -1.0 if path.endswith("q_proj") else (0.25 if layer_of(path) < 2 else 0.5)
            b = 0.0 if path.endswith("q_proj") else 2.0
            expected = sum(
                weight * self.members[name].modules[path].dense(torch.float64) for name, weight in (("a", a), ("b", b))
            )
            torch.testing.assert_close(update.dense(torch.float64), expected, rtol=1e-6, atol=1e-6)
        assert set(parts) == {"a", "a#2", "a#3", "b", "b#2"}

    def test_no_rules_change_nothing(self):
        parts, weights = by_rules(self.members, {"a": 0.5}, [])
        assert {name: part.digest for name, part in parts.items()} == {n: m.digest for n, m in self.members.items()}
        assert weights == {"a": 0.5, "b": 0.0}

    def test_a_part_never_takes_a_members_name(self):
        members = {**self.members, "a#2": adapter(paths_of(range(4)), 2)}
        parts, _ = by_rules(members, dict.fromkeys(members, 1.0), [Rule("q_proj", {"a": 0.5})])
        assert set(parts) == {"a", "a#2'", "b", "a#2"}

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            (Rule("q_proj", {"c": 1.0}), "'c', which is no member; members: a, b"),
            (Rule("layers.7-9", {"a": 1.0}), r"no module of 'a' matches 'layers.7-9'; write layers.0-9, a path"),
            (Rule("q_proj", {"a": math.nan}), "'q_proj' is nan; give a finite number"),
        ],
    )
    def test_bad_rules(self, rule, message):
        with pytest.raises(UserError, match=message):
            by_rules(self.members, {"a": 1.0}, [rule])

    def test_no_group(self):
        with pytest.raises(UserError, match="1 group or more; got 0"):
            layer_groups(["a"], 0)
