"""The stages of measuring on one worker, in their order: each needs what the ones before found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tinfer.errors import StartError
from tinfer.tune.chunk import choose_chunk
from tinfer.tune.points import KvRoom, StepPoint
from tinfer.tuner import design
from tinfer.tuner.design import Batch, MixedStep
from tinfer.tuner.driver import Driver, SeenStep
from tinfer.tuner.rounds import Progress, rounds

# A prompt whose step took so long is the last and largest of the curve.
LONGEST_STEP_S = 4.0
# Points of batches have many samples in one visit.
MAX_BATCH_VISITS = 3
NUM_LOOP_STEPS = 48


class Stages:
    """`room`, `loop_s` and `prefill_token_s` (of the largest prompts) are known after `all_steps`,
    `room` before."""

    def __init__(self, driver: Driver, repeats: int, progress: Progress) -> None:
        self.room = room_of(driver)
        self.loop_s = 0.0
        self.prefill_token_s = 0.0
        self._driver = driver
        self._repeats = repeats
        self._progress = progress

    async def all_steps(self) -> list[StepPoint]:
        """Every point of a step. Raises `StartError` where the engine is too small for any."""
        self.loop_s = await self._measure_loop()
        prefills = await self._prefills()
        chunk_tokens = choose_chunk(prefills, self.room.block_tokens).chunk_tokens
        self.prefill_token_s = max(p.step_s / p.prefill_tokens for p in prefills[-2:])
        batches = design.batches(self.room, self.prefill_token_s)
        if not batches:
            raise StartError("cannot measure: the KV cache or --max-model-len is too small")
        return [
            *prefills,
            *await self._later_chunks(chunk_tokens),
            *await self._decodes(batches),
            *await self._mixed(design.mixed_steps(self.room, chunk_tokens, batches)),
        ]

    async def _measure_loop(self) -> float:
        """What a worker spends between two steps, from a lone sequence; warms it up as well."""
        prompt_tokens = min(design.MIN_PROMPT_TOKENS, self.room.max_model_len // 2)
        num_steps = min(NUM_LOOP_STEPS, self.room.max_model_len - prompt_tokens - 1)
        self._progress.stage("warm-up", 1)
        seen = await self._run(prompt_tokens, 1 + num_steps)
        self._progress.visited()
        between_s = [s.period_s - s.busy_s for s in seen if s.period_s is not None]
        return max(0.0, statistics.median(between_s)) if between_s else 0.0

    async def _prefills(self) -> list[StepPoint]:
        sizes = await self._bearable(design.prefill_sizes(self.room))

        async def visit(size: int) -> list[float]:
            return [self._alone_s(step) for step in await self._run(size, 1)]

        samples = await rounds(self._progress, "prefill", sizes, visit, self._repeats)
        return [
            StepPoint(
                kind="prefill",
                prefill_tokens=size,
                context_tokens=size * size / 2.0,
                samples_s=tuple(samples[size]),
            )
            for size in sizes
        ]

    async def _bearable(self, sizes: Sequence[int]) -> list[int]:
        """The sizes up to the first that takes too long, each tried once, which does not count:
        kernels are made and memory is touched for the first time."""
        self._progress.stage("prefill, first round", len(sizes))
        found = []
        for size in sizes:
            steps = await self._run(size, 1)
            found.append(size)
            self._progress.visited()
            if steps[-1].busy_s > LONGEST_STEP_S:
                break
        return found

    async def _later_chunks(self, chunk_tokens: int) -> list[StepPoint]:
        samples: dict[tuple[int, float], list[float]] = {}

        async def visit(prompt: tuple[int, int]) -> list[float]:
            self._driver.limit_prefill(prompt[0])
            _, *later = await self._run(prompt[1], 1)
            for step in later:
                key = step.prefill_tokens, step.context_tokens
                samples.setdefault(key, []).append(self._alone_s(step))
            return []

        prompts = design.chunked_prompts(self.room, chunk_tokens)
        await rounds(self._progress, "later chunks", prompts, visit, self._repeats)
        self._driver.limit_prefill(None)
        return [
            StepPoint(
                kind="later-chunk",
                prefill_tokens=tokens,
                context_tokens=context_tokens,
                samples_s=tuple(seconds),
            )
            for (tokens, context_tokens), seconds in sorted(samples.items())
        ]

    async def _decodes(self, batches: Sequence[Batch]) -> list[StepPoint]:
        async def visit(batch: Batch) -> list[SeenStep]:
            self._start(batch)
            steps = await self._driver.steps_to_end()
            whole = [s for s in steps if _has_all(s, batch) and not s.prefill_tokens]
            return whole[design.NUM_SETTLING_STEPS :]

        visits = min(self._repeats, MAX_BATCH_VISITS)
        seen = await rounds(self._progress, "decode", batches, visit, visits)
        return [
            StepPoint(
                kind="decode",
                num_decodes=batch.num_decodes,
                kv_tokens=_mean_kv_tokens(steps),
                samples_s=_periods_s(steps),
            )
            for batch, steps in seen.items()
            if steps
        ]

    async def _mixed(self, mixed: Sequence[MixedStep]) -> list[StepPoint]:
        visits = min(self._repeats, MAX_BATCH_VISITS)
        seen = await rounds(self._progress, "mixed", mixed, self._beside, visits)
        return [
            StepPoint(
                kind="mixed",
                prefill_tokens=one.prefill_tokens,
                context_tokens=one.prefill_tokens**2 / 2.0,
                num_decodes=one.batch.num_decodes,
                kv_tokens=_mean_kv_tokens(steps),
                samples_s=_periods_s(steps),
            )
            for one, steps in seen.items()
            if steps
        ]

    async def _beside(self, one: MixedStep) -> list[SeenStep]:
        """The batch decodes; whenever it has done so alone for a few steps a prompt comes, and the
        step that computes it is a sample."""
        self._start(one.batch)
        found = []
        num_quiet = 0
        while (step := await self._driver.step()) is not None:
            whole = _has_all(step, one.batch)
            if whole and (step.num_prompts, step.prefill_tokens) == (1, one.prefill_tokens):
                found.append(step)
            num_quiet = num_quiet + 1 if whole and not step.prefill_tokens else 0
            if num_quiet == design.NUM_SETTLING_STEPS:
                self._driver.start(one.prefill_tokens, 1)
        return found

    def _start(self, batch: Batch) -> None:
        output_tokens = design.answer_tokens(batch, self.room)
        self._driver.start(batch.prompt_tokens, output_tokens, batch.num_decodes)

    async def _run(self, prompt_tokens: int, output_tokens: int) -> list[SeenStep]:
        self._driver.start(prompt_tokens, output_tokens)
        return await self._driver.steps_to_end()

    def _alone_s(self, step: SeenStep) -> float:
        """A step after which nothing came has no period; the loop's share is added instead."""
        return step.busy_s + self.loop_s


def room_of(driver: Driver) -> KvRoom:
    """What the worker holds. vLLM's buffer has one block more than it gives to requests."""
    ready = driver.ready
    num_blocks = ready.num_blocks + (ready.engine == "vllm")
    return KvRoom(
        num_blocks=ready.num_blocks,
        block_tokens=ready.block_tokens,
        kv_bytes=ready.kv_bytes,
        bytes_per_token=ready.kv_bytes / (num_blocks * ready.block_tokens),
        max_num_seqs=ready.max_num_seqs,
        max_model_len=ready.max_model_len,
        step_tokens=ready.chunk_tokens,
    )


def _has_all(step: SeenStep, batch: Batch) -> bool:
    return step.num_decodes == batch.num_decodes and step.period_s is not None


def _periods_s(steps: Sequence[SeenStep]) -> tuple[float, ...]:
    return tuple(step.period_s for step in steps if step.period_s is not None)


def _mean_kv_tokens(steps: Sequence[SeenStep]) -> float:
    return statistics.fmean(step.kv_tokens for step in steps)
