"""What the pictures show, as plain numbers: pure, from result files read back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

Phase = Literal["prefill", "hand-off", "decode"]
Record = Mapping[str, Any]


def _tpot_s(record: Record) -> float | None:
    gaps = record["output_tokens"] - 1
    return None if gaps < 1 else float(record["e2el_s"] - record["ttft_s"]) / gaps


# What is drawn of a record with a whole answer, in seconds.
CDF_METRICS: dict[str, Callable[[Record], float | None]] = {
    "TTFT": lambda record: record["ttft_s"],
    "TPOT": _tpot_s,
    "E2EL": lambda record: record["e2el_s"],
}


class Curve(Struct, frozen=True):
    """One line of a plot, its points in order of `x`."""

    label: str
    x: list[float]
    y: list[float]


class Span(Struct, frozen=True):
    """Time that one request spent in a phase on one worker; `row` is its place in the lane."""

    start_s: float
    end_s: float
    phase: Phase
    row: int = 0


class Lane(Struct, frozen=True):
    """All that one worker did; `num_rows` spans overlap at the most."""

    worker: str
    spans: list[Span]
    num_rows: int


def cdf(label: str, values: Iterable[float]) -> Curve:
    """The share of values that are at most x, a step up at each value."""
    ordered = sorted(values)
    return Curve(label, ordered, [(i + 1) / len(ordered) for i in range(len(ordered))])


def latency_cdfs(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Curve]]:
    """By metric, one curve in milliseconds per result that has records with it."""
    curves: dict[str, list[Curve]] = {}
    for metric, measure in CDF_METRICS.items():
        for result in results:
            # Only whole answers have an end-to-end latency.
            whole = [r for r in result.get("records", ()) if r.get("e2el_s") is not None]
            values_s = [seconds for r in whole if (seconds := measure(r)) is not None]
            if values_s:
                curve = cdf(label_of(result), [1000 * seconds for seconds in values_s])
                curves.setdefault(metric, []).append(curve)
    return curves


def goodput_over_load(results: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Good requests/s over offered requests/s: one curve per label, a point per result.

    Results without an SLO, or whose requests all came at once, have no place in it. Several runs
    at one load are one point, their mean.
    """
    points: defaultdict[str, defaultdict[float, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for result in results:
        offered, good = result.get("offered_rate"), result.get("request_goodput")
        if offered is not None and good is not None:
            points[label_of(result)][offered].append(good)
    curves = []
    for label, by_load in points.items():
        loads = sorted(by_load)
        means = [sum(by_load[load]) / len(by_load[load]) for load in loads]
        curves.append(Curve(label, loads, means))
    return curves


def label_of(result: Mapping[str, Any]) -> str:
    """What tells this run's server from others: its --label, or where it is and what it serves."""
    return result.get("label") or f"{result.get('model_id')} at {result.get('base_url')}"


def timeline(records: Iterable[Record]) -> list[Lane]:
    """Who computed what and when, by worker, from the records that have a trace.

    A trace has durations only. They are hung on the moment at which the client had the first token,
    so everything is drawn late by what that token took from the master to the client.
    """
    by_worker: defaultdict[str, list[Span]] = defaultdict(list)
    for record in records:
        trace, ttft_s = record.get("trace"), record.get("ttft_s")
        if trace and ttft_s is not None:
            for worker, span in _spans(trace, record["sent_s"] + ttft_s):
                by_worker[worker].append(span)
    return [_lane(worker, by_worker[worker]) for worker in sorted(by_worker)]


def _spans(trace: Mapping[str, Any], first_s: float) -> Iterable[tuple[str, Span]]:
    prefill, decode = trace.get("prefill_worker"), trace.get("decode_worker")
    handoff_s, decode_s = trace.get("handoff_s"), trace.get("decode_s")
    if prefill and trace.get("prefill_s") is not None:
        yield prefill, Span(first_s - trace["prefill_s"], first_s, "prefill")
    if decode is None or not decode_s:
        return
    if handoff_s:
        yield decode, Span(first_s, first_s + handoff_s, "hand-off")
    yield decode, Span(first_s + (handoff_s or 0.0), first_s + decode_s, "decode")


def _lane(worker: str, spans: Iterable[Span]) -> Lane:
    """Each span on the lowest row that is free by then, so that none hides another."""
    free_s: list[float] = []
    placed = []
    for span in sorted(spans, key=lambda one: (one.start_s, one.end_s)):
        row = next((i for i, at_s in enumerate(free_s) if at_s <= span.start_s), len(free_s))
        if row == len(free_s):
            free_s.append(span.end_s)
        free_s[row] = span.end_s
        placed.append(Span(span.start_s, span.end_s, span.phase, row))
    return Lane(worker, placed, len(free_s))
