"""What the monitoring examples ask for is what `/metrics` has: series, labels, and their values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.metrics_box import MeteredBox

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
RULES = msgspec.yaml.decode((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
SERIES = re.compile(r"\b((?:vllm|tinfer):\w+|process_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!=|=)"([^"]*)"')
# Prometheus adds these itself.
OF_THE_SCRAPE = {"job", "instance"}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = DASHBOARD["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]
    for rule in RULES:
        yield rule["expr"]


def series() -> dict[str, dict[str, set[str]]]:
    """By name of the series: its labels, and the values that a new server shows of them."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in MeteredBox().registry.collect():
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


KNOWN = series()


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_every_series_and_label_is_one_of_the_server(expression: str) -> None:
    asked = SERIES.findall(expression)
    assert asked, "asks for nothing of the server"
    labels = {"le"} | OF_THE_SCRAPE
    for name, matchers in asked:
        assert name in KNOWN
        labels |= KNOWN[name].keys()
        for label, operator, value in MATCHER.findall(matchers):
            assert label in KNOWN[name].keys() | OF_THE_SCRAPE, (name, label)
            if operator != "=~":
                assert value in KNOWN[name][label], (name, label, value)
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        assert set(grouped.split(", ")) <= labels
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_counters_are_rated_and_gauges_are_not(expression: str) -> None:
    for name, _ in SERIES.findall(expression):
        is_counter = name.endswith(("_total", "_bucket", "_sum", "_count"))
        rated = re.search(rf"(rate|increase)\({name}", expression) is not None
        assert rated == is_counter, name


def test_legends_name_labels_that_are_there() -> None:
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            kept = {label for labels in grouped for label in labels.split(", ")}
            assert named <= kept, panel["title"]


def test_alerts_name_labels_that_are_there() -> None:
    for rule in RULES:
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        grouped = re.findall(r"\bby \(([^)]*)\)", rule["expr"])
        kept = {label for labels in grouped for label in labels.split(", ")}
        if not grouped:
            names = [name for name, _ in SERIES.findall(rule["expr"])]
            kept = OF_THE_SCRAPE | {label for name in names for label in KNOWN[name]}
        assert named <= kept, rule["alert"]


def test_panels_have_a_place_and_a_number_of_their_own() -> None:
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_variables_of_the_dashboard_are_declared() -> None:
    text = json.dumps(DASHBOARD)
    used = set(re.findall(r"\$\{?([a-z]\w*)\}?", text))
    assert used == {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def test_prometheus_loads_what_is_there() -> None:
    config = msgspec.yaml.decode((FOLDER / "prometheus.yml").read_text())
    assert all((FOLDER / name).is_file() for name in config["rule_files"])
    (scrape,) = config["scrape_configs"]
    assert scrape["job_name"] == "tinfer"
    assert scrape.get("metrics_path", "/metrics") == "/metrics"
    assert len({one["alert"] for one in RULES}) == len(RULES)
