"""The dashboard and the alerts query only metrics that the gateway exports."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from orbithash.search.gateway.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "orbithash.json"
RULES = DEPLOY / "prometheus" / "orbithash.rules.yml"


class Served:
    """The part of a service that `Metrics.watch` reads."""

    num_queries_waiting = num_rows_waiting = 0
    follow_lag_s = 0.0

    def describe(self):
        from orbithash.search.protocol.description import Description, ShardStatus

        return Description(1, 8, "m", 1, "flat", False, (ShardStatus(1, 1, 1),), "0", 4, None)


@pytest.fixture(scope="module")
def exported():
    """Return the labels of each sample that the gateway can export, by the sample's name."""
    from prometheus_client import generate_latest

    metrics = Metrics()
    metrics.watch(Served())
    metrics.call_began("Search")
    metrics.call_ended("Search", "OK", 0.1)
    found = {"up": {"job", "instance"}}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def check(expression, exported):
    """Check that an expression uses exported metrics and their labels only."""
    found = re.findall(r"\b((?:orbithash|process)_\w+|up)(?:\{([^}]*)\})?", expression)
    assert found, expression
    for name, selectors in found:
        assert name in exported, expression
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selectors)) - {"instance", "job"}
        assert labels <= exported[name], expression
    for names in re.findall(r"by \(([^)]*)\)", expression):
        labels = {label.strip() for label in names.split(",")} - {"instance", "job"}
        assert labels <= set().union(*(exported[name] for name, _ in found)), expression
    assert expression.count("(") == expression.count(")")


def test_the_dashboard_shows_every_metric(exported):
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    for expression in expressions:
        check(expression, exported)
    text = " ".join(expressions)
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported if name.startswith("orbithash_")}
    missing = {name for name in names if not name.endswith("_created") and name not in text}
    assert missing == set()


def test_the_dashboard_is_well_formed():
    board = json.loads(DASHBOARD.read_text())
    assert board["schemaVersion"] >= 39
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    positions = [panel["gridPos"] for panel in panels]
    for position in positions:
        assert 0 <= position["x"] < position["x"] + position["w"] <= 24
    for one, other in itertools.combinations(positions, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    for panel in panels:
        for target in panel["targets"]:
            assert panel["datasource"]["uid"] == target["datasource"]["uid"] == "${datasource}"
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names)


def test_alerts_use_exported_metrics(exported):
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    for rule in rules:
        check(rule["expr"], exported)
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
    assert len({rule["alert"] for rule in rules}) == len(rules)
    text = " ".join(rule["expr"] for rule in rules)
    names = ("partial_answers_total", "healthy_replicas", "shed_queries_total", "requests_total")
    for name in (*names, "follow_lag_seconds", "failed_showings_total", "segments"):
        assert f"orbithash_{name}" in text


def test_prometheus_finds_the_rules():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for name in config["rule_files"]:
        assert (DEPLOY / "prometheus" / name).is_file()
    assert [job["job_name"] for job in config["scrape_configs"]] == ["orbithash"]


@pytest.mark.parametrize(
    "expression", ["rate(orbithash_nothing_total[5m])", "orbithash_rows{rpc='Search'}", "sum by (rpc) (orbithash_rows)"]
)
def test_the_check_finds_errors(exported, expression):
    with pytest.raises(AssertionError):
        check(expression, exported)
