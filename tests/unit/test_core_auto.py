"""What `auto` does with a request, how roles move, what a step may hold, and why who waits."""

from __future__ import annotations

import pytest

from tests.unit.core_box import Box
from tinfer.core.costs import CostModel
from tinfer.core.demand import Demand
from tinfer.core.events import (
    Action,
    Arrived,
    FirstToken,
    LeaseEnded,
    Pulled,
    RoleAsked,
    RoleChanged,
    RoleRefused,
    SetBudget,
    StartDecode,
    StartPrefill,
    StartWhole,
    Stepped,
    Tick,
    WorkerDown,
    WorkerFinished,
    WorkerUp,
)
from tinfer.core.lengths import certain
from tinfer.core.policies.auto import LATE_PART, late_s
from tinfer.core.requests import Request
from tinfer.core.types import Capacity, LeaseKey, Role
from tinfer.core.worker import Worker

COSTS = CostModel(
    base_s=0.006, prefill_token_s=0.0004, decode_seq_s=0.0006, kv_token_s=0.0, handoff_s=0.002
)
ROOMY = Capacity(num_blocks=4000, block_tokens=16, max_num_seqs=64, chunk_tokens=512)
AUTO = {"route": "auto", "decode_admission": "peak", "decode_choice": "projected", "costs": COSTS}


def auto_box(roles: str = "p d", **more: object) -> Box:
    return Box(roles, ROOMY, **{**AUTO, **more})


def arrive(
    box: Box, name: str, prompt: int, out: int = 100, hashes: tuple[int, ...] = ()
) -> list[Action]:
    arrived = Arrived(name, prompt, out, lengths=certain(out), block_hashes=hashes)
    return [one for one in box.on(arrived) if not isinstance(one, SetBudget)]


def decoding(box: Box, num: int, worker_id: str = "d", out: int = 200) -> None:
    """So many requests decode on that worker."""
    for number in range(num):
        name = f"{worker_id}-{number}"
        (start,) = arrive(box, name, 20, out)
        assert isinstance(start, StartWhole | StartPrefill)
        if isinstance(start, StartWhole) and start.worker_id == worker_id:
            box.on(FirstToken(name, worker_id, 0))
        else:
            pytest.fail(f"{name} went elsewhere: {start}")


# --- auto ------------------------------------------------------------------------------------


def test_an_idle_box_computes_whole() -> None:
    (start,) = arrive(auto_box(), "r", 1000)
    assert isinstance(start, StartWhole)


def test_a_long_prompt_is_split_when_it_would_stall_those_who_decode() -> None:
    box = auto_box()
    decoding(box, 1)
    for number in range(12):  # all but the first are short, and batch where one decodes already
        for action in arrive(box, f"s{number}", 10):
            assert isinstance(action, StartWhole | StartPrefill)
            if isinstance(action, StartWhole):
                box.on(FirstToken(action.request_id, action.worker_id, 0))
    busy = max(("p", "d"), key=lambda name: box.worker(name).num_decoding)
    (start,) = arrive(box, "long", 1500)
    assert isinstance(start, StartPrefill | StartWhole) and start.worker_id != busy


def test_a_prefix_that_a_worker_has_draws_a_request_there() -> None:
    for _ in range(2):
        box = auto_box("d1 d2")
        hashes = tuple(range(60))
        (first,) = arrive(box, "first", 1000, out=20, hashes=hashes)
        assert isinstance(first, StartWhole)
        box.on(FirstToken("first", first.worker_id, 0))
        (again,) = arrive(box, "again", 1000, out=20, hashes=hashes)
        assert isinstance(again, StartWhole) and again.worker_id == first.worker_id
        (other,) = arrive(box, "other", 1000, out=20)
        assert isinstance(other, StartWhole) and other.worker_id != first.worker_id


def test_one_kind_of_work_spreads_over_all_workers() -> None:
    box = auto_box()
    seen = []
    for number in range(20):
        for action in arrive(box, f"r{number}", 10, out=300):
            assert isinstance(action, StartWhole | StartPrefill)
            seen.append(action.worker_id)
            box.on(FirstToken(action.request_id, action.worker_id, 0))
    assert abs(seen.count("p") - seen.count("d")) <= 4


def test_an_answer_of_one_token_has_nothing_to_hand_off() -> None:
    for number in range(6):
        box = auto_box()
        (start,) = arrive(box, f"r{number}", 2000, out=1)
        assert isinstance(start, StartWhole)


def test_no_request_waits_for_a_worker_that_is_not_there() -> None:
    box = auto_box("d")
    (start,) = arrive(box, "r", 3000)
    assert start == StartWhole("r", "d", 0)


# --- budgets ---------------------------------------------------------------------------------


