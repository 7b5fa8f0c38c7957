"""The fake engine's scheduler: prefill budgets, victims, and what it reports of both."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.fake_box import ROOMY, boxed
from tests.unit.fake_steps import Stepper
from tinfer.core.sampling import SamplingSpec
from tinfer.wire.messages import PullDone

PROMPT = 100


@contextmanager
def stepping(
    num_blocks: int = 64,
    max_num_seqs: int = 8,
    tokens: int = 16,
    order: Literal["fcfs", "srpt"] = "fcfs",
) -> Iterator[Stepper]:
    stepper = Stepper(num_blocks, max_num_seqs, tokens, order)
    try:
        yield stepper
    finally:
        stepper.close()


def test_a_budget_acts_from_the_next_step_and_none_restores() -> None:
    with stepping() as stepper:
        for name in "abc":
            stepper.add(name, 1, 200)
        stepper.step()
        stepper.add("long", PROMPT, 5)
        got = []
        for budget in (5, 7, 0, 0, 13, 100, None, None):
            stepper.scheduler.prefill_budget = budget
            tokens = stepper.step()
            assert {"a", "b", "c"} <= tokens.keys(), "a decode missed a step"
            got.append(tokens.get("long", 0))
        assert got == [5, 7, 0, 0, 13, 13, 13, 13], "a step has 16 tokens, and decodes first"


def test_a_budget_is_shared_by_prompts_in_order_of_arrival() -> None:
    with stepping() as stepper:
        stepper.scheduler.prefill_budget = 10
        for name, prompt_tokens in (("a", 4), ("b", 3), ("c", 20)):
            stepper.add(name, prompt_tokens, 9)
        assert stepper.step() == {"a": 4, "b": 3, "c": 3}
        assert stepper.report.progress == [("c", 3)]
        stepper.add("d", 2, 9)
        assert stepper.step() == {"a": 1, "b": 1, "c": 10}
        stepper.scheduler.prefill_budget = 8
        assert stepper.step() == {"a": 1, "b": 1, "c": 7, "d": 1}
        assert stepper.report.progress == [("d", 1)]


@pytest.mark.parametrize("budget", [0, 3, None])
def test_a_pull_passes_prompts_and_ends_beside_them(budget: int | None) -> None:
    with stepping(max_num_seqs=4) as stepper:
        stepper.scheduler.prefill_budget = budget
        stepper.add("long", PROMPT, 2)
        stepper.add("also long", PROMPT, 2)
        stepper.step()
        pulled = stepper.add("pulled", 9, 3, pulled=True)
        stepper.step()
        assert stepper.pulling == [pulled]
        stepper.step()
        stepper.end_pull(pulled)
        assert stepper.step()["pulled"] == 1
        assert stepper.step()["pulled"] == 1
        assert pulled.answer.num_tokens == 2


def test_a_failed_pull_is_a_prompt_and_holds_up_no_other() -> None:
    with stepping() as stepper:
        stepper.scheduler.prefill_budget = 0
        failed, good = (stepper.add(name, 9, 2, pulled=True) for name in ("failed", "good"))
        stepper.step()
        stepper.end_pull(failed, ok=False)
        late = stepper.add("late", 9, 2, pulled=True)
        assert stepper.step() == {}
        assert stepper.pulling == [good, late]
        stepper.end_pull(good)
        assert stepper.step() == {"good": 1}
        stepper.scheduler.prefill_budget = 6
        assert stepper.step() == {"good": 1, "failed": 6}


def test_who_is_passed_keeps_its_place() -> None:
    with stepping(num_blocks=12) as stepper:
        stepper.scheduler.prefill_budget = 0
        stepper.add("holds blocks", 30, 2, pulled=True)
        stepper.add("first", 8, 2)
        stepper.add("lacks blocks", 30, 2, pulled=True)
        stepper.step()
        waiting = [request.start.request_id for request in stepper.scheduler.waiting]
        assert waiting == ["first", "lacks blocks"]
        assert len(stepper.pulling) == 1


def test_the_least_progressed_gives_way_and_is_reported() -> None:
    """A prompt that is older than the sequence that grows, and has nothing of its answer."""
    with stepping(num_blocks=12, tokens=4) as stepper:
        stepper.scheduler.prefill_budget = 1
        stepper.add("prompt", 40, 2)
        stepper.step()
        grows = stepper.add("grows", 8, 30, pulled=True)
        stepper.step()
        stepper.end_pull(grows)
        victims = []
        while grows.answer.finish_reason is None:
            stepper.step()
            victims += stepper.report.preempted
            for name in stepper.report.preempted:
                stepper.resume(name)
        assert victims
        assert set(victims) == {"prompt"}
        assert stepper.scheduler.num_preemptions == len(victims)
        stepper.drain()


def test_who_gives_way_waits_without_blocks_until_it_is_told_to_go_on() -> None:
    with stepping(num_blocks=6) as stepper:
        old, young = (stepper.add(name, 8, 9) for name in ("old", "young"))
        while not stepper.report.preempted:
            stepper.step()
        assert stepper.report.preempted == ["young"]
        assert (young.blocks, young.num_computed) == ([], 0)
        assert stepper.scheduler.num_waiting == 1
        while old.answer.finish_reason is None:
            assert stepper.step() == {"old": 1}
        assert not stepper.scheduler.has_requests()
        assert stepper.step() == {}
        num_tokens = young.num_tokens
        stepper.resume("young")
        assert stepper.step() == {"young": num_tokens}
        stepper.drain()
        assert young.answer.num_tokens == 9


def test_it_goes_on_with_a_pull_before_all_that_wait() -> None:
    with stepping(num_blocks=6) as stepper:
        old, young = (stepper.add(name, 8, 9) for name in ("old", "young"))
        while not stepper.report.preempted:
            stepper.step()
        late = stepper.add("late", 16, 2, pulled=True)
        stepper.resume("young", pulled=True)
        while old.answer.finish_reason is None:
            assert stepper.pulling == []
            stepper.step()
        stepper.scheduler.prefill_budget = 0
        stepper.step()
        assert stepper.pulling == [young]
        assert len(young.blocks) == -(-young.num_tokens // 4)
        num_tokens = young.answer.num_tokens
        stepper.end_pull(young)
        assert stepper.step() == {"young": 1}
        assert young.answer.num_tokens == num_tokens + 1
        assert late.blocks == []
        stepper.drain()


def test_of_prompts_the_shortest_is_first_within_a_step() -> None:
    with stepping(order="srpt") as stepper:
        stepper.add("long", PROMPT, 2)
        assert stepper.step() == {"long": 16}
        stepper.scheduler.prefill_budget = 10
        stepper.add("six", 6, 2)
        stepper.add("three", 3, 2)
        assert stepper.step() == {"six": 6, "three": 3, "long": 1}
        assert stepper.step() == {"six": 1, "three": 1, "long": 10}


def test_of_equals_who_came_first_and_what_counts_is_what_is_left() -> None:
    with stepping(order="srpt") as stepper:
        stepper.scheduler.prefill_budget = 6
        stepper.add("a", 9, 2)
        stepper.add("b", 9, 2)
        assert stepper.step() == {"a": 6}
        stepper.add("c", 4, 2)
        assert stepper.step() == {"a": 3, "c": 3}
        assert stepper.step() == {"a": 1, "b": 5, "c": 1}


def test_a_short_prompt_that_lacks_blocks_keeps_nobody_from_the_budget() -> None:
    with stepping(num_blocks=12, order="srpt") as stepper:
        stepper.scheduler.prefill_budget = 1
        stepper.add("large", 44, 2, pulled=True)
        stepper.add("long", 4, 2)
        assert stepper.step() == {"long": 1}
        stepper.add("short", 2, 2)
        # No block is free for it: once it has been turned away the long one goes on.
        assert stepper.step() == {}
        assert stepper.step() == {"long": 1}
        stepper.drain()


# Two prompts without room took turns at the tokens that one with its blocks had to get.
TURNS = [
    (28, 13, False),
    (29, 1, False),
    (1, 1, True),
    (1, 1, False),
    (1, 2, False),
    (16, 15, True),
    (28, 6, False),
    (29, 1, False),
    (1, 1, False),
    (1, 1, False),
    (13, 12, True),
    (29, 1, True),
]


@st.composite
def work(draw: st.DrawFn) -> list[tuple[int, int, bool]]:
    """Prompt tokens, answer tokens, and whether the prompt is pulled."""
    request = st.tuples(st.integers(1, 40), st.integers(1, 20), st.booleans())
    return draw(st.lists(request, min_size=1, max_size=12))


@settings(max_examples=200, deadline=None)
@given(
    work(),
    st.integers(16, 40),
    st.integers(2, 8),
    st.integers(8, 24),
    st.sampled_from(["fcfs", "srpt"]),
    st.integers(0, 1 << 32),
)
@example(TURNS, 16, 2, 13, "srpt", (1 << 32) - 1)
def test_no_step_breaks_a_rule_whatever_the_budgets(
    requests: list[tuple[int, int, bool]],
    num_blocks: int,
    seats: int,
    tokens: int,
    order: Literal["fcfs", "srpt"],
    seed: int,
) -> None:
    """Every step is checked (`Stepper.step`): the prompts within the budget, nobody who needs one
    token and no pull behind it, the least progressed preempted; and all of it comes to an end."""
    rng = random.Random(seed)
    with stepping(num_blocks, seats, tokens, order) as stepper:
        pending = list(enumerate(requests))
        answers = []
        for _ in range(300):
            move = rng.random()
            if pending and move < 0.3:
                number, request = pending.pop(0)
                answers.append((stepper.add(str(number), *request), request[1]))
            elif stepper.pulling and move < 0.5:
                stepper.end_pull(rng.choice(stepper.pulling), ok=rng.random() < 0.8)
            elif stepper.scheduler.parked and move < 0.55:
                stepper.resume(rng.choice(list(stepper.scheduler.parked)), rng.random() < 0.5)
            elif move < 0.6:
                stepper.scheduler.prefill_budget = rng.choice([0, 1, 3, 10, 100, None])
            else:
                stepper.step()
        for name in list(stepper.scheduler.parked):
            stepper.resume(name)
        stepper.scheduler.prefill_budget = rng.choice([1, 5, None])
        stepper.drain()
        assert [a.answer.num_tokens for a, _ in answers] == [length for _, length in answers]
        assert stepper.kv.num_used == 0


def test_an_engine_obeys_reports_and_counts() -> None:
    with boxed(chunk=16, **ROOMY) as box:
        box.d.set_prefill_budget(4)
        prompt = list(range(30))
        box.start("r", "whole", prompt, SamplingSpec(max_tokens=3, ignore_eos=True))
        seen = []
        while box.d.has_requests():
            box.step(box.d)
            seen += box.report.progress
            assert box.report.preempted == []
        assert seen == [("r", done) for done in range(4, 30, 4)]
        stats = box.d.stats()
        assert (stats.num_steps, stats.num_computed_prompt_tokens) == (8 + 2, 30)
        assert stats.busy_s > 0
        assert stats.num_free_blocks == box.settings.num_blocks
        assert box.clients["r"].answer == box.expected(box.clients["r"])


def test_steps_that_compute_nothing_are_not_counted() -> None:
    with boxed(**ROOMY) as box:
        box.d.set_prefill_budget(0)
        box.start("r", "whole", [1, 2, 3], SamplingSpec(max_tokens=3))
        box.prefill("pulled")
        box.decode("pulled")
        for _ in range(3):
            box.step(box.d)
        assert [done.ok for done in box.seen(PullDone)] == [True]
        assert len(box.clients["pulled"].token_ids) == 2
        assert box.d.stats().num_steps == 2
        assert not box.d.was_idle_step()
        box.d.abort(["pulled"])
        box.step(box.d)
        assert box.d.was_idle_step()
        box.d.set_prefill_budget(None)
        box.drain()
        assert box.clients["r"].answer == box.expected(box.clients["r"])
