"""What a simulation is reported as: one object for a file, and the same as a table. Pure.

| key | meaning |
|---|---|
| `date`, `version` | when, and with which tinfer |
| `settings` | what was asked for: requests, box, options |
| `num_requests`, `offered_rate` | of the run; the rate is null where all arrive at once |
| `slos_ms` | by level and class: the bounds on `ttft_ms` and `tpot_ms` |
| `baseline` | the arm that ratios are to; null without one |
| `arms` | by name, see below |

Of an arm: `figures` (see `results`), `ratios` of them to the baseline's with both forms of perf/$,
`classes` (per class of requests its mean latencies and the share of answers within each SLO),
`routes` (how many requests went which way), `workers` (steps and preemptions), `num_devices`, and
with --save-detailed `requests` (see `results.RequestResult`). What does not exist is null.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from tinfer.sim.arms import Arm, ReplicasArm, num_devices_of
from tinfer.sim.results import (
    PAPER_FORM,
    RECIPROCAL_FORM,
    RequestResult,
    SimRun,
    Slo,
    Slos,
    WorkerResult,
    figures_of,
    ratios_of,
)

Result = dict[str, Any]

# Name, words and unit of what the table shows, in its order.
SHOWN = (
    ("goodput_loose", "goodput, loose SLO", "req/s"),
    ("goodput_tight", "goodput, tight SLO", "req/s"),
    ("request_throughput", "throughput", "req/s"),
    ("output_throughput", "output throughput", "tok/s"),
    ("mean_ttft_ms", "TTFT mean", "ms"),
    ("median_ttft_ms", "TTFT p50", "ms"),
    ("p99_ttft_ms", "TTFT p99", "ms"),
    ("mean_tpot_ms", "TPOT mean", "ms"),
    ("p99_tpot_ms", "TPOT p99", "ms"),
    ("p99_itl_ms", "ITL p99", "ms"),
    ("mean_e2el_ms", "E2EL mean", "ms"),
    ("median_e2el_ms", "E2EL p50", "ms"),
    ("p99_e2el_ms", "E2EL p99", "ms"),
    ("resource_s", "resource time", "device-s"),
    ("busy_s", "busy device time", "device-s"),
    (PAPER_FORM, "perf/$ (paper's form)", ""),
    (RECIPROCAL_FORM, "perf/$ (reciprocal)", "1/s2"),
    ("num_preemptions", "preemptions", ""),
    ("num_reprefills", "prefills after a preemption", ""),
    ("num_failed", "failed requests", ""),
)
_MS = 1000.0


def result_of(
    settings: Mapping[str, Any],
    arms: Sequence[Arm],
    runs: Sequence[SimRun],
    slos: Slos,
    save_detailed: bool = False,
) -> Result:
    """The report of runs of these arms on the same requests, as written to JSON but its date."""
    figures = [figures_of(run, slos) for run in runs]
    baseline = baseline_of(arms, figures)
    requests = runs[0].requests
    last_s = max(one.arrival_s for one in requests)
    shown: dict[str, Any] = {}
    for arm, run, mine in zip(arms, runs, figures, strict=True):
        shown[arm.name] = {
            "num_devices": num_devices_of(arm),
            "figures": mine,
            "ratios": None if baseline is None else ratios_of(mine, figures[baseline]),
            "classes": _classes(run, slos),
            "routes": dict(sorted(Counter(str(one.route) for one in run.requests).items())),
            "workers": [_worker(one) for one in run.workers],
        }
        if save_detailed:
            shown[arm.name]["requests"] = run.requests
    return {
        "settings": dict(settings),
        "num_requests": len(requests),
        "offered_rate": len(requests) / last_s if last_s > 0.0 else None,
        "slos_ms": {level: slos_ms(by_task) for level, by_task in slos.items()},
        "baseline": None if baseline is None else arms[baseline].name,
        "arms": shown,
    }


def baseline_of(arms: Sequence[Arm], figures: Sequence[Mapping[str, float]]) -> int | None:
    """The place of the better replicas, by goodput at the loose SLO and then by mean E2EL; else of
    the second arm; None where there is but one."""
    if len(arms) == 1:
        return None
    replicas = [
        place
        for place, arm in enumerate(arms)
        if isinstance(arm, ReplicasArm) and arm.name.startswith("replicas")
    ]
    if not replicas:
        return 1
    return max(
        replicas,
        key=lambda place: (
            figures[place].get("goodput_loose", 0.0),
            -figures[place]["mean_e2el_ms"],
        ),
    )


def encoded(result: Mapping[str, Any]) -> bytes:
    """As JSON for a person to read; equal results give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"


