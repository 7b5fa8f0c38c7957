"""One rule of the scheduler per test: cancels, leases, dying workers, late messages."""

from __future__ import annotations

import pytest

from tests.unit.core_box import CAPACITY, HAND_OFF, KEY, Box
from tinfer.core.events import (
    AbortOn,
    Cancelled,
    Event,
    ExtendLease,
    Fail,
    FirstToken,
    LeaseEnded,
    LeaseOpened,
    LeaseOverdue,
    Prefilled,
    Pulled,
    ReleaseLease,
    Remainder,
    StartDecode,
    StartPrefill,
    StartWhole,
    Tick,
    WorkerDown,
    WorkerExpected,
    WorkerFinished,
    WorkerGone,
    WorkerUp,
)
from tinfer.core.ledger import LedgerError
from tinfer.core.types import (
    Phase,
    Role,
)


@pytest.fixture
def box() -> Box:
    return Box()


# --- cancel ----------------------------------------------------------------------------------


def test_cancel_in_the_queue(box: Box) -> None:
    box.arrive("a", prompt=100)
    box.arrive()
    assert box.on(Cancelled("r"), Cancelled("r")) == []
    assert box.phase() is None


@pytest.mark.parametrize("answered", [True, False])
def test_cancel_while_prefilling(box: Box, answered: bool) -> None:
    box.arrive(prompt=100)
    assert box.on(Cancelled("r")) == [AbortOn("r", "p", 0)]
    assert box.phase() is None
    assert box.scheduler.ledger_snapshot().zombies == 1
    assert box.arrive("b") == []  # the budget is still taken
    assert box.on(WorkerFinished("r", "p", 0, answered)) == [StartPrefill("b", "p", 0)]


def test_a_prefill_that_beats_its_abort_is_released_at_once(box: Box) -> None:
    box.arrive()
    box.on(Cancelled("r"))
    assert box.prefilled() == [ReleaseLease(KEY)]
    assert box.on(WorkerFinished("r", "p", 0, False), LeaseEnded(KEY)) == []
    box.assert_zero()


def test_cancel_before_the_decode_worker_was_told(box: Box) -> None:
    box.to_waiting()
    assert box.on(Cancelled("r")) == [ReleaseLease(KEY)]
    assert box.scheduler.ledger_snapshot().zombies == 0
    assert box.on(LeaseOverdue(KEY)) == []
    assert box.on(WorkerFinished("f0", "d", 0, True), LeaseEnded(KEY)) == []


def test_cancel_of_a_pull_leaves_the_lease_to_the_reader(box: Box) -> None:
    box.to_handoff()
    assert box.on(Cancelled("r")) == [AbortOn("r", "d", 0)]
    assert box.on(WorkerFinished("r", "d", 0, False)) == []
    assert box.on(LeaseOverdue(KEY)) == [ExtendLease(KEY)]
    assert box.on(Pulled("r", "d", 0, False), LeaseEnded(KEY)) == []
    box.assert_zero()


def test_cancel_while_decoding(box: Box) -> None:
    box.to_decoding()
    assert box.on(Cancelled("r")) == [AbortOn("r", "d", 0)]
    assert box.worker("d").num_seqs == 1
    assert box.on(LeaseEnded(KEY), WorkerFinished("r", "d", 0, True)) == []
    box.assert_zero()


def test_a_cancelled_whole_request_keeps_its_seat_until_the_worker_stops() -> None:
    box = Box(route="whole")
    box.arrive()
    assert box.on(Cancelled("r")) == [AbortOn("r", "d", 0)]
    assert box.on(FirstToken("r", "d", 0)) == []
    assert (box.worker("d").num_seqs, box.worker("d").outstanding_prefill_tokens) == (1, 0)
    box.on(WorkerFinished("r", "d", 0, False))
    box.assert_zero()


# --- leases ----------------------------------------------------------------------------------


def test_a_refused_handoff_is_released(box: Box) -> None:
    box.to_handoff()
    refused = WorkerFinished("r", "d", 0, answered=False, refused=True)
    assert box.on(refused) == [ReleaseLease(KEY)]
    assert box.on(LeaseOverdue(KEY), LeaseEnded(KEY)) == []
    box.assert_zero()


def test_an_overdue_lease_is_extended_while_somebody_may_read_it(box: Box) -> None:
    box.to_waiting()
    assert box.on(LeaseOverdue(KEY)) == [ExtendLease(KEY)]
    assert box.on(WorkerFinished("f0", "d", 0, True)) == [HAND_OFF]
    assert box.on(LeaseOverdue(KEY)) == [ExtendLease(KEY)]


