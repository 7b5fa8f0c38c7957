"""A comparison as text: what tinfer loses first, then what it wins, then every figure. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tinfer.bench.compare.bootstrap import Estimate
from tinfer.bench.compare.comparison import Compared, Line, PointResult
from tinfer.bench.compare.metrics import METRICS

IDLE_SHARE_LIMIT = 0.05
_MARKS = {"better": "+", "worse": "-", "unclear": " ", None: " "}
_SHOWN = (
    *("goodput_loose", "goodput_tight", "request_throughput", "mean_ttft_ms", "p99_ttft_ms"),
    *("mean_tpot_ms", "p99_itl_ms", "mean_e2el_ms", "p99_e2el_ms", "resource_s", "busy_s"),
    *("perf_per_dollar_paper", "perf_per_dollar_reciprocal"),
)


def text(
    points: Sequence[PointResult],
    losses: Sequence[Line],
    wins: Sequence[Line],
    header: Sequence[str] = (),
) -> Iterator[str]:
    """All lines of the report."""
    yield from header
    yield ""
    yield from _lines("Worse than the baseline, with the whole interval", losses)
    yield ""
    yield from _lines("Better than the baseline, with the whole interval", wins)
    for point in points:
        yield ""
        yield from _table(point)


def warnings(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Why the figures may say less than they seem to."""
    from tinfer.bench import report

    worst: dict[str, tuple[int, str]] = {}
    for run in runs:
        for warning in report.warnings(run["figures"]):
            # The kind of a warning is what it says without its numbers.
            kind = "".join(letter for letter in warning if not letter.isdigit() and letter != ".")
            worst[kind] = (worst.get(kind, (0, ""))[0] + 1, warning)
    for count, example in worst.values():
        yield f"in {count} of {len(runs)} runs, as: {example}"
    share = max((run["idle_cpu_share"] for run in runs), default=0.0)
    if share > IDLE_SHARE_LIMIT:
        yield (
            f"idle arms used up to {share:.2f} of a core beside the measured one: "
            "--residency alone has one arm up at a time"
        )


def _lines(title: str, lines: Sequence[Line]) -> Iterator[str]:
    yield f"{title}: {len(lines) or 'nothing'}"
    for line in lines:
        metric = METRICS[line.metric]
        where = f"{line.workload} at {line.load:g}"
        told = _absolute(line) if line.ratio is None else f"x{_interval(line.ratio)}"
        yield f"  {line.arm:<14} {where:<16} {metric.words:<24} {told}  (to {line.baseline})"


def _absolute(line: Line) -> str:
    unit = METRICS[line.metric].unit
    return f"{_maybe(line.value)} against {_maybe(line.baseline_value)} {unit}"


def _table(point: PointResult) -> Iterator[str]:
    yield (
        f"{point.workload} at {point.load:g} of full load, {point.offered_rps:.3f} req/s, "
        f"{point.num_repetitions} repetitions; baseline: {point.baseline}"
    )
    failed = {arm: number for arm, number in point.num_failed.items() if number}
    if failed:
        yield "  failed requests: " + ", ".join(f"{arm} {num}" for arm, num in failed.items())
    arms = [point.baseline, *(arm for arm in point.arms if arm != point.baseline)]
    rows = [["", *arms]]
    for name in _SHOWN:
        metric = METRICS[name]
        words = f"{metric.words} ({metric.unit})" if metric.unit else metric.words
        rows.append([words, *(_cell(point.arms[arm][name]) for arm in arms)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield ("  " + "  ".join(cells)).rstrip()


def _cell(one: Compared) -> str:
    """The figure, and the ratio with its interval; + and - mark a whole interval on one side."""
    shown = "" if one.value is None else _number(one.value.value)
    if one.ratio is not None:
        shown = f"{shown} x{_interval(one.ratio)}"
    return f"{shown}{_MARKS[one.verdict]}".strip() or "-"


def _interval(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return _number(one.value)
    return f"{_number(one.value)} [{_number(one.low)}, {_number(one.high)}]"


def _maybe(one: Estimate | None) -> str:
    return "-" if one is None else _interval(one)


def _number(value: float) -> str:
    """Three significant digits, and never an exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.4f}"
