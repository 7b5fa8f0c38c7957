"""What is measured, and that it is measured right: on workers in virtual time."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest

from tests.unit.tune_box import COSTS, ROOM
from tests.unit.tune_workers import SimWorkers, ready
from tinfer.errors import StartError
from tinfer.tune.fit import fit
from tinfer.tune.points import KvRoom
from tinfer.tuner import design
from tinfer.tuner.design import Batch, MixedStep, Prompt
from tinfer.tuner.driver import Driver, SeenStep, random_prompt
from tinfer.tuner.measure import measure
from tinfer.tuner.rounds import rounds

LOOP_S = 2e-4


class Watch:
    """Notes the stages."""

    def __init__(self) -> None:
        self.stages: list[list[Any]] = []

    def stage(self, words: str, num_visits: int) -> None:
        self.stages.append([words, num_visits, 0])

    def visited(self) -> None:
        self.stages[-1][2] += 1


def room(**changes: int) -> KvRoom:
    return msgspec.structs.replace(ROOM, **changes)


# --- the whole of it ------------------------------------------------------------------------------


async def test_measuring_finds_the_costs_that_the_workers_have() -> None:
    watch = Watch()
    found = await measure(SimWorkers(COSTS, LOOP_S, [ready(), ready()]), 3, 0, watch)
    assert found.loop_s == pytest.approx(LOOP_S) and found.waited_share == 0.0
    fitted = fit(found.steps, found.handoffs, COSTS.source)
    for name in COSTS.__struct_fields__[:-1]:
        assert getattr(fitted.costs, name) == pytest.approx(getattr(COSTS, name), rel=1e-6), name
    assert max(fitted.errors.values()) < 1e-6
    kinds = Counter(point.kind for point in found.steps)
    assert set(kinds) == {"prefill", "later-chunk", "decode", "mixed"}
    assert [point.tokens for point in found.handoffs] == list(design.HANDOFF_TOKENS)
    assert all(planned == done for _, planned, done in watch.stages)
    assert [words for words, _, _ in watch.stages] == [
        "warm-up",
        "first look",
        "steps",
        "first hand-off",
        "hand-off",
    ]


async def test_what_a_worker_waits_for_its_core_is_taken_out() -> None:
    crowded = SimWorkers(COSTS, LOOP_S, [ready(), ready()], crowd=3.0)
    found = await measure(crowded, 2, 0, Watch())
    assert found.waited_share == pytest.approx(0.75, rel=0.05)
    fitted = fit(found.steps, found.handoffs, COSTS.source)
    for name in COSTS.__struct_fields__[:-1]:
        assert getattr(fitted.costs, name) == pytest.approx(getattr(COSTS, name), rel=1e-6), name


async def test_one_worker_is_measured_without_a_hand_off() -> None:
    found = await measure(SimWorkers(COSTS, LOOP_S, [ready()]), 1, 0, Watch())
    assert found.handoffs == [] and found.kv.bytes_per_token == 64.0
    assert (found.kv.num_tokens, found.kv.step_tokens) == (65536, 2048)


async def test_a_small_engine_is_measured_as_far_as_it_goes() -> None:
    small = ready(max_model_len=96, num_blocks=16, max_num_seqs=2, chunk_tokens=64)
    found = await measure(SimWorkers(COSTS, LOOP_S, [small]), 2, 0, Watch())
    sizes = [p.prefill_tokens for p in found.steps if p.kind == "prefill"]
    assert sizes == [16, 24, 32, 48, 64]
    assert {p.num_decodes for p in found.steps if p.kind == "decode"} == {1, 2}


async def test_a_refusal_ends_it_with_the_engines_words() -> None:
    driver = Driver(SimWorkers(COSTS, LOOP_S, [ready()]), "worker-0", random.Random(0))
    driver.start(9000, 1)
    with pytest.raises(StartError, match="refused a measurement: 9000 tokens are too many"):
        await driver.step()


# --- what a step was ------------------------------------------------------------------------------


async def test_steps_are_seen_as_they_are() -> None:
    driver = Driver(SimWorkers(COSTS, LOOP_S, [ready()]), "worker-0", random.Random(0))
    driver.limit_prefill(64)
    driver.start(100, 3)
    first, second, third, fourth = await driver.steps_to_end()
    assert first[4:] == (64, 64 * 32.0, 1, 0, 0) and second[4:] == (36, 36 * 82.0, 1, 0, 0)
    assert third[4:] == (0, 0, 0, 1, 101) and fourth.kv_tokens == 102
    assert [step.is_first for step in (first, second, third, fourth)] == [True, *[False] * 3]
    for step in (first, second, third, fourth):
        assert step.elapsed_s == pytest.approx(step.busy_s + LOOP_S) and step.waited_s == 0.0
    assert await driver.step() is None
    driver.start(10, 1)
    (alone,) = await driver.steps_to_end()
    assert alone == SeenStep(True, alone.elapsed_s, 0.0, alone.busy_s, 10, 50.0, 1, 0, 0)
    assert alone.busy_s + LOOP_S == pytest.approx(COSTS.step_s(10, 0, 0, 50.0))


def test_prompts_differ_and_follow_the_seed() -> None:
    rng, again = random.Random(3), random.Random(3)
    first = random_prompt(100, 512, rng)
    assert len(first) == 400 and first == random_prompt(100, 512, again)
    assert random_prompt(100, 512, rng) != first


async def test_points_are_visited_in_turns() -> None:
    visits = []

    async def visit(point: str) -> list[int]:
        visits.append(point)
        return [len(visits)]

    samples = await rounds(watch := Watch(), "some", ["a", "b"], visit, 2)
    assert visits == ["a", "b", "a", "b"]
    assert samples == {"a": [1, 3], "b": [2, 4]} and watch.stages == [["some", 4, 4]]


async def test_a_point_that_takes_long_is_not_visited_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tinfer.tuner.rounds.POINT_S", 0.0)

    async def visit(point: str) -> list[str]:
        return [point]

    watch = Watch()
    assert await rounds(watch, "slow", ["a"], visit, 3) == {"a": []}
    assert watch.stages == [["slow", 3, 3]]


# --- which points ---------------------------------------------------------------------------------


def test_prompts_go_up_to_the_limit_of_a_step() -> None:
    assert design.prefill_sizes(room(step_tokens=100)) == [16, 24, 32, 48, 64, 96, 100]
    assert design.prefill_sizes(room(max_model_len=50))[-2:] == [48, 49]
    assert design.prefill_sizes(room(max_model_len=5)) == [4]
    assert design.prefill_sizes(ROOM)[-3:] == [2048, 3072, 4096]


def test_chunks_of_long_prompts_come_in_two_sizes() -> None:
    large, small = Prompt(4096, 512), Prompt(1024, 128)
    assert design.chunked_prompts(ROOM, 512) == [large, small]
    assert design.chunked_prompts(room(max_model_len=1100), 512) == [Prompt(1024, 512), small]
    assert design.chunked_prompts(room(max_model_len=200), 512) == []
    assert design.chunked_prompts(room(step_tokens=64), 512) == [Prompt(512, 64), Prompt(128, 16)]


@pytest.mark.parametrize("prefill_token_s", [1e-6, 3e-4, 1.0])
@pytest.mark.parametrize("max_num_seqs", [1, 7, 256])
def test_batches_fit_and_are_quick_enough(prefill_token_s: float, max_num_seqs: int) -> None:
    some = room(max_num_seqs=max_num_seqs)
    found = design.batches(some, prefill_token_s)
    assert found[0] == Batch(1, design.SHORT_PROMPT_TOKENS)
    assert len(set(found)) == len(found)
    for batch in found:
        assert design.fits(batch, some) and batch.num_decodes <= max_num_seqs
        prepare_s = batch.num_decodes * batch.prompt_tokens * prefill_token_s
        assert batch.num_decodes == 1 or prepare_s <= design.PREPARE_S
    if prefill_token_s < 1.0:
        assert len({batch.prompt_tokens for batch in found}) == 2
        assert max(b.num_decodes for b in found) == max_num_seqs


def test_no_batch_where_not_even_one_sequence_fits() -> None:
    assert design.batches(room(num_blocks=1, block_tokens=16), 1e-6) == []


def test_mixed_steps_are_of_measured_batches_and_fit_into_a_step() -> None:
    known = [Batch(n, length) for length in (64, 1024) for n in (1, 2, 4, 16, 64)]
    found = design.mixed_steps(room(step_tokens=512), 512, known)
    assert MixedStep(Batch(4, 64), 508) in found and MixedStep(Batch(4, 64), 127) in found
    assert {one.batch for one in found} == {Batch(n, 64) for n in (1, 4, 16)}
    # A prompt needs a seat.
    assert design.mixed_steps(room(max_num_seqs=1), 512, [Batch(1, 64)]) == []


def test_hand_offs_stay_within_the_model_and_are_quick_enough() -> None:
    assert design.handoff_sizes(ROOM, 1e-6) == list(design.HANDOFF_TOKENS)
    assert design.handoff_sizes(room(max_model_len=600), 1e-6) == [16, 128, 512]
    assert design.handoff_sizes(ROOM, 0.01) == [16, 128, 512]
    assert design.handoff_sizes(room(max_model_len=12), 1e-6) == [10]
