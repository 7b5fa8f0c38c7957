"""tinfer's scheduler over simulated workers: every request ends once, and nothing is left over."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tests.sim.box import SPEC, request
from tinfer.core import events as ev
from tinfer.core.lengths import Lengths, bucket
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Role, Route, SchedulerConfig
from tinfer.sim import cluster as cluster_module
from tinfer.sim import presets
from tinfer.sim.cluster import Cluster, simulate
from tinfer.sim.engine import SimEngine
from tinfer.sim.jobs import Output, Ticket
from tinfer.sim.results import SimRun
from tinfer.sim.spec import TICK_S, SimRequest, SimSpec, WorkerSpec
from tinfer.sim.workload import sim_requests
from tinfer.sim.world import SETTLED_AFTER_S, SimulationError, World
from tinfer.workloads import WorkloadSpec, make

ROOT = Path(__file__).resolve().parents[2]
ROUTES = ["split", "whole", "auto"]
# What the smallest box below just serves.
RATES_RPS = {"Mixed": 1.2, "multi-tenant": 0.5}
# Room for about 14 mean requests of `Mixed`, so blocks run out at times.
TIGHT = replace(presets.PAPER_ENGINE, num_blocks=400, prefix_caching=True)


def box(letters: str = "pd", engine: object = SPEC) -> tuple[WorkerSpec, ...]:
    roles = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}
    return tuple(
        WorkerSpec(worker_id=f"{letter}{place}", role=roles[letter], engine=engine)  # type: ignore[arg-type]
        for place, letter in enumerate(letters)
    )


def workload(
    name: str = "Mixed", num: int = 120, rate_rps: float | None = 2.0, seed: int = 0
) -> tuple[SimRequest, ...]:
    spec = WorkloadSpec(
        name=name, num_requests=num, rate_rps=rate_rps, seed=seed, max_prompt_tokens=4000
    )
    return sim_requests(make(spec), 16, max_output_tokens=1500)


def print_of(run: SimRun) -> str:
    """All of a run as one short text."""
    digest = hashlib.sha256(msgspec.json.encode((run.requests, run.workers, run.duration_s)))
    digest.update(run.itl_s.tobytes())
    digest.update(run.itl_owner.tobytes())
    return digest.hexdigest()


def check_conserved(run: SimRun, requests: Sequence[SimRequest]) -> None:
    """Every request has its whole answer, once, and no token before it can be there."""
    assert [one.request_id for one in run.requests] == [one.request_id for one in requests]
    for got, asked in zip(run.requests, requests, strict=True):
        assert got.ok and got.output_tokens == asked.output_tokens
        assert got.ttft_s is not None and got.e2el_s is not None and got.started_s is not None
        assert asked.arrival_s <= got.started_s < asked.arrival_s + got.ttft_s
        assert got.ttft_s <= got.e2el_s
        assert len(got.workers) == (1 if got.route == "whole" else 2) or got.output_tokens == 1
    assert len(run.itl_s) == sum(one.output_tokens - 1 for one in requests)
    assert run.itl_s.min() > 0.0
    assert run.busy_s <= run.resource_s


# --- conservation ------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("letters", ["pd", "ppdd", "bb", "pbd"])
@pytest.mark.parametrize("name", RATES_RPS)
def test_every_request_ends_once(route: str, letters: str, name: str) -> None:
    requests = workload(name, rate_rps=RATES_RPS[name])
    spec = SimSpec(
        workers=box(letters, TIGHT),
        requests=requests,
        scheduler=SchedulerConfig(route=route),
        tick_s=1.0,
    )
    # That the ledger is zero and the engines are empty at the end, it checks itself.
    check_conserved(simulate(spec), requests)


def test_all_at_once_and_preempting() -> None:
    requests = workload("LPHD", num=60, rate_rps=None)
    scheduler = SchedulerConfig(route="whole", decode_admission="greedy")
    run = simulate(SimSpec(workers=box("bb", TIGHT), requests=requests, scheduler=scheduler))
    check_conserved(run, requests)
    assert sum(one.num_preemptions for one in run.requests) > 0
    assert sum(one.num_preemptions for one in run.workers) == sum(
        one.num_preemptions for one in run.requests
    )


def test_clients_that_leave_are_counted_once_and_leave_nothing() -> None:
    requests = tuple(
        replace(one, patience_s=(0.05, 0.4, 3.0, 20.0, None)[place % 5])
        for place, one in enumerate(workload("Mixed", num=150, rate_rps=4.0))
    )
    run = simulate(SimSpec(workers=box("pd", TIGHT), requests=requests, tick_s=1.0))
    errors = [one.error for one in run.requests]
    assert set(errors) == {None, "cancelled"}
    assert all(error is None for error in errors[4::5])
    assert errors[0::5].count("cancelled") > errors[3::5].count("cancelled")


def test_a_request_that_fits_no_engine_fails_alone() -> None:
    requests = (
        request("big", prompt=150, out=60, at_s=0.0),
        request("small", prompt=4, out=3, at_s=0.5),
    )
    for route in ROUTES:
        scheduler = SchedulerConfig(route=route)
        run = simulate(SimSpec(workers=box("pd"), requests=requests, scheduler=scheduler))
        assert [one.error for one in run.requests] == ["refused", None]


def test_a_full_queue_refuses() -> None:
    requests = tuple(request(f"r{number}", prompt=40, out=2) for number in range(12))
    scheduler = SchedulerConfig(max_num_queued_reqs=1)
    run = simulate(SimSpec(workers=box("pd"), requests=requests, scheduler=scheduler))
    assert {one.error for one in run.requests} == {None, "queue-full"}


# --- determinism -------------------------------------------------------------------------------


def noisy(letters: str = "ppdd") -> SimSpec:
    return SimSpec(
        workers=box(letters, replace(TIGHT, noise=0.1)),
        requests=workload("multi-tenant", num=80, rate_rps=0.8),
        tick_s=1.0,
        seed=3,
    )


def test_equal_specs_give_equal_runs() -> None:
    spec = noisy()
    assert print_of(simulate(spec)) == print_of(simulate(spec))
    assert print_of(simulate(spec)) != print_of(simulate(replace(spec, seed=4)))


def test_the_order_of_workers_and_requests_means_nothing() -> None:
    spec = noisy()
    turned = replace(spec, workers=spec.workers[::-1])
    assert print_of(simulate(turned)) == print_of(simulate(spec))
    # Only among those that arrive at one moment the order counts.
    apart = tuple(
        replace(one, arrival_s=one.arrival_s + place / 1000)
        for place, one in enumerate(spec.requests)
    )
    forth, back = (
        simulate(replace(spec, requests=requests)).requests for requests in (apart, apart[::-1])
    )
    assert back[::-1] == forth


def test_a_run_does_not_depend_on_how_python_hashes() -> None:
    script = (
        "from tests.sim.test_cluster import noisy, print_of\n"
        "from tinfer.sim import simulate\n"
        "print(print_of(simulate(noisy())))\n"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert printed[0].strip() == print_of(simulate(noisy()))


# --- times, by hand ----------------------------------------------------------------------------


def test_a_split_request_takes_its_hops_its_steps_and_its_copy() -> None:
    spec = SimSpec(
        workers=box("pd"),
        requests=(request("a", prompt=4, out=3, at_s=8.0),),
        scheduler=SchedulerConfig(route="split"),
        message_s=0.25,
    )
    run = simulate(spec)
    (one,) = run.requests
    # A hop, 1.5 s of prefill, a hop.
    assert one.ttft_s == 2.0
    # A hop, 0.5 s of copying, the first token again, two more (1.25 s each), a hop.
    assert one.e2el_s == 2.0 + 0.25 + 0.5 + 3 * 1.25 + 0.25
    # As the master sees it: from the first token to word of the copy.
    assert one.handoff_s == 0.25 + 0.5 + 0.25
    assert run.itl_s.tolist() == [3.5, 1.25]
    assert (one.route, one.workers) == ("split", ("p0", "d1"))
    assert [w.work for w in run.workers] == [((10.0, 14.75),), ((8.0, 10.0),)]


def test_a_whole_request_takes_two_hops_and_its_steps() -> None:
    spec = SimSpec(
        workers=box("b"),
        requests=(request("a", prompt=6, out=2, at_s=1.0),),
        message_s=0.25,
    )
    (one,) = simulate(spec).requests
    assert one.ttft_s == 0.25 + 1.5 + 1.25 + 0.25
    assert one.e2el_s == one.ttft_s + 1.25
    assert (one.route, one.workers, one.started_s) == ("whole", ("b0",), 1.0)


# --- what the scheduler is told ----------------------------------------------------------------


class Recorder(Scheduler):
    """Writes down what passes."""

    log: list[tuple[float, ev.Event, list[ev.Action]]] = []

    def on_event(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        actions = super().on_event(event, now_s)
        self.log.append((now_s, event, actions))
        return actions


Log = list[tuple[float, ev.Event, list[ev.Action]]]


def recorded(monkeypatch: pytest.MonkeyPatch, spec: SimSpec) -> Log:
    monkeypatch.setattr(Recorder, "log", [])
    monkeypatch.setattr(cluster_module, "Scheduler", Recorder)
    simulate(spec)
    return Recorder.log


def test_events_come_in_order_of_time_with_steps_before_what_they_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = recorded(monkeypatch, noisy("pd"))
    times = [now_s for now_s, _, _ in log]
    assert times == sorted(times)
    last: dict[str, ev.Stepped] = {}
    for _, event, _ in log:
        if isinstance(event, ev.Stepped):
            before = last.get(event.worker_id)
            if before is not None:
                # Where a preemption leaves nothing to compute, it is told of without a step.
                assert event.num_steps > before.num_steps or event.preempted
                assert event.busy_s > before.busy_s or event.num_steps == before.num_steps
                assert event.num_prefill_tokens >= before.num_prefill_tokens
            assert 0 <= event.num_free_blocks <= TIGHT.num_blocks
            last[event.worker_id] = event
        elif isinstance(event, ev.FirstToken | ev.Prefilled | ev.WorkerFinished):
            assert event.worker_id in last
    assert set(last) == {"p0", "d1"}
    assert any(event.progress for _, event, _ in log if isinstance(event, ev.Stepped))


def test_the_log_of_a_run_replays_to_the_same_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = noisy("pbd")
    scheduler = Scheduler(spec.scheduler)
    for now_s, event, actions in recorded(monkeypatch, spec):
        assert scheduler.on_event(event, now_s) == actions


def test_prompts_under_way_are_told_of_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimSpec(
        workers=box("pd"),
        requests=(request("a", prompt=11, out=2),),
        scheduler=SchedulerConfig(route="split"),
        message_s=0.0,
    )
    log = recorded(monkeypatch, spec)
    steps = [(now_s, e) for now_s, e, _ in log if isinstance(e, ev.Stepped) and e.progress]
    assert [(now_s, step.progress) for now_s, step in steps] == [
        (1.5, (("a", 4),)),
        (3.0, (("a", 8),)),
    ]


def test_steps_can_be_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    log = recorded(monkeypatch, replace(noisy(), post_steps=False))
    assert not any(isinstance(event, ev.Stepped) for _, event, _ in log)


def test_preempted_requests_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = workload("LPHD", num=60, rate_rps=None)
    scheduler = SchedulerConfig(route="whole", decode_admission="greedy")
    spec = SimSpec(workers=box("bb", TIGHT), requests=requests, scheduler=scheduler)
    log = recorded(monkeypatch, spec)
    named = [rid for _, e, _ in log if isinstance(e, ev.Stepped) for rid in e.preempted]
    run = simulate(spec)
    counted = {one.request_id: one.num_preemptions for one in run.requests if one.num_preemptions}
    assert {rid: named.count(rid) for rid in named} == counted


class Halves:
    """Says half of what is true, or a bit more."""

    def predict(self, request: SimRequest) -> Lengths:
        return bucket(request.output_tokens // 2, request.output_tokens + 10)


def test_the_predictor_is_asked_once_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(noisy(), predictor=Halves())
    log = recorded(monkeypatch, spec)
    told = {e.request_id: e.lengths for _, e, _ in log if isinstance(e, ev.Arrived)}
    assert told == {one.request_id: Halves().predict(one) for one in spec.requests}


class Braking(Scheduler):
    """Sets a budget with every tick, for all that it does else like the real one."""

    def on_event(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        actions: list[ev.Action] = [
            action
            for action in super().on_event(event, now_s)
            if not isinstance(action, ev.SetBudget)
        ]
        if isinstance(event, ev.Tick):
            actions.append(ev.SetBudget("b0", 0, 1))
        return actions


def test_a_budget_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimSpec(
        workers=box("b"),
        requests=(request("a", prompt=3, out=1, at_s=1.0),),
        message_s=0.25,
        tick_s=0.5,
    )
    assert simulate(spec).requests[0].ttft_s == 0.25 + 1.375 + 0.25
    monkeypatch.setattr(cluster_module, "Scheduler", Braking)
    assert simulate(spec).requests[0].ttft_s == 0.25 + 3 * 1.125 + 0.25


def test_a_wish_of_the_client_is_passed_on() -> None:
    asked = replace(request("a", prompt=4, out=3), route=Route.WHOLE)
    scheduler = SchedulerConfig(route="split")
    run = simulate(SimSpec(workers=box("pd"), requests=(asked,), scheduler=scheduler))
    assert run.requests[0].route == "whole"


# --- what cannot be ----------------------------------------------------------------------------


class Deaf:
    """Starts nothing, ever."""

    def arrived(self, ticket: Ticket, now_s: float) -> None:
        return

    def heard(self, outputs: Sequence[Output], now_s: float) -> None:
        return

    def left(self, ticket: Ticket, now_s: float) -> None:
        return

    def ticked(self, now_s: float) -> None:
        return


@pytest.mark.parametrize("tick_s", [None, 0.1])
def test_a_request_that_is_never_answered_is_an_error(tick_s: float | None) -> None:
    world = World([SimEngine(SPEC)], [request("a")], message_s=0.0, tick_s=tick_s)
    with pytest.raises(SimulationError, match="1 requests are never answered; the first one is a"):
        world.run(Deaf())


def test_a_long_silence_is_not_ticked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    apart_s = 1e6 + TICK_S / 2
    requests = (request("a"), request("b", at_s=apart_s))
    spec = SimSpec(workers=box("pd"), requests=requests, message_s=0.25)
    log = recorded(monkeypatch, spec)
    ticks_s = [now_s for now_s, event, _ in log if isinstance(event, ev.Tick)]
    assert len(ticks_s) < 1.2 * SETTLED_AFTER_S / TICK_S
    # The tick before the next arrival is not left out.
    assert max(at_s for at_s in ticks_s if at_s < apart_s) > apart_s - 2 * TICK_S
    first, second = simulate(spec).requests
    assert first.ttft_s == second.ttft_s and second.ok


def test_a_second_end_is_an_error() -> None:
    world = World([SimEngine(SPEC)], [request("a")], message_s=0.0)
    world.end(world.tickets[0], 1.0)
    with pytest.raises(SimulationError, match="a ended twice"):
        world.end(world.tickets[0], 2.0)


def test_open_accounts_at_the_end_are_an_error() -> None:
    spec = SimSpec(workers=box("pd"), requests=(request("a"),))
    engines = [SimEngine(worker.engine, worker.worker_id) for worker in spec.workers]
    world = World(engines, spec.requests, message_s=0.0)
    cluster = Cluster(spec, world)
    cluster.check_closed()
    cluster.arrived(world.tickets[0], 0.0)
    with pytest.raises(SimulationError, match="accounts are open"):
        cluster.check_closed()


def test_specs_that_make_no_sense_are_errors() -> None:
    asked = request("a")
    with pytest.raises(ValueError, match="no worker"):
        simulate(SimSpec(workers=(), requests=(asked,)))
    with pytest.raises(ValueError, match="same worker_id"):
        simulate(SimSpec(workers=box("p") + box("p"), requests=(asked,)))
    with pytest.raises(ValueError, match="same request_id"):
        simulate(SimSpec(workers=box("pd"), requests=(asked, asked)))
    for at_s in (1e300, math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match="a arrives at"):
            simulate(SimSpec(workers=box("pd"), requests=(replace(asked, arrival_s=at_s),)))


def test_no_requests_give_an_empty_run() -> None:
    run = simulate(SimSpec(workers=box("pd"), requests=()))
    assert run.requests == () and run.duration_s == 0.0 and run.resource_s == 0.0
