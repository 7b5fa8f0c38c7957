"""The scheduler's parts one by one: phase table, ledger, fleet, policies, registry."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from tinfer.core.costs import CostModel
from tinfer.core.events import Action, Event, Fail, StartDecode, WorkerFinished, WorkerUp
from tinfer.core.fleet import Fleet, can_hand_off
from tinfer.core.ledger import Ledger, LedgerError
from tinfer.core.lengths import certain
from tinfer.core.lifecycle import LEGAL, LifecycleError, move
from tinfer.core.policies.admission import Greedy
from tinfer.core.policies.decode import LeastKv
from tinfer.core.policies.orders import Fcfs
from tinfer.core.policies.prefill import DECODE_SEQ_WEIGHT_TOKENS, LeastLoaded
from tinfer.core.policies.registry import UnknownPolicy
from tinfer.core.requests import Request, RequestTable
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Capacity, LeaseKey, Phase, Role, Route, SchedulerConfig
from tinfer.core.worker import Worker

CAPACITY = Capacity(num_blocks=10, block_tokens=16, max_num_seqs=2, chunk_tokens=32)


def request(request_id: str = "r", prompt_tokens: int = 16) -> Request:
    return Request(request_id, prompt_tokens, 8, 0, 0.0, Route.SPLIT, certain(8))


def worker(worker_id: str = "p", role: Role = Role.PREFILL) -> Worker:
    return Worker(worker_id, 0, role, CAPACITY)


def key(slot: int = 0, worker_id: str = "p") -> LeaseKey:
    return LeaseKey(worker_id, 0, slot, 0)


# --- lifecycle -------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_a_phase_changes_only_along_the_table(before: Phase, after: Phase) -> None:
    r = request()
    r.phase = before
    if after in LEGAL[before]:
        move(r, after)
        assert r.phase is after
    else:
        with pytest.raises(LifecycleError, match="r: "):
            move(r, after)
        assert r.phase is before


def test_every_phase_can_end_and_no_end_can_be_left() -> None:
    for phase in Phase:
        assert (Phase.FINISHED in LEGAL[phase]) == (phase is not Phase.FINISHED)
    assert LEGAL[Phase.FINISHED] == set()


def test_the_table_refuses_a_second_arrival_and_a_second_end() -> None:
    table = RequestTable()
    r = request()
    table.add(r)
    with pytest.raises(LifecycleError, match="twice"):
        table.add(request())
    table.move(r, Phase.FINISHED)
    with pytest.raises(LifecycleError):
        table.move(r, Phase.FINISHED)


def test_a_zombie_is_counted_until_buried_and_keeps_its_id() -> None:
    table = RequestTable()
    r = request()
    table.add(r)
    table.bereave(r)
    assert (table.num_open, table.num_zombies) == (0, 1)
    with pytest.raises(LifecycleError, match="twice"):
        table.add(request())
    table.bury(r)
    assert table.num_zombies == 0
    assert not any(table.num_by_phase().values())


# --- ledger ----------------------------------------------------------------------------------


def test_a_lease_holds_its_owners_blocks_until_it_ends() -> None:
    ledger, owner = Ledger(), worker()
    lease = ledger.open(key(), owner, 3, "r")
    assert (ledger.num_leases, owner.num_held_blocks) == (1, 3)
    ledger.release(lease)
    assert owner.num_held_blocks == 3
    ledger.end(key())
    assert (ledger.num_leases, owner.num_held_blocks, ledger.of_request("r")) == (0, 0, None)


def test_a_lease_is_opened_released_and_ended_once() -> None:
    ledger, owner = Ledger(), worker()
    lease = ledger.open(key(), owner, 3, None)
    with pytest.raises(LedgerError, match="opened twice"):
        ledger.open(key(), owner, 3, None)
    ledger.release(lease)
    with pytest.raises(LedgerError, match="released twice"):
        ledger.release(lease)
    ledger.end(key())
    with pytest.raises(LedgerError, match="not open"):
        ledger.end(key())


def test_a_lease_that_nobody_read_or_released_cannot_end() -> None:
    ledger, owner = Ledger(), worker()
    ledger.open(key(), owner, 3, "r")
    with pytest.raises(LedgerError, match="neither read nor released"):
        ledger.end(key())
    assert owner.num_held_blocks == 3


def test_only_a_waiting_lease_gets_a_reader() -> None:
    ledger, owner, reader = Ledger(), worker(), worker("d", Role.DECODE)
    lease = ledger.open(key(), owner, 3, "r")
    ledger.start_read(lease, reader)
    with pytest.raises(LedgerError, match="read while reading"):
        ledger.start_read(lease, reader)


def test_a_lease_belongs_to_the_incarnation_that_reports_it() -> None:
    with pytest.raises(LedgerError, match="reported by d"):
        Ledger().open(key(), worker("d"), 3, "r")


def test_a_pull_starts_once() -> None:
    ledger = Ledger()
    ledger.start_pull("r")
    with pytest.raises(LedgerError, match="pulled twice"):
        ledger.start_pull("r")
    ledger.stop_pull("r")
    ledger.stop_pull("r")
    assert ledger.num_pulls == 0


# --- fleet -----------------------------------------------------------------------------------


def up(worker_id: str, role: Role, generation: int = 0) -> WorkerUp:
    return WorkerUp(worker_id, generation, role, CAPACITY)


def test_two_replicas_do_not_hand_off_to_each_other() -> None:
    pairs = {(s, r) for s in Role for r in Role if can_hand_off(s, r)}
    p, d, b = Role.PREFILL, Role.DECODE, Role.BOTH
    assert pairs == {(p, d), (p, b), (b, d)}


@pytest.mark.parametrize(
    ("roles", "sources"),
    [
        ("PREFILL", []),
        ("DECODE", []),
        ("BOTH BOTH", []),
        ("PREFILL WHOLE", []),
        ("WHOLE DECODE", []),
        ("WHOLE BOTH", []),
        ("PREFILL DECODE", ["w0"]),
        ("PREFILL WHOLE DECODE", ["w0"]),
        ("PREFILL BOTH", ["w0"]),
        ("BOTH DECODE", ["w0"]),
        ("PREFILL BOTH DECODE", ["w0", "w1"]),
    ],
)
def test_a_split_starts_where_somebody_else_can_read(roles: str, sources: list[str]) -> None:
    fleet = Fleet(CostModel())
    for i, role in enumerate(roles.split()):
        fleet.up(up(f"w{i}", Role[role]))
    assert [w.id for w in fleet.split_sources] == sources


def test_workers_are_listed_by_id_however_they_came_up() -> None:
    fleet = Fleet(CostModel())
    for worker_id in ("p2", "p1"):
        fleet.up(up(worker_id, Role.PREFILL))
    for worker_id in ("d2", "d1"):
        fleet.up(up(worker_id, Role.DECODE))
    assert [w.id for w in fleet.workers] == ["d1", "d2", "p1", "p2"]
    assert [w.id for w in fleet.split_sources] == ["p1", "p2"]
    assert [w.id for w in fleet.readers(Role.PREFILL)] == ["d1", "d2"]


def test_an_old_generation_never_comes_up_again() -> None:
    fleet = Fleet(CostModel())
    fleet.up(up("p", Role.PREFILL, 3))
    assert fleet.down("p", 2) is None
    assert fleet.get("p", 2) is None
    assert fleet.down("p", 3) is not None
    fleet.up(up("p", Role.PREFILL, 3))
    assert fleet.workers == []
    fleet.down("p", 4)  # died before it was up
    fleet.up(up("p", Role.PREFILL, 4))
    assert fleet.workers == []


def test_two_incarnations_of_one_worker_are_never_up_together() -> None:
    fleet = Fleet(CostModel())
    fleet.up(up("p", Role.PREFILL, 0))
    with pytest.raises(LifecycleError, match="up again"):
        fleet.up(up("p", Role.PREFILL, 1))


def test_placing_and_removing_a_request_leaves_nothing_behind() -> None:
    w, r = worker(), request(prompt_tokens=32)
    w.place(r, prefill_tokens=32)
    seen = w.snapshot()
    assert (seen.outstanding_prefill_tokens, seen.num_seqs, seen.num_projected_blocks) == (32, 1, 3)
    w.prefill_done(r)
    assert (w.outstanding_prefill_tokens, len(w.prefilling), w.num_seqs) == (0, 0, 1)
    w.remove(r)
    assert w.snapshot() == worker().snapshot()


# --- policies --------------------------------------------------------------------------------


def test_fcfs_keeps_arrival_order_and_forgets_what_it_is_told_to() -> None:
    order = Fcfs()
    a, b, c = request("a"), request("b"), request("c")
    for r in (b, a, c):
        order.add(r, 0.0)
    assert next(order.in_order(0.0)) is b
    order.discard(b)
    order.discard(b)
    order.discard(a)
    assert next(order.in_order(0.0)) is c
    assert len(order) == 1


def test_least_loaded_weighs_prompts_against_decoding_sequences() -> None:
    a, b = worker("a"), worker("b")
    a.place(request("x", DECODE_SEQ_WEIGHT_TOKENS + 1), DECODE_SEQ_WEIGHT_TOKENS + 1)
    b.place(request("y", 5), 0)
    choose = LeastLoaded().choose
    assert choose(request(), [a, b], 0.0) is b
    b.place(request("z", 5), 0)
    assert choose(request(), [a, b], 0.0) is a


def test_equal_loads_go_to_the_smaller_id_however_listed() -> None:
    a, b = worker("a"), worker("b")
    for listed in ([a, b], [b, a]):
        assert LeastLoaded().choose(request(), listed, 0.0) is a
        assert LeastKv().choose(request(), listed) is a


def test_decode_goes_to_the_lightest_kv_load() -> None:
    a, b = worker("a"), worker("b")
    a.num_held_blocks = 1
    assert LeastKv().choose(request(), [a, b]) is b


@pytest.mark.parametrize(
    ("used", "prompt_tokens", "admitted"),
    [(8, 31, True), (8, 32, False), (1, 1000, False), (0, 1000, True)],
)
def test_greedy_wants_blocks_for_the_prompt_and_one_token(
    used: int, prompt_tokens: int, admitted: bool
) -> None:
    w = worker()
    w.num_held_blocks = used
    assert Greedy().admits(request(prompt_tokens=prompt_tokens), w, 0.0) is admitted


def test_greedy_wants_a_seat() -> None:
    w = worker()
    w.place(request("a", 1), 0)
    assert Greedy().admits(request("c", 1), w, 0.0)
    w.place(request("b", 1), 0)
    assert not Greedy().admits(request("c", 1), w, 0.0)


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("route", "auto, split, whole"),
        ("prefill_order", "fcfs, ljf, sjf, srpt"),
        ("prefill_choice", "earliest-finish, least-loaded"),
        ("whole_choice", "earliest-finish, least-loaded"),
        ("decode_choice", "least-kv, power-of-two, projected"),
        ("decode_admission", "greedy, peak, reserve-dynamic, reserve-static"),
        ("dispatch", "first-chunk, first-token"),
        ("prefill_budget", "slack, whole-chunks"),
    ],
)
def test_an_unknown_policy_is_refused_with_the_known_names(option: str, names: str) -> None:
    config = msgspec.structs.replace(SchedulerConfig(), **{option: "best"})
    with pytest.raises(UnknownPolicy, match=f"unknown {option} 'best'; one of: {names}"):
        Scheduler(config)


# --- wire form -------------------------------------------------------------------------------


def test_events_and_actions_survive_a_log() -> None:
    events = msgspec.json.Decoder(Event)
    actions = msgspec.json.Decoder(Action)
    for event in (up("p", Role.BOTH), WorkerFinished("r", "p", 0, False, refused=True)):
        assert events.decode(msgspec.json.encode(event)) == event
    for action in (StartDecode("r", "d", 0, key()), Fail("r", "no-worker", "m")):
        assert actions.decode(msgspec.json.encode(action)) == action
