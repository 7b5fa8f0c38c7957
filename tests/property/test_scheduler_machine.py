"""The scheduler against workers in every interleaving; see `scheduler_world` for what must hold.

Hypothesis finds and shrinks short histories; the walks go deep, where many requests are under way.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.property.scheduler_world import World
from tinfer.core.types import Route

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

    @rule(tokens=st.integers(0, 30), out=st.sampled_from([2, 1]), wish=st.sampled_from(WISHES))
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
            world.arrive(rng.randint(0, 30), rng.choice([2, 2, 2, 1]), rng.choice(WISHES))
        elif dice < 0.14:
            world.cancel(rng.randrange(100))
        elif dice < 0.18:
            world.disturb(rng.randrange(100), rng.choice(DISTURB))
        else:
            world.work(rng.choice(WORK), rng.randrange(100), rng.choice(ENDS))
    world.finish()