def test_only_its_reader_can_say_that_a_lease_is_read(box: Box) -> None:
    box.to_handoff()
    assert box.on(Pulled("r", "p", 0, True), LeaseOverdue(KEY)) == [ExtendLease(KEY)]
    assert box.phase() is Phase.HANDOFF


def test_an_overdue_lease_whose_reader_has_stopped_is_released_once(box: Box) -> None:
    box.to_decoding()
    assert box.on(LeaseOverdue(KEY), LeaseOverdue(KEY)) == [ReleaseLease(KEY)]
    assert box.on(LeaseEnded(KEY), LeaseOverdue(KEY)) == []


def test_a_lease_ends_once_and_not_by_itself(box: Box) -> None:
    box.to_waiting()
    with pytest.raises(LedgerError, match="neither read nor released"):
        box.on(LeaseEnded(KEY))
    box.on(Cancelled("r"), LeaseEnded(KEY))
    with pytest.raises(LedgerError, match="not open"):
        box.on(LeaseEnded(KEY))


# --- dying workers ---------------------------------------------------------------------------


def test_a_prefill_begins_again_elsewhere(box: Box) -> None:
    box.arrive()
    assert box.on(WorkerDown("p", 0)) == [StartWhole("r", "d", 0)]
    assert box.on(WorkerDown("p", 0)) == []
    box.on(FirstToken("r", "d", 0), WorkerFinished("r", "d", 0, True))
    box.assert_zero()


def test_a_decode_begins_again_elsewhere_and_frees_its_source(box: Box) -> None:
    box.to_decoding()
    assert box.on(WorkerDown("d", 0)) == [ReleaseLease(KEY), StartWhole("r", "p", 0)]
    box.on(LeaseEnded(KEY), FirstToken("r", "p", 0), WorkerFinished("r", "p", 0, True))
    box.assert_zero()


def test_what_was_emitted_counts_as_prompt_when_it_begins_again(box: Box) -> None:
    box.arrive(prompt=20, out=40)
    assert box.prefilled() == [HAND_OFF]
    box.on(Pulled("r", "d", 0, True))
    left = Remainder("r", prompt_tokens=45, max_output_tokens=15, num_emitted=33)
    _, start = box.on(WorkerDown("d", 0, (left,)))
    assert start == StartWhole("r", "p", 0)
    assert box.worker("p").outstanding_prefill_tokens == 45


def test_a_pull_whose_reader_died_waits_for_another(box: Box) -> None:
    box.to_handoff()
    assert box.on(WorkerDown("d", 0)) == []
    snapshot = box.scheduler.ledger_snapshot()
    assert (snapshot.pulls, snapshot.leases, box.phase()) == (0, 1, Phase.HANDOFF)
    assert box.on(LeaseOverdue(KEY)) == [ExtendLease(KEY)]
    assert box.up("d", 1) == [StartDecode("r", "d", 1, KEY)]
    box.on(Pulled("r", "d", 1, True), LeaseEnded(KEY), WorkerFinished("r", "d", 1, True))
    box.assert_zero()


def test_a_dead_reader_may_have_said_that_it_has_read() -> None:
    """The owner has seen it and freed the blocks: nothing is left to read."""
    box = Box("p d")
    box.to_handoff()
    assert box.on(WorkerDown("d", 0)) == []
    assert box.on(LeaseEnded(KEY)) == [StartWhole("r", "p", 0)]
    box = Box("p d d2")
    box.arrive()
    (start,) = box.prefilled()
    assert isinstance(start, StartDecode)
    other = "d2" if start.worker_id == "d" else "d"
    assert box.on(WorkerDown(start.worker_id, 0)) == [StartDecode("r", other, 0, KEY)]
    assert box.on(LeaseEnded(KEY), Pulled("r", other, 0, False)) == []
    box.on(WorkerFinished("r", other, 0, True))
    box.assert_zero()


def test_a_waiting_handoff_begins_again_when_its_source_dies(box: Box) -> None:
    box.to_waiting()
    assert box.on(WorkerDown("p", 0)) == []
    assert box.phase() is Phase.QUEUED
    assert box.on(WorkerFinished("f0", "d", 0, True)) == [StartWhole("r", "d", 0)]


def test_a_request_that_kills_is_refused_after_a_few_workers() -> None:
    box = Box("p")
    box.arrive()
    for generation in range(3):
        assert box.on(WorkerDown("p", generation)) == []
        assert box.up("p", generation + 1) == [StartWhole("r", "p", generation + 1)]
    (failed,) = box.on(WorkerDown("p", 3))
    assert isinstance(failed, Fail) and failed.cause == "worker-lost"
    assert "4 workers in a row" in failed.message
    box.assert_zero()


