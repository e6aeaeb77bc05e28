"""What lies in deploy/ for those who operate: alert rules, their tests and runbooks, and the
Grafana dashboard."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import needs

from respcache.ops.stats import metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "respcache.rules.yml").read_text())["groups"][0]["rules"]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "respcache.json").read_text())
RUNBOOKS = ROOT / "docs" / "runbooks"
SECTIONS = [
    "What it means",
    "What users notice",
    "How to see it",
    "How to fix it",
    "How to verify the fix",
]

NAME = re.compile(r"\b(?:(?:[a-z_]+:)*respcache_[a-z_]+(?::[a-z0-9_]+)?)\b")
SELECTOR = re.compile(rf"({NAME.pattern})\{{([^}}]*)\}}")


def exported() -> dict[str, set[str]]:
    """Return the series that a scrape yields, with their labels: of histograms three."""
    found: dict[str, set[str]] = {}
    for metric in metrics.ALL:
        labels = set(metric.labels) | (
            {"worker"} if metric in (*metrics.OF_WORKERS, *metrics.OF_TENANTS) else set()
        )
        for suffix in ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",):
            found[metric.full_name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def panels(of: Any = DASHBOARD) -> Iterator[dict[str, Any]]:
    for panel in of["panels"]:
        yield panel
        yield from panels(panel) if "panels" in panel else ()


QUERIES = {
    f"{panel['title']}: {target['refId']}": target["expr"]
    for panel in panels()
    for target in panel.get("targets", ())
}
VARIABLES = {
    f"${one['name']}": one["query"]["query"]
    for one in DASHBOARD["templating"]["list"]
    if one["type"] == "query"
}
EXPRESSIONS = {
    **RECORDED, **{name: rule["expr"] for name, rule in ALERTS.items()}, **QUERIES, **VARIABLES,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_name_in_an_expression_is_exported_or_recorded(name: str) -> None:
    """Also in the dashboard; and the labels that it selects by are the series' own."""
    series = exported()
    found = set(NAME.findall(EXPRESSIONS[name]))
    assert found or "up{" in EXPRESSIONS[name], "nothing of ours"
    assert found <= series.keys() | RECORDED.keys()
    for metric, selected in SELECTOR.findall(EXPRESSIONS[name]):
        labels = set(re.findall(r"(\w+)\s*[=!]", selected)) - {"job", "instance"}
        assert labels <= series.get(metric, {"module", "route", "reason"})


def test_what_is_recorded_is_used() -> None:
    """By an alert, the dashboard or another recording."""
    used = {found for expression in EXPRESSIONS.values() for found in NAME.findall(expression)}
    assert RECORDED.keys() <= used


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_a_runbook(name: str) -> None:
    """With the same sections in the same order; its name is the page's, and the page says how
    urgent it is."""
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert {"summary", "description", "runbook_url"} == rule["annotations"].keys()
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
    page = (RUNBOOKS / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n\n**{rule['labels']['severity'].capitalize()}**")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == SECTIONS
    named = set(NAME.findall(page)) - {"respcache_outbox", "respcache_fence", "respcache_trail"}
    assert named <= exported().keys() | RECORDED.keys()


def test_every_runbook_belongs_to_an_alert_and_is_listed() -> None:
    """docs/metrics.md lists them all."""
    pages = {path.stem for path in RUNBOOKS.glob("*.md")}
    assert pages == ALERTS.keys()
    listed = re.findall(
        r"^\| \[(\w+)\]\(runbooks/(\w+)\.md\) \| (\w+) \|",
        (ROOT / "docs" / "metrics.md").read_text(),
        re.MULTILINE,
    )
    assert listed == [(name, name, rule["labels"]["severity"]) for name, rule in ALERTS.items()]


def test_every_alert_has_a_unit_test_that_it_fires() -> None:
    """And one moment at which it does not yet."""
    tests = yaml.safe_load((PROMETHEUS / "respcache.rules.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == ALERTS.keys()
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == ALERTS.keys()


@needs.PROMTOOL
@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "respcache.rules.yml"),
        pytest.param(("test", "rules", "respcache.rules.test.yml"), marks=pytest.mark.long),
        ("check", "config", "--syntax-only", "prometheus.yml"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_promtool_accepts(command: tuple[str, ...]) -> None:
    """The rules, the unit tests of the alerts, and the scrape configuration."""
    done = subprocess.run(
        ["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs.PROMTOOL
@pytest.mark.parametrize("name", QUERIES)
def test_promtool_parses_what_the_dashboard_asks(name: str, tmp_path: Path) -> None:
    """Grafana's variables stand for what it puts in their place."""
    expression = re.sub(r"\$__(rate_)?interval", "5m", QUERIES[name]).replace("$job", "respcache")
    assert "$" not in expression
    rules = {"groups": [{"name": "dashboard", "rules": [{"record": "panel", "expr": expression}]}]}
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump(rules))
    done = subprocess.run(
        ["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_whole() -> None:
    """Panels have titles, do not overlap, use the variable data source, and say their unit."""
    assert DASHBOARD["uid"] == "respcache"
    taken: set[tuple[int, int]] = set()
    identities = [panel["id"] for panel in panels()]
    assert len(set(identities)) == len(identities)
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert panel["title"]
        assert not taken & cells, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["description"]
