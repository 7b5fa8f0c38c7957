"""`--otlp-traces-endpoint`: the spans of a request, whose child they are; nothing waits."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.unit.master_box import D, P
from tests.unit.trace_box import Box
from tinfer.api.service import Generation
from tinfer.clock import MonotonicClock
from tinfer.config import load
from tinfer.core.sampling import SamplingSpec
from tinfer.errors import EngineFailed, StartError
from tinfer.master.otlp import PROTOCOL_VARIABLE, check_otlp_option, open_spans
from tinfer.master.tracing.spans import SpanSender
from tinfer.wire import messages as wire

ROOT = Path(__file__).resolve().parents[2]
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": "vendor=abc"}


class Traced(Box):
    """A dispatcher that tells of its requests in spans."""

    def __init__(self) -> None:
        super().__init__()
        self.exporter = InMemorySpanExporter()
        self.sender = SpanSender(self.exporter, self.clock, "m")
        self.dispatcher.recorder.spans = self.sender

    def spans(self) -> list[ReadableSpan]:
        """All that were sent, by their begin; nothing can be sent after this."""
        self.sender.close()
        return sorted(self.exporter.get_finished_spans(), key=lambda one: one.start_time or 0)

    def run(self, trace_headers: dict[str, str] | None = None, n: int = 1) -> None:
        """One split request: queued for 0 s, 2 s of prefill, 0.25 s of hand-off, 4 s of decode."""
        sampling = SamplingSpec(8, temperature=0.5, top_p=0.9)
        generation = Generation(
            list(range(20)), sampling, n=n, response_id="cmpl-x", trace_headers=trace_headers
        )
        self.dispatcher.submit("r", generation)
        self.after(2.0)
        self.prefilled()
        self.after(0.25)
        self.say(D, wire.PullDone("r", True, "", 4096, 0.125, 0.2))
        self.after(4.0)
        self.step(D, [17, 18], 2, "abc", 3, finish_reason="stop")


@pytest.fixture
def traced() -> Traced:
    return Traced()


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


async def test_a_request_and_its_phases(traced: Traced) -> None:
    traced.run(n=3)
    spans = {span.name: span for span in traced.spans()}
    assert spans.keys() == {"llm_request", "queue", "prefill", "handoff", "pull", "decode"}
    root = spans.pop("llm_request")
    assert root.parent is None and root.kind is SpanKind.SERVER
    assert root.status.status_code is StatusCode.UNSET
    assert root.context is not None
    for span in spans.values():
        assert span.parent is not None and span.context is not None
        assert span.parent.span_id == root.context.span_id
        assert span.context.trace_id == root.context.trace_id
        assert span.start_time is not None and root.start_time is not None
        assert root.start_time <= span.start_time
    lengths = {name: round(seconds(span), 6) for name, span in spans.items()}
    assert lengths == {"queue": 0.0, "prefill": 2.0, "handoff": 0.25, "pull": 0.25, "decode": 4.0}
    assert round(seconds(root), 6) == 6.25
    assert dict(root.attributes or {}) == {
        "gen_ai.request.id": "cmpl-x",
        "gen_ai.response.model": "m",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.n": 3,
        "gen_ai.usage.prompt_tokens": 20,
        "gen_ai.usage.completion_tokens": 2,
        "gen_ai.latency.time_in_queue": 0.0,
        "gen_ai.latency.time_to_first_token": 2.0,
        "gen_ai.latency.e2e": 6.25,
        "gen_ai.latency.time_in_model_prefill": 2.0,
        "gen_ai.latency.time_in_model_decode": 4.25,
        "gen_ai.latency.time_in_model_inference": 6.25,
        "tinfer.request_id": "r",
        "tinfer.end": "stop",
        "tinfer.route": "split",
        "tinfer.prefill_worker": "p",
        "tinfer.decode_worker": "d",
        "tinfer.cached_tokens": 16,
        "tinfer.handoff_s": 0.25,
        "tinfer.copy_s": 0.125,
        "tinfer.handoff_bytes": 4096,
        "tinfer.restarts": 0,
        "tinfer.preemptions": 0,
    }
    assert dict(spans["pull"].attributes or {}) == {
        "tinfer.worker": "d",
        "tinfer.ok": True,
        "tinfer.num_bytes": 4096,
        "tinfer.copy_s": 0.125,
    }
    assert dict(spans["queue"].attributes or {}) == {}
    assert dict(spans["handoff"].attributes or {}) == {"tinfer.worker": "p"}


async def test_the_parent_is_the_clients(traced: Traced) -> None:
    traced.run(PARENT)
    (root,) = [span for span in traced.spans() if span.name == "llm_request"]
    assert root.parent is not None and root.context is not None
    assert f"{root.context.trace_id:032x}" == TRACE_ID
    assert f"{root.parent.span_id:016x}" == SPAN_ID
    assert root.context.trace_state.get("vendor") == "abc"


async def test_what_the_client_does_not_sample_has_no_span(traced: Traced) -> None:
    traced.run({"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"})
    assert traced.spans() == []


@pytest.mark.parametrize("value", ["", "x", f"ff-{TRACE_ID}-{SPAN_ID}-01", "00-0-0-01", "\udcff"])
async def test_a_parent_that_is_none(traced: Traced, value: str) -> None:
    traced.run({"traceparent": value, "tracestate": "\udcff=,,=;"})
    (root,) = [span for span in traced.spans() if span.name == "llm_request"]
    assert root.parent is None


async def test_a_failure_and_a_client_that_leaves(traced: Traced) -> None:
    traced.submit("failed")
    left = traced.submit("left")
    traced.step(P, [], 0, "", 0, "failed", finish_reason="error")
    left.cancel()
    traced.say(P, wire.Aborted(["left"]))
    spans = [span for span in traced.spans() if span.name == "llm_request"]
    by_id = {str((span.attributes or {})["tinfer.request_id"]): span for span in spans}
    assert by_id["failed"].status.status_code is StatusCode.ERROR
    assert by_id["failed"].status.description == EngineFailed.__name__
    assert by_id["left"].status.status_code is StatusCode.UNSET
    assert (by_id["left"].attributes or {})["tinfer.end"] == "abort"


class Stuck(SpanExporter):
    """A collector that takes nothing until it is told that all is over."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.asked = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.over.wait(30)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.over.set()


