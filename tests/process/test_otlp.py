"""A live server sends spans to a collector, below the client's own: the last ones as it stops."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

import tinfer
from tests.e2e.serving import run_to_end, serving, wait_gone
from tests.process.load import fake_flags
from tinfer.master.otlp import HTTP, PROTOCOL_VARIABLE

FAKE = {"step_s": 0.002, "mean_output_tokens": 1_000_000}
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OVER_HTTP = {PROTOCOL_VARIABLE: HTTP, "OTEL_SERVICE_NAME": "ours"}


class Collector:
    """Takes spans over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.url = ""

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for one in resource.resource.attributes:
                if one.key == "service.name":
                    self.services.add(one.value.string_value)
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port, for as long as the block."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


async def test_spans_reach_a_collector_below_the_clients(tmp_path: Path) -> None:
    with collecting() as collector:
        flags = fake_flags(FAKE, prefill=1, decode=1, otlp_traces_endpoint=collector.url)
        with serving(tmp_path, *flags, "--route", "split", environment=OVER_HTTP) as process:
            headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
            async with tinfer.AsyncClient(process.url, headers=headers) as client:
                answer = await client.completions([1, 2, 3], max_tokens=5)
                with_chat = await client.chat("hi", max_tokens=5)
            family = process.family()
            assert process.interrupt() == 0, process.output
            assert wait_gone(family) == []
        assert "opentelemetry" not in process.output
    roots = {
        one.value.string_value: span
        for span in collector.spans
        if span.name == "llm_request"
        for one in span.attributes
        if one.key == "gen_ai.request.id"
    }
    assert roots.keys() == {answer.id, with_chat.id} and collector.services == {"ours"}
    for root in roots.values():
        assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
        phases = [span for span in collector.spans if span.parent_span_id == root.span_id]
        assert sorted(one.name for one in phases) == [
            *("decode", "handoff", "prefill", "pull", "queue")
        ]
        for one in phases:
            assert root.start_time_unix_nano <= one.start_time_unix_nano
            assert one.end_time_unix_nano <= root.end_time_unix_nano


async def test_a_collector_that_is_not_there_is_no_matter(tmp_path: Path) -> None:
    flags = fake_flags(FAKE, prefill=1, decode=1, otlp_traces_endpoint="http://127.0.0.1:9/v1")
    environment = {**OVER_HTTP, "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "1"}
    with serving(tmp_path, *flags, environment=environment) as process:
        async with tinfer.AsyncClient(process.url) as client:
            answer = await client.completions([1, 2, 3], max_tokens=5)
            assert answer.usage is not None and answer.usage.completion_tokens == 5
        family = process.family()
        assert process.interrupt() == 0, process.output
        assert wait_gone(family) == []


def test_an_endpoint_that_is_none_ends_the_start(tmp_path: Path) -> None:
    code, line = run_to_end(
        tmp_path, *fake_flags({}, otlp_traces_endpoint="collector"), environment=OVER_HTTP
    )
    assert (code, "--otlp-traces-endpoint takes an http:// or https:// URL" in line) == (2, True)
