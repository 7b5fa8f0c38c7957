"""One rule of the scheduler per test: routes, queue, placement, decode admission."""

from __future__ import annotations

import pytest

from tests.unit.core_box import HAND_OFF, KEY, Box
from tinfer.core.events import (
    Action,
    Arrived,
    Cancelled,
    Event,
    Fail,
    FirstToken,
    LeaseEnded,
    LeaseOpened,
    Pulled,
    ReleaseLease,
    StartDecode,
    StartPrefill,
    StartWhole,
    Tick,
    WorkerDown,
    WorkerFinished,
    WorkerGone,
)
from tinfer.core.lifecycle import LifecycleError
from tinfer.core.types import (
    Capacity,
    Phase,
    Route,
)


@pytest.fixture
def box() -> Box:
    return Box()


# --- the life of a request -------------------------------------------------------------------


def test_a_split_request_goes_through_every_phase(box: Box) -> None:
    assert box.arrive() == [StartPrefill("r", "p", 0)]
    assert box.phase() is Phase.PREFILLING
    assert box.prefilled() == [HAND_OFF]
    assert box.phase() is Phase.HANDOFF
    snapshot = box.scheduler.ledger_snapshot()
    assert (snapshot.leases, snapshot.pulls, snapshot.held_blocks) == (1, 1, {"d": 0, "p": 2})
    assert snapshot.requests_by_phase["handoff"] == snapshot.open_requests == 1
    assert box.on(Pulled("r", "d", 0, True)) == []
    assert box.phase() is Phase.DECODING
    assert box.scheduler.ledger_snapshot().pulls == 0
    assert box.on(LeaseEnded(KEY), WorkerFinished("r", "d", 0, True)) == []
    assert box.phase() is None
    box.assert_zero()


def test_a_failed_pull_is_computed_again_by_its_reader(box: Box) -> None:
    box.to_handoff()
    assert box.on(Pulled("r", "d", 0, False)) == []
    assert box.phase() is Phase.DECODING


def test_the_owners_word_may_overtake_the_readers(box: Box) -> None:
    box.to_handoff()
    assert box.on(LeaseEnded(KEY)) == []
    assert box.scheduler.ledger_snapshot().pulls == 1
    assert box.on(Pulled("r", "d", 0, True), WorkerFinished("r", "d", 0, True)) == []
    box.assert_zero()


def test_a_whole_request_stays_on_one_worker() -> None:
    box = Box(route="whole")
    assert box.arrive() == [StartWhole("r", "d", 0)]
    box.on(FirstToken("r", "d", 0))
    assert box.phase() is Phase.DECODING
    assert box.worker("d").outstanding_prefill_tokens == 0
    assert box.on(WorkerFinished("r", "d", 0, True)) == []
    box.assert_zero()


def test_a_first_token_can_end_a_split_request(box: Box) -> None:
    box.arrive()
    assert box.on(WorkerFinished("r", "p", 0, True)) == []
    assert box.on(LeaseOpened(KEY, 2)) == [ReleaseLease(KEY)]
    assert box.scheduler.ledger_snapshot().leases == 1
    assert box.on(LeaseEnded(KEY)) == []
    box.assert_zero()


@pytest.mark.parametrize(
    ("config", "wish", "out", "start"),
    [
        ("auto", None, 8, StartWhole("r", "d", 0)),  # an idle box
        ("split", None, 8, StartPrefill("r", "p", 0)),
        ("split", Route.WHOLE, 8, StartWhole("r", "d", 0)),
        ("whole", Route.SPLIT, 8, StartPrefill("r", "p", 0)),
        ("split", Route.SPLIT, 1, StartWhole("r", "d", 0)),
    ],
)
def test_route(config: str, wish: Route | None, out: int, start: Action) -> None:
    assert Box(route=config).on(Arrived("r", 20, out, wish)) == [start]


@pytest.mark.parametrize(("roles", "worker_id"), [("p", "p"), ("d", "d"), ("b1 b2", "b1")])
def test_where_nobody_can_hand_off_a_request_is_whole(roles: str, worker_id: str) -> None:
    assert Box(roles).arrive() == [StartWhole("r", worker_id, 0)]


