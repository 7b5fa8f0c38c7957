"""docs/metrics.md is what the server shows: every metric, its type and its labels, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import Metric

from tests.unit.metrics_box import MeteredBox
from tinfer.master.metrics.catalogue import METRICS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text()
ROW = re.compile(r"^\| `([a-z_:0-9]+)` \| (counter|gauge|histogram) \|([^|]*)\| ([^|]+) \|$", re.M)

Shown = dict[str, tuple[str, tuple[str, ...]]]


def documented() -> Shown:
    return {
        name: (kind, tuple(sorted(re.findall(r"`(\w+)`", labels))))
        for name, kind, labels, _ in ROW.findall(DOCUMENT)
    }


def families() -> Iterator[Metric]:
    yield from MeteredBox().registry.collect()


def shown() -> Shown:
    found: Shown = {}
    for family in families():
        labels = {tuple(sorted(sample.labels.keys() - {"le"})) for sample in family.samples}
        assert len(labels) == 1, f"{family.name}: samples with different labels"
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = (family.type, labels.pop())
    return found


def test_the_document_has_what_is_shown_and_nothing_else() -> None:
    assert documented() == shown()


def test_every_row_of_a_metric_is_read() -> None:
    rows = re.findall(r"^\| `(?:vllm|tinfer|process)[:_]\w+` \|.*$", DOCUMENT, re.M)
    assert len(rows) == len(documented()) == len(METRICS) + 6


def test_every_metric_says_what_it_is() -> None:
    abouts = [family.documentation for family in families()]
    assert all(about and about.strip()[-1] == "." for about in abouts)


def test_label_values_that_the_document_names_are_shown() -> None:
    """Where a label has a fixed set of values, each is there from the start, and is explained."""
    for family in families():
        name = family.name + ("_total" if family.type == "counter" else "")
        (row,) = [row for row in ROW.findall(DOCUMENT) if row[0] == name]
        for label in ("reason", "cause", "form", "outcome", "phase", "source", "route"):
            for value in {s.labels[label] for s in family.samples if label in s.labels}:
                assert f"`{value}`" in row[3], f"{name}: {label} {value} is not explained"
