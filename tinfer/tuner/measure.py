"""Measures one box: steps on the worker that comes first, beside a busy second one, then hand-offs
from the one to the other."""

from __future__ import annotations

import random

from msgspec import Struct

from tinfer.tune.points import HandoffPoint, KvRoom, StepPoint
from tinfer.tuner import design
from tinfer.tuner.driver import Driver, Workers
from tinfer.tuner.handoff import HandoffDriver, handoffs
from tinfer.tuner.neighbour import Neighbour
from tinfer.tuner.rounds import Progress
from tinfer.tuner.stages import Stages, room_of


class Measured(Struct, frozen=True, kw_only=True):
    """Everything that was measured; `Tuning` says what the fields are."""

    loop_s: float
    waited_share: float
    kv: KvRoom
    steps: list[StepPoint]
    handoffs: list[HandoffPoint]
    beside_others: bool


async def measure(
    workers: Workers, repeats: int, seed: int, progress: Progress, alone: bool = False
) -> Measured:
    """Both workers have to be idle, and are so at the end; `alone`: the second one all the time.

    Without a second worker there are no hand-offs. Raises `StartError` where a worker fails or is
    too small to be measured.
    """
    rng = random.Random(seed)
    first, *others = workers.ready
    neighbours = [] if alone else [_neighbour(workers, name, seed) for name in others[:1]]
    driver = Driver(workers, first, rng, *(one.heard for one in neighbours))
    stages = Stages(driver, repeats, progress)
    for one in neighbours:
        one.begin()
    steps = await stages.all_steps()
    for one in neighbours:
        await one.end()
    moved: list[HandoffPoint] = []
    for reader in others[:1]:
        sizes = design.handoff_sizes(stages.room, stages.prefill_token_s)
        mover = HandoffDriver(workers, first, reader, rng)
        moved = await handoffs(mover, sizes, repeats, progress)
    return Measured(
        loop_s=stages.loop_s,
        waited_share=stages.waited_share,
        kv=stages.room,
        steps=steps,
        handoffs=moved,
        beside_others=bool(neighbours),
    )


def _neighbour(workers: Workers, worker_id: str, seed: int) -> Neighbour:
    """With prompts of its own draw: those of the measurement do not depend on how fast it is."""
    rng = random.Random(f"neighbour/{seed}")
    return Neighbour(workers, worker_id, room_of(workers.ready[worker_id]), rng)
