"""The scheduler against workers in every interleaving; see `scheduler_world` for what must hold.

Hypothesis finds and shrinks short histories; the walks go deep, where many requests are under way.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.property.scheduler_world import World
from tinfer.core.events import Resume
from tinfer.core.policies.registry import (
    BUDGETS,
    DECODE_ADMISSIONS,
    DECODE_CHOICES,
    DISPATCHES,
    FLIPS,
    PREEMPTIONS,
    PREFILL_ORDERS,
    ROUTES,
    START_CHOICES,
)
from tinfer.core.types import Role, Route, SchedulerConfig

FLEETS = ["PD", "PPDD", "BD", "BB", "PBD", "PB", "D", "PPD"]
WORK = ["receive", "step", "deliver"]
DISTURB = ["kill", "notice", "notice", "restart", "restart", "restart", "give up", "expect"]
WISHES = [None, None, Route.SPLIT, Route.WHOLE]
ENDS = [0, 0, 0, 0, 0, 1, 2, 3]
INDEX = st.integers(0, 99)


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of clients, workers, their messages and their deaths."""

    world: World | None = None

    @initialize(fleet=st.sampled_from(FLEETS), order=st.randoms(use_true_random=False))
    def start(self, fleet: str, order: random.Random) -> None:
        self.world = World(fleet, order)

    @rule(tokens=st.integers(1, 30), out=st.sampled_from([2, 1]), wish=st.sampled_from(WISHES))
    def arrive(self, tokens: int, out: int, wish: Route | None) -> None:
        assert self.world is not None
        self.world.arrive(tokens, out, wish)

    @rule(index=INDEX)
    def cancel(self, index: int) -> None:
        assert self.world is not None
        self.world.cancel(index)

    @rule(
        moves=st.lists(
            st.tuples(st.sampled_from(WORK), INDEX, st.sampled_from(ENDS)), min_size=3, max_size=12
        )
    )
    def work(self, moves: list[tuple[str, int, int]]) -> None:
        assert self.world is not None
        for kind, index, choice in moves:
            self.world.work(kind, index, choice)

    @rule(index=INDEX, kind=st.sampled_from(DISTURB))
    def disturb(self, index: int, kind: str) -> None:
        assert self.world is not None
        self.world.disturb(index, kind)

    @rule(index=INDEX)
    def drain(self, index: int) -> None:
        assert self.world is not None
        self.world.drain(index)

    def teardown(self) -> None:
        if self.world is not None:
            self.world.finish()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=40)


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_long_walk_keeps_every_account(fleet: str, seed: int) -> None:
    walk(fleet, random.Random(seed), num_moves=1500)


def walk(fleet: str, rng: random.Random, num_moves: int) -> None:
    """Mostly work, some arrivals, few cancels, and a death now and then."""
    world = World(fleet, rng)
    for _ in range(num_moves):
        dice = rng.random()
        if dice < 0.10:
            world.arrive(rng.randint(1, 30), rng.choice([2, 2, 2, 1]), rng.choice(WISHES))
        elif dice < 0.14:
            world.cancel(rng.randrange(100))
        elif dice < 0.18:
            world.disturb(rng.randrange(100), rng.choice(DISTURB))
        elif dice < 0.185:
            world.drain(rng.randrange(100))
        else:
            world.work(rng.choice(WORK), rng.randrange(100), rng.choice(ENDS))
    world.finish()


def some_config(rng: random.Random) -> SchedulerConfig:
    """Any policy of each kind."""
    kinds: dict[str, Iterable[str]] = {
        "route": ROUTES,
        "prefill_order": PREFILL_ORDERS,
        "prefill_choice": START_CHOICES,
        "whole_choice": START_CHOICES,
        "decode_choice": DECODE_CHOICES,
        "decode_admission": DECODE_ADMISSIONS,
        "prefill_budget": BUDGETS,
        "flip": FLIPS,
        "dispatch": DISPATCHES,
        "preemption": PREEMPTIONS,
    }
    chosen: dict[str, Any] = {o: rng.choice(sorted(names)) for o, names in kinds.items()}
    return SchedulerConfig(
        **chosen,
        max_num_queued_reqs=4,
        prefill_sched_batch=rng.choice((1, 3)),
        ttft_deadline_s=rng.choice((None, 5.0)),
        seed=rng.randrange(9),
    )


MOVES = ("arrive", "cancel", "disturb", "report", "ask role", "drain", "work")
WILD = (15, 3, 3, 10, 2, 1, 66)
CALM = (4, 0.5, 0.3, 3, 0.2, 0.1, 92)


def walk_on(world: World, rng: random.Random, weights: Sequence[float], num: int) -> None:
    """Work, with everything that a worker may say and everything that may happen to it."""
    for move in rng.choices(MOVES, weights, k=num):
        if move == "arrive":
            hashes = tuple(range(rng.randrange(4)))
            out = rng.choice((1, 2, 5, 400))
            world.arrive(rng.randint(1, 30), out, rng.choice(WISHES), hashes)
        elif move == "cancel":
            world.cancel(rng.randrange(100))
        elif move == "disturb":
            world.disturb(rng.randrange(100), rng.choice(DISTURB))
        elif move == "report":
            world.report(rng.randrange(100), rng.randint(1, 50))
        elif move == "ask role":
            world.ask_role(rng.randrange(100), rng.choice((Role.PREFILL, Role.DECODE)))
        elif move == "drain":
            world.drain(rng.randrange(100))
        else:
            world.work(rng.choice(WORK), rng.randrange(100), rng.choice(ENDS))


@pytest.mark.parametrize("seed", range(60))
def test_whatever_decides_no_request_is_lost_and_no_account_stays_open(seed: int) -> None:
    rng = random.Random(f"policies {seed}")
    fleet = rng.choice([*FLEETS, "PPDD", "PDDD", "PPPD"])
    world = World(fleet, rng, some_config(rng))
    walk_on(world, rng, WILD, 400)
    world.finish()


def test_what_lost_its_blocks_goes_on_wherever_they_are_computed_again() -> None:
    """And every word of a worker that crosses the answer, or a death, leaves nothing behind."""
    outcomes: Counter[str] = Counter()
    for seed in range(36):
        rng = random.Random(f"preemption {seed}")
        config = SchedulerConfig(route="split", preemption="elsewhere", max_num_queued_reqs=4)
        world = World(rng.choice(["PD", "PPDD", "PBD", "PPD"]), rng, config)
        walk_on(world, rng, CALM, 4000)
        world.finish()
        for _, actions in world.log:
            for action in actions:
                has_lease = isinstance(action, Resume) and action.lease is not None
                outcomes[type(action).__name__ + " with blocks" * has_lease] += 1
    assert outcomes["StartReprefill"] > 100
    assert outcomes["Resume with blocks"] > 30
    assert outcomes["Resume"] > 30
