"""The report: whole or partial data, hostile data, one file that needs nothing else."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import stat
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorchestra.errors import StorageError
from lorchestra.report.drawing import Scale, number, ramp, spanned, tick
from lorchestra.report.figures import Candidate, Line, line_chart, simplex
from lorchestra.report.values import measure, percent
from lorchestra.report.write import render_report, write_report

SECTIONS = {
    "lineage": ("base", "stages"),
    "comparison": ("evaluation",),
    "differences": ("evaluation",),
    "stages": ("stages",),
    "search": ("search",),
    "answers": ("samples",),
    "data": ("data",),
}
MEMBERS = ("general", "clinic", "preference")
VOID = {"meta"}


def make_stage(name, task, context, steps=12):
    history = [
        {
            "step": k + 1,
            "loss": 3.0 - k / 10,
            "learning_rate": 2e-4 * (1 - k / steps),
            "gradient_norm": 1.0 + k % 3,
            "tokens": 100,
            "context": dict.fromkeys(context, 1.0 - k / steps),
            **({"accuracy": 0.5 + k / 40, "margin": k / 10 - 0.2} if task == "dpo" else {}),
        }
        for k in range(steps)
    ]
    return {
        "name": name,
        "task": task,
        "digest": f"sha256:{name}-digest",
        "lora": {"rank": 8, "alpha": 16.0, "scaling": "rslora"},
        "train": {"epochs": 1, "report_to": []},
        "scale": 5.657,
        "trainable": 1000,
        "examples": {"train": 80, "validation": 10, "test": 10},
        "context": {m: {"weight": 1.0, "schedule": "cosine", "to": 0.0, "start": 0.5, "end": 1.0} for m in context},
        "history": history,
        "validation": [{"step": 0, "loss": 3.1}, {"step": 12, "loss": 2.2}],
        "best_step": 12,
        "stopped_early": False,
        "seconds": 61.0,
        "tokens": 1200,
        "tokens_per_second": 19.7,
    }


def make_data():
    """A small whole report."""
    models = ["base", *MEMBERS, "chosen"]
    weights = {"general": 0.25, "clinic": 0.5, "preference": 0.25}
    return {
        "title": "medical",
        "created": "2025-01-01",
        "lorchestra": "0.1.0",
        "seconds": 321.0,
        "recipe_text": "name: medical\n",
        "settings": {"name": "medical", "stages": [{"name": "general", "data": ["a.jsonl"]}], "seeds": {"init": 0}},
        "verdict": {"sentence": "The chosen sum is better than the base.", "notes": ["Mixed was not trained."]},
        "base": {"name": "tiny", "weights": "w", "tokenizer": "t", "template": None, "parameters": 134_515_008,
                 "dtype": "float32", "device": "cpu"},
        "steps": [{"name": "general", "kind": "train", "digest": "d1", "cached": True, "seconds": 0.1}],
        "stages": [make_stage("general", "sft", ()), make_stage("clinic", "sft", ("general",)),
                   make_stage("preference", "dpo", ("general", "clinic"))],
        "search": {
            "strategy": "random",
            "members": list(MEMBERS),
            "chosen": weights,
            "candidates": [
                {"weights": dict.fromkeys(MEMBERS, 0.0), "score": 1.0, "origin": "base"},
                {"weights": weights, "score": 0.8, "origin": "simplex"},
                {"weights": dict.fromkeys(MEMBERS, 1.0), "score": 0.9, "origin": "stack"},
                {"weights": {"general": 1.0, "clinic": 0.5, "preference": -0.5}, "score": 0.95, "origin": "simplex"},
            ],
            "validation_items": 60,
        },
        "fusion": {"digest": "fd", "weights": weights, "rank": 24, "retained": 0.987,
                   "norms": {"general": 1.0, "clinic": 2.0, "preference": 0.5}, "warnings": ["not the stack"]},
        "merge": {"dtype": "float32", "parity": 1e-5, "update_ratio": 0.01, "rounding_lost": 1e-6, "seconds": 2.0},
        "evaluation": {
            "models": models,
            "domains": list(MEMBERS),
            "rows": [{"model": m, "domain": d, "metric": "nll", "estimate": 3 - k / 10, "low": 2.9 - k / 10,
                      "high": 3.1 - k / 10, "n": 40} for k, m in enumerate(models) for d in MEMBERS],
            "differences": [
                {"a": "chosen", "b": "base", "domain": "general", "metric": "nll", "estimate": -0.4, "low": -0.5,
                 "high": -0.3, "n": 40},
                {"a": "chosen", "b": "base", "domain": "clinic", "metric": "nll", "estimate": 0.4, "low": 0.3,
                 "high": 0.5, "n": 40},
                {"a": "chosen", "b": "base", "domain": "preference", "metric": "nll", "estimate": 0.0, "low": -0.1,
                 "high": 0.1, "n": 40},
            ],
            "ledger": [{"domain": "general", "digest": "ld", "reads": 3}],
        },
        "samples": [{"domain": "clinic", "prompt": "胸闷三周?", "gold": "gold", "before": "b", "after": "a"}],
        "data": {
            "general": {
                "format": "messages", "rows": 100, "counts": {"train": 80, "validation": 10, "test": 10},
                "lengths": {"mean": 50.5, "p50": 48, "max": 99}, "truncated": 1, "duplicates": 2, "leakage": 0,
                "examples": [{"text": "question ANSWER", "supervised": [[9, 15]]}], "warnings": ["one cut"],
            }
        },
    }  # fmt: skip


class Page(HTMLParser):
    """Every start tag with its attributes, the text of scripts, ids; fails on badly nested elements."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.text, self.open = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def ids(self):
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]

    @property
    def said(self):
        return "".join(self.text)


