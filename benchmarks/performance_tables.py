"""Writes the tables of docs/performance.md from results of `tinfer bench`.

    python -m benchmarks.performance_tables

A test holds the document against what this would write.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cost_tables import cost_tables, head, row

ROOT = Path(__file__).resolve().parents[1]
Point = Mapping[str, Any]
_TABLE = re.compile(r"<!-- table (?P<file>\S+) (?P<name>[\w ]+) -->.*?<!-- end -->", re.DOTALL)
# Heading, metrics of one cell, factor, and how a number is shown.
VALUES = (
    ("TTFT mean / p99 (ms)", ("mean_ttft_ms", "p99_ttft_ms"), 1.0, ".0f"),
    ("TPOT mean (ms)", ("mean_tpot_ms",), 1.0, ".1f"),
    ("ITL p99 (ms)", ("p99_itl_ms",), 1.0, ".0f"),
    ("E2EL mean / p99 (s)", ("mean_e2el_ms", "p99_e2el_ms"), 1e-3, ".2f"),
    ("req/s", ("request_throughput",), 1.0, ".2f"),
    ("good req/s, loose", ("goodput_loose",), 1.0, ".2f"),
    ("tight", ("goodput_tight",), 1.0, ".2f"),
)
RATIOS = (
    ("goodput, loose", "goodput_loose"),
    ("goodput, tight", "goodput_tight"),
    ("ITL p99", "p99_itl_ms"),
    ("TTFT mean", "mean_ttft_ms"),
    ("E2EL mean", "mean_e2el_ms"),
    ("throughput", "request_throughput"),
    ("device time", "resource_s"),
    ("perf/$, paper's", "perf_per_dollar_paper"),
    ("perf/$, reciprocal", "perf_per_dollar_reciprocal"),
)


def value_cell(metrics: Mapping[str, Any], names: tuple[str, ...], factor: float, form: str) -> str:
    found = [metrics[name]["value"] for name in names]
    return " / ".join("–" if one is None else format(factor * one["value"], form) for one in found)


def values(points: list[Point]) -> Iterator[str]:
    """What every arm did, a table per workload."""
    for workload in dict.fromkeys(point["workload"] for point in points):
        yield from ("", f"**{workload}**", "")
        yield from head("load", "arm", *(heading for heading, *_ in VALUES))
        for point in points:
            if point["workload"] != workload:
                continue
            for arm in sorted(point["arms"], key=lambda arm: (arm != point["baseline"], arm)):
                shown = f"**{arm}**" if arm == point["baseline"] else arm
                of_arm = point["arms"][arm]
                cells = (value_cell(of_arm, names, by, form) for _, names, by, form in VALUES)
                yield row(f"{point['load']:.0%} ({point['offered_rps']:.2f}/s)", shown, *cells)


def ratio_cell(one: Mapping[str, Any]) -> str:
    """The ratio with its interval, in bold where the whole interval is on one side of 1."""
    ratio = one["ratio"]
    if ratio is None:
        return "–"
    text = f"{ratio['value']:.2f}"
    if ratio["low"] is not None and ratio["high"] is not None:
        text += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    mark = {"better": "+", "worse": "−"}.get(one["verdict"], "")
    return f"**{text}** {mark}" if mark else text


def ratios(points: list[Point], kinds: Mapping[str, str]) -> Iterator[str]:
    """Everything but the replicas, beside the better of them; replicas where there is no other."""
    others = {arm for arm, kind in kinds.items() if not kind.startswith("replicas")}
    yield from head("workload", "load", "arm", *(heading for heading, _ in RATIOS))
    for point in points:
        for arm in sorted(point["arms"]):
            if arm in others or (not others and arm != point["baseline"]):
                cells = (ratio_cell(point["arms"][arm][name]) for _, name in RATIOS)
                yield row(point["workload"], f"{point['load']:.0%}", arm, *cells)


def classes(result: Mapping[str, Any]) -> Iterator[str]:
    """Unloaded times and the bounds that follow from them."""
    yield from head(
        "class", "TTFT alone (ms)", "TPOT alone (ms)", "TTFT bound", "TPOT loose", "TPOT tight"
    )
    for task, one in result["unloaded"].items():
        loose, tight = (result["slos"][level][task] for level in ("loose", "tight"))
        alone = (f"{1e3 * one[key]:.1f}" for key in ("ttft_s", "tpot_s"))
        bounds = (loose["ttft"], loose["tpot"], tight["tpot"])
        yield row(task, *alone, *(f"{bound:.0f}" for bound in bounds))


def full_loads(result: Mapping[str, Any]) -> Iterator[str]:
    yield from head("workload", "100 % load (req/s)", "kept up with by", "looks at a rate")
    for workload, found in result["full_load"].items():
        arm = found["arm"] or "given"
        yield row(workload, f"{found['rate_rps']:.2f}", arm, str(len(found["probes"])))


def lines_of(lines: list[Any]) -> Iterator[str]:
    """What tinfer loses or wins of the figures that the ratios show, farthest first."""
    headline = dict((metric, heading) for heading, metric in RATIOS)
    yield from head("workload", "load", "arm", "figure", "ratio to the better replicas")
    for line in lines:
        if line["metric"] not in headline:
            continue
        if line["ratio"] is not None:
            text = f"{line['ratio']['value']:.2f}"
            if line["ratio"]["low"] is not None:
                text += f" [{line['ratio']['low']:.2f}, {line['ratio']['high']:.2f}]"
        else:
            text = f"{number(line['value'])} against {number(line['baseline_value'])}"
        yield row(
            line["workload"], f"{line['load']:.0%}", line["arm"], headline[line["metric"]], text
        )


def number(one: Mapping[str, Any] | None) -> str:
    return "nothing" if one is None else f"{one['value']:.3g}"


def tables(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Each table's lines, by name."""
    if costs := cost_tables(result):
        return costs
    kinds = {arm["name"]: arm["kind"] for arm in result["arms"]}
    return {
        "classes": list(classes(result)),
        "full load": list(full_loads(result)),
        "ratios": list(ratios(result["points"], kinds)),
        "values": list(values(result["points"])),
        "losses": list(lines_of(result["losses"])),
        "wins": list(lines_of(result["wins"])),
    }


def written(document: str, folder: Path) -> str:
    """The document with every table as its result file has it.

    A table stands between `<!-- table FILE NAME -->` and `<!-- end -->`.
    """
    known: dict[str, dict[str, list[str]]] = {}

    def table(found: re.Match[str]) -> str:
        file, name = found.group("file"), found.group("name")
        if file not in known:
            known[file] = tables(json.loads((folder / file).read_text()))
        lines = "\n".join(known[file][name]).strip("\n")
        return f"<!-- table {file} {name} -->\n\n{lines}\n\n<!-- end -->"

    return _TABLE.sub(table, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, nargs="?", default=ROOT / "docs" / "performance.md")
    document = parser.parse_args().document
    document.write_text(written(document.read_text(), ROOT / "benchmarks" / "results"))


if __name__ == "__main__":
    main()
