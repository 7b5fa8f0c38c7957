"""One running worker under measurement: gives it requests, and tells what each of its steps was.

The worker is the one that `tinfer serve` runs, with its loop and its messages; nothing in it knows
that it is measured. How long a step took comes from its own counters, what was in it from the
outputs and the progress that it reports after every step.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from msgspec import Struct

from tinfer.core.sampling import SamplingSpec
from tinfer.errors import StartError
from tinfer.wire import messages as wire


class Received(NamedTuple):
    """A worker's message, and when it came (monotonic seconds)."""

    at_s: float
    worker_id: str
    message: wire.ToMaster


class Workers(Protocol):
    """The workers of the box, all ready, and each told of the others."""

    @property
    def ready(self) -> Mapping[str, wire.Ready]:
        """What each one is, prefill workers first."""

    def send(self, worker_id: str, message: wire.ToWorker) -> None: ...

    async def receive(self) -> Received:
        """The next message of any of them. Raises `StartError` where one has died or is mute."""


class SeenStep(NamedTuple):
    """One engine step. `period_s` is from the news of the step before to the news of this one, None
    where the worker was idle between; `num_prompts` had a part in `prefill_tokens`."""

    period_s: float | None
    busy_s: float
    prefill_tokens: int
    context_tokens: float
    num_prompts: int
    num_decodes: int
    kv_tokens: int


class _Request(Struct):
    prompt_tokens: int
    computed_tokens: int = 0


class Driver:
    """Measures by one worker at a time; messages of other workers are none of its steps."""

    def __init__(self, workers: Workers, worker_id: str, rng: random.Random) -> None:
        self.ready = workers.ready[worker_id]
        self._workers = workers
        self._worker_id = worker_id
        self._rng = rng
        self._requests: dict[str, _Request] = {}
        self._before = wire.WorkerStats()
        self._before_at_s: float | None = None
        self._num_started = 0

    def start(self, prompt_tokens: int, output_tokens: int, num_requests: int = 1) -> None:
        """Requests that stay on this worker and end by their length. All prompts are there before
        the first is sent, so that few steps begin without some of them."""
        starts = []
        for _ in range(num_requests):
            self._num_started += 1
            request_id = f"{self._worker_id}/{self._num_started}"
            self._requests[request_id] = _Request(prompt_tokens)
            prompt = random_prompt(prompt_tokens, self.ready.vocab_size, self._rng)
            sampling = fixed_length(output_tokens)
            starts.append(wire.Start(request_id, "whole", prompt, sampling))
        for start in starts:
            self._workers.send(self._worker_id, start)

    def limit_prefill(self, tokens: int | None) -> None:
        """At most so many prompt tokens per step from the next one on."""
        self._workers.send(self._worker_id, wire.SetBudget(tokens))

    async def step(self) -> SeenStep | None:
        """The next step; None once all requests have ended. Raises `StartError`."""
        if not self._requests:
            self._before_at_s = None
            return None
        while True:
            at_s, worker_id, message = await self._workers.receive()
            if worker_id != self._worker_id:
                continue
            if isinstance(message, wire.Refused):
                raise StartError(f"the engine refused a measurement: {message.message}")
            if isinstance(message, wire.Step):
                return self._seen(message, at_s)

    async def steps_to_end(self) -> list[SeenStep]:
        """All steps until all requests have ended."""
        seen = []
        while (step := await self.step()) is not None:
            seen.append(step)
        return seen

    def _seen(self, message: wire.Step, at_s: float) -> SeenStep:
        parts = [self._advance(rid, tokens) for rid, tokens in message.progress]
        num_decodes = kv_tokens = 0
        for output in message.outputs:
            request = self._requests[output.request_id]
            if output.num_output_tokens == len(output.token_ids):
                cached = output.cached_tokens or 0
                parts.append(self._advance(output.request_id, request.prompt_tokens, cached))
            else:
                num_decodes += 1
                # What it has computed itself: all but the token that this step has made.
                kv_tokens += request.prompt_tokens + output.num_output_tokens - 1
            if output.finish_reason is not None:
                del self._requests[output.request_id]
        before, before_at_s = self._before, self._before_at_s
        self._before, self._before_at_s = message.stats, at_s
        return SeenStep(
            period_s=None if before_at_s is None else at_s - before_at_s,
            busy_s=message.stats.busy_s - before.busy_s,
            prefill_tokens=(
                message.stats.num_computed_prompt_tokens - before.num_computed_prompt_tokens
            ),
            context_tokens=sum(parts),
            num_prompts=len(parts),
            num_decodes=num_decodes,
            kv_tokens=kv_tokens,
        )

    def _advance(self, request_id: str, to_tokens: int, cached_tokens: int = 0) -> float:
        """The prompt is computed so far now; returns the sum of what its new tokens look back at,
        counted as `CostModel` does."""
        request = self._requests[request_id]
        start = max(request.computed_tokens, cached_tokens)
        request.computed_tokens = to_tokens
        return (to_tokens - start) * (start + to_tokens) / 2.0


def random_prompt(num_tokens: int, vocab_size: int, rng: random.Random) -> bytes:
    """Token ids as `Start` has them. Random, so that no prefix cache knows them."""
    return np.asarray([rng.randrange(vocab_size) for _ in range(num_tokens)], "<i4").tobytes()


def fixed_length(output_tokens: int) -> SamplingSpec:
    """Greedy, and exactly so many tokens."""
    return SamplingSpec(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