def poisoned(value, texts, path=""):
    """The same data with every string, keys too, made hostile; numbers stay."""
    if isinstance(value, dict):
        # The contract's own keys stay; what users name (members, stages, settings) does not.
        named = path in {"weights", "norms", "chosen", "context", "data", "settings", "counts", "lengths"}
        return {(texts(k) if named else k): poisoned(v, texts, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, texts, path) for inner in value]
    return texts(value) if isinstance(value, str) else value


HOSTILE = (
    "<script>alert(1)</script>",
    "</svg></title></style></script></pre></textarea><script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)' x='",
    "{{ 7 * 7 }}{% include 'x' %}",
    "<!-- ]]> javascript:alert(1)",
    "&lt;b&gt; &amp;",
)  # fmt: skip


def test_whole_report_has_every_section_and_its_facts():
    page = Page(render_report(make_data()))
    assert set(page.ids) >= {*SECTIONS, "fusion", "settings"}
    for text in (
        "The chosen sum is better than the base.",
        "3.000",
        "2.600",
        "−0.400",
        "98.7",
        "胸闷三周?",
        "sha256:clinic-digest",
    ):
        assert text in page.said
    curves = [attrs["data-name"] for tag, attrs in page.tags if tag == "polyline"]
    assert {"training", "validation", "Learning rate", "Gradient norm", "Preference margin", "general"} <= set(curves)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_everywhere_stays_text(hostile):
    plain = Page(render_report(make_data()))
    data = poisoned(make_data(), lambda text: f"{text}{hostile}")
    # The metric and part names pick rows; with them intact every table is there to be attacked.
    for row, kept in ((r, "nll") for r in data["evaluation"]["rows"] + data["evaluation"]["differences"]):
        row["metric"] = kept
    page = Page(render_report(data))
    assert len(page.scripts) == 1
    assert page.scripts == plain.scripts
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
    assert hostile in page.said  # as text, character for character
    assert f"medical{hostile}" in page.said
    assert not re.search(r"\b49\b", page.said)


def test_supervised_part_is_marked_and_nothing_else():
    html = render_report(make_data())
    assert re.search(r'<pre class="text" dir="auto">question <mark>ANSWER</mark></pre>', html)


@pytest.mark.parametrize("spans", [[[12, 400], [3, 5], [4, 9]], [[-5, 3]], [["a", 2], None, [1]], None, "no", [[9, 2]]])
def test_odd_spans_keep_the_text(spans):
    data = make_data()
    data["data"]["general"]["examples"] = [{"text": "question ANSWER", "supervised": spans}]
    (pre,) = re.findall(r'<pre class="text" dir="auto">(.*?)</pre>', render_report(data), re.S)
    assert re.sub("</?mark>", "", pre) == "question ANSWER"


