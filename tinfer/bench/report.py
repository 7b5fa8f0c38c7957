"""The figures of a run as a table like that of `vllm bench serve`, and doubts about them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tinfer.bench.metrics import percentile_word

WIDTH = 50
_LABEL_WIDTH = 40
_MAX_ERRORS = 10
# Above it this process may be what limits the run: its event loop has no time left to be on time.
CPU_SHARE_LIMIT = 0.8
# Timers have a resolution of 1 ms; the shortest times to a first token that are compared are about
# 20 ms (LPHD, two workers, unloaded), of which this is a quarter.
LAG_LIMIT_MS = 5.0

_NAMES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "ttft_from_arrival": ("TTFT from arrival", "Time to First Token, from Arrival"),
    "e2el_from_arrival": ("E2EL from arrival", "End-to-end Latency, from Arrival"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": (
        "E2EL incl. Client Queue",
        "Queue-inclusive End-to-end Latency",
    ),
}
_ROWS = (
    ("Successful requests", "completed"),
    ("Failed requests", "failed"),
    ("Interrupted requests", "num_interrupted"),
    ("Requests never sent", "num_not_sent"),
    ("Answers shorter than asked", "num_short_answers"),
    ("Answers without usage", "num_without_usage"),
    ("Maximum request concurrency", "max_concurrency"),
    ("Request rate configured (RPS)", "request_rate"),
    ("Benchmark duration (s)", "duration"),
    ("Total input tokens", "total_input_tokens"),
    ("Total cached input tokens", "total_cached_tokens"),
    ("Total generated tokens", "total_output_tokens"),
    ("Request throughput (req/s)", "request_throughput"),
    ("Request goodput (req/s)", "request_goodput"),
    ("Request goodput from arrival (req/s)", "request_goodput_from_arrival"),
    ("Output token throughput (tok/s)", "output_throughput"),
    ("Peak output token throughput (tok/s)", "max_output_tokens_per_s"),
    ("Peak concurrent requests", "max_concurrent_requests"),
    ("Total token throughput (tok/s)", "total_token_throughput"),
)
# Shown only where there is something to say.
_QUIET_AT_ZERO = {"num_interrupted", "num_not_sent", "num_short_answers", "num_without_usage"}
_CLIENT_ROWS = (
    ("Client CPU share (of one core)", "client_cpu_share"),
    ("P50 sending lag (ms)", "client_lag_p50_ms"),
    ("P99 sending lag (ms)", "client_lag_p99_ms"),
    ("Max sending lag (ms)", "client_lag_max_ms"),
)


def table(
    result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]
) -> Iterator[str]:
    """The lines of the table; what was not measured shows as a dash."""
    title = " Serving Benchmark Result "
    if result.get("interrupted"):
        title = " Serving Benchmark Result (interrupted) "
    yield title.center(WIDTH, "=")
    for label, key in _ROWS:
        value = result.get(key)
        if value is None or value == "inf" or (key in _QUIET_AT_ZERO and not value):
            continue
        yield _row(label, value)
    for metric in metrics:
        short, long = _NAMES[metric]
        yield long.center(WIDTH, "-")
        yield _row(f"Mean {short} (ms)", result[f"mean_{metric}_ms"])
        yield _row(f"Median {short} (ms)", result[f"median_{metric}_ms"])
        for percentile in percentiles:
            word = percentile_word(percentile)
            yield _row(f"P{word} {short} (ms)", result[f"p{word}_{metric}_ms"])
    yield "Load Generator".center(WIDTH, "-")
    for label, key in _CLIENT_ROWS:
        yield _row(label, result[key])
    yield from _errors(result["error_counts"])
    yield "=" * WIDTH


def warnings(result: Mapping[str, Any]) -> Iterator[str]:
    """Why the figures may say less of the server, or of this load, than they seem to."""
    share, lag_ms = result["client_cpu_share"], result["client_lag_p99_ms"]
    if share is not None and share > CPU_SHARE_LIMIT:
        yield (
            f"the load generator used {share:.2f} of a core (more than {CPU_SHARE_LIMIT}): "
            "it may be what limits the run"
        )
    if lag_ms is not None and lag_ms > LAG_LIMIT_MS:
        yield (
            f"requests were sent late by {lag_ms:.1f} ms at p99 (more than {LAG_LIMIT_MS:g} ms): "
            "the load was not quite the one asked for"
        )
    if result["failed"]:
        yield f"{result['failed']} requests failed and are in no latency"
    if result["num_short_answers"]:
        yield f"{result['num_short_answers']} answers are shorter than asked for"


def _errors(counts: Mapping[str, int]) -> Iterator[str]:
    if not counts:
        return
    yield "Errors".center(WIDTH, "-")
    shown = list(counts.items())
    for message, number in shown[:_MAX_ERRORS]:
        yield f"{number:>6} x {message}"
    rest = sum(number for _, number in shown[_MAX_ERRORS:])
    if rest:
        yield f"{rest:>6} x other errors (all of them in the result of --json)"


def _row(label: str, value: float | None) -> str:
    shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label + ':':<{_LABEL_WIDTH}} {shown:<10}"


def say(line: str) -> None:
    """One line of progress with the time of day, on standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()
