"""What each policy of the two levels decides, on workers that are only numbers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinfer.core.costs import CostModel
from tinfer.core.events import Stepped, WorkerUp
from tinfer.core.fleet import Fleet
from tinfer.core.lengths import Lengths, certain
from tinfer.core.policies.admission import Greedy, Peak, ReserveDynamic, ReserveStatic
from tinfer.core.policies.decode import (
    LeastKv,
    PowerOfTwo,
    Projected,
    crowding,
    heavy_to_light,
    step_cost,
)
from tinfer.core.policies.orders import Batched, ByPriority, Fcfs, Srpt
from tinfer.core.policies.prefill import EarliestFinish
from tinfer.core.policies.registry import DECODE_CHOICES
from tinfer.core.requests import Request
from tinfer.core.types import Capacity, Role, Route, SchedulerConfig
from tinfer.core.worker import Worker

COSTS = CostModel(base_s=0.01, prefill_token_s=0.001, decode_seq_s=0.001, kv_token_s=0.0)
CAPACITY = Capacity(num_blocks=100, block_tokens=10, max_num_seqs=64, chunk_tokens=512)


def request(
    name: str = "r",
    prompt: int = 16,
    lengths: Lengths | None = None,
    arrived_s: float = 0.0,
    seq: int = 0,
    hashes: tuple[int, ...] = (),
) -> Request:
    lengths = lengths or certain(8)
    made = Request(name, prompt, lengths.points[-1], seq, arrived_s, None, lengths, hashes)
    made.route = Route.WHOLE
    return made


def worker(name: str = "d", capacity: Capacity = CAPACITY, z: float = 0.0) -> Worker:
    return Worker(name, 0, Role.DECODE, capacity, COSTS, z)


def decoding(at: Worker, *requests: Request) -> Worker:
    for one in requests:
        at.place(one, 0)
        at.decodes(one)
    return at


def steps(at: Worker, num: int) -> None:
    total = at.num_steps + num
    at.stepped(Stepped(at.id, 0, total, at.busy_s + 0.01 * num, 0, 50), 0.01 * total)


# --- orders ----------------------------------------------------------------------------------


def started(order: Batched | Srpt, now_s: float = 0.0) -> list[str]:
    names = []
    while len(order):
        first = next(order.in_order(now_s))
        order.discard(first)
        names.append(first.id)
    return names


@pytest.mark.parametrize(("sign", "expected"), [(1, "c b a e d"), (-1, "a b c d e")])
def test_a_batch_is_sorted_and_not_overtaken(sign: int, expected: str) -> None:
    order = Batched(3, sign)
    for seq, (name, prompt) in enumerate(zip("abcde", (90, 50, 10, 5, 1), strict=True)):
        order.add(request(name, prompt, seq=seq), 0.0)
    assert started(order) == expected.split()


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_sjf_is_sorting_inside_each_batch(prompts: list[int], batch: int) -> None:
    order = Batched(batch, 1)
    requests = [request(str(i), prompt, seq=i) for i, prompt in enumerate(prompts)]
    for one in requests:
        order.add(one, 0.0)
    expected: list[Request] = []
    for start in range(0, len(requests), batch):
        expected += sorted(requests[start : start + batch], key=lambda one: one.prompt_tokens)
    assert started(order) == [one.id for one in expected]


def fleet_of(*workers: str) -> Fleet:
    fleet = Fleet(COSTS)
    for name in workers:
        fleet.up(WorkerUp(name, 0, Role.PREFILL, CAPACITY))
    return fleet


def srpt(ageing: float = 0.1, deadline_s: float | None = None) -> Srpt:
    return Srpt(COSTS, ageing, deadline_s, fleet_of("p"))


@given(st.lists(st.integers(-3, 3), max_size=12), st.sets(st.integers(0, 11)))
def test_a_lower_priority_goes_first_and_the_order_holds_within(
    priorities: list[int], gone: set[int]
) -> None:
    queue = ByPriority(Fcfs)
    requests = [request(f"r{number}", seq=number) for number in range(len(priorities))]
    for one, priority in zip(requests, priorities, strict=True):
        one.priority = priority
        queue.add(one, 0.0)
    for number in gone & set(range(len(requests))):
        queue.discard(requests[number])
        queue.discard(requests[number])
    left = [one for number, one in enumerate(requests) if number not in gone]
    expected = sorted(left, key=lambda one: (one.priority, one.arrival_seq))
    assert list(queue.in_order(0.0)) == list(queue.listed(0.0)) == expected
    assert len(queue) == len(expected)


def test_a_batch_of_one_priority_does_not_hold_up_a_lower_one() -> None:
    queue = ByPriority(lambda: Batched(2, 1))
    later = [request(f"r{number}", prompt=20 - number, seq=number) for number in range(4)]
    for one in later:
        queue.add(one, 0.0)
    assert [one.id for one in queue.in_order(0.0)] == ["r1", "r0"]
    urgent = request("urgent", prompt=900, seq=9)
    urgent.priority = -1
    queue.add(urgent, 0.0)
    assert [one.id for one in queue.in_order(0.0)] == ["urgent", "r1", "r0"]
    assert [one.id for one in queue.listed(0.0)] == ["urgent", "r1", "r0", "r3", "r2"]


def test_srpt_takes_the_shortest_and_then_the_earliest() -> None:
    order = srpt()
    for seq, (name, prompt) in enumerate(zip("abc", (50, 9, 9), strict=True)):
        order.add(request(name, prompt, seq=seq), 0.0)
    order.discard(request("never"))
    assert started(order) == ["b", "c", "a"]


def test_srpt_counts_what_no_cache_has() -> None:
    fleet = fleet_of("p1", "p2")
    fleet.workers[1].prefixes.use(tuple(range(9)))
    order = Srpt(COSTS, 0.1, None, fleet)
    order.add(request("short", 50, seq=0), 0.0)
    order.add(request("cached", 100, seq=1, hashes=tuple(range(9))), 0.0)
    assert started(order) == ["cached", "short"]


@given(
    st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 100)), min_size=2, max_size=30),
    st.sampled_from([0.05, 0.1, 1.0]),
)
def test_ageing_bounds_who_may_overtake(arrivals: list[tuple[int, float]], ageing: float) -> None:
    order = srpt(ageing)
    requests = {}
    for seq, (prompt, at_s) in enumerate(sorted(arrivals, key=lambda one: one[1])):
        one = request(str(seq), prompt, arrived_s=at_s, seq=seq)
        requests[one.id] = one
        order.add(one, at_s)
    names = started(order)
    for place, name in enumerate(names):
        late = requests[name]
        for before in names[:place]:
            # Cost is 1 ms a token here.
            bound_s = 0.001 * late.prompt_tokens / ageing
            assert requests[before].arrived_s <= late.arrived_s + bound_s + 1e-6


def test_srpt_saves_a_deadline_that_the_first_by_length_would_cost() -> None:
    order = srpt(deadline_s=1.0)
    order.add(request("long", 800, arrived_s=0.0, seq=0), 0.0)  # has to start by 0.2
    order.add(request("short", 100, arrived_s=0.0, seq=1), 0.0)
    assert next(order.in_order(0.0)).id == "short"  # after it there is time enough
    assert next(order.in_order(0.15)).id == "long"
    assert next(order.in_order(0.25)).id == "short"  # too late to be saved
    assert [one.id for one in order.in_order(0.15)] == ["long", "short"]


# --- prefill worker --------------------------------------------------------------------------


def test_a_prefix_is_worth_what_it_saves_and_no_more() -> None:
    has, idle = worker("a"), worker("b")
    hashes = tuple(range(10))
    has.prefixes.use(hashes)
    one = request(prompt=120, hashes=hashes)
    assert EarliestFinish().choose(one, [has, idle], 0.0) is has
    has.place(request("other", 60), 60)
    assert EarliestFinish().choose(one, [has, idle], 0.0) is has
    has.place(request("more", 80), 80)
    assert EarliestFinish().choose(one, [has, idle], 0.0) is idle


def test_a_slow_worker_finishes_later() -> None:
    a, b = worker("a"), worker("b")
    a.learn_slowness(2.0)
    assert EarliestFinish().choose(request(), [a, b], 0.0) is b


# --- decode worker ---------------------------------------------------------------------------


def test_power_of_two_draws_from_those_with_room_and_takes_the_lighter() -> None:
    heavy, light, full = worker("a"), worker("b"), worker("c")
    decoding(heavy, request("h", lengths=certain(500)))
    decoding(light, request("l"))
    full.num_held_blocks = 100
    policy = PowerOfTwo(seed=3)
    assert {policy.choose(request(), [heavy, light, full]) for _ in range(50)} == {light}
    assert heavy_to_light(heavy) == 1.0 and heavy_to_light(light) == 0.0


def test_power_of_two_draws_from_the_others_where_nobody_has_room() -> None:
    workers = [worker(name) for name in "abc"]
    for one in workers:
        one.num_held_blocks = 99
    policy = PowerOfTwo(seed=3)
    assert {policy.choose(request(), workers) for _ in range(80)} <= set(workers)


def test_power_of_two_draws_alike_with_one_seed() -> None:
    workers = [worker(name) for name in "abcdefgh"]
    for one in workers[::2]:
        decoding(one, request(f"h{one.id}", lengths=certain(500)))

    def drawn(seed: int) -> list[Worker | None]:
        policy = PowerOfTwo(seed)
        return [policy.choose(request(), workers) for _ in range(30)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_projected_takes_the_smaller_batch_and_shuns_a_cache_that_will_be_full() -> None:
    a, b = worker("a"), worker("b")
    decoding(a, *(request(f"a{i}") for i in range(6)))
    decoding(b, *(request(f"b{i}") for i in range(4)))
    assert Projected().choose(request(), [a, b]) is b
    decoding(b, request("long", 400, certain(500)))
    assert Projected().choose(request(prompt=100), [a, b]) is a


def test_least_kv_looks_at_prompts_alone() -> None:
    a, b = worker("a"), worker("b")
    decoding(a, request("x", 100))
    assert LeastKv().choose(request(), [a, b]) is b


@pytest.mark.parametrize("name", DECODE_CHOICES)
def test_only_workers_that_admit_a_request_are_chosen(name: str) -> None:
    workers = [worker(name) for name in "abc"]
    choice = DECODE_CHOICES[name](SchedulerConfig())
    decoding(workers[2], request("x", 100))
    assert choice.choose(request(), workers, lambda one: one.id == "c") is workers[2]
    assert choice.choose(request(), workers, lambda one: False) is None


def test_projected_finds_the_cheapest_without_a_look_at_every_cache() -> None:
    rng = random.Random(5)
    num_asked = 0
    for _ in range(60):
        workers = [worker(name) for name in "abcdefgh"]
        for one in workers:
            residents = rng.sample(range(1000), rng.randrange(6))
            decoding(one, *(request(f"{one.id}{i}", i % 90, certain(1 + i)) for i in residents))
        new = request("new", 50)
        asked: list[str] = []

        def admits(one: Worker, asked: list[str] = asked, new: Request = new) -> bool:
            asked.append(one.id)
            return Peak().admits(new, one, 0.0)

        admitted = [one for one in workers if Peak().admits(new, one, 0.0)]
        costs = {one: step_cost(new, one) + crowding(new, one) for one in admitted}
        cheapest = min(admitted, key=lambda one: (costs[one], one.id), default=None)
        assert Projected().choose(new, workers, admits) is cheapest
        num_asked += len(asked)
    assert num_asked < 60 * 8


# --- admission -------------------------------------------------------------------------------


def test_greedy_counts_what_residents_have_grown_to() -> None:
    at = decoding(worker(), request("x", 800, certain(150)))
    assert Greedy().admits(request(prompt=180), at, 0.0)
    steps(at, 100)
    assert at.generated_tokens(at.requests["x"]) == 101
    assert not Greedy().admits(request(prompt=180), at, 0.0)


def test_reserve_static_wants_the_answer_too() -> None:
    at = decoding(worker(), request("x", 800))
    assert ReserveStatic().admits(request(prompt=100, lengths=certain(80)), at, 0.0)
    assert not ReserveStatic().admits(request(prompt=100, lengths=certain(150)), at, 0.0)


def test_reserve_dynamic_looks_at_the_end_of_the_shortest() -> None:
    at = decoding(worker(), request("short", 400, certain(50)), request("long", 300, certain(400)))
    # In 49 steps the short one is gone and the long one has 350: 1000 - 350 are free.
    assert ReserveDynamic().admits(request(prompt=190, lengths=certain(300)), at, 0.0)
    assert not Peak().admits(request(prompt=400, lengths=certain(300)), at, 0.0)
    at = decoding(worker(), *(request(f"r{i}", 300, certain(200)) for i in range(2)))
    assert ReserveDynamic().admits(request(prompt=300, lengths=certain(90)), at, 0.0)
    assert not ReserveDynamic().admits(request(prompt=390, lengths=certain(200)), at, 0.0)


def test_peak_sees_what_lies_behind_the_first_end() -> None:
    at = decoding(worker(), request("a", 100, certain(300)), request("b", 100, certain(300)))
    small, large = (
        request(prompt=50, lengths=certain(50)),
        request(prompt=250, lengths=certain(300)),
    )
    assert ReserveDynamic().admits(large, at, 0.0)
    assert not Peak().admits(large, at, 0.0)
    assert Peak().admits(small, at, 0.0)


def test_peak_leaves_room_for_what_is_not_known() -> None:
    unsure = Lengths((10, 300))
    at = decoding(worker(), *(request(f"r{i}", 80, unsure) for i in range(3)))
    newcomer = request(prompt=80, lengths=unsure)
    assert Peak().admits(newcomer, at, 0.0)
    unsure_at = decoding(worker(z=1.64), *(request(f"r{i}", 80, unsure) for i in range(3)))
    assert not Peak().admits(newcomer, unsure_at, 0.0)


@pytest.mark.parametrize("policy", [Greedy(), ReserveStatic(), ReserveDynamic(), Peak()])
def test_an_empty_worker_takes_anything_and_a_full_house_nothing(policy: Greedy) -> None:
    huge = request(prompt=5000, lengths=certain(5000))
    assert policy.admits(huge, worker(), 0.0)
    at = worker(capacity=Capacity(1000, 10, 2, 512))
    decoding(at, request("a"), request("b"))
    assert not policy.admits(request(), at, 0.0)


def test_with_perfect_prediction_peak_never_admits_more_than_fits() -> None:
    rng = random.Random(5)
    for _ in range(30):
        at = worker()
        for i in range(40):
            one = request(f"r{i}", rng.randrange(1, 200), certain(rng.randrange(1, 300)))
            if Peak().admits(one, at, 0.0):
                decoding(at, one)
        for _ in range(300):
            steps(at, 1)
            for one in list(at.requests.values()):
                if at.generated_tokens(one) >= one.lengths.low:
                    at.remove(one)
            used = sum(
                -(-(one.prompt_tokens + at.generated_tokens(one)) // 10)
                for one in at.requests.values()
            )
            assert used <= 100
