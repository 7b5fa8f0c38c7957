"""How long an engine's steps take: its cost model, and noise on top where the spec asks for it."""

from __future__ import annotations

import math
import random

from tinfer.sim.batch import DecodeBatch, Stretch
from tinfer.sim.jobs import Job
from tinfer.sim.spec import EngineSpec

# A row of steps with noise is listed, so it is kept short.
NUM_NOISY_STEPS = 64


class Pace:
    """Turns what a step computes into time."""

    def __init__(self, spec: EngineSpec, seed: str) -> None:
        self._costs = spec.costs
        self._padded_tokens = spec.max_num_batched_tokens if spec.pads_chunks else 0
        self._tax = spec.prefill_tax
        self._noise = Noise(spec.noise, seed) if spec.noise else None

    def mixed(
        self,
        now_s: float,
        step_number: int,
        chunks: list[tuple[Job, int]],
        batch: DecodeBatch | None,
    ) -> Stretch:
        """One step with prompts in it, beside all that decodes (None: nothing does)."""
        tokens = context = 0
        for job, num_tokens in chunks:
            tokens += num_tokens
            context += num_tokens * (2 * job.computed + num_tokens)
        num, kv_tokens = (batch.num, batch.kv_tokens) if batch is not None else (0, 0)
        if not num:
            tokens = max(tokens, self._padded_tokens)
        first_s = self._costs.step_s(tokens, num, kv_tokens, context / 2)
        if self._tax:
            without_s = self._costs.decode_step_s(num, kv_tokens) if num else 0.0
            first_s += self._tax * (first_s - without_s)
        if self._noise is not None:
            first_s *= self._noise.factors(step_number, 1)[0]
        return Stretch(now_s, first_s, 0.0, 1, num, chunks)

    def decodes(
        self, now_s: float, step_number: int, num_steps: int, batch: DecodeBatch
    ) -> Stretch:
        """At most `num_steps` steps of a batch that stays as it is."""
        first_s = self._costs.decode_step_s(batch.num, batch.kv_tokens)
        more_s = self._costs.kv_token_s * batch.num
        if self._noise is None:
            return Stretch(now_s, first_s, more_s, num_steps, batch.num, [])
        num_steps = min(num_steps, NUM_NOISY_STEPS)
        ends_s, end_s = [], now_s
        for number, factor in enumerate(self._noise.factors(step_number, num_steps)):
            end_s += factor * (first_s + number * more_s)
            ends_s.append(end_s)
        return Stretch(now_s, first_s, more_s, num_steps, batch.num, [], ends_s)


class Noise:
    """Independent lognormal factors of mean 1, one per step number, drawn in order from a seed.

    A step's factor depends on its number alone, not on how steps are grouped.
    """

    def __init__(self, sigma: float, seed: str) -> None:
        self._sigma = sigma
        self._rng = random.Random(seed)
        self._factors: list[float] = []
        self._first = 0

    def factors(self, first_step: int, num_steps: int) -> list[float]:
        """Those of steps `first_step` and on; every step before it has been asked for."""
        del self._factors[: first_step - self._first]
        self._first = first_step
        while len(self._factors) < num_steps:
            drawn = self._rng.gauss(-0.5 * self._sigma**2, self._sigma)
            self._factors.append(math.exp(drawn))
        return self._factors[:num_steps]
