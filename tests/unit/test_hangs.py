"""A worker that never answers is killed, one that answers late is not, and nobody else is hurt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from tinfer.master.hangs import HangWatch
from tinfer.master.supervisor import Life, Supervisor
from tinfer.wire.links import Incarnation


@dataclass
class Slot:
    worker_id: str
    generation: int = 1
    life: Life = Life.READY

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(self.worker_id, self.generation)


@dataclass
class Box:
    """Two workers and who was pinged and killed."""

    slots: dict[str, Slot] = field(default_factory=lambda: {n: Slot(n) for n in ("a", "b")})
    pinged: list[Incarnation] = field(default_factory=list)
    killed: list[tuple[str, str]] = field(default_factory=list)

    def end_worker(self, slot: Slot, reason: str, cause: str) -> None:
        assert cause == "hung"
        self.killed.append((slot.worker_id, reason))

    def watch(self, timeout_s: float) -> HangWatch:
        supervisor = cast(Supervisor, self)
        return HangWatch(supervisor, lambda who, ping: self.pinged.append(who), timeout_s)


A, B = Incarnation("a", 1), Incarnation("b", 1)


@pytest.mark.parametrize(("timeout_s", "num_looks"), [(3.0, 5), (10.0, 11), (0.4, 5)])
def test_who_does_not_answer_in_time_is_killed(timeout_s: float, num_looks: int) -> None:
    box = Box()
    watch = box.watch(timeout_s)
    for _ in range(num_looks - 1):
        watch.look()
        watch.answered(B)
    assert box.killed == [] and box.pinged.count(A) == 1
    assert box.pinged.count(B) == num_looks - 1
    watch.look()
    assert box.killed == [("a", f"hung: no step ended in {timeout_s:g} s")]


def test_a_late_answer_is_one_all_the_same() -> None:
    box = Box()
    watch = box.watch(3.0)
    for _ in range(20):
        for _ in range(3):
            watch.look()
        watch.answered(A)
        watch.answered(B)
    assert box.killed == []


def test_each_incarnation_begins_anew_and_only_those_that_serve_are_asked() -> None:
    box = Box()
    watch = box.watch(3.0)
    for number in range(20):
        box.slots["a"].generation = number // 3
        box.slots["b"].life = Life.STARTING if number % 3 == 2 else Life.READY
        watch.look()
    assert box.killed == []
    asked: Any = {who.generation for who in box.pinged if who.worker_id == "a"}
    assert asked == set(range(7))
