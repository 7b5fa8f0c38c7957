"""Every metric by name: its type, its labels, and one sentence, which the scrape shows as HELP.

`vllm:` metrics have the names, types, labels and buckets of vLLM 0.32 (vllm/v1/metrics/loggers.py);
they are those whose meaning here is the same, seen from a client: the server counts as one engine,
however many workers a request goes through. `tinfer:` metrics are about what vLLM does not have.
docs/metrics.md defines each from named moments; a test holds it to this list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from msgspec import Struct

Kind = Literal["counter", "gauge", "histogram"]
VLLM, OURS = "vllm", "tinfer"
# The number of vLLM's engine: there is one, the server.
ENGINE = "0"


class Metric(Struct, frozen=True):
    """One family. `labels` are its own ones, after those that all of its namespace have: the
    model's name, and for vLLM's, but for one that is not `of_engine`, the engine's number. A
    counter is exposed as `NAME_total`."""

    name: str
    kind: Kind
    about: str
    labels: tuple[str, ...] = ()
    namespace: str = OURS
    of_engine: bool = True

    @property
    def full_name(self) -> str:
        return f"{self.namespace}:{self.name}"

    @property
    def all_labels(self) -> tuple[str, ...]:
        of_engine = self.namespace == VLLM and self.of_engine
        return ("model_name", *(["engine"] if of_engine else []), *self.labels)


def _of(namespace: str, *rows: tuple[str, Kind, str] | tuple[str, Kind, str, str]) -> list[Metric]:
    return [
        Metric(name, kind, about, tuple(labels[0].split()) if labels else (), namespace)
        for name, kind, about, *labels in rows
    ]


def _vllm() -> Iterator[Metric]:
    yield from _of(
        VLLM,
        ("num_requests_running", "gauge", "Requests that a worker computes."),
        ("num_requests_waiting", "gauge", "Requests that wait for a worker."),
        (
            "num_requests_waiting_by_reason",
            "gauge",
            "Requests that wait for a first worker (capacity) or for their hand-off (deferred).",
            "reason",
        ),
        ("kv_cache_usage_perc", "gauge", "Share of all KV blocks in use. 1 means 100 percent."),
        ("prefix_cache_queries", "counter", "Prompt tokens looked up in a prefix cache."),
        ("prefix_cache_hits", "counter", "Prompt tokens found in a prefix cache."),
        ("num_preemptions", "counter", "Requests that lost their KV blocks on a worker."),
        ("prompt_tokens", "counter", "Prompt tokens of requests that have a first token."),
        ("prompt_tokens_by_source", "counter", "Prompt tokens by source.", "source"),
        ("prompt_tokens_cached", "counter", "Prompt tokens that no worker had to compute."),
        ("generation_tokens", "counter", "Tokens delivered to clients, each once."),
        ("request_success", "counter", "Accepted requests by how they ended.", "finished_reason"),
    )
    about = "Requests that a limit of the queue has refused."
    yield Metric("admission_rejections", "counter", about, ("reason",), VLLM, of_engine=False)
    yield from _of(
        VLLM,
        ("time_to_first_token_seconds", "histogram", "From acceptance to the first token."),
        ("inter_token_latency_seconds", "histogram", "Between two deliveries to one stream."),
        (
            "request_time_per_output_token_seconds",
            "histogram",
            "Mean time per token after the first, per answered request.",
        ),
        ("e2e_request_latency_seconds", "histogram", "From acceptance to the last token."),
        ("request_queue_time_seconds", "histogram", "From acceptance until sent to a worker."),
        ("request_inference_time_seconds", "histogram", "From sent to a worker to the last token."),
        ("request_prefill_time_seconds", "histogram", "From sent to a worker to the first token."),
        ("request_decode_time_seconds", "histogram", "From the first token to the last one."),
        ("request_prompt_tokens", "histogram", "Prompt tokens per answered request."),
        ("request_generation_tokens", "histogram", "Output tokens per answered request."),
        (
            "request_prefill_kv_computed_tokens",
            "histogram",
            "Prompt tokens that were not cached, per answered request.",
        ),
        ("request_params_max_tokens", "histogram", "max_tokens per answered request."),
        ("request_params_n", "histogram", "n per accepted prompt."),
        ("request_num_preemptions", "histogram", "Preemptions per answered request."),
    )


def _requests() -> Iterator[Metric]:
    yield from _of(
        OURS,
        ("requests", "gauge", "Open requests by phase.", "phase"),
        ("requests_zombie", "gauge", "Requests over for the client and not yet for a worker."),
        ("requests_accepted", "counter", "Requests that the scheduler has taken."),
        ("requests_refused", "counter", "Requests that were not taken, by reason.", "reason"),
        ("requests_failed", "counter", "Accepted requests that ended with an error.", "reason"),
        ("requests_routed", "counter", "Requests by the route that they took first.", "route"),
        ("requests_resumed", "counter", "Times a request went on elsewhere, by form.", "form"),
        ("handoffs", "counter", "Hand-offs by outcome.", "outcome"),
        ("handoff_seconds", "histogram", "From the first token until the KV blocks are there."),
        ("handoff_copy_seconds", "histogram", "The copy alone of a hand-off."),
        ("handoff_bytes", "counter", "Bytes copied by hand-offs."),
        (
            "length_predictions",
            "counter",
            "Answers by where their length lay to the predicted interval of 80 percent.",
            "outcome",
        ),
        (
            "length_error_tokens",
            "histogram",
            "Absolute error of the predicted median length, per answered request.",
        ),
        ("predicted_output_tokens", "counter", "Sum of predicted mean lengths of the answered."),
    )


def _workers() -> Iterator[Metric]:
    yield from _of(
        OURS,
        ("healthy", "gauge", "Whether requests can be served now."),
        ("workers", "gauge", "Workers that the server was told to have."),
        ("workers_up", "gauge", "Workers that serve and are not to be stopped."),
        (
            "worker_info",
            "gauge",
            "What a worker is now; always 1.",
            "worker role state device",
        ),
        ("worker_up", "gauge", "Whether a worker serves.", "worker"),
        ("worker_generation", "gauge", "Incarnation of a worker.", "worker"),
        ("worker_deaths", "counter", "Deaths of a worker by cause.", "worker cause"),
        ("worker_restarts", "counter", "Starts of a worker after its first.", "worker"),
        ("role_changes", "counter", "Times a worker took a role.", "worker role"),
        ("worker_requests", "gauge", "Requests in a worker's engine.", "worker state"),
        ("worker_outstanding_prefill_tokens", "gauge", "Sent and not yet computed.", "worker"),
        ("worker_prefill_share", "gauge", "Of its time lately, spent on prompts.", "worker"),
        ("worker_slowness", "gauge", "Step time as a multiple of the cost model's.", "worker"),
        ("leases", "gauge", "Open leases of a worker by state.", "worker state"),
        ("pulls", "gauge", "Hand-offs whose copy was asked for and has not ended."),
        ("worker_kv_bytes", "gauge", "Size of a worker's KV cache.", "worker"),
        ("worker_kv_used_bytes", "gauge", "KV blocks owned by a request or held.", "worker"),
        ("worker_kv_held_bytes", "gauge", "KV blocks held under open leases.", "worker"),
        ("worker_mapped_peers", "gauge", "Workers whose KV memory is mapped.", "worker"),
        ("worker_stale_mappings", "gauge", "Mapped peers that are dead.", "worker"),
        ("worker_steps", "counter", "Engine steps that computed anything.", "worker"),
        ("worker_busy_seconds", "counter", "Time in those steps.", "worker"),
        ("worker_prompt_tokens", "counter", "Prompt tokens computed.", "worker"),
        ("worker_recomputed_tokens", "counter", "Of them, in place of failed pulls.", "worker"),
        ("worker_preemptions", "counter", "Requests that lost their KV blocks.", "worker"),
        ("worker_pulls", "counter", "Pulls that ended, by outcome.", "worker outcome"),
        ("worker_pulled_bytes", "counter", "Bytes copied from other workers.", "worker"),
        ("worker_pull_seconds", "counter", "Time spent copying them.", "worker"),
        ("loop_lag_seconds", "histogram", "How late turns of the master's loop were."),
        ("build_info", "gauge", "Version of the server; always 1.", "version"),
    )


METRICS = (*_vllm(), *_requests(), *_workers())