def test_an_id_arrives_once(box: Box) -> None:
    box.arrive()
    with pytest.raises(LifecycleError, match="twice"):
        box.arrive()


# --- the queue and placement -----------------------------------------------------------------


def test_without_a_worker_a_request_is_refused() -> None:
    (fail,) = Box("").arrive()
    assert isinstance(fail, Fail) and fail.cause == "no-worker"


def test_a_full_queue_refuses_and_takes_again() -> None:
    box = Box(max_num_queued_reqs=1)
    box.arrive("a", prompt=100)
    assert box.arrive("b") == []
    (fail,) = box.arrive("c")
    assert isinstance(fail, Fail) and fail.cause == "queue-full"
    assert box.phase("c") is None
    assert box.prefilled("a") == [StartDecode("a", "d", 0, KEY), StartPrefill("b", "p", 0)]
    assert box.arrive("c") == [StartPrefill("c", "p", 0)]


def test_a_worker_gets_two_chunks_ahead_and_no_more(box: Box) -> None:
    assert box.arrive("a", prompt=99) == [StartPrefill("a", "p", 0)]
    assert box.arrive("b", prompt=500) == [StartPrefill("b", "p", 0)]
    assert box.arrive("c", prompt=1) == []
    box.prefilled("a")
    assert box.phase("c") is Phase.QUEUED
    assert StartPrefill("c", "p", 0) in box.prefilled("b", slot=1)


def test_a_whole_request_frees_its_prefill_budget_with_its_first_token() -> None:
    box = Box("d", route="whole")
    box.arrive("a", prompt=100)
    assert box.arrive("b") == []
    assert box.on(FirstToken("a", "d", 0)) == [StartWhole("b", "d", 0)]


def test_seats_bound_what_a_worker_gets() -> None:
    box = Box("d", route="whole")
    starts = [box.arrive(str(i), prompt=1) for i in range(5)]
    assert [len(start) for start in starts] == [1, 1, 1, 1, 0]
    assert box.on(WorkerFinished("2", "d", 0, True)) == [StartWhole("4", "d", 0)]


def test_prefills_go_to_the_worker_with_the_fewest_tokens_ahead() -> None:
    box = Box("p1 p2 d")
    assert box.arrive("a", prompt=50) == [StartPrefill("a", "p1", 0)]
    assert box.arrive("b", prompt=10) == [StartPrefill("b", "p2", 0)]
    assert box.arrive("c", prompt=10) == [StartPrefill("c", "p2", 0)]


def test_a_blocked_split_does_not_hold_back_a_whole_one(box: Box) -> None:
    box.arrive("a", prompt=100)
    assert box.arrive("b") == []
    assert box.on(Arrived("c", 20, 8, Route.WHOLE)) == [StartWhole("c", "d", 0)]


@pytest.mark.parametrize("first", [Route.SPLIT, Route.WHOLE])
def test_between_the_two_queues_the_earlier_arrival_starts_first(first: Route) -> None:
    box = Box("d")
    box.arrive("a", prompt=100)
    second = Route.WHOLE if first is Route.SPLIT else Route.SPLIT
    box.on(Arrived("b", 20, 8, first), Arrived("c", 20, 8, second))
    starts = box.on(FirstToken("a", "d", 0))
    assert starts == [StartWhole("b", "d", 0), StartWhole("c", "d", 0)]


def test_the_first_token_of_a_split_request_does_not_end_its_prefill(box: Box) -> None:
    box.arrive()
    assert box.on(FirstToken("r", "p", 0)) == []
    assert box.phase() is Phase.PREFILLING
    assert box.prefilled() == [HAND_OFF]


def test_queued_requests_start_in_arrival_order(box: Box) -> None:
    box.arrive("a", prompt=100)
    for request_id in "bcd":
        box.arrive(request_id)
    box.on(Cancelled("c"))
    starts = [x for x in box.prefilled("a") if isinstance(x, StartPrefill)]
    assert [start.request_id for start in starts] == ["b", "d"]


