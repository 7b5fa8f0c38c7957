"""What a scrape reads: the tally, and the state of scheduler, workers and loop as it is right now.

All values are taken in one turn of the loop, so that they belong together; families are then made
one by one, as the scrape writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from msgspec import Struct
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tinfer import __version__
from tinfer.core.ledger import LeaseState
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import LedgerSnapshot
from tinfer.master.lag import BOUNDS_S, LagMeter
from tinfer.master.loop import Dispatcher
from tinfer.master.metrics import catalogue
from tinfer.master.metrics.catalogue import ENGINE, METRICS, VLLM
from tinfer.master.metrics.histogram import Counts
from tinfer.master.metrics.tally import ResumeForm
from tinfer.master.metrics.workers import Values, WorkerReader
from tinfer.master.supervisor import Supervisor

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_FAMILIES: dict[catalogue.Kind, type[Family]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}
# Shown from the start, at zero: a rate over a series that appears with its first count misses it.
_ENDS = ("stop", "length", "abort", "error")
_REFUSALS = ("queue-full", "slo", "no-worker", "starting", "draining")
_LIMITS = ("max_num_queued_reqs", "max_num_queued_tokens")
_FAILURES = ("engine", "refused", "worker-lost", "no-worker", "stopping")


class Sources(Struct, frozen=True):
    """The parts of the master that a scrape reads. `max_model_len` is in tokens."""

    dispatcher: Dispatcher
    scheduler: Scheduler
    supervisor: Supervisor
    lag: LagMeter
    model_name: str
    max_model_len: int
    is_healthy: Callable[[], bool]


def registry_of(sources: Sources) -> CollectorRegistry:
    """The server's metrics, and those of the master's process under Prometheus' usual names."""
    registry = CollectorRegistry()
    registry.register(MasterCollector(sources))
    ProcessCollector(registry=registry)
    return registry