@pytest.mark.parametrize("absent", [None, "gone", {}, []])
@pytest.mark.parametrize("key", list(make_data()))
def test_missing_section(key, absent):
    data = make_data()
    if absent == "gone":
        del data[key]
    else:
        data[key] = absent
    page = Page(render_report(data))
    for section, keys in SECTIONS.items():
        if keys == (key,):
            assert section not in page.ids
    links = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert links <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_empty_and_partial_data():
    assert "lorchestra run" in render_report({})
    data = make_data()
    data["stages"] = data["stages"][:1]
    data["stages"][0] |= {"history": [], "validation": [], "best_step": None}
    data |= {"search": None, "merge": None, "verdict": {}}
    page = Page(render_report(data))
    assert "polyline" not in {tag for tag, _ in page.tags}
    assert "merged model" not in page.said


ANYTHING = (
    None,
    True,
    -3,
    10**400,
    1e300,
    1e-300,
    float("nan"),
    float("-inf"),
    "",
    "text",
    [],
    [1, "x"],
    {},
    {"a": {"b": [None]}},
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_leaf_may_be_anything(draw):
    """No value of JSON, at any place, stops the report: it is written after hours of work."""
    data = make_data()
    at, places = data, []
    while isinstance(at, (dict, list)) and at:
        key = draw.draw(st.sampled_from(sorted(at, key=str) if isinstance(at, dict) else range(len(at))))
        places.append((at, key))
        at = at[key]
    holder, key = draw.draw(st.sampled_from(places))
    holder[key] = draw.draw(
        st.sampled_from(
            [None, True, -3, 1e300, float("nan"), float("-inf"), "text", "", [], {}, [1, "x"], {"a": {"b": [None]}}]
        )
    )
    Page(render_report(data))


def test_only_its_own_script_may_run_and_nothing_is_fetched():
    html = render_report(make_data())
    page = Page(html)
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "use", "image"} & {t for t, _ in page.tags}
    assert not re.search(r"https?://|@import|url\(", html)


def test_same_data_same_bytes():
    first = render_report(make_data())
    assert render_report(json.loads(json.dumps(make_data()))) == first
    assert first == render_report(copy.deepcopy(make_data()))


def test_render_leaves_the_data_alone():
    data = make_data()
    render_report(data)
    assert data == make_data()


