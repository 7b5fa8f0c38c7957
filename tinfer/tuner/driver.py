"""One running worker under measurement: gives it requests, and tells what each of its steps was.

The worker is the one that `tinfer serve` runs, with its loop and its messages; nothing in it knows
that it is measured. How long a step took comes from its own counters and from when its news come,
what was in it from the outputs and the progress that it reports after every step.

A process that is ready to run may have to wait for its core where the box does other things as
well. What the kernel counts of that is taken out again, so that such a box is measured about right.
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


class Moment(NamedTuple):
    """A time (monotonic seconds), and how long a worker had waited for its core by then in all."""

    at_s: float
    waited_s: float


class Received(NamedTuple):
    """A worker's message, and when it came."""

    moment: Moment
    worker_id: str
    message: wire.ToMaster


class Workers(Protocol):
    """The workers of the box, all ready, and each told of the others."""

    @property
    def ready(self) -> Mapping[str, wire.Ready]:
        """What each one is, prefill workers first."""

    def moment(self, worker_id: str) -> Moment:
        """Now."""

    def send(self, worker_id: str, message: wire.ToWorker) -> None: ...

    async def receive(self) -> Received:
        """The next message of any of them. Raises `StartError` where one has died or is mute."""


class SeenStep(NamedTuple):
    """One engine step.

    `elapsed_s` is from the news of the step before, or from the order where the worker was idle
    (`is_first`), to the news of this one, without `waited_s`, in which the worker wanted to run and
    could not. `busy_s` is the step alone, by the worker's clock, with what it waited in it.
    `num_prompts` had a part in `prefill_tokens`.
    """

    is_first: bool
    elapsed_s: float
    waited_s: float
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
        self._since = workers.moment(worker_id)
        self._is_first = True
        self._num_started = 0
        self._elapsed_s = self._waited_s = 0.0

    @property
    def waited_share(self) -> float:
        """Of all time so far in which it had something to do: waiting for its core."""
        total_s = self._elapsed_s + self._waited_s
        return self._waited_s / total_s if total_s else 0.0

    def start(self, prompt_tokens: int, output_tokens: int, num_requests: int = 1) -> None:
        """Requests that stay on this worker and end by their length. All prompts are there before
        the first is sent, so that few steps begin without some of them."""
        was_idle = not self._requests
        starts = []
        for _ in range(num_requests):
            self._num_started += 1
            request_id = f"{self._worker_id}/{self._num_started}"
            self._requests[request_id] = _Request(prompt_tokens)
            prompt = random_prompt(prompt_tokens, self.ready.vocab_size, self._rng)
            sampling = fixed_length(output_tokens)
            starts.append(wire.Start(request_id, "whole", prompt, sampling))
        if was_idle:
            self._since, self._is_first = self._workers.moment(self._worker_id), True
        for start in starts:
            self._workers.send(self._worker_id, start)

    def limit_prefill(self, tokens: int | None) -> None:
        """At most so many prompt tokens per step from the next one on."""
        self._workers.send(self._worker_id, wire.SetBudget(tokens))

    async def step(self) -> SeenStep | None:
        """The next step; None once all requests have ended. Raises `StartError`."""
        if not self._requests:
            return None
        while True:
            moment, worker_id, message = await self._workers.receive()
            if worker_id != self._worker_id:
                continue
            if isinstance(message, wire.Refused):
                raise StartError(f"the engine refused a measurement: {message.message}")
            if isinstance(message, wire.Step):
                return self._seen(message, moment)

    async def steps_to_end(self) -> list[SeenStep]:
        """All steps until all requests have ended."""
        seen = []
        while (step := await self.step()) is not None:
            seen.append(step)
        return seen

    def _seen(self, message: wire.Step, moment: Moment) -> SeenStep:
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
        before, since, is_first = self._before, self._since, self._is_first
        self._before, self._since, self._is_first = message.stats, moment, False
        waited_s = moment.waited_s - since.waited_s
        elapsed_s = moment.at_s - since.at_s - waited_s
        self._elapsed_s += elapsed_s
        self._waited_s += waited_s
        return SeenStep(
            is_first=is_first,
            elapsed_s=elapsed_s,
            waited_s=waited_s,
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