# --- decode admission ------------------------------------------------------------------------


def test_a_handoff_waits_for_a_seat_and_takes_the_first_one(box: Box) -> None:
    box.to_waiting()
    box.arrive("s")
    assert box.prefilled("s", slot=9) == []
    assert box.on(Tick()) == []
    assert box.on(WorkerFinished("f1", "d", 0, True)) == [HAND_OFF]
    assert box.phase("s") is Phase.HANDOFF


def test_a_handoff_waits_for_blocks() -> None:
    box = Box(capacity=Capacity(num_blocks=5, block_tokens=16, max_num_seqs=9, chunk_tokens=99))
    box.arrive("a", prompt=40)
    box.prefilled("a", slot=1)
    box.arrive("r", prompt=40)
    assert box.prefilled() == []
    assert box.on(Pulled("a", "d", 0, True)) == []
    assert box.on(WorkerFinished("a", "d", 0, True)) == [HAND_OFF]


def test_a_whole_request_does_not_overtake_a_waiting_handoff() -> None:
    box = Box(capacity=Capacity(num_blocks=5, block_tokens=16, max_num_seqs=9, chunk_tokens=99))
    box.arrive("a", prompt=40)
    box.prefilled("a", slot=1)
    box.arrive("r", prompt=40)
    box.prefilled()
    box.arrive("s", prompt=190)  # so that `d` would be the less loaded one
    assert box.on(Arrived("w", 1, 8, Route.WHOLE)) == [StartWhole("w", "p", 0)]


def test_a_restarted_decode_worker_takes_what_waits(box: Box) -> None:
    box.arrive()
    box.on(WorkerDown("d", 0))
    assert box.prefilled() == []
    assert box.up("d", 1) == [StartDecode("r", "d", 1, KEY)]


@pytest.mark.parametrize("gone_first", [True, False])
def test_a_handoff_that_nobody_will_read_begins_again(box: Box, gone_first: bool) -> None:
    box.arrive()
    events: list[Event] = [WorkerGone("d"), WorkerDown("d", 0)]
    box.on(*events if gone_first else reversed(events))
    assert box.prefilled() == [ReleaseLease(KEY), StartWhole("r", "p", 0)]
    box.on(LeaseEnded(KEY), FirstToken("r", "p", 0), WorkerFinished("r", "p", 0, True))
    box.assert_zero()


# --- a full queue ----------------------------------------------------------------------------


def refused(actions: list[Action]) -> Fail:
    (fail,) = actions
    assert isinstance(fail, Fail) and fail.cause == "queue-full"
    return fail


def test_a_queue_is_full_by_prompt_tokens_too() -> None:
    box = Box(max_num_queued_tokens=100)
    box.arrive("a", prompt=100)
    assert box.arrive("long", prompt=500) == []  # nothing else waits
    assert refused(box.arrive("b", prompt=1)).retry_after_s >= 0.0
    box.on(Cancelled("long"))
    assert box.arrive("c", prompt=60) == box.arrive("d", prompt=40) == []
    refused(box.arrive("e", prompt=1))
    box.on(Cancelled("c"))
    assert box.arrive("f", prompt=60) == []


def test_who_is_sent_away_hears_when_half_the_queue_will_be_gone() -> None:
    box = Box(max_num_queued_reqs=6)
    scheduler = box.scheduler
    now_s = 0.0
    for number in range(40):  # one starts and ends every half second
        now_s = 0.5 * number
        name = f"s{number}"
        scheduler.on_event(Arrived(name, 100, 1), now_s)
        scheduler.on_event(WorkerFinished(name, "p", 0, True), now_s)
        scheduler.on_event(WorkerFinished(name, "d", 0, True), now_s)
    for number in range(20):
        actions = scheduler.on_event(Arrived(f"q{number}", 500, 1), now_s)
    fail = refused(actions)
    assert 1.0 < fail.retry_after_s < 2.5  # three of six, at two in a second
