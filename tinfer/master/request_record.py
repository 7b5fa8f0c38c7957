"""One line of the server's request log: what was asked, and what became of it.

Hashes and counts: text only where `--log-prompts` asks for it, and never a header or a key.
"""

from __future__ import annotations

from tinfer.master.live import LiveRequest, trace_of
from tinfer.master.prediction import end_of
from tinfer.master.timeline import NUM_DIGITS
from tinfer.predict.asked import End
from tinfer.predict.hashes import as_hex
from tinfer.workloads import LogRecord, encode_record, prefix_segments


class ServerRecord(LogRecord, frozen=True, kw_only=True):
    """The log's record and what only the server knows.

    `response_id` is the id of the response, which ends in the client's own where it sent one;
    `queue_s` how long it waited for its first worker; `restarts` how often it began again because a
    worker had died. With `--log-prompts`, `prompt_text` is what was tokenised, or
    `prompt_token_ids` are what the client sent in its place.
    """

    response_id: str = ""
    queue_s: float | None = None
    restarts: int = 0
    prompt_text: str | None = None
    prompt_token_ids: list[int] | None = None


def line_of(epoch_s: float, keeps_prompts: bool, live: LiveRequest, model: str) -> bytes:
    """The line of a request that has ended, served by that model; see `record_of`."""
    return encode_record(record_of(live, model, epoch_s, keeps_prompts))


def record_of(
    live: LiveRequest, model: str, epoch_s: float, keeps_prompts: bool = False
) -> ServerRecord:
    """Of a request that has ended. `epoch_s` is what the dispatcher's clock showed in 1970."""
    end = end_of(live)
    asked, generation = live.asked, live.generation
    hints = generation.hints
    arrived_s = live.timeline.arrived_s
    ended_s = live.timeline.ended_s
    trace = trace_of(live, arrived_s if ended_s is None else ended_s)
    workers = (trace.prefill_worker, trace.decode_worker)
    has_started = trace.queue_s is not None
    text = generation.prompt_text if keeps_prompts else None
    keeps_ids = keeps_prompts and text is None
    return ServerRecord(
        request_id=asked.request_id,
        arrival_s=round(arrived_s - epoch_s, NUM_DIGITS),
        prompt_tokens=asked.prompt_tokens,
        max_output_tokens=asked.max_output_tokens,
        output_tokens=live.delivered_tokens,
        segments=prefix_segments(live.prompt, asked.request_id),
        finish_reason=end.value,
        error=_error_of(live) if end is End.ERROR else None,
        ttft_s=trace.ttft_s,
        e2el_s=trace.e2el_s if has_started else None,
        route=trace.route,
        workers=tuple(dict.fromkeys(one for one in workers if one is not None)),
        handoff_s=trace.handoff_s,
        cached_tokens=trace.cached_tokens if has_started else None,
        predictor=live.prediction.predictor,
        predicted_output_tokens=live.prediction.median_tokens,
        predicted_low_tokens=live.prediction.low_tokens,
        predicted_high_tokens=live.prediction.high_tokens,
        model=model,
        prompt_head=as_hex(asked.features.head),
        prompt_signature=asked.features.signature,
        runs_to_bound=asked.runs_to_bound,
        expected_output_tokens=hints.expected_output_tokens,
        priority=hints.priority,
        deadline_s=hints.deadline_s,
        response_id=generation.response_id,
        queue_s=trace.queue_s,
        restarts=trace.restarts,
        prompt_text=text,
        prompt_token_ids=list(generation.prompt_token_ids) if keeps_ids else None,
    )


def _error_of(live: LiveRequest) -> str:
    """The kind alone: a message may quote what the client sent."""
    failure = live.stream.failure
    return "the engine failed" if failure is None else f"{failure.http_status} {failure.error_type}"
