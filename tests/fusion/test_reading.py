"""Every sentence stands on its threshold, on both sides of it, and on nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.fusion import reading
from lorchestra.fusion.diagnose import diagnose
from lorchestra.fusion.reading import read

N = 64
DOCS = Path(__file__).parents[2] / "docs" / "diagnose.md"


def unit(i, j, size=1.0):
    """The update with the one entry ``size`` at (i, j)."""
    B, A = torch.zeros(N, 1), torch.zeros(1, N)
    B[i], A[0, j] = size, 1.0
    return LowRank(B, A)


def turned(cosine, i, j, other):
    """At ``cosine`` to ``unit(i, j)``, the rest at ``other``, of length 1."""
    return unit(i, j, cosine) + unit(*other, (1 - cosine**2) ** 0.5)


def layers(updates):
    return Adapter({f"model.layers.{k}.q_proj": update for k, update in enumerate(updates)})


def kinds(adapters, **more):
    return {remark.kind: remark for remark in read(diagnose(adapters, **more))}


def test_nearly_the_same_and_opposite():
    a = layers([unit(0, 0)])
    assert kinds({"a": a, "b": layers([turned(0.96, 0, 0, (1, 1))])})["same"].text == (
        "a and b are nearly the same adapter (cosine 0.96): keep one"
    )
    assert "norms 3 : 1" in kinds({"a": a, "b": a * 3.0})["same"].text
    assert "drowns" not in kinds({"a": a, "b": a * 3.0})
    assert "same" not in kinds({"a": a, "b": layers([turned(0.94, 0, 0, (1, 1))])})
    assert "cosine −0.96" in kinds({"a": a, "b": layers([turned(-0.96, 0, 0, (1, 1))])})["opposite"].text


def test_fights_and_agreements_are_placed_in_their_layers():
    a = layers([unit(0, 0)] * 8)
    cosines = (0.0, -0.3, -0.11, -0.2, -0.09, 0.0, -0.5, 0.4)
    found = kinds({"a": a, "b": layers([turned(c, 0, 0, (1, 1)) for c in cosines])})
    assert found["fight"].layers == (1, 2, 3, 6)
    assert "fight in layers 1–3, 6 (cosine −0.50 to −0.11)" in found["fight"].text
    assert found["agree"].layers == (7,)
    assert "in layer 7 (cosine 0.40)" in found["agree"].text
    assert "independent" not in found


@pytest.mark.parametrize(("cosine", "kind"), [(0.04, "independent"), (-0.04, "independent"), (0.06, "loose")])
def test_independent_up_to_a_twentieth(cosine, kind):
    """One direction of four in common, as much of it as gives the cosine."""
    part = 2 * cosine * (3 / (1 - 4 * cosine**2)) ** 0.5
    one = unit(0, 0) + unit(1, 1) + unit(2, 2) + unit(3, 3)
    two = unit(0, 0, part) + unit(5, 5) + unit(6, 6) + unit(7, 7)
    assert one.inner(two) / one.norm() / two.norm() == pytest.approx(cosine)
    found = set(kinds({"a": layers([one]), "b": layers([two])}))
    assert found & {"independent", "loose", "fight", "agree"} == {kind}
    whole = (one + two).norm() ** 2 / (one.norm() ** 2 + two.norm() ** 2)
    assert abs(whole - 1) <= abs(cosine) + 1e-6, "what the sentence claims of the sum"


def test_spaces_in_common_without_a_cosine():
    """The same inputs read, the same outputs written, in another pairing: ⟨a, b⟩ = 0, and still not independent."""
    a, b = layers([unit(0, 0) + unit(1, 1)]), layers([unit(0, 1) + unit(1, 0)])
    found = kinds({"a": a, "b": b})
    assert {"inputs", "outputs", "loose"} <= set(found)
    assert "independent" not in found
    assert "row spaces overlap by 1.00, chance is 0.031" in found["inputs"].text
    assert {"independent", "inputs"} <= set(kinds({"a": a, "b": layers([unit(4, 0) + unit(5, 1)])}))
    everybody = kinds({"a": a, "b": b, "c": layers([unit(4, 0) + unit(5, 1)])})
    assert everybody["inputs"].members == ("a", "b", "c")
    assert everybody["inputs"].text.startswith("all of them read much the same inputs")


def test_overlap_that_chance_explains_is_no_news():
    """Random spaces of dimension 40 in 64 overlap by 0.6."""
    random = torch.Generator().manual_seed(0)
    a, b = (
        layers([LowRank(torch.randn(N, 40, generator=random), torch.randn(40, N, generator=random))]) for _ in range(2)
    )
    found = diagnose({"a": a, "b": b})
    assert found.pairs[0].whole().row_overlap > reading.OVERLAP
    assert not {"inputs", "outputs"} & {remark.kind for remark in read(found)}


def test_norms_that_drown():
    a, b = layers([unit(0, 0)]), layers([unit(1, 1)])
    assert kinds({"general": a, "clinic": b * 5.0})["drowns"].text == (
        "clinic drowns general at equal weights: norms 5 : 1"
    )
    assert kinds({"general": a, "clinic": b * 5.0})["drowns"].members == ("clinic", "general")
    assert "drowns" not in kinds({"general": a, "clinic": b * 2.9})


def test_nothing_in_common_is_named():
    a, b = Adapter({"model.layers.0.q_proj": unit(0, 0)}), Adapter({"layers.0.k_proj": unit(0, 0)})
    found = kinds({"a": a, "b": b})
    assert "no module in common (a: model.layers.0.q_proj, …; b: layers.0.k_proj, …)" in found["apart"].text
    assert "independent" not in found


def test_rank_that_would_do():
    strong = unit(0, 0, 10.0) + unit(1, 1, 0.1) + unit(2, 2, 0.1) + unit(3, 3, 0.1)
    found = kinds({"a": layers([strong])})
    assert found["rank"].text == "rank 1 would keep 99.9 % of a's ‖ΔW‖² (it has rank 4)"
    assert "rank" not in kinds({"a": layers([unit(0, 0) + unit(1, 1)])})


def test_size_beside_the_base():
    a, path = layers([unit(0, 0)]), "model.layers.0.q_proj"
    assert "‖ΔW‖/‖W‖ is 12.5%" in kinds({"a": a}, weights={path: 8.0})["large"].text
    assert "‖ΔW‖/‖W‖ is 0.10%" in kinds({"a": a}, weights={path: 1000.0})["small"].text
    assert not {"large", "small"} & set(kinds({"a": a}, weights={path: 100.0}))
    assert not {"large", "small"} & set(kinds({"a": a}))


def test_signs():
    ones, mostly = torch.ones(N, 1), torch.ones(1, N)
    flipped = mostly.clone()
    flipped[0, : round(0.6 * N)] = -1
    a, b = layers([LowRank(ones, mostly)]), layers([LowRank(ones, flipped)])
    assert "opposite signs in 59% of the entries" in kinds({"a": a, "b": b})["signs"].text
    flipped[0, round(0.52 * N) :] = 1
    assert "signs" not in kinds({"a": a, "b": layers([LowRank(ones, flipped)])})


def test_effects_on_data():
    path = "model.layers.0.q_proj"
    members = {"a": layers([unit(0, 0)]), "b": layers([unit(1, 1)]), "c": layers([unit(2, 2)])}
    found = kinds(members, activation={"a": {path: {"a": 1.0, "b": 0.7, "c": 0.01}}})
    assert "on a's data a is not alone" in found["acts"].text
    assert found["acts"].text.endswith("b 0.7×")
    assert found["idle"].text.endswith("c 0.01×")
    assert not {"acts", "idle"} & set(kinds(members, activation={"a": {path: {"a": 1.0, "b": 0.3, "c": 0.3}}}))


def test_an_adapter_that_does_nothing():
    zero = Adapter({"model.layers.0.q_proj": LowRank(torch.zeros(N, 2), torch.ones(2, N))})
    found = kinds({"zero": zero, "a": layers([unit(0, 0)])})
    assert found["nothing"].text == "zero changes nothing: every ΔW is zero"
    assert not {"same", "independent", "drowns", "rank"} & set(found)


def test_the_documentation_lists_every_kind_and_threshold():
    text = DOCS.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (.*?) \|$", text, re.MULTILINE))
    named = set(re.findall(r'Remark\(\s*"(\w+)"', Path(reading.__file__).read_text(encoding="utf-8")))
    assert set(rows) == named | set(reading._SPACES)
    for kind, threshold in (
        ("same", f"{reading.SAME:g}"), ("fight", f"{reading.FIGHT:g}"), ("independent", f"{reading.INDEPENDENT:g}"),
        ("inputs", f"{reading.OVERLAP:g}"), ("inputs", f"{reading.ABOVE_CHANCE:g} times"),
        ("drowns", f"{reading.DROWNS:g} : 1"), ("rank", f"{reading.ENERGY:.0%}".replace("%", " %")),
        ("large", f"{reading.LARGE:.0%}".replace("%", " %")), ("small", f"{reading.SMALL:.2%}".replace("%", " %")),
        ("signs", f"{reading.SIGNS:.0%}".replace("%", " %")), ("acts", f"{reading.ACTS:g}"),
        ("idle", f"{reading.IDLE:g}"),
    ):  # fmt: skip
        assert threshold in rows[kind], kind