class MasterCollector(Collector):
    """Every metric of the catalogue. To be collected on the loop."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._workers = WorkerReader(sources.dispatcher, sources.scheduler, sources.supervisor)

    def describe(self) -> Iterator[Metric]:
        """The families without their values."""
        for metric in METRICS:
            yield _family(metric)

    def collect(self) -> Iterator[Metric]:
        """The families as of the first one."""
        values = self._values()
        for metric in METRICS:
            common = [self._sources.model_name]
            if "engine" in metric.all_labels:
                common.append(ENGINE)
            family = _family(metric)
            for labels, value in values[metric.full_name].items():
                _add(family, [*common, *labels], value)
            yield family

    def _values(self) -> dict[str, Values]:
        ledger = self._sources.scheduler.ledger_snapshot()
        vllm = {
            **self._queue(ledger),
            **self._tokens(),
            **self._times(),
            **self._sizes(),
        }
        ours = {
            **self._requests(ledger),
            **self._handoffs(ledger),
            **self._lengths(),
            **self._server(),
            **self._workers.values(),
        }
        return {
            **{f"{VLLM}:{name}": values for name, values in vllm.items()},
            **{f"{catalogue.OURS}:{name}": values for name, values in ours.items()},
        }

    # --- vLLM's -------------------------------------------------------------------------------

    def _queue(self, ledger: LedgerSnapshot) -> dict[str, Values]:
        phases, tally = ledger.requests_by_phase, self._sources.dispatcher.tally
        queued, handoff = phases["queued"], phases["handoff"]
        return {
            "num_requests_running": _only(phases["prefilling"] + phases["decoding"]),
            "num_requests_waiting": _only(queued + handoff),
            "num_requests_waiting_by_reason": _by({"capacity": queued, "deferred": handoff}),
            "kv_cache_usage_perc": _only(self._workers.kv_usage),
            "num_preemptions": _only(self._workers.sum_of("num_preemptions")),
            "request_success": _by(tally.ended, _ENDS),
            "admission_rejections": _by(tally.rejected, _LIMITS),
        }

    def _tokens(self) -> dict[str, Values]:
        tally = self._sources.dispatcher.tally
        has_cache = self._sources.dispatcher.block_tokens is not None
        computed = tally.prompt_tokens - tally.cached_tokens
        sources = {"local_compute": computed, "local_cache_hit": tally.cached_tokens}
        return {
            "prefix_cache_queries": _only(tally.looked_up_tokens if has_cache else 0),
            "prefix_cache_hits": _only(tally.cached_tokens),
            "prompt_tokens": _only(tally.prompt_tokens),
            "prompt_tokens_by_source": _by(sources),
            "prompt_tokens_cached": _only(tally.cached_tokens),
            "generation_tokens": _only(tally.output_tokens),
        }

    def _times(self) -> dict[str, Values]:
        tally = self._sources.dispatcher.tally
        return {
            "time_to_first_token_seconds": _only(tally.ttft.now()),
            "inter_token_latency_seconds": _only(tally.itl.now()),
            "request_time_per_output_token_seconds": _only(tally.tpot.now()),
            "e2e_request_latency_seconds": _only(tally.e2el.now()),
            "request_queue_time_seconds": _only(tally.queue.now()),
            "request_inference_time_seconds": _only(tally.inference.now()),
            "request_prefill_time_seconds": _only(tally.prefill.now()),
            "request_decode_time_seconds": _only(tally.decode.now()),
        }

    def _sizes(self) -> dict[str, Values]:
        tally, longest = self._sources.dispatcher.tally, self._sources.max_model_len
        return {
            "request_prompt_tokens": _only(tally.request_prompt_tokens.now().up_to(longest)),
            "request_generation_tokens": _only(tally.request_output_tokens.now().up_to(longest)),
            "request_prefill_kv_computed_tokens": _only(
                tally.request_computed_tokens.now().up_to(longest)
            ),
            "request_params_max_tokens": _only(tally.max_tokens.now().up_to(longest)),
            "request_params_n": _only(tally.n.now()),
            "request_num_preemptions": _only(tally.preemptions.now()),
        }

    # --- ours ---------------------------------------------------------------------------------

    def _requests(self, ledger: LedgerSnapshot) -> dict[str, Values]:
        tally = self._sources.dispatcher.tally
        return {
            "requests": _by(ledger.requests_by_phase),
            "requests_zombie": _only(ledger.zombies),
            "requests_accepted": _only(tally.num_accepted),
            "requests_refused": _by(tally.refused, _REFUSALS),
            "requests_failed": _by(tally.failed, _FAILURES),
            "requests_routed": _by(tally.routed, ("split", "whole")),
            "requests_resumed": _by(tally.resumed, get_args(ResumeForm)),
        }

    def _handoffs(self, ledger: LedgerSnapshot) -> dict[str, Values]:
        tally = self._sources.dispatcher.tally
        leases = self._sources.scheduler.leases_by_owner()
        owners = self._sources.supervisor.slots
        return {
            "handoffs": _by(tally.handoffs, ("installed", "recomputed")),
            "handoff_seconds": _only(tally.handoff.now()),
            "handoff_copy_seconds": _only(tally.handoff_copy.now()),
            "handoff_bytes": _only(tally.handoff_bytes),
            "pulls": _only(ledger.pulls),
            "leases": {
                (owner, state.value): leases.get((owner, state.value), 0)
                for owner in owners
                for state in LeaseState
            },
        }

    def _lengths(self) -> dict[str, Values]:
        tally, longest = self._sources.dispatcher.tally, self._sources.max_model_len
        return {
            "length_predictions": _by(tally.lengths, ("below", "within", "above")),
            "length_error_tokens": _only(tally.length_error.now().up_to(longest)),
            "predicted_output_tokens": _only(tally.predicted_tokens),
        }

    def _server(self) -> dict[str, Values]:
        lag = self._sources.lag
        counts = Counts(BOUNDS_S, tuple(lag.counts), lag.total_s)
        return {
            "healthy": _only(self._sources.is_healthy()),
            "loop_lag_seconds": _only(counts),
            "build_info": {(__version__,): 1},
        }


def _only(value: float | Counts) -> Values:
    """Of a metric without labels of its own."""
    return {(): value}


def _by(counts: Mapping[str, float], labels: Sequence[str] = ()) -> Values:
    """Of a metric with one label; those in `labels` are there even where nothing was counted."""
    return {(label,): counts.get(label, 0) for label in dict.fromkeys((*labels, *counts))}


def _family(metric: catalogue.Metric) -> Family:
    return _FAMILIES[metric.kind](metric.full_name, metric.about, labels=metric.all_labels)


def _add(family: Family, labels: Sequence[str], value: float | Counts) -> None:
    if not isinstance(value, Counts):
        assert not isinstance(family, HistogramMetricFamily), family.name
        return family.add_metric(labels, value)
    assert isinstance(family, HistogramMetricFamily), family.name
    cumulative: list[tuple[str, float]] = []
    num = 0
    for bound, count in zip((*value.bounds, float("inf")), value.counts, strict=True):
        num += count
        le: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
        cumulative.append((le, num))
    return family.add_metric(labels, cumulative, value.total)
