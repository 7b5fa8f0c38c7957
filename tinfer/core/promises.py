"""Early refusal: is a request that arrives now likely to be answered within the SLO?

Two predictions of the time to first token, of which the later counts: what is queued, spread over
the workers at the speed that they are believed to have; and, once there is a queue, what is queued
at the pace at which requests have left it lately, which knows of whatever else they wait for
(seats, memory). The time per token is that of the batch it would join.

A request that no idle worker could answer in time is not refused for that: it waits for its turn
like one that could.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tinfer.core.fleet import Fleet
from tinfer.core.requests import Request
from tinfer.core.types import Route
from tinfer.core.worker import Worker

# The pace of a queue is that of the last seconds in which there was one.
MEMORY_S = 10.0
# Before so long a queue has been seen, its pace is not known.
MIN_SEEN_S = 0.5
# What is let in fills an SLO up to here: what comes after it can still cost it time.
HEADROOM = 0.75
# Times as long as alone count as in time, whatever the SLO: the model is as exact as that.
TOLERANCE = 1.25


class Refusal(NamedTuple):
    """Why a request is refused, and when it could be tried again."""

    message: str
    retry_after_s: float


class QueueView(NamedTuple):
    """What waits for a first worker; `longest_wait_s` is over all without a first token."""

    num: int
    tokens: int
    longest_wait_s: float


class Pace:
    """Prompt tokens per second that leave the queue while there is one."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seen_s = 0.0
        self._at_s: float | None = None
        self._is_queued = False

    def started(self, tokens: int) -> None:
        """A queued request was started."""
        if self._is_queued:
            self._tokens += tokens

    def look(self, num_queued: int, now_s: float) -> None:
        """Time has passed, and so many are queued from now on."""
        if self._is_queued and self._at_s is not None:
            passed_s = now_s - self._at_s
            fading = math.exp(-passed_s / MEMORY_S)
            self._tokens *= fading
            self._seen_s = self._seen_s * fading + MEMORY_S * (1.0 - fading)
        self._at_s, self._is_queued = now_s, num_queued > 0

    @property
    def tokens_per_s(self) -> float | None:
        """None before enough was seen."""
        if self._seen_s < MIN_SEEN_S or not self._tokens:
            return None
        return self._tokens / self._seen_s


class Promises:
    """The SLO in seconds; None bounds nothing."""

    def __init__(self, ttft_s: float | None, tpot_s: float | None, fleet: Fleet) -> None:
        self._ttft_s = ttft_s
        self._tpot_s = tpot_s
        self._fleet = fleet
        self.pace = Pace()

    @property
    def are_made(self) -> bool:
        """Whether there is an SLO at all."""
        return self._ttft_s is not None or self._tpot_s is not None

    def broken_by(self, request: Request, queue: QueueView) -> Refusal | None:
        """Why it would not be answered in time, behind what is queued; None if it would be."""
        workers = self._fleet.staying
        if not workers:
            return None
        if self._ttft_s is not None:
            predicted_s = max(self.ttft_s(request, queue.tokens), queue.longest_wait_s)
            alone_s = min(_alone_s(request, one) for one in workers)
            allowed_s = max(HEADROOM * self._ttft_s, TOLERANCE * alone_s)
            if predicted_s > allowed_s:
                why = _why("to the first token", predicted_s, self._ttft_s)
                return Refusal(why, predicted_s - allowed_s)
        if self._tpot_s is not None:
            predicted_s = self.tpot_s(request, queue.num)
            tokens = request.prompt_tokens
            alone_s = min(one.costs.decode_step_s(1, tokens) * one.pace for one in workers)
            if predicted_s > max(HEADROOM * self._tpot_s, TOLERANCE * alone_s):
                why = _why("per token", predicted_s, self._tpot_s)
                # By then half an answer like it is over, and so are those that were further.
                return Refusal(why, request.expected_tokens * predicted_s / 2.0)
        return None

    def ttft_s(self, request: Request, queued_tokens: int) -> float:
        """Predicted seconds until its first token."""
        workers = self._fleet.staying
        share = queued_tokens // len(workers)
        predicted_s = min(
            _start_s(request, one, share) + _room_s(request, one, share) for one in workers
        )
        rate = self.pace.tokens_per_s
        if queued_tokens and rate is not None:
            here_s = min(_start_s(request, one, 0) for one in workers)
            predicted_s = max(predicted_s, queued_tokens / rate + here_s)
        return predicted_s

    def tpot_s(self, request: Request, num_queued: int) -> float:
        """Predicted seconds per token of its answer."""
        workers = self._fleet.staying
        if request.wish is Route.SPLIT and self._fleet.split_sources:
            roles = {source.role for source in self._fleet.split_sources}
            workers = [one for role in roles for one in self._fleet.readers(role)]
        return min(_step_s(request, one, num_queued / len(workers)) for one in workers)


def _alone_s(request: Request, worker: Worker) -> float:
    """Its prompt on that worker, if it were idle."""
    num_new = worker.uncached_tokens(request)
    return worker.costs.prefill_s(num_new, worker.capacity.chunk_tokens) * worker.pace


def _start_s(request: Request, worker: Worker, ahead_tokens: int) -> float:
    """Until its first token, behind all that is there and what would come there before it."""
    before_tokens = worker.outstanding_prefill_tokens + ahead_tokens
    return worker.queued_s(before_tokens) + worker.prefill_s(worker.uncached_tokens(request))


def _room_s(request: Request, worker: Worker, ahead_tokens: int) -> float:
    """Until its KV cache has room for it, behind what would come there before it: residents give up
    theirs at the pace at which they end."""
    needed_tokens = ahead_tokens + request.prompt_tokens + request.expected_tokens
    missing_tokens = needed_tokens - worker.capacity_tokens + worker.outlook.peak(0.0).expected
    if missing_tokens <= 0 or not worker.num_decoding:
        return 0.0
    life_s = worker.step_s * worker.pace / worker.mean_inverse_length
    return missing_tokens * life_s / max(1, worker.kv_tokens)


def _step_s(request: Request, worker: Worker, num_before: float) -> float:
    """A step with it and those that come before it, stretched by what prompts take of the time."""
    costs = worker.costs
    added_s = costs.decode_seq_s + costs.kv_token_s * request.prompt_tokens
    step_s = worker.coming_step_s + (1.0 + num_before) * added_s
    return step_s * worker.pace / (1.0 - min(0.9, worker.recent_prefill_share))


def _why(what: str, predicted_s: float, bound_s: float) -> str:
    predicted_ms, bound_ms = 1e3 * predicted_s, 1e3 * bound_s
    return f"too busy: {predicted_ms:.0f} ms {what} are predicted, and the SLO is {bound_ms:.0f} ms"