async def test_a_stop_does_not_wait_for_a_collector_that_hangs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    box, stuck = Box(), Stuck()
    sender = SpanSender(stuck, box.clock, "m")
    box.dispatcher.recorder.spans = sender
    box.submit()
    box.step(P, [7], 1, "x", 1, finish_reason="stop")
    sender.close(timeout_s=0.05)
    assert stuck.asked.is_set() and stuck.over.is_set()
    assert "the last spans were not taken in 0.05 s" in caplog.text
    sender.close()
    box.submit("late")
    box.step(P, [7], 1, "x", 1, "late", finish_reason="stop")


async def test_a_library_that_breaks_costs_a_span_and_no_request(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(traced.sender._tracer, "start_span", broken)
    traced.run()
    assert "no span of r" in caplog.text
    assert traced.dispatcher.num_live == 0
    assert traced.spans() == []


@pytest.mark.parametrize(
    ("protocol", "endpoint", "why"),
    [
        ("", "", "takes an http:// or https:// URL or HOST:PORT"),
        ("grpc", "collector", "takes an http:// or https:// URL or HOST:PORT"),
        ("grpc", "http://", "takes an http:// or https:// URL or HOST:PORT"),
        ("http/protobuf", "collector:4318", "takes an http:// or https:// URL, got"),
        ("http/json", "http://a", f"{PROTOCOL_VARIABLE} is 'http/json'"),
    ],
)
def test_options_that_mean_nothing(
    monkeypatch: pytest.MonkeyPatch, protocol: str, endpoint: str, why: str
) -> None:
    monkeypatch.setenv(PROTOCOL_VARIABLE, protocol)
    with pytest.raises(StartError, match=why):
        check_otlp_option(load({"otlp_traces_endpoint": endpoint}))


@pytest.mark.parametrize("protocol", ["", "grpc", "http/protobuf"])
def test_options_that_open_an_exporter(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    monkeypatch.setenv(PROTOCOL_VARIABLE, protocol)
    config = load({"otlp_traces_endpoint": "http://127.0.0.1:1/v1/traces"})
    check_otlp_option(config)
    sender = open_spans(config, MonotonicClock(), "m")
    assert sender is not None
    is_http = protocol == "http/protobuf"
    assert (".http." in type(sender._exporter).__module__) == is_http
    sender.close()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinfer.master.otlp._PACKAGES", ("opentelemetry.sdk", "no_such.package"))
    with pytest.raises(StartError, match=r"needs the package no_such\.package, which is missing"):
        check_otlp_option(load({"otlp_traces_endpoint": "http://a"}))


def test_without_the_option_nothing_of_it_is_loaded() -> None:
    assert open_spans(load({}), MonotonicClock(), "m") is None
    script = "import sys, tinfer.master.app; print([m for m in sys.modules if 'opentel' in m])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
