"""One line of the request log per request of a run: what was asked, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinfer.bench.outcome import Outcome
from tinfer.workloads import LogRecord, Request

_NUM_DIGITS = 6  # microseconds: less than reading a chunk off a socket takes


class BenchRecord(LogRecord, frozen=True, kw_only=True):
    """The log's record and what only the client of a measurement knows.

    `status` is the HTTP status, None where no answer began; `queue_s` the part of `sent_s` -
    `arrival_s` that was a wait for a place under --max-concurrency; `trace` what a tinfer server
    told of the answer, durations in seconds. `finish_reason` is "error" for a request that failed
    and "abort" for one that the end of the run cut off; `e2el_s` is there for whole answers only.
    """

    status: int | None = None
    queue_s: float | None = None
    trace: dict[str, Any] | None = None


def records_of(requests: Sequence[Request], outcomes: Sequence[Outcome]) -> list[BenchRecord]:
    """A record for each request that was sent, in the order of `requests`."""
    by_id = {outcome.request_id: outcome for outcome in outcomes}
    return [_record(one, by_id[one.request_id]) for one in requests if one.request_id in by_id]


def _record(request: Request, outcome: Outcome) -> BenchRecord:
    reason = outcome.finish_reason
    if not outcome.ok:
        reason = "abort" if outcome.interrupted else "error"
    trace = outcome.trace or {}
    workers = [trace[key] for key in ("prefill_worker", "decode_worker") if trace.get(key)]
    return BenchRecord(
        request_id=request.request_id,
        arrival_s=round(outcome.due_s, _NUM_DIGITS),
        prompt_tokens=outcome.prompt_tokens,
        max_output_tokens=request.output_tokens,
        # Of an answer that was cut, every chunk that came has at least one token.
        output_tokens=outcome.output_tokens or len(outcome.chunk_s),
        task=request.task,
        tenant=request.tenant,
        session=request.session,
        turn=request.turn,
        after=request.after,
        segments=request.segments,
        finish_reason=reason,
        error=outcome.error,
        sent_s=round(outcome.sent_s, _NUM_DIGITS),
        ttft_s=round(outcome.ttft_s, _NUM_DIGITS) if outcome.chunk_s else None,
        e2el_s=round(outcome.e2el_s, _NUM_DIGITS) if outcome.ok else None,
        itl_s=tuple(round(gap_s, _NUM_DIGITS) for gap_s in outcome.itls_s),
        route=trace.get("route"),
        # A request that one worker served whole has it in both places.
        workers=tuple(dict.fromkeys(workers)),
        handoff_s=trace.get("handoff_s"),
        cached_tokens=outcome.cached_tokens,
        status=outcome.status,
        queue_s=round(outcome.queue_s, _NUM_DIGITS),
        trace=outcome.trace,
    )
