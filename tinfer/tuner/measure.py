"""Measures one box: steps on the worker that comes first, then hand-offs from it to the second."""

from __future__ import annotations

import random

from msgspec import Struct

from tinfer.tune.points import HandoffPoint, KvRoom, StepPoint
from tinfer.tuner import design
from tinfer.tuner.driver import Driver, Workers
from tinfer.tuner.handoff import HandoffDriver, handoffs
from tinfer.tuner.rounds import Progress
from tinfer.tuner.stages import Stages


class Measured(Struct, frozen=True, kw_only=True):
    """Everything that was measured; `Tuning` says what the fields are."""

    loop_s: float
    waited_share: float
    kv: KvRoom
    steps: list[StepPoint]
    handoffs: list[HandoffPoint]


async def measure(workers: Workers, repeats: int, seed: int, progress: Progress) -> Measured:
    """Both workers have to be idle, and are so at the end.

    Without a second worker there are no hand-offs. Raises `StartError` where a worker fails or is
    too small to be measured.
    """
    rng = random.Random(seed)
    first, *others = workers.ready
    stages = Stages(Driver(workers, first, rng), repeats, progress)
    steps = await stages.all_steps()
    moved: list[HandoffPoint] = []
    for reader in others[:1]:
        sizes = design.handoff_sizes(stages.room, stages.prefill_token_s)
        driver = HandoffDriver(workers, first, reader, rng)
        moved = await handoffs(driver, sizes, repeats, progress)
    return Measured(
        loop_s=stages.loop_s,
        waited_share=stages.waited_share,
        kv=stages.room,
        steps=steps,
        handoffs=moved,
    )
