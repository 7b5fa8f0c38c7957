"""A request that is not over: what its client has of the answer, and how it gets the rest."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from msgspec import Struct

from tinfer.api.service import Delta, Generation
from tinfer.api.trace import Predicted, Trace
from tinfer.clock import Clock
from tinfer.core.lengths import Lengths
from tinfer.master.attempts import Attempt, text_before
from tinfer.master.metrics.tally import Tally
from tinfer.master.streams import RequestStream
from tinfer.master.timeline import Timeline
from tinfer.predict.asked import Asked
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation


class LiveRequest(Struct):
    """One accepted request, from submit until every worker has let go of it. `prompt` and
    `emitted` are int32 token ids; `source` is where its blocks were or will be read from last;
    `asked` what the length predictor was asked, `unhinted` what it said, `lengths` that with the
    client's own word in it, and `prediction` as it is told; `finish_reason` is the engine's word of
    the end, and `is_counted` whether predictor and request log know of it."""

    generation: Generation
    prompt: bytes
    emitted: array[int]
    stream: RequestStream
    timeline: Timeline
    attempt: Attempt
    asked: Asked
    unhinted: Lengths
    lengths: Lengths
    prediction: Predicted
    is_counted: bool = False
    delivered_tokens: int = 0
    delivered_text_len: int = 0
    cached_tokens: int = 0
    source: wire.Source | None = None
    last_token_s: float = 0.0
    num_preempted: int = 0
    finish_reason: str | None = None
    workers: set[Incarnation] = set()  # those with a part in it; ended and empty, it is forgotten


def deliver(
    live: LiveRequest, output: wire.Output, step_s: float, clock: Clock, tally: Tally
) -> None:
    """Push what the client lacks of an output, and count it. `step_s` is when the message that
    brought it was taken in; only the first and the last token have a moment of their own."""
    live.finish_reason = output.finish_reason
    num_tokens = live.attempt.num_moved + output.num_output_tokens
    has = (live.delivered_tokens, live.delivered_text_len)
    len_before = text_before(live.attempt, num_tokens, output.text_len, len(output.text), has)
    text_len = len_before + output.text_len
    num_new = num_tokens - live.delivered_tokens
    len_new = text_len - live.delivered_text_len
    if num_new <= 0 and len_new <= 0 and output.finish_reason is None:
        return
    first = live.delivered_tokens == 0
    if num_new > 0:
        if first:
            _has_token(live, num_new, clock.now_s(), tally)
        elif not live.stream.ended:
            tally.delivered(num_new, step_s - live.last_token_s)
        live.last_token_s = step_s
        live.emitted.extend(output.token_ids[-num_new:])
    live.delivered_tokens = max(live.delivered_tokens, num_tokens)
    live.delivered_text_len = max(live.delivered_text_len, text_len)
    logprobs = output.logprobs
    trace = None
    if output.finish_reason is not None:
        end_s = clock.now_s()
        live.timeline.ended(end_s)
        trace = trace_of(live, end_s)
        if not live.stream.ended:
            sampling = live.generation.sampling
            tally.answered(output.finish_reason, trace, sampling, live.lengths, live.num_preempted)
    live.stream.push(
        Delta(
            text=output.text[-len_new:] if len_new > 0 else "",
            token_ids=output.token_ids[-num_new:] if num_new > 0 else [],
            logprobs=None if logprobs is None else logprobs[-num_new:] if num_new > 0 else [],
            prompt_logprobs=output.prompt_logprobs if first else None,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            cached_tokens=live.cached_tokens,
            trace=trace,
        )
    )


def _has_token(live: LiveRequest, num_new: int, now_s: float, tally: Tally) -> None:
    live.timeline.has_token(now_s)
    if not live.stream.ended:
        generation, ttft_s = live.generation, now_s - live.timeline.arrived_s
        prompt_tokens = len(generation.prompt_token_ids)
        tally.output_tokens += num_new
        tally.first_token(ttft_s, generation.sampling, prompt_tokens, live.cached_tokens)


def trace_of(live: LiveRequest, now_s: float) -> Trace:
    """How it was served, for one whose last token came at `now_s`."""
    return live.timeline.trace(
        live.stream.request_id,
        len(live.generation.prompt_token_ids),
        live.cached_tokens,
        live.delivered_tokens,
        now_s,
        live.prediction,
    )


def note_death(
    lives: Mapping[str, LiveRequest],
    reprefills: Mapping[str, tuple[str, Incarnation]],
    dead: Incarnation,
    now_s: float,
) -> None:
    """Note for every request that a worker with a part in it is dead: it computed, pulled, held
    its blocks, or computed them again for it (`reprefills`)."""
    served = {request_id for request_id, worker in reprefills.values() if worker == dead}
    for request_id, live in lives.items():
        source = live.source
        holds = source is not None and (source.worker_id, source.worker_generation) == dead
        if holds or dead in live.workers or request_id in served:
            live.timeline.note("lost", now_s, dead.worker_id)
