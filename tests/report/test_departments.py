"""``departments.html``: everything in it is escaped, figures stand where they belong, whatever is missing."""

from __future__ import annotations

from lorchestra.report.departments import render_departments

HOSTILE = "<script>alert(1)</script>"


def interval(estimate: float, low: float, high: float) -> dict:
    return {"estimate": estimate, "low": low, "high": high, "n": 9}


def department(metric: str = "accuracy", over: tuple[float, float, float] = (0.2, 0.1, 0.3), **changes) -> dict:
    test = {
        "metric": metric, "groups": 9, "base": interval(0.3, 0.2, 0.4), "shared": interval(0.35, 0.2, 0.5),
        "delivered": interval(0.55, 0.4, 0.7), "over_base": interval(0.25, 0.1, 0.4), "over_shared": interval(*over),
    }  # fmt: skip
    told = {
        "state": "done", "settings": {"name": "icu", "data": "icu.jsonl", "lora.rank": "4"}, "tests": [test],
        "examples": {"train": 1234}, "before": 2.5, "after": 1.25, "trainable": 98765, "seconds": 61.0, "remarks": [],
        "warnings": [], "digest": "sha256:abc", "adapter": "departments/icu/adapter",
    }  # fmt: skip
    return told | changes


def page(departments: dict, **changes) -> str:
    told = {
        "recipe": "hospital", "created": "2026-01-01T00:00:00+00:00", "lorchestra": "1", "context": True,
        "departments_in_all": len(departments), "departments": departments, "left_out": [], "shared": {"general": "d"},
        "base": {"name": "tiny", "weights": "sha256:w"},
    }  # fmt: skip
    return render_departments(told | changes)


def test_figures_of_a_department():
    html = page({"icu": department()})
    for text in ("icu", "lora.rank 4", "1,234", "2.500 → 1.250", "55.0\xa0%", "[40.0, 70.0]", "+20.0\xa0points",
                 "98,765", "1 min 01 s", "sha256:abc", "1 of 1 delivered"):  # fmt: skip
        assert text in html, text
    assert 'class="estimate better"' in html
    assert page({"icu": department()}) == html


def test_a_loss_is_better_where_it_is_lower():
    assert 'class="estimate better"' in page({"icu": department("nll", (-0.2, -0.3, -0.1))})
    assert 'class="estimate worse"' in page({"icu": department("nll", (0.2, 0.1, 0.3))})
    assert 'class="estimate unclear"' in page({"icu": department("nll", (-0.1, -0.3, 0.1))})


def test_what_failed_is_told_and_nothing_of_others_is_a_tag():
    failed = {"state": "failed", "reason": HOSTILE, "remarks": [HOSTILE], "warnings": [HOSTILE], "tests": []}
    html = page({HOSTILE: failed, "icu": department()}, left_out=[HOSTILE], recipe=HOSTILE)
    assert HOSTILE not in html
    assert html.count("&lt;script&gt;alert(1)") >= 5
    assert "1 of 2 delivered" in html
    assert 'class="tag worse">failed' in html
    assert "–</td>" in html
    assert "– →" not in html


def test_remarks_and_warnings_have_a_line_of_their_own():
    warned = department(remarks=["too few test examples", "2 warnings"], warnings=["first", "second"])
    html = page({"icu": warned, "er": department()})
    assert html.count('<tr class="explains"><td colspan="12">') == 1
    assert "<p>too few test examples</p>" in html
    assert "<summary>2 warnings</summary><p>first</p><p>second</p>" in html, "they are counted once"
    assert '<td colspan="11">' in page({"icu": warned}, context=False)


def test_without_context_the_base_is_what_it_is_compared_with():
    html = page({"icu": department()}, context=False)
    assert "Over base" in html
    assert "+25.0\xa0points" in html
    assert "+20.0\xa0points" not in html


def test_an_unfinished_matrix_says_so():
    assert "1 of 57 are done" in page({"icu": department()}, departments_in_all=57)
    assert "Every department" in render_departments({})