def _classes(run: SimRun, slos: Slos) -> dict[str, Any]:
    by_task: dict[str, list[RequestResult]] = {}
    for one in run.requests:
        by_task.setdefault(one.task, []).append(one)
    return {
        task: {
            "num_requests": len(mine),
            **{f"mean_{name}_ms": _mean_ms(mine, name) for name in ("ttft", "tpot", "e2el")},
            **{
                f"good_{level}": sum(of_level[task].met_by(one) for one in mine) / len(mine)
                for level, of_level in slos.items()
            },
        }
        for task, mine in sorted(by_task.items())
    }


def _mean_ms(requests: Sequence[RequestResult], name: str) -> float | None:
    values = [getattr(one, f"{name}_s") for one in requests if one.ok]
    known = [value for value in values if value is not None]
    return _MS * math.fsum(known) / len(known) if known else None


def _worker(one: WorkerResult) -> dict[str, Any]:
    fields = msgspec.structs.asdict(one)
    del fields["work"]
    return fields


def slos_ms(by_task: Mapping[str, Slo]) -> dict[str, dict[str, float | None]]:
    """The bounds of each class in milliseconds."""
    return {
        task: {
            f"{name}_ms": None if bound is None else _MS * bound
            for name, bound in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s), ("e2el", slo.e2el_s))
        }
        for task, slo in sorted(by_task.items())
    }


# --- as text -------------------------------------------------------------------------------------


def text(result: Result) -> Iterator[str]:
    """The lines of the report."""
    rate = result["offered_rate"]
    told = "all at once" if rate is None else f"{number(rate)} requests/s"
    settings = result["settings"]
    yield f"{settings['requests']}: {result['num_requests']} requests, {told}; {settings['box']}"
    yield from _warnings(result)
    yield ""
    yield from table(_rows(result))
    if any(len(arm["classes"]) > 1 for arm in result["arms"].values()):
        yield ""
        yield from table(_class_rows(result))


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells, the first one the head, as aligned lines."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def number(value: float | None) -> str:
    """Three significant digits, and never an exponent; a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"


def _rows(result: Result) -> list[list[str]]:
    arms, baseline = result["arms"], result["baseline"]
    rows = [["", *(f"{name} (baseline)" if name == baseline else name for name in arms)]]
    for name, words, unit in SHOWN:
        cells = [
            _cell(arm, name, is_baseline=arm_name == baseline) for arm_name, arm in arms.items()
        ]
        if any(cell != "-" for cell in cells):
            rows.append([f"{words} ({unit})" if unit else words, *cells])
    return rows


def _cell(arm: Result, name: str, is_baseline: bool) -> str:
    """The figure, and its ratio to the baseline's."""
    value = arm["figures"].get(name)
    ratio = None if is_baseline or arm["ratios"] is None else arm["ratios"].get(name)
    shown = "" if value is None else number(value)
    if ratio is not None and math.isfinite(ratio):
        shown = f"{shown} x{number(ratio)}"
    return shown.strip() or "-"


def _class_rows(result: Result) -> list[list[str]]:
    arms = result["arms"]
    rows = [["good answers, loose / tight", *arms]]
    for task in next(iter(arms.values()))["classes"]:
        mine = [arm["classes"][task] for arm in arms.values()]
        cells = [" / ".join(f"{100 * one[key]:.0f} %" for key in _good(one)) or "-" for one in mine]
        rows.append([f"{task or '(no class)'}, {mine[0]['num_requests']} requests", *cells])
    return rows


def _good(one: Result) -> list[str]:
    return sorted(key for key in one if key.startswith("good_"))


def _warnings(result: Result) -> Iterator[str]:
    for name, arm in result["arms"].items():
        num_failed = arm["figures"]["num_failed"]
        if num_failed:
            yield f"{name}: {num_failed:g} of {result['num_requests']} requests failed"
