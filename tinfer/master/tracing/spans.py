"""A span for every request and one for each of its phases, sent by OpenTelemetry's own thread.

They are made when the request has ended, from the moments that its timeline has: nothing is kept
open and nothing waits. The SDK's queue is bounded, and what it has no room for is dropped. Only
`tinfer.master.otlp` imports this module, where the option is given.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tinfer import __version__
from tinfer.clock import Clock
from tinfer.master.live import LiveRequest, trace_of
from tinfer.master.tracing.recorder import RequestRecord, record_of
from tinfer.master.tracing.slices import Slice, slices_of

log = logging.getLogger(__name__)

# vLLM's name for the span of a request.
REQUEST = "llm_request"
# Phases as they are called here; others have the names of their slices.
NAMES = {"queued": "queue", "hand-off": "handoff"}
# How long a stop waits for the collector.
CLOSE_S = 5.0
# And then for the exporter to see that it is over.
_GIVE_UP_S = 1.0
_PROPAGATOR = TraceContextTextMapPropagator()


def exporter_to(endpoint: str, is_grpc: bool) -> SpanExporter:
    """What sends spans there, as vLLM does: gRPC, or HTTP with the whole URL. Connects later."""
    if is_grpc:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter as HttpExporter,
    )

    return HttpExporter(endpoint=endpoint)


class SpanSender:
    """Owns the exporter and the thread that feeds it. `clock` is what timelines go by; `model` the
    name of the served one."""

    def __init__(self, exporter: SpanExporter, clock: Clock, model: str) -> None:
        self._exporter = exporter
        self._clock = clock
        self._model = model
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tinfer", __version__)
        self._is_closed = False

    def over(self, live: LiveRequest) -> None:
        """A request has ended. Never blocks; a request that its client's tracer has not sampled has
        no span."""
        record = record_of(live)
        if record.ended_s is None or self._is_closed:
            return
        try:
            self._tell(live, record, record.ended_s)
        except Exception:  # noqa: BLE001 - of a library; a span is worth no request and no worker
            log.exception("no span of %s", record.request_id)

    def _tell(self, live: LiveRequest, record: RequestRecord, ended_s: float) -> None:
        epoch_ns = time.time_ns() - round(self._clock.now_s() * 1e9)
        parent = _PROPAGATOR.extract(live.generation.trace_headers or {}, Context())
        span = self._tracer.start_span(
            REQUEST, parent, SpanKind.SERVER, start_time=_ns(record.arrived_s, epoch_ns)
        )
        if span.is_recording():
            span.set_attributes(_of_request(live, record, ended_s, self._model))
            if record.end == "error":
                failure = live.stream.failure
                why = "EngineFailed" if failure is None else type(failure).__name__
                span.set_status(Status(StatusCode.ERROR, why))
            within = set_span_in_context(span, parent)
            for one in slices_of(record, ended_s):
                self._tracer.start_span(
                    NAMES.get(one.name, one.name),
                    within,
                    attributes=_of_slice(one),
                    start_time=_ns(one.start_s, epoch_ns),
                ).end(_ns(one.end_s, epoch_ns))
        span.end(_ns(ended_s, epoch_ns))

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Send what waits, for so long at most. Idempotent; blocks."""
        if self._is_closed:
            return
        self._is_closed = True
        flush = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        flush.start()
        flush.join(timeout_s)
        if flush.is_alive():
            log.warning("--otlp-traces-endpoint: the last spans were not taken in %g s", timeout_s)
            threading.Thread(target=self._exporter.shutdown, name="spans", daemon=True).start()
            flush.join(_GIVE_UP_S)


def _ns(at_s: float, epoch_ns: int) -> int:
    return round(at_s * 1e9) + epoch_ns


def _resource() -> Resource:
    """The SDK's, from its variables; the name of the service is ours unless they have one."""
    found = Resource.create({"service.version": __version__})
    if str(found.attributes.get("service.name", "")).startswith("unknown_service"):
        return found.merge(Resource({"service.name": "tinfer"}))
    return found


def _of_request(
    live: LiveRequest, record: RequestRecord, ended_s: float, model: str
) -> dict[str, Any]:
    """vLLM's names where the meaning is the same, durations in seconds."""
    trace = trace_of(live, ended_s)
    sampling = live.generation.sampling
    queue_s = trace.queue_s
    inference_s = None if queue_s is None else trace.e2el_s - queue_s
    found = {
        "gen_ai.request.id": record.response_id or record.request_id,
        "gen_ai.response.model": model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.n": live.generation.n,
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.output_tokens,
        "gen_ai.latency.time_in_queue": queue_s,
        "gen_ai.latency.time_to_first_token": trace.ttft_s,
        "gen_ai.latency.e2e": trace.e2el_s,
        "gen_ai.latency.time_in_model_prefill": trace.prefill_s,
        "gen_ai.latency.time_in_model_decode": trace.decode_s,
        "gen_ai.latency.time_in_model_inference": inference_s,
        "tinfer.request_id": record.request_id,
        "tinfer.end": record.end,
        "tinfer.route": trace.route,
        "tinfer.prefill_worker": trace.prefill_worker,
        "tinfer.decode_worker": trace.decode_worker,
        "tinfer.cached_tokens": record.cached_tokens,
        "tinfer.handoff_s": trace.handoff_s,
        "tinfer.copy_s": trace.copy_s,
        "tinfer.handoff_bytes": trace.handoff_bytes,
        "tinfer.restarts": trace.restarts,
        "tinfer.preemptions": live.num_preempted,
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_slice(one: Slice) -> dict[str, Any]:
    """Where it was, and what only it has to say."""
    own = ("ok", "num_bytes", "copy_s", "recomputed", "worker_died")
    found = {f"tinfer.{name}": one.args[name] for name in own if name in one.args}
    return found | ({"tinfer.worker": one.place} if one.place else {})
