"""The page on rsLoRA holds the figures of the committed trainings, and differences are paired as they should be."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

LORA = {"lora.rank": 64, "lora.scaling": "lora", "lora.init": "kaiming"}
RSLORA = {**LORA, "lora.scaling": "rslora"}


@pytest.fixture(scope="module")
def rs_lora(script, benchmarks):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(benchmarks))
        return script("rs_lora")


@pytest.fixture(scope="module")
def runs(benchmarks):
    """Setting → its trainings in the committed file, by seed."""
    cells = json.loads((benchmarks / "results/sweeps/ranks-subjects.json").read_text())["cells"]

    def of(settings):
        return sorted((cell for cell in cells if cell["settings"] == settings), key=lambda cell: cell["seed"])

    return of


def test_every_table_of_the_pages_is_what_the_trainings_say(rs_lora):
    pages = [page.read_text(encoding="utf-8") for page in rs_lora.PAGES]
    assert sorted(found[2] for page in pages for found in rs_lora.MARK.finditer(page)) == sorted(rs_lora.TABLES)
    for page in pages:
        assert rs_lora.filled(page) == page, "python benchmarks/rs_lora.py --docs"


def test_a_difference_is_that_of_the_means_and_of_a_setting_from_itself_nothing(rs_lora, runs):
    sweep = rs_lora.sweep_of("ranks-subjects")
    ours, theirs = (sweep.at(rank=64, scaling=way, init="kaiming") for way in ("rslora", "lora"))
    mine, other = (np.array([run["test"]["values"] for run in runs(settings)]) for settings in (RSLORA, LORA))
    found = sweep.difference([ours], [theirs])
    assert found.estimate == pytest.approx(mine.mean() - other.mean(), rel=1e-12)
    assert found.low < found.estimate < found.high
    back = sweep.difference([theirs], [ours])
    assert (back.estimate, back.low, back.high) == pytest.approx((-found.estimate, -found.high, -found.low), rel=1e-9)
    nothing = sweep.difference([ours], [ours])
    assert (nothing.estimate, nothing.low, nothing.high) == (0, 0, 0)


def test_what_a_seed_has_as_a_whole_is_a_paired_t_test(rs_lora, runs):
    sweep = rs_lora.sweep_of("ranks-subjects")
    ours, theirs = (sweep.at(rank=64, scaling=way, init="kaiming") for way in ("rslora", "lora"))
    found = sweep.by_seed([ours], [theirs], rs_lora.last_validation)
    mine, other = ([run["validation"][-1][1] for run in runs(settings)] for settings in (RSLORA, LORA))
    expected = ttest_rel(mine, other).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_the_scalings_are_one_training_at_the_anchor(runs):
    """What the page leaves out as the same is the same, to the last digit."""
    for init in ("kaiming", "rescaled"):
        one, *others = (
            [
                (run["history"], run["test"]["values"])
                for run in runs({"lora.rank": 8, "lora.scaling": way, "lora.init": init})
            ]
            for way in ("rslora", "lora", "constant")
        )
        assert len(one) == 3
        assert others == [one, one]