def test_a_token_more_clears_a_request(box: Box) -> None:
    box.arrive()
    for generation in range(9):
        left = Remainder("r", 20, 8, num_emitted=generation + 1)
        box.on(WorkerDown("p", generation, (left,)))
        box.on(WorkerDown("d", generation, (left,)))
        assert box.phase() is Phase.QUEUED
        box.up("p", generation + 1)
        box.up("d", generation + 1)
        assert box.phase() is Phase.PREFILLING


def test_suspects_run_one_at_a_time(box: Box) -> None:
    """Three prompts die with their worker: which of them did it shows when each is alone."""
    for name in "abc":
        box.arrive(name, prompt=10)
    started = box.on(WorkerDown("p", 0))
    assert started == [StartWhole("a", "d", 0)]
    assert box.arrive("fresh", prompt=10) == [StartWhole("fresh", "d", 0)]
    assert box.on(FirstToken("a", "d", 0)) == [StartWhole("b", "d", 0)]
    assert box.up("p", 1) == [StartPrefill("c", "p", 1)]


def test_a_pull_outlives_its_source(box: Box) -> None:
    box.to_handoff()
    assert box.on(WorkerDown("p", 0)) == []
    assert box.scheduler.ledger_snapshot().leases == 0
    assert box.on(Pulled("r", "d", 0, True), LeaseEnded(KEY), LeaseOverdue(KEY)) == []
    assert box.on(WorkerFinished("r", "d", 0, True)) == []
    box.assert_zero()


def test_a_zombie_dies_with_its_worker(box: Box) -> None:
    box.to_handoff()
    box.on(Cancelled("r"))
    assert box.on(WorkerDown("d", 0)) == [ReleaseLease(KEY)]
    box.on(LeaseEnded(KEY))
    box.assert_zero()


def test_old_incarnations_are_not_heard(box: Box) -> None:
    box.arrive()
    box.on(WorkerDown("p", 0), WorkerFinished("r", "d", 0, True))
    box.up("p", 1)
    assert box.arrive("s") == [StartPrefill("s", "p", 1)]
    stale: list[Event] = [
        Prefilled("s", "p", 0, KEY, 2),
        FirstToken("s", "p", 0),
        WorkerFinished("s", "p", 0, True),
        LeaseOpened(KEY, 2),
        LeaseEnded(KEY),
        LeaseOverdue(KEY),
        WorkerDown("p", 0),
        WorkerUp("p", 0, Role.PREFILL, CAPACITY),
        Pulled("s", "p", 0, True),
    ]
    assert box.on(*stale) == []
    assert box.phase("s") is Phase.PREFILLING


def test_the_queue_waits_for_a_replacement() -> None:
    box = Box("p")
    box.arrive("a", prompt=100)
    box.arrive("b")
    assert box.on(WorkerDown("p", 0)) == []
    assert box.phase("a") is box.phase("b") is Phase.QUEUED
    assert box.up("p", 1) == [StartWhole("a", "p", 1)]
    assert box.on(FirstToken("a", "p", 1)) == [StartWhole("b", "p", 1)]


@pytest.mark.parametrize("gone_first", [True, False])
def test_the_queue_fails_when_the_last_worker_is_given_up(gone_first: bool) -> None:
    box = Box("p")
    box.arrive("a", prompt=100)
    box.arrive("b")
    events: list[Event] = [WorkerGone("p"), WorkerDown("p", 0)]
    fails = box.on(*events if gone_first else reversed(events))
    assert [(x.request_id, x.cause) for x in fails if isinstance(x, Fail)] == [
        ("a", "no-worker"),
        ("b", "no-worker"),
    ]
    box.assert_zero()


def test_the_queue_waits_for_a_worker_that_has_yet_to_start() -> None:
    box = Box("p")
    box.arrive("a", prompt=100)
    box.arrive("b")
    box.on(WorkerExpected("d", Role.DECODE), WorkerDown("p", 0), WorkerGone("p"))
    assert box.phase("b") is Phase.QUEUED
    fails = box.on(WorkerGone("d"))
    assert [one.request_id for one in fails if isinstance(one, Fail)] == ["a", "b"]


def test_unknown_ids_are_ignored(box: Box) -> None:
    unknown: list[Event] = [
        Cancelled("x"),
        FirstToken("x", "p", 0),
        Pulled("x", "d", 0, True),
        WorkerFinished("x", "d", 0, True),
        LeaseOverdue(KEY),
        WorkerDown("x", 0),
        Tick(),
    ]
    assert box.on(*unknown) == []
    assert box.prefilled("x") == [ReleaseLease(KEY)]