def test_write_and_read_back(tmp_path):
    path = write_report(make_data(), tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "report.html"
    stored = json.loads((path.parent / "report.json").read_text(encoding="utf-8"))
    assert stored == make_data()
    assert path.read_text(encoding="utf-8") == render_report(stored)
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_what_json_and_html_cannot_hold(tmp_path):
    data = make_data()
    data["stages"][0]["history"][3]["gradient_norm"] = float("inf")
    data["merge"]["parity"] = float("nan")
    data["samples"][0]["after"] = "half \ud83d nul \x00 escape \x1b[31m"
    path = write_report(data, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert stored["merge"]["parity"] is None
    assert stored["stages"][0]["history"][3]["gradient_norm"] is None
    html = path.read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f]", html)
    assert "half \ufffd nul \ufffd escape \ufffd[31m" in html


def test_unwritable_directory_is_explained_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"report\.json.*run the recipe again"):
        write_report(make_data(), tmp_path / "file")
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(make_data(), tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


def test_better_and_worse_follow_the_metric():
    data = make_data()
    words = re.findall(r'<b class="(\w+)">([\w ]+)</b> [+−]', render_report(data))
    unclear = ("unclear", "no clear difference")
    assert words == [("better", "better"), ("worse", "worse"), unclear]
    for row in data["evaluation"]["rows"] + data["evaluation"]["differences"]:
        row["metric"] = "accuracy"
    words = re.findall(r'<b class="(\w+)">([\w ]+)</b> [+−]', render_report(data))
    assert words == [("worse", "worse"), ("better", "better"), unclear]


@pytest.mark.parametrize("count", [1, 2, 4, 12])
def test_search_over_any_number_of_members(count):
    data = make_data()
    members = [f"m{k}" for k in range(count)]
    weights = dict.fromkeys(members, 1 / count)
    data["search"] |= {"members": members, "chosen": weights, "candidates": [{"weights": weights, "score": 0.5}]}
    html = render_report(data)
    assert "0.5000" in html
    assert 'class="triangle"' not in html


def test_simplex_puts_corners_and_centre_where_they_belong():
    def at(*weights):
        ((label, figure),) = simplex(MEMBERS, [Candidate(weights, 0.5, "t")])
        ((x, y),) = re.findall(r'class="candidate" cx="([\d.]+)" cy="([\d.]+)"', figure)
        return label, float(x), float(y)

    corners = [at(1.0, 0.0, 0.0), at(0.0, 1.0, 0.0), at(0.0, 0.0, 1.0)]
    label, x, y = at(0.5, 0.5, 0.5)
    assert label == "1.5"
    assert x == pytest.approx(sum(c[1] for c in corners) / 3, abs=0.02)
    assert y == pytest.approx(sum(c[2] for c in corners) / 3, abs=0.02)
    assert simplex(MEMBERS, [Candidate((1.0, 1.0, -0.5), 0.5, "t")]) == []


def test_many_total_scales_share_four_facets_and_lose_no_candidate():
    candidates = [Candidate((k / 7, 0.1, 0.2), k / 10, "t") for k in range(12)]
    facets = simplex(MEMBERS, candidates)
    assert len(facets) == 4
    assert sum(figure.count('class="candidate"') for _, figure in facets) == 12


def test_long_histories_are_thinned_without_moving_the_mean():
    line = Line.of("loss", [(k, float(k % 7)) for k in range(100_000)])
    thin = line.thinned()
    assert len(thin.points) <= 300
    mean = sum(y for _, y in thin.points) / len(thin.points)
    assert mean == pytest.approx(3.0, abs=0.02)


def test_smoothing_keeps_a_constant():
    line = Line.of("loss", [(k, 2.5) for k in range(40)]).smoothed("s")
    assert [y for _, y in line.points] == pytest.approx([2.5] * 40)


def test_curve_passes_through_its_values():
    """Read the drawn points back through the frame, as the page's script does."""
    values = [(1, 0.5), (2, 40.0), (3, 300.0)]
    for floor in (None, 0.0):
        figure = line_chart([Line.of("x", values)], "x", floor=floor)
        frame = json.loads(Page(f"<p>{figure}</p>").tags[1][1]["data-frame"])
        (points,) = re.findall(r'points="([^"]+)"', figure)
        (y0, y1, bottom, top), log = frame["y"], frame["log"]
        assert log == (floor is None)
        for (_, value), point in zip(values, points.split(), strict=True):
            share = (float(point.split(",")[1]) - bottom) / (top - bottom)
            read = y0 * (y1 / y0) ** share if log else y0 + share * (y1 - y0)
            assert read == pytest.approx(value, rel=0.01, abs=0.02)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_inside_and_even(low, width):
    scale = Scale(low, low + width, 0, 100)
    ticks = scale.ticks()
    assert len(ticks) <= 8
    slack = 1e-6 * (abs(low) + width)
    assert all(low - slack <= t <= low + width + slack for t in ticks)
    assert ticks == sorted(ticks)


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=True)), max_size=5))
def test_spanned_is_never_empty(values):
    low, high = spanned([v for v in values if v is None or not abs(v) > 1e100])
    assert low < high


def test_numbers_for_people():
    assert [number(v) for v in (0, 12, 1234567, 0.5, -2.345, 1e-6, 123456.7, None, float("nan"), "x")] == [
        "0", "12", "1,234,567", "0.5", "−2.35", "1×10⁻⁶", "123,457", "–", "–", "x",
    ]  # fmt: skip
    assert [tick(v) for v in (0, 0.25, -3.5, 1.5e-4, 12000, 2e6)] == ["0", "0.25", "−3.5", "1.5e−4", "12,000", "2e6"]
    assert measure(-0.00001, "nll", signed=True) == "+0.000"
    assert measure(0.625, "accuracy") == "62.5\u00a0%"
    assert measure(-0.031, "preference_accuracy", signed=True) == "−3.1\u00a0points"
    assert percent(0.0123) == "1.23\u00a0%"


def test_ramp_ends_and_brightens():
    assert ramp(0) == "#00224e"
    assert ramp(1) == "#fee838"
    green = [int(ramp(k / 20)[3:5], 16) for k in range(21)]
    assert green == sorted(green)


def test_the_mixed_baseline_has_its_settings_and_curve():
    data = make_data()
    before = render_report(data)
    data["mixed"] = make_stage("mixed", "sft", ())
    page = render_report(data)
    assert "baseline: one adapter on the data of all stages, mixed" in page
    assert "Settings and counts of mixed" in page
    assert "adapter mixed" in page
    assert "sha256:mixed-digest" in page
    assert "Settings and counts of mixed" not in before
    graph = re.compile(r'<section id="lineage">.*?</section>', re.DOTALL)
    assert graph.search(page)[0] == graph.search(before)[0], "it is no part of what is delivered"