def test_a_step_beside_decodes_has_as_much_prompt_as_the_slack_holds() -> None:
    box = auto_box(prefill_budget="slack", itl_slack=2.0, route="whole")
    actions = box.on(Arrived("r", 20, 100, lengths=certain(100)))
    assert [one for one in actions if isinstance(one, SetBudget)] == []
    (budget,) = [one for one in box.on(FirstToken("r", "d", 0)) if isinstance(one, SetBudget)]
    # Twice a step of 6.6 ms at 0.4 ms a token are 33 tokens.
    assert budget == SetBudget("d", 0, 32)
    back = box.on(WorkerFinished("r", "d", 0, answered=True))
    assert SetBudget("d", 0, None) in back


# --- speed -----------------------------------------------------------------------------------


def stepped(worker_id: str, num: int, busy_s: float) -> Stepped:
    return Stepped(worker_id, 0, num, busy_s, 0, 100)


def test_a_worker_that_has_not_run_is_taken_for_as_fast_as_the_others() -> None:
    box = auto_box("d1 d2")
    box.scheduler.on_event(stepped("d1", 1000, 60.0), 60.0)
    first, second = box.worker("d1"), box.worker("d2")
    assert first.slowness == pytest.approx(10.0, rel=0.01) and second.slowness == first.slowness


def test_what_made_an_idle_worker_slow_is_forgotten() -> None:
    box = auto_box("d1 d2")
    box.scheduler.on_event(stepped("d1", 1000, 6.0), 60.0)
    box.scheduler.on_event(stepped("d2", 1000, 60.0), 60.0)
    apart = box.worker("d2").slowness - box.worker("d1").slowness
    for number in range(100):
        box.scheduler.on_event(Tick(), 60.0 + 0.1 * number)
    assert box.worker("d2").slowness - box.worker("d1").slowness < 0.2 * apart


# --- roles -----------------------------------------------------------------------------------


def test_a_decode_worker_becomes_a_prefill_worker_at_once() -> None:
    box = Box("p d1 d2")
    changed = box.on(RoleAsked("d1", 0, Role.PREFILL))
    assert changed == [RoleChanged("d1", 0, Role.PREFILL, "asked for")]
    assert box.worker("d1").role is Role.PREFILL
    starts = [box.arrive(f"r{number}")[0] for number in range(2)]
    assert {one.worker_id for one in starts if isinstance(one, StartPrefill)} == {"d1", "p"}


def test_a_prefill_worker_hands_over_before_it_decodes() -> None:
    box = Box("p1 p2 d")
    (start,) = box.arrive("r")
    assert start == StartPrefill("r", "p1", 0)
    assert box.on(RoleAsked("p1", 0, Role.DECODE)) == []
    assert box.worker("p1").flips_to is Role.DECODE
    assert box.arrive("s") == [StartPrefill("s", "p2", 0)]  # nothing new starts there
    (decode,) = box.prefilled("r", worker_id="p1")
    assert isinstance(decode, StartDecode) and decode.worker_id == "d"
    assert box.on(Pulled("r", "d", 0, True)) == []  # its blocks are held until they are freed
    changed = box.on(LeaseEnded(decode.lease))
    assert changed == [RoleChanged("p1", 0, Role.DECODE, "asked for")]


def test_a_worker_comes_back_in_the_role_that_it_has_taken() -> None:
    """Or else the last worker of a phase could come back as one of the other."""
    box = Box("p1 p2 d")
    box.on(RoleAsked("p1", 0, Role.DECODE), RoleAsked("d", 0, Role.PREFILL))
    assert box.arrive("r") == [StartPrefill("r", "d", 0)]
    box.on(WorkerDown("p1", 0))
    assert box.prefilled("r", worker_id="d") == []
    assert box.up("p1", generation=1) == [StartDecode("r", "p1", 1, LeaseKey("d", 0, 0, 0))]
    assert box.worker("p1").role is Role.DECODE
    # One whose blocks fit no other's any more has no role to take.
    box.on(WorkerDown("d", 0), WorkerUp("d", 1, Role.WHOLE, box.capacity))
    assert box.worker("d").role is Role.WHOLE


@pytest.mark.parametrize(
    ("worker_id", "role", "why"),
    [
        ("p", Role.DECODE, "it is the only prefill worker"),
        ("d1", Role.DECODE, "it is a decode worker"),
        ("d1", Role.BOTH, "only prefill and decode workers change roles"),
        ("b", Role.DECODE, "only prefill and decode workers change roles"),
        ("x", Role.DECODE, "it is not up"),
    ],
)
def test_what_keeps_a_role(worker_id: str, role: Role, why: str) -> None:
    box = Box("p d1 d2 b")
    assert box.on(RoleAsked(worker_id, 0, role)) == [RoleRefused(worker_id, 0, why)]


def test_reactive_follows_the_demand_and_not_its_noise() -> None:
    box = Box("p d1 d2 d3", ROOMY, flip="reactive", costs=COSTS)
    changes = []
    for number in range(60):
        now_s = 0.25 * number
        arrived = Arrived(f"r{number}", 4000, 10, lengths=certain(10))
        for event in (arrived, Tick()):
            found = box.scheduler.on_event(event, now_s)
            changes += [(now_s, one) for one in found if isinstance(one, RoleChanged)]
    # Nearly all of the work is prefill, and one decode worker stays.
    assert [one.role for _, one in changes] == [Role.PREFILL] * 2
    assert changes[0][0] >= 3.0
    roles = [box.worker(name).role for name in ("p", "d1", "d2", "d3")]
    assert roles.count(Role.DECODE) == 1


