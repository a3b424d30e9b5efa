"""The alerts and the dashboard: what they ask for is there, what they say holds, each alert has its runbook entry."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx2
import pytest
from ruamel.yaml import YAML
from tests.deploy.scraped import prometheus, watched

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
OF_A_SCRAPE = {"job", "instance"}
VARIABLES = {"$__rate_interval": "30s", "$instance": ".*", "$adapter": ".*"}
SECONDS = 60.0
QUIET = {"annotation", "Canary: share that fails, by arm A"}  # no alert fires, and no candidate fails


def rules() -> list[dict]:
    document = YAML(typ="safe").load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    found = [rule for group in document["groups"] for rule in group["rules"]]
    assert len(found) > 10
    return found


ALERTS = {rule["alert"]: rule for rule in rules()}


def panels() -> dict[str, str]:
    """Where it stands → expression of the dashboard, its variables filled in."""
    dashboard = json.loads((DEPLOY / "grafana" / "lorchestra.json").read_text(encoding="utf-8"))
    found = {"annotation": dashboard["annotations"]["list"][0]["expr"]}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    assert len(found) > 20
    for where, expression in found.items():
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        assert "$" not in expression, where
        found[where] = expression
    return found


PANELS = panels()
LEGENDS = {
    f"{panel['title']} {target['refId']}": re.findall(r"{{(\w+)}}", target["legendFormat"])
    for panel in json.loads((DEPLOY / "grafana" / "lorchestra.json").read_text(encoding="utf-8"))["panels"]
    for target in panel.get("targets", ())
}
ASKED = {name: rule["expr"] for name, rule in ALERTS.items()} | PANELS


@pytest.fixture(scope="module")
def promtool() -> str:
    return program("promtool")


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here (Debian's package prometheus has it)")
    return found


def checked(promtool: str, *words: str | Path) -> str:
    done = subprocess.run(
        [promtool, *map(str, words)], capture_output=True, text=True, check=False, cwd=DEPLOY / "prometheus"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def asked_of(expression: str) -> list[tuple[str, set[str]]]:
    """Series that an expression names, each with the labels that it must have for that."""
    strings = re.sub(r'"[^"]*"', '""', expression)
    grouped = re.findall(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)", strings)
    everywhere = {label.strip() for labels in grouped for label in labels.split(",") if label.strip()}
    found = []
    for name, braces in re.findall(r"\b(up|ALERTS|lorchestra_\w+)\b\s*(?:{([^}]*)})?", strings):
        found.append((name, everywhere | set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", braces))))
    assert found, expression
    return found


def test_the_reader_of_expressions_sees_names_and_labels():
    found = asked_of('sum by (job, le) (rate(lorchestra_x_bucket{a="by (z)", b!~"[(]u[)]"}[5m])) > on (c) up == 0')
    assert found == [("lorchestra_x_bucket", {"a", "b", "c", "job", "le"}), ("up", {"c", "job", "le"})]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with watched(tmp_path_factory.mktemp("watched")) as there:
        there.traffic()
        yield there


@pytest.fixture(scope="module")
def shown(server) -> dict[str, set[str]]:
    return server.labels()


@pytest.mark.slow
def test_the_traffic_was_of_every_kind(shown):
    """Else a label could be missing only because nothing happened."""
    for series, labels in {
        "lorchestra_requests_total": {"adapter", "status"},
        "lorchestra_rejected_total": {"reason"},
        "lorchestra_inter_token_seconds_bucket": {"adapter", "le"},
        "lorchestra_adapter_evictions_total": {"adapter"},
        "lorchestra_registry_failures_total": {"kind"},
        "lorchestra_canary_requests_total": {"adapter", "arm", "outcome"},
    }.items():
        assert shown[series] == labels


@pytest.mark.slow
@pytest.mark.parametrize("where", list(ASKED))
def test_every_metric_and_label_is_one_that_a_server_shows(where, shown):
    for name, labels in asked_of(ASKED[where]):
        if name == "ALERTS":
            continue
        there = OF_A_SCRAPE | (set() if name == "up" else shown[name])
        assert labels - there == set(), name
        assert set(LEGENDS.get(where, ())) - there - {"instance"} == set(), name


@pytest.mark.slow
def test_a_real_prometheus_reads_the_server_and_answers_every_panel(server, tmp_path):
    """With our own configuration, but for the addresses and the pace."""
    there = program("prometheus")
    key = tmp_path / "key"
    key.write_text(server.operator, encoding="utf-8")
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    for before, after in {
        "server:8000": server.url.removeprefix("http://"),
        "/run/secrets/metrics_key": str(key),
        "interval: 15s": "interval: 1s",
    }.items():
        assert before in config
        config = config.replace(before, after)
    (tmp_path / "prometheus.yml").write_text(config, encoding="utf-8")
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", tmp_path)
    with prometheus(there, tmp_path / "prometheus.yml", tmp_path / "prometheus") as url:

        def ask(query: str) -> list:
            answer = httpx2.get(f"{url}/api/v1/query", params={"query": query}, timeout=SECONDS).json()
            assert answer["status"] == "success", (query, answer)
            return answer["data"]["result"]

        until = time.monotonic() + SECONDS
        missing = set(PANELS) - QUIET
        while missing and time.monotonic() < until:
            server.traffic()  # what is counted must grow between two looks
            time.sleep(1.1)
            missing = {where for where in missing if not ask(PANELS[where])}
        assert missing == set()
        assert [ask(PANELS[where]) for where in QUIET] == [[]] * len(QUIET)
        assert [one["value"][1] for one in ask('up{job="lorchestra"}')] == ["1"]
        loaded = httpx2.get(f"{url}/api/v1/rules").json()["data"]["groups"]
        assert {rule["name"]: rule["health"] for group in loaded for rule in group["rules"]} == dict.fromkeys(
            ALERTS, "ok"
        )


def test_promtool_takes_rules_and_configuration(promtool):
    assert f"{len(ALERTS)} rules found" in checked(promtool, "check", "rules", "alerts.yml")
    checked(promtool, "check", "config", "--syntax-only", "prometheus.yml")


def test_each_alert_fires_where_it_must_and_only_there(promtool):
    """The cases are in tests.yml, where ``promtool`` computes them."""
    checked(promtool, "test", "rules", "tests.yml")
    cases = YAML(typ="safe").load((DEPLOY / "prometheus" / "tests.yml").read_text(encoding="utf-8"))
    fires: dict[str, int] = {}
    for test in cases["tests"]:
        for case in test["alert_rule_test"]:
            fires[case["alertname"]] = fires.get(case["alertname"], 0) + len(case.get("exp_alerts", ()))
    assert set(fires) == set(ALERTS)
    assert [name for name, count in fires.items() if not count] == []


def test_a_wrong_threshold_would_be_noticed(promtool, tmp_path):
    for name in ("alerts.yml", "tests.yml"):
        shutil.copy(DEPLOY / "prometheus" / name, tmp_path)
    text = (tmp_path / "alerts.yml").read_text(encoding="utf-8")
    (tmp_path / "alerts.yml").write_text(text.replace("> 0.02", "> 0.5"), encoding="utf-8")
    done = subprocess.run([promtool, "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 1


def test_the_dashboards_expressions_are_promql(promtool, tmp_path):
    written = [{"record": f"panel:{i}", "expr": expression} for i, expression in enumerate(PANELS.values())]
    (tmp_path / "panels.json").write_text(json.dumps({"groups": [{"name": "panels", "rules": written}]}))
    assert f"{len(written)} rules found" in checked(promtool, "check", "rules", tmp_path / "panels.json")


def test_the_dashboard_is_whole():
    dashboard = json.loads((DEPLOY / "grafana" / "lorchestra.json").read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for target in panel.get("targets", ()):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
            assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], "panels overlap"


def test_every_alert_has_a_runbook_entry_and_every_entry_an_alert():
    entries = dict(re.findall(r"^## (Lorchestra\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
    assert set(entries) == set(ALERTS)
    for name, text in entries.items():
        assert re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE) == [
            "What it means.", "How to see it.", "What to do.", "Going back.",
        ], name  # fmt: skip
        assert f"Severity: {ALERTS[name]['labels']['severity']}" in text, name
        assert ALERTS[name]["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
