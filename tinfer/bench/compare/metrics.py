"""The figures of an arm at one point, each for the runs as measured and for every resample. Pure.

Percentiles are of all requests (for ITL: all gaps) of all repetitions together; throughput is a
count over all repetitions by their summed durations. Goodput is the share of good answers times the
offered rate: a run is short, and its duration holds the end of its longest answer, long after the
last arrival, which would make the goodput of every arm look smaller than it is under a load that
goes on. Failed requests are in no latency; they lower throughput and goodput.

| key | meaning |
|---|---|
| `{mean,median,p99}_ttft_ms`, `..._tpot_ms`, `..._e2el_ms` | latencies, see `tinfer bench serve` |
| `p99_itl_ms` | of all gaps between chunks |
| `request_throughput`, `output_throughput` | whole answers, and their tokens, per second |
| `goodput_loose`, `goodput_tight` | answers within that SLO of their class, see above |
| `resource_s`, `busy_s` | per run: device-seconds, see `samples` |
| `server_cpu_s` | per run: processor time of the arm's processes |
| `perf_per_dollar_paper` | only as a ratio: (1 + relative cut of mean E2EL) / ratio of resource |
| `perf_per_dollar_reciprocal` | 1 / (mean E2EL in s x resource time in s) |

The paper's own five values of perf/$ are the first form (arXiv 2401.11181, Figures 11 to 15); the
second is the usual one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from msgspec import Struct

from tinfer.bench.compare.bootstrap import Weights, weighted_mean, weighted_percentile
from tinfer.bench.compare.limits import LEVELS
from tinfer.bench.compare.samples import Bools, Floats, Ints, Sample

_MS = 1000.0
PAPER_FORM = "perf_per_dollar_paper"
RECIPROCAL_FORM = "perf_per_dollar_reciprocal"
# One value per run: a single repetition tells nothing of how far it varies.
BETWEEN_RUNS = frozenset(
    ("request_throughput", "output_throughput", "resource_s", "busy_s", "server_cpu_s")
    + (PAPER_FORM, RECIPROCAL_FORM)
)
GOODPUTS = tuple(f"goodput_{level}" for level in LEVELS)


class Metric(Struct, frozen=True):
    """A figure: its words in a table, its unit, and which way is better."""

    name: str
    words: str
    unit: str
    higher_is_better: bool


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("goodput_loose", "goodput, loose SLO", "req/s", True),
        Metric("goodput_tight", "goodput, tight SLO", "req/s", True),
        Metric("request_throughput", "throughput", "req/s", True),
        Metric("output_throughput", "output throughput", "tok/s", True),
        Metric("mean_ttft_ms", "TTFT mean", "ms", False),
        Metric("median_ttft_ms", "TTFT p50", "ms", False),
        Metric("p99_ttft_ms", "TTFT p99", "ms", False),
        Metric("mean_tpot_ms", "TPOT mean", "ms", False),
        Metric("median_tpot_ms", "TPOT p50", "ms", False),
        Metric("p99_tpot_ms", "TPOT p99", "ms", False),
        Metric("p99_itl_ms", "ITL p99", "ms", False),
        Metric("mean_e2el_ms", "E2EL mean", "ms", False),
        Metric("median_e2el_ms", "E2EL p50", "ms", False),
        Metric("p99_e2el_ms", "E2EL p99", "ms", False),
        Metric("resource_s", "resource time", "device-s", False),
        Metric("busy_s", "busy device time", "device-s", False),
        Metric("server_cpu_s", "CPU time of the servers", "s", False),
        Metric(PAPER_FORM, "perf/$ (paper's form)", "", True),
        Metric(RECIPROCAL_FORM, "perf/$ (reciprocal)", "1/s2", True),
    )
}

Figures = Mapping[str, Floats]


def figures_of(
    samples: Sequence[Sample], weights: Weights, offered_rps: float
) -> dict[str, Floats]:
    """Every metric but the paper's perf/$, by name: one value per row of `weights`.

    `samples` are the repetitions of one arm, in the order that `weights` were drawn for.
    """
    pooled = _Pool(samples, weights)
    figures = {
        f"goodput_{level}": offered_rps * pooled.share(lambda one, level=level: one.good[level])  # type: ignore[misc]
        for level in LEVELS
    }
    figures |= {
        "request_throughput": pooled.rate(lambda one: one.ok.astype(np.float64)),
        "output_throughput": pooled.rate(lambda one: one.output_tokens),
    }
    for name in ("ttft", "tpot", "e2el"):
        values_ms = pooled.requests(lambda one, name=name: one.latency_s[name]) * _MS  # type: ignore[misc]
        figures[f"mean_{name}_ms"] = weighted_mean(values_ms, weights.requests)
        for word, percent in (("median", 50.0), ("p99", 99.0)):
            figures[f"{word}_{name}_ms"] = weighted_percentile(
                values_ms, weights.requests, np.arange(len(values_ms)), percent
            )
    gaps_ms, owner = pooled.gaps()
    figures["p99_itl_ms"] = weighted_percentile(gaps_ms * _MS, weights.requests, owner, 99.0)
    figures["resource_s"] = pooled.per_run(lambda one: one.resource_s)
    figures["busy_s"] = pooled.per_run(lambda one: one.busy_s)
    figures["server_cpu_s"] = pooled.per_run(lambda one: one.server_cpu_s)
    with np.errstate(divide="ignore", invalid="ignore"):
        figures[RECIPROCAL_FORM] = _MS / (figures["mean_e2el_ms"] * figures["resource_s"])
    return figures


def ratios_of(figures: Figures, baseline: Figures) -> dict[str, Floats]:
    """Every metric as a ratio to the baseline's, row by row; NaN or infinite where it has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {name: values / baseline[name] for name, values in figures.items()}
        cut = 1.0 - ratios["mean_e2el_ms"]
        ratios[PAPER_FORM] = (1.0 + cut) / ratios["resource_s"]
    return ratios


class _Pool:
    """Repetitions one after the other, as the weights count them."""

    def __init__(self, samples: Sequence[Sample], weights: Weights) -> None:
        self._samples = samples
        self._weights = weights

    def requests(self, values_of: Callable[[Sample], Floats]) -> Floats:
        return np.concatenate([values_of(one) for one in self._samples])

    def share(self, values_of: Callable[[Sample], Bools]) -> Floats:
        values = np.concatenate([values_of(one) for one in self._samples]).astype(np.float64)
        return weighted_mean(values, self._weights.requests)

    def rate(self, values_of: Callable[[Sample], Floats]) -> Floats:
        durations_s = np.array([one.duration_s for one in self._samples])
        total = self._weights.requests @ self.requests(values_of)
        return np.asarray(total / (self._weights.repetitions @ durations_s), dtype=np.float64)

    def per_run(self, value_of: Callable[[Sample], float]) -> Floats:
        values = np.array([value_of(one) for one in self._samples])
        return weighted_mean(values, self._weights.repetitions)

    def gaps(self) -> tuple[Floats, Ints]:
        """All gaps, and the column of the request that each belongs to."""
        first = np.cumsum([0, *(one.num_requests for one in self._samples)])
        owners = [one.itl_owner + first[place] for place, one in enumerate(self._samples)]
        return self.requests(lambda one: one.itl_s), np.concatenate(owners)
