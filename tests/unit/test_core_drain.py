"""A worker that drains: nothing starts there, what is there ends there, and then it says so."""

from __future__ import annotations

import pytest

from tests.unit.core_box import KEY, Box
from tinfer.core.events import (
    DrainAsked,
    Drained,
    LeaseEnded,
    StartDecode,
    StartPrefill,
    StartWhole,
    WorkerDown,
    WorkerFinished,
)
from tinfer.core.types import LeaseKey, Phase


def test_an_idle_worker_has_drained_at_once_and_says_so_once() -> None:
    box = Box("p d")
    assert box.on(DrainAsked("d", 0)) == [Drained("d", 0)]
    assert box.on(DrainAsked("d", 0)) == []


def test_an_incarnation_that_is_not_up_does_not_drain() -> None:
    box = Box("p d")
    assert box.on(DrainAsked("d", 7), DrainAsked("x", 0)) == []


def test_a_decode_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    box = Box("p d d2")
    box.to_decoding()
    assert box.on(DrainAsked("d", 0)) == []
    box.arrive("s")
    assert box.prefilled("s", 1) == [StartDecode("s", "d2", 0, LeaseKey("p", 0, 1, 0))]
    # It has read the blocks of another's: that lease is not its own.
    done = box.on(WorkerFinished("r", "d", 0, answered=True))
    assert done[-1] == Drained("d", 0)


def test_a_prefill_worker_waits_until_its_blocks_are_read() -> None:
    box = Box("p p2 d")
    box.to_handoff()
    assert box.on(DrainAsked("p", 0)) == []
    assert [type(a) for a in box.arrive("s")] == [StartPrefill]
    assert box.worker("p2").num_seqs == 1
    assert box.on(LeaseEnded(KEY)) == [Drained("p", 0)]


def test_nothing_is_split_towards_the_only_reader_once_it_drains() -> None:
    box = Box("p d")
    box.to_decoding()
    box.on(DrainAsked("d", 0))
    assert box.arrive("s") == [StartWhole("s", "p", 0)]


def test_what_waits_for_the_only_reader_begins_again_elsewhere() -> None:
    box = Box("p d")
    box.to_waiting()
    actions = box.on(DrainAsked("d", 0))
    assert StartWhole("r", "p", 0) in actions
    assert box.phase() is Phase.PREFILLING


def test_a_worker_that_dies_while_it_drains_is_never_said_to_have_drained() -> None:
    box = Box("p d d2")
    box.to_decoding()
    box.on(DrainAsked("d", 0))
    actions = box.on(WorkerDown("d", 0))
    assert not any(isinstance(action, Drained) for action in actions)
    box.up("d", 1)
    assert not box.worker("d").is_draining


@pytest.mark.parametrize("roles", ["p d", "b b2"])
def test_a_second_drain_of_another_worker_is_its_own(roles: str) -> None:
    box = Box(roles)
    first, second = roles.split()
    assert box.on(DrainAsked(first, 0)) == [Drained(first, 0)]
    assert box.on(DrainAsked(second, 0)) == [Drained(second, 0)]
    assert box.arrive() == []
