"""Measures steps on one worker: all points of all kinds in turns, after a first look at prompts.

A box that is slower for a while then is slower for points of every kind, and costs that are fitted
to them together still fit together.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from tinfer.errors import StartError
from tinfer.tune.chunk import choose_chunk
from tinfer.tune.points import KvRoom, StepPoint
from tinfer.tuner import design
from tinfer.tuner.design import Batch, MixedStep, Point, Prompt
from tinfer.tuner.driver import Driver, SeenStep
from tinfer.tuner.rounds import Progress, rounds

# A prompt whose step took so long is the last and largest of the curve.
LONGEST_STEP_S = 4.0
NUM_LOOP_STEPS = 48


class Stages:
    """`room` is known from the begin, `loop_s`, `prefill_token_s` (of the largest prompts) and
    `waited_share` after `all_steps`."""

    def __init__(self, driver: Driver, repeats: int, progress: Progress) -> None:
        self.room = room_of(driver)
        self.loop_s = 0.0
        self.prefill_token_s = 0.0
        self.waited_share = 0.0
        self._driver = driver
        self._repeats = repeats
        self._progress = progress

    async def all_steps(self) -> list[StepPoint]:
        """Every point of a step. Raises `StartError` where the engine is too small for any."""
        self.loop_s = await self._measure_loop()
        prompts, seen = await self._first_look()
        chunk_tokens = choose_chunk(seen, self.room.block_tokens).chunk_tokens
        self.prefill_token_s = max(p.step_s / p.prefill_tokens for p in seen[-2:])
        batches = design.batches(self.room, self.prefill_token_s)
        if not batches:
            raise StartError("cannot measure: the KV cache or --max-model-len is too small")
        points: list[Point] = [
            *prompts,
            *design.chunked_prompts(self.room, chunk_tokens),
            *batches,
            *design.mixed_steps(self.room, chunk_tokens, batches),
        ]
        steps = await rounds(self._progress, "steps", points, self._visit, self._repeats)
        self.waited_share = self._driver.waited_share
        return [made for point, some in steps.items() for made in self._points_of(point, some)]

    async def _measure_loop(self) -> float:
        """What a worker spends between two steps, from a lone sequence; warms it up as well."""
        prompt_tokens = min(design.MIN_PROMPT_TOKENS, self.room.max_model_len // 2)
        num_steps = min(NUM_LOOP_STEPS, self.room.max_model_len - prompt_tokens - 1)
        self._progress.stage("warm-up", 1)
        seen = await self._run(prompt_tokens, 1 + num_steps)
        self._progress.visited()
        between_s = [s.elapsed_s + s.waited_s - s.busy_s for s in seen if not s.is_first]
        return max(0.0, statistics.median(between_s)) if between_s else 0.0

    async def _first_look(self) -> tuple[list[Prompt], list[StepPoint]]:
        """The prompts of the curve, up to the first that takes too long, and one try of each. It
        does not count: kernels are made and memory is touched for the first time."""
        sizes = design.prefill_sizes(self.room)
        self._progress.stage("first look", len(sizes))
        prompts: list[Prompt] = []
        seen: list[StepPoint] = []
        for size in sizes:
            prompt = Prompt(size, self.room.step_tokens)
            steps = await self._visit(prompt)
            prompts.append(prompt)
            seen += self._points_of(prompt, steps)
            self._progress.visited()
            if steps[-1].busy_s > LONGEST_STEP_S:
                break
        return prompts, seen

    # --- one visit ----------------------------------------------------------------------------

    async def _visit(self, point: Point) -> list[SeenStep]:
        """The steps that are samples of the point."""
        match point:
            case Prompt(tokens, chunk_tokens):
                self._driver.limit_prefill(chunk_tokens)
                steps = await self._run(tokens, 1)
                self._driver.limit_prefill(None)
                # The first chunk is like a prompt that ends with it, which is a point of its own.
                return steps[1:] if tokens > chunk_tokens else steps
            case Batch():
                self._start(point)
                whole = [
                    step
                    for step in await self._driver.steps_to_end()
                    if _has_all(step, point) and not step.prefill_tokens
                ]
                return whole[design.NUM_SETTLING_STEPS :]
            case MixedStep():
                return await self._beside(point)

    async def _beside(self, point: MixedStep) -> list[SeenStep]:
        """The batch decodes; whenever it has done so alone for a few steps a prompt comes, and the
        step that computes it is a sample."""
        self._start(point.batch)
        found = []
        num_quiet = 0
        while (step := await self._driver.step()) is not None:
            whole = _has_all(step, point.batch)
            if whole and (step.num_prompts, step.prefill_tokens) == (1, point.prefill_tokens):
                found.append(step)
            num_quiet = num_quiet + 1 if whole and not step.prefill_tokens else 0
            if num_quiet == design.NUM_SETTLING_STEPS:
                self._driver.start(point.prefill_tokens, 1)
        return found

    def _start(self, batch: Batch) -> None:
        output_tokens = design.answer_tokens(batch, self.room)
        self._driver.start(batch.prompt_tokens, output_tokens, batch.num_decodes)

    async def _run(self, prompt_tokens: int, output_tokens: int) -> list[SeenStep]:
        self._driver.start(prompt_tokens, output_tokens)
        return await self._driver.steps_to_end()

    # --- what the visits brought --------------------------------------------------------------

    def _points_of(self, point: Point, steps: Sequence[SeenStep]) -> Iterator[StepPoint]:
        """None where no step came out as wanted."""
        if not steps:
            return
        match point:
            case Prompt(tokens, chunk_tokens):
                for context_tokens in sorted({step.context_tokens for step in steps}):
                    some = [step for step in steps if step.context_tokens == context_tokens]
                    yield StepPoint(
                        kind="later-chunk" if tokens > chunk_tokens else "prefill",
                        prefill_tokens=some[0].prefill_tokens,
                        context_tokens=context_tokens,
                        samples_s=tuple(self._alone_s(step) for step in some),
                    )
            case Batch(num_decodes, _):
                yield _batch_point(num_decodes, 0, steps)
            case MixedStep(batch, prefill_tokens):
                yield _batch_point(batch.num_decodes, prefill_tokens, steps)

    def _alone_s(self, step: SeenStep) -> float:
        """After a lone prompt comes no step whose begin would tell when the loop was done with it.
        The time since the order has too much in it, but is nearer where the step had to wait."""
        return min(step.busy_s + self.loop_s, step.elapsed_s)


def _batch_point(num_decodes: int, prefill_tokens: int, steps: Sequence[SeenStep]) -> StepPoint:
    return StepPoint(
        kind="mixed" if prefill_tokens else "decode",
        prefill_tokens=prefill_tokens,
        context_tokens=prefill_tokens**2 / 2.0,
        num_decodes=num_decodes,
        kv_tokens=statistics.fmean(step.kv_tokens for step in steps),
        samples_s=tuple(step.elapsed_s for step in steps),
    )


def _has_all(step: SeenStep, batch: Batch) -> bool:
    return step.num_decodes == batch.num_decodes and not step.is_first


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
