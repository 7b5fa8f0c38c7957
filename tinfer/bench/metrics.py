"""From the outcomes of a run to its figures: pure, and by the definitions of `vllm bench serve`.

Only whole answers (`Outcome.ok`) enter latencies and token counts, as there; refused, failed and
interrupted requests are counted beside them. Where nothing was measured a figure is None, and never
the 0 that would look like a very good one.

| key | meaning |
|---|---|
| `duration` | seconds from the start to the end of the last answer |
| `completed`, `failed` | requests with a whole answer; refused, cut or failed ones |
| `num_interrupted`, `num_not_sent` | in flight, and not sent yet, when the run was interrupted |
| `num_short_answers` | whole answers with fewer tokens than were asked for |
| `num_without_usage` | whole answers without usage: their tokens are the chunks that came |
| `total_input_tokens`, `total_output_tokens` | of whole answers |
| `total_cached_tokens` | prompt tokens that the server says it had cached; None if it never says |
| `request_throughput` | whole answers per second of `duration` |
| `request_goodput` | those that met the SLO, measured from the sending; None without an SLO |
| `request_goodput_from_arrival` | the same, measured from when the request was due |
| `output_throughput`, `total_token_throughput` | output tokens, and prompt + output tokens, per s |
| `max_output_tokens_per_s` | chunks in the fullest second, counted from the first sending |
| `max_concurrent_requests` | most requests under way within one of those seconds |
| `{mean,median,std,pP}_{metric}_ms` | statistics of each metric below; P interpolates linearly |
| `error_counts`, `status_counts` | failed requests by message; all requests by HTTP status |
| `client_cpu_share` | processor time of this process / `duration`; 1 is one core |
| `client_lag_{p50,p99,max}_ms` | sending late by this process's own fault |

Metrics: `ttft`, `tpot`, `itl`, `e2el` are measured from the sending. `ttft_from_arrival` and
`e2el_from_arrival` are measured from when the request was due: what a user waits who does not know
of the client's queue. `client_queue_time` is the wait for a place under --max-concurrency, and
`e2el_including_client_queue` that and the answer, as there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinfer.bench.outcome import LoadRun, Outcome
from tinfer.bench.slo import Slo

_MS = 1000.0


def _tpots_s(outcome: Outcome) -> Sequence[float]:
    tpot_s = outcome.tpot_s
    return () if tpot_s is None else (tpot_s,)


# What one answer adds to each metric, in seconds.
METRICS: dict[str, Callable[[Outcome], Sequence[float]]] = {
    "ttft": lambda outcome: (outcome.ttft_s,),
    "tpot": _tpots_s,
    "itl": lambda outcome: outcome.itls_s,
    "e2el": lambda outcome: (outcome.e2el_s,),
    "ttft_from_arrival": lambda outcome: (outcome.chunk_s[0] - outcome.due_s,),
    "e2el_from_arrival": lambda outcome: (outcome.chunk_s[-1] - outcome.due_s,),
    "client_queue_time": lambda outcome: (outcome.queue_s,),
    "e2el_including_client_queue": lambda outcome: (outcome.queue_s + outcome.e2el_s,),
}


def figures_of(
    run: LoadRun, metrics: Sequence[str], percentiles: Sequence[float], slo: Slo | None
) -> dict[str, Any]:
    """All keys of the table above; statistics of `metrics` only, at these percentiles."""
    whole = [outcome for outcome in run.outcomes if outcome.ok]
    figures = {
        **_counts(run, whole),
        **_throughputs(run, whole, slo),
        **_peaks(whole),
        **_client(run),
    }
    for metric in metrics:
        values_s = [value for outcome in whole for value in METRICS[metric](outcome)]
        figures |= _statistics(metric, values_s, percentiles)
    return figures


def percentile_word(percentile: float) -> str:
    """99.0 as in `p99_ttft_ms`, 99.9 as in `p99.9_ttft_ms`."""
    return f"{percentile:g}"


def _counts(run: LoadRun, whole: Sequence[Outcome]) -> dict[str, Any]:
    failed = [outcome for outcome in run.outcomes if not outcome.ok and not outcome.interrupted]
    cached = [o.cached_tokens for o in whole if o.cached_tokens is not None]
    return {
        "duration": run.duration_s,
        "completed": len(whole),
        "failed": len(failed),
        "num_interrupted": sum(outcome.interrupted for outcome in run.outcomes),
        "num_not_sent": run.num_not_sent,
        "num_short_answers": sum(o.output_tokens < o.asked_tokens for o in whole),
        "num_without_usage": sum(not outcome.has_usage for outcome in whole),
        "total_input_tokens": sum(outcome.prompt_tokens for outcome in whole),
        "total_output_tokens": sum(outcome.output_tokens for outcome in whole),
        "total_cached_tokens": sum(cached) if cached else None,
        "error_counts": dict(Counter(o.error or "no answer" for o in failed).most_common()),
        "status_counts": dict(
            Counter(str(o.status) for o in run.outcomes if o.status is not None).most_common()
        ),
    }


def _throughputs(run: LoadRun, whole: Sequence[Outcome], slo: Slo | None) -> dict[str, Any]:
    output_tokens = sum(outcome.output_tokens for outcome in whole)
    input_tokens = sum(outcome.prompt_tokens for outcome in whole)
    good = good_from_arrival = None
    if slo is not None:
        good = sum(slo.met_by(outcome) for outcome in whole)
        good_from_arrival = sum(slo.met_by(o, o.sent_s - o.due_s) for o in whole)

    def per_s(number: int | None) -> float | None:
        return None if number is None or run.duration_s <= 0 else number / run.duration_s

    return {
        "request_throughput": per_s(len(whole)),
        "request_goodput": per_s(good),
        "request_goodput_from_arrival": per_s(good_from_arrival),
        "output_throughput": per_s(output_tokens),
        "total_token_throughput": per_s(input_tokens + output_tokens),
    }


def _peaks(whole: Sequence[Outcome]) -> dict[str, Any]:
    """The busiest second, in tokens and in requests; every second that a request touches counts."""
    if not whole:
        return {"max_output_tokens_per_s": None, "max_concurrent_requests": None}
    start_s = min(outcome.sent_s for outcome in whole)
    tokens: Counter[int] = Counter()
    requests: Counter[int] = Counter()
    for outcome in whole:
        tokens.update(int(at_s - start_s) for at_s in outcome.chunk_s)
        first, last = int(outcome.sent_s - start_s), int(outcome.chunk_s[-1] - start_s)
        requests.update(range(first, last + 1))
    return {
        "max_output_tokens_per_s": float(max(tokens.values())),
        "max_concurrent_requests": max(requests.values()),
    }


def _client(run: LoadRun) -> dict[str, Any]:
    lags_ms = np.array([outcome.lag_s for outcome in run.outcomes]) * _MS
    p50, p99, highest = (
        np.percentile(lags_ms, (50, 99, 100)).tolist() if len(lags_ms) else [None] * 3
    )
    return {
        "client_cpu_share": run.cpu_s / run.duration_s if run.duration_s > 0 else None,
        "client_lag_p50_ms": p50,
        "client_lag_p99_ms": p99,
        "client_lag_max_ms": highest,
    }


def _statistics(
    metric: str, values_s: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float | None]:
    names = ["mean", "median", "std", *(f"p{percentile_word(p)}" for p in percentiles)]
    if not values_s:
        return {f"{name}_{metric}_ms": None for name in names}
    values_ms = np.array(values_s) * _MS
    statistics = [values_ms.mean(), np.median(values_ms), values_ms.std()]
    statistics += list(np.percentile(values_ms, percentiles))
    return {
        f"{name}_{metric}_ms": float(value) for name, value in zip(names, statistics, strict=True)
    }
