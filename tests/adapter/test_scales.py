"""Scales against PEFT's own matching, and patterns that mean harm."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorchestra.adapter import scales
from lorchestra.adapter.scales import module_scales
from lorchestra.errors import AdapterError

PATHS = [
    f"model.layers.{i}.{name}"
    for i in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.q_proj")
] + ["lm_head", "model.odd+name.[0]"]
PATTERNS = [
    "q_proj", "self_attn.q_proj", r"self_attn\.v_proj", "model.layers.0.mlp.up_proj", r"model\.layers\.10\.mlp\.q_proj",
    r".*\.0\..*", r"layers\.(0|1)\..*proj", r"(?:q|v)_proj", r"^lm_head", r"model\.odd\+name\.\[0\]", r"[qv]_proj",
    r"layers\.\d+\.mlp\.\w+", "proj", "head", "^model", r"layers\.1\b.*", "lm_head|mlp.up_proj",
]  # fmt: skip
tables = st.lists(st.tuples(st.sampled_from(PATTERNS), st.integers(1, 64)), max_size=6).map(dict)


def peft_value(table, path, default):
    """What PEFT gives a module: the first pattern that matches the end of its path."""
    return table.get(get_pattern_key(table.keys(), path), default)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ranks=tables, alphas=tables, r=st.integers(1, 64), alpha=st.floats(0.1, 64), rslora=st.booleans())
def test_scales_are_pefts(ranks, alphas, r, alpha, rslora):
    config = {"r": r, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    stored = {path: peft_value(ranks, path, r) for path in PATHS}
    found = module_scales(config, stored)
    for path, rank in stored.items():
        expected = peft_value(alphas, path, alpha) / (math.sqrt(rank) if rslora else rank)
        assert found[path] == pytest.approx(expected, rel=1e-12), path


def test_without_patterns():
    config = {"r": 8, "lora_alpha": 16}
    assert module_scales(config, {"a.b": 8}) == {"a.b": 2.0}
    assert module_scales({**config, "use_rslora": True}, {"a.b": 8})["a.b"] == pytest.approx(16 / math.sqrt(8))
    assert module_scales({**config, "rank_pattern": None, "alpha_pattern": None}, {"a.b": 8}) == {"a.b": 2.0}


class TestBadInput:
    @pytest.mark.parametrize(
        "pattern", [r"(\w|\w\w|[a-z]+)+[^\w.]", r"(a|aa)+\.q_proj", r"((((a{1,99}){1,99}){1,99}){1,99})"]
    )
    @pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
    def test_evil_patterns_are_given_up_in_time(self, pattern, key, monkeypatch):
        """Each would run for years; the bound is for all modules together."""
        monkeypatch.setattr(scales, "PATTERN_SECONDS", 0.1)
        paths = [f"model.layers.{i}." + "a" * 60 + ".q_proj_" for i in range(1000)]
        started = time.monotonic()
        with pytest.raises(
            AdapterError, match=f"{key}: matching .* takes too long; write the modules' names"
        ) as raised:
            module_scales({"r": 8, "lora_alpha": 16, key: {pattern: 8}}, dict.fromkeys(paths, 8))
        assert repr(pattern) in str(raised.value)
        assert time.monotonic() - started < 10

    def test_long_and_broken_patterns(self):
        for pattern, message in {
            "(": "no regular expression",
            "(?:" * 190 + "a*" + ")*" * 190: "no regular expression",
            "(" + "a" * 2000 + ")": "2002 characters",
        }.items():
            with pytest.raises(AdapterError, match=f"rank_pattern: .*{message}"):
                module_scales({"r": 8, "lora_alpha": 8, "rank_pattern": {pattern: 4}}, {"a": 8})

    def test_a_long_plain_name_is_text_and_welcome(self):
        path = ".".join(["deep"] * 500)
        config = {"r": 8, "lora_alpha": 8, "rank_pattern": {path: 4}, "alpha_pattern": {path: 2}}
        assert module_scales(config, {path: 4, "other": 8}) == {path: 0.5, "other": 1.0}

    def test_rank_that_is_not_the_stored_one(self):
        with pytest.raises(AdapterError, match=r"'a\.q_proj': the configuration says rank 16, the weights have rank 8"):
            module_scales({"r": 16, "lora_alpha": 8}, {"a.q_proj": 8})

    def test_rank_zero(self):
        with pytest.raises(AdapterError, match="'a' has rank 0"):
            module_scales({"r": 0, "lora_alpha": 8}, {"a": 0})

    @pytest.mark.parametrize("bad", [None, "16", True, math.nan, math.inf, [16], 10**400])
    def test_numbers(self, bad):
        with pytest.raises(AdapterError, match="lora_alpha should be a number"):
            module_scales({"r": 8, "lora_alpha": bad}, {"a": 8})
        with pytest.raises(AdapterError, match=r"alpha_pattern\['a'\] should be a number"):
            module_scales({"r": 8, "lora_alpha": 8, "alpha_pattern": {"a": bad}}, {"a": 8})

    def test_patterns_that_are_no_table(self):
        with pytest.raises(AdapterError, match="rank_pattern should map patterns to numbers; it is list"):
            module_scales({"r": 8, "lora_alpha": 8, "rank_pattern": ["q_proj"]}, {"a": 8})