def test_the_watchdog_moves_who_was_idle_for_a_minute() -> None:
    box = Box("p1 p2 d", flip="watchdog")
    box.arrive("r")
    box.prefilled("r", worker_id="p1")
    box.on(Pulled("r", "d", 0, True))
    changes: list[tuple[int, Action]] = []
    for now_s in range(1, 100):
        found = box.scheduler.on_event(Tick(), float(now_s))
        changes += [(now_s, one) for one in found if isinstance(one, RoleChanged)]
    (change,) = changes  # the other one is the only one left
    assert change[0] >= 60
    assert isinstance(change[1], RoleChanged) and change[1].role is Role.DECODE
    assert change[1].reason.startswith("idle for 6")


def test_demand_fades_and_fills() -> None:
    demand = Demand(10.0)
    assert demand.rates(0.0) == (0.0, 0.0, 0.0)
    for number in range(100):
        request = Request(f"r{number}", 50, 20, number, 0.0, None, certain(20))
        demand.arrived(request, 50, now_s=0.5 * number)
    requests, prompts, outputs = demand.rates(50.0)
    assert requests == pytest.approx(2.0, rel=0.1)
    assert prompts == pytest.approx(50 * requests) and outputs == pytest.approx(20 * requests)
    part = demand.prefill_part(COSTS, 8, 50.0)
    assert part is not None and part == pytest.approx(
        50 * 0.0004 / (50 * 0.0004 + 20 * (0.006 + 8 * 0.0006) / 8)
    )
    assert demand.rates(100.0)[0] < 0.1


# --- why it waits ----------------------------------------------------------------------------


def test_who_waits_is_told_why() -> None:
    box = Box("p d")
    for number in range(3):
        box.arrive(f"r{number}", prompt=60)
    (third,) = box.scheduler.waiting(1.0)
    assert (third.request_id, third.phase, third.waited_s) == ("r2", "queued", 1.0)
    assert third.reason == "p has 120 prompt tokens to do"
    box.arrive("r3", prompt=60)
    assert box.scheduler.waiting(1.0)[1].reason == "1 ahead of it"


def test_a_hand_off_without_room_is_told_which() -> None:
    box = Box("p d")
    box.to_waiting()
    (waiting,) = box.scheduler.waiting(2.0)
    assert waiting.phase == "handoff" and waiting.reason == "d has no seat left"


def test_looking_changes_nothing() -> None:
    looked, alone = (Box("p d", prefill_order="sjf", prefill_sched_batch=2) for _ in range(2))
    for number, prompt in enumerate((60, 60, 9, 50, 40, 30)):
        looked.arrive(f"r{number}", prompt)
        looked.scheduler.waiting(0.0)
        looked.scheduler.workers_snapshot()
        alone.arrive(f"r{number}", prompt)
    for number in range(6):
        assert looked.prefilled(f"r{number}", number) == alone.prefilled(f"r{number}", number)


def test_a_first_token_is_late_by_the_prompts_own_measure() -> None:
    worker = Worker("w", 0, Role.BOTH, ROOMY, COSTS)
    short, long = (Request("r", tokens, 100, 0, 0.0, None, certain(100)) for tokens in (10, 2000))
    alone_s = {one: COSTS.prefill_s(one.prompt_tokens, ROOMY.chunk_tokens) for one in (short, long)}
    assert late_s(short, worker, 2.4 * alone_s[short]) == 0.0
    assert late_s(long, worker, 6.0 * alone_s[short]) == 0.0
    half_s, full_s = (late_s(short, worker, times * alone_s[short]) for times in (3.75, 5.0))
    assert half_s == pytest.approx(full_s / 2.0)
    assert full_s == late_s(short, worker, 9.0 * alone_s[short])
    whole_s = alone_s[short] + 100 * COSTS.decode_step_s(1, 10)
    assert full_s == pytest.approx(LATE_PART * whole_s)
    free = Worker("w", 0, Role.BOTH, ROOMY, CostModel(base_s=0.0, prefill_token_s=0.0))
    assert late_s(short, free, 1.0) == 0.0


def test_prompts_in_a_row_do_not_look_back_at_each_other() -> None:
    costs = CostModel(base_s=0.0, prefill_token_s=1e-3, prefill_context_s=1e-6)
    worker = Worker("w", 0, Role.BOTH, ROOMY, costs)
    assert worker.prefill_s(1000) == pytest.approx(1.0 + 0.5)
    assert worker.queued_s(1000) == pytest.approx(1.0)
    assert worker.taken_s(1000) == worker.prefill_s(1000)
