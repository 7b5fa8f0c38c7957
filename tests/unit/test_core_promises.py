"""Early refusal: who would be answered too late is told so at once, and nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.core_box import Box
from tinfer.core.costs import CostModel
from tinfer.core.events import Action, Arrived, Cancelled, Fail, FirstToken, Stepped, Tick
from tinfer.core.promises import Pace
from tinfer.core.types import Capacity

# 10 ms per prompt token, chunks of 50: a prompt of 20 tokens takes 0.21 s.
COSTS = CostModel(base_s=0.01, prefill_token_s=0.01, decode_seq_s=0.02, kv_token_s=0.0)
ROOMY = Capacity(num_blocks=1000, block_tokens=16, max_num_seqs=64, chunk_tokens=50)


class Timed(Box):
    """A box whose clock the test sets."""

    now_s = 0.0

    def on(self, *events: Any) -> list[Action]:
        return [a for event in events for a in self.scheduler.on_event(event, self.now_s)]


def boxed(roles: str = "b", **config: object) -> Timed:
    return Timed(roles, capacity=ROOMY, **{"route": "whole", "costs": COSTS, **config})


def refusals(actions: list[Action]) -> list[Fail]:
    return [action for action in actions if isinstance(action, Fail)]


def test_without_an_slo_nobody_is_refused() -> None:
    box = boxed()
    assert not any(refusals(box.arrive(f"r{n}")) for n in range(200))


def test_what_would_wait_too_long_is_refused_with_the_time_when_it_would_not() -> None:
    box = boxed(slo_ttft_s=1.0)
    taken = 0
    while not (failed := refusals(box.arrive(f"r{taken}"))):
        taken += 1
        assert taken < 100
    # 0.75 s of the SLO are for prompts of 0.21 s.
    assert taken == 3
    (fail,) = failed
    assert fail.cause == "slo"
    assert fail.message == (
        "too busy: 830 ms to the first token are predicted, and the SLO is 1000 ms"
    )
    assert fail.retry_after_s == pytest.approx(0.83 - 0.75)
    # What is refused leaves no trace.
    assert box.scheduler.ledger_snapshot().open_requests == taken


def test_two_workers_take_twice_as_much() -> None:
    taken = {}
    for roles in ("b", "b b2"):
        box = boxed(roles, slo_ttft_s=2.0)
        taken[roles] = sum(not refusals(box.arrive(f"r{n}")) for n in range(40))
    assert taken["b b2"] >= 2 * taken["b"] - 1


def test_a_prompt_that_is_late_by_itself_is_taken_when_it_need_not_wait() -> None:
    box = boxed(slo_ttft_s=0.5)
    assert not refusals(box.arrive("long", prompt=400))
    assert refusals(box.arrive("short"))
    box = boxed(slo_ttft_s=0.5)
    for number in range(2):
        assert not refusals(box.arrive(f"r{number}", prompt=10))
    assert not refusals(box.arrive("long", prompt=400)), "a tenth of its own time is no wait"
    assert refusals(box.arrive("longer", prompt=401))


def test_one_that_has_waited_for_too_long_keeps_others_out() -> None:
    """Whatever it waits for: what was predicted for it was wrong."""
    box = boxed(slo_ttft_s=1.0)
    box.arrive("r", prompt=1)
    box.now_s = 0.7
    assert not refusals(box.arrive("s", prompt=1))
    box.now_s = 0.8
    (fail,) = refusals(box.arrive("t", prompt=1))
    assert "800 ms to the first token" in fail.message
    box.on(FirstToken("r", "b", 0))
    assert not refusals(box.arrive("u", prompt=1))


def test_an_answer_that_would_be_too_slow_is_refused() -> None:
    # A step of n sequences takes 0.01 + 0.02 n: three quarters of 0.2 s are seven of them.
    box = boxed(slo_tpot_s=0.2)
    results = [refusals(box.arrive(f"r{n}", prompt=1)) for n in range(12)]
    assert [bool(one) for one in results] == [False] * 7 + [True] * 5
    assert results[7][0].message.startswith("too busy: 170 ms per token are predicted")
    assert results[7][0].retry_after_s > 0
    for number in range(3):
        box.on(FirstToken(f"r{number}", "b", 0))
        box.on(Cancelled(f"r{number}"))
    assert refusals(box.arrive("late", prompt=1)), "a worker has not let go of them"


def test_the_slowness_of_a_worker_counts() -> None:
    box = boxed(slo_tpot_s=0.2)
    box.arrive("r", prompt=1)
    box.on(FirstToken("r", "b", 0))
    for number in range(1, 60):  # steps of 0.06 s, twice what the model says
        box.now_s += 0.06
        box.on(Stepped("b", 0, number, number * 0.06, 1, 900))
    taken = sum(not refusals(box.arrive(f"s{n}", prompt=1)) for n in range(12))
    assert taken < 5


def test_the_pace_of_a_queue_is_that_of_when_there_was_one() -> None:
    pace = Pace()
    pace.look(0, 0.0)
    pace.started(1000)  # it did not wait
    pace.look(0, 5.0)
    assert pace.tokens_per_s is None
    pace.look(3, 6.0)
    pace.look(3, 6.2)
    assert pace.tokens_per_s is None, "too short a look"
    for number in range(40):
        pace.started(20)
        pace.look(3, 6.4 + 0.2 * number)
    assert pace.tokens_per_s == pytest.approx(100, rel=0.1)
    pace.look(0, 14.4)
    pace.look(0, 99.0)  # an hour without a queue says nothing about one
    assert pace.tokens_per_s == pytest.approx(100, rel=0.1)


def test_a_queue_that_moves_slower_than_it_should_is_believed() -> None:
    """Seats are what is short here: the prompts alone would be computed in no time."""
    few = Capacity(num_blocks=1000, block_tokens=16, max_num_seqs=1, chunk_tokens=50)
    box = Timed("b", capacity=few, route="whole", costs=COSTS, slo_ttft_s=30.0)
    number = 0
    for second in range(30):
        box.now_s = float(second)
        if second % 5 == 0:
            box.arrive(f"r{number}", prompt=1)
            box.arrive(f"r{number + 1}", prompt=1)
            number += 2
        box.on(Tick())
    # One has its seat for ever; of the nine that wait the first has for 30 s.
    assert refusals(box.on(Arrived("new", 1, 8)))
