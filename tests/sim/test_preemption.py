"""What a cluster does with a request that lost its blocks, whatever the scheduler says: going on
where it is, or with what another worker has computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.sim.box import SPEC, request
from tests.sim.test_cluster import TIGHT, box, check_conserved, workload
from tests.sim.test_cluster_property import ENGINES, check
from tinfer.core import events as ev
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import LeaseKey, SchedulerConfig
from tinfer.sim import cluster as cluster_module
from tinfer.sim.cluster import simulate
from tinfer.sim.results import SimRun, figures_of
from tinfer.sim.spec import EngineSpec, SimRequest, SimSpec
from tinfer.sim.world import SimulationError

# After so long a prefill that has not ended is given up: it may wait for blocks that wait for it.
PATIENCE_S = 20.0


@dataclass
class Asked:
    """A prefill of what `request_id` lost, as `lost` told; its end is `wanted` unless the request
    is over, and its blocks unless it is `late`."""

    request_id: str
    lost: ev.Stepped
    at_s: float
    is_wanted: bool = True
    is_late: bool = False


class Scripted(Scheduler):
    """The real one, which is told of no preemption; each is answered by the script beside it.

    `helper` is the worker that computes again what was lost; None: who lost it does.
    """

    helper: ClassVar[str | None] = None

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.asked: dict[str, Asked] = {}
        self.leases: set[LeaseKey] = set()
        self.pulling: set[str] = set()
        self.over: set[str] = set()
        self.num_asked = 0

    def on_event(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        match event:
            case ev.Stepped(preempted=lost) if lost:
                actions = super().on_event(replace(event, preempted=()), now_s)
                alive = [request_id for request_id in lost if request_id not in self.over]
                return actions + [self.answer(one, event, now_s) for one in alive]
            case ev.Prefilled(prefill_id, lease=lease) if prefill_id in self.asked:
                return self.prefilled(self.asked.pop(prefill_id), lease)
            case ev.WorkerFinished(prefill_id) if prefill_id in self.asked:
                asked = self.asked.pop(prefill_id)
                return [resume(asked.request_id, asked.lost)] if asked.is_wanted else []
            case ev.WorkerFinished(request_id) | ev.Cancelled(request_id):
                self.over.add(request_id)
                return super().on_event(event, now_s) + self.forget(request_id)
            case ev.LeaseEnded(lease) if lease in self.leases:
                self.leases.remove(lease)
                return []
            case ev.Pulled(request_id) if request_id in self.pulling:
                self.pulling.remove(request_id)
                return []
            case ev.Tick():
                return super().on_event(event, now_s) + self.give_up(now_s)
        return super().on_event(event, now_s)

    def answer(self, request_id: str, lost: ev.Stepped, now_s: float) -> ev.Action:
        if self.helper is None or self.helper == lost.worker_id or request_id in self.asked:
            return resume(request_id, lost)
        self.num_asked += 1
        prefill_id = f"{request_id}/{self.num_asked}"
        self.asked[prefill_id] = Asked(request_id, lost, now_s)
        return ev.StartReprefill(prefill_id, request_id, self.helper, 0)

    def prefilled(self, asked: Asked, lease: LeaseKey) -> list[ev.Action]:
        self.leases.add(lease)
        if asked.is_wanted and not asked.is_late:
            self.pulling.add(asked.request_id)
            return [resume(asked.request_id, asked.lost, lease)]
        actions: list[ev.Action] = [ev.ReleaseLease(lease)]
        return actions + ([resume(asked.request_id, asked.lost)] if asked.is_wanted else [])

    def forget(self, request_id: str) -> list[ev.Action]:
        mine = [one for one in self.asked.items() if one[1].request_id == request_id]
        for _, asked in mine:
            asked.is_wanted = False
        return [ev.AbortOn(prefill_id, str(self.helper), 0) for prefill_id, _ in mine]

    def give_up(self, now_s: float) -> list[ev.Action]:
        late = [
            prefill_id
            for prefill_id, asked in self.asked.items()
            if asked.is_wanted and not asked.is_late and now_s > asked.at_s + PATIENCE_S
        ]
        for prefill_id in late:
            self.asked[prefill_id].is_late = True
        return [ev.AbortOn(prefill_id, str(self.helper), 0) for prefill_id in late]


def resume(request_id: str, lost: ev.Stepped, lease: LeaseKey | None = None) -> ev.Resume:
    return ev.Resume(request_id, lost.worker_id, lost.generation, lease)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    class Script(Scripted):
        pass

    monkeypatch.setattr(cluster_module, "Scheduler", Script)
    return Script


GREEDY = SchedulerConfig(route="split", decode_admission="greedy")


def long_answers() -> tuple[SimRequest, ...]:
    return workload("LPHD", num=120, rate_rps=None)


def num_of(run: SimRun, name: str) -> int:
    return round(figures_of(run)[name])


@pytest.mark.parametrize("helper", [None, "p0", "d2"])
@pytest.mark.parametrize("caching", [False, True])
def test_every_request_ends_once(
    scripted: type[Scripted], helper: str | None, caching: bool
) -> None:
    scripted.helper = helper
    requests = long_answers()
    engine = replace(TIGHT, prefix_caching=caching)
    run = simulate(SimSpec(workers=box("pdd", engine), requests=requests, scheduler=GREEDY))
    check_conserved(run, requests)
    assert num_of(run, "num_preemptions") > 0
    assert (num_of(run, "num_reprefills") > 0) == (helper is not None)
    assert all(one.num_reprefills == 0 for one in run.workers if one.worker_id != helper)
    num_lost = sum(one.num_preemptions for one in run.requests)
    assert num_of(run, "num_preemptions") == num_lost


@st.composite
def growing(draw: st.DrawFn) -> tuple[SimRequest, ...]:
    """Requests that come at about the same time, and whose answers need most of a small engine."""
    return tuple(
        request(
            f"r{number}",
            prompt=draw(st.integers(4, 9)),
            out=draw(st.integers(8, 17)),
            at_s=draw(st.integers(0, 6)) / 2,
            hashes=range(100, 100 + draw(st.integers(0, 1))),
            patience_s=draw(st.sampled_from([None, None, 9.0, 15.0, 24.0])),
        )
        for number in range(draw(st.integers(3, 8)))
    )


@settings(max_examples=100)
@given(
    letters=st.sampled_from(["pd", "pdd", "pbd"]),
    engine=ENGINES,
    asked=growing(),
    caching=st.booleans(),
    message_s=st.sampled_from([0.0, 0.3]),
)
def test_whatever_happens_every_request_ends_once(
    letters: str,
    engine: EngineSpec,
    asked: tuple[SimRequest, ...],
    caching: bool,
    message_s: float,
) -> None:
    class Script(Scripted):
        pass

    # Nobody reads from the one that reads from it: else each could hold what the other one needs.
    Script.helper = "p0"
    num_blocks = 24 // engine.block_tokens
    engine = replace(engine, num_blocks=num_blocks, prefix_caching=caching, max_num_seqs=6)
    scheduler = SchedulerConfig(decode_admission="greedy")
    spec = SimSpec(
        workers=box(letters, engine), requests=asked, scheduler=scheduler, message_s=message_s
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_module, "Scheduler", Script)
        check(simulate(spec), asked, is_bounded=False)


def test_clients_that_leave_meanwhile_leave_nothing(scripted: type[Scripted]) -> None:
    scripted.helper = "p0"
    requests = tuple(
        replace(one, patience_s=(None, 20.0 + place)[place % 2])
        for place, one in enumerate(long_answers())
    )
    run = simulate(SimSpec(workers=box("pdd", TIGHT), requests=requests, scheduler=GREEDY))
    assert {one.error for one in run.requests} == {None, "cancelled"}
    assert num_of(run, "num_reprefills") > 0


def test_a_prefill_that_fits_nowhere_is_refused_and_the_request_goes_on(
    scripted: type[Scripted],
) -> None:
    scripted.helper = "p0"
    workers = (
        box("pd", replace(SPEC, num_blocks=3))[0],
        box("pd", replace(SPEC, num_blocks=8))[1],
    )
    requests = tuple(request(name, prompt=2, out=12) for name in "ab")
    run = simulate(SimSpec(workers=workers, requests=requests, scheduler=GREEDY))
    check_conserved(run, requests)
    assert num_of(run, "num_preemptions") > 0
    assert num_of(run, "num_reprefills") == 0


def test_it_takes_its_hops_its_steps_and_its_copy(scripted: type[Scripted]) -> None:
    scripted.helper = "p0"
    spec = SimSpec(
        workers=(box("pd")[0], box("pd", replace(SPEC, num_blocks=4))[1]),
        requests=(request("a", prompt=2, out=5), request("b", prompt=2, out=5, at_s=0.125)),
        scheduler=GREEDY,
        message_s=0.25,
        tick_s=None,
    )
    run = simulate(spec)
    a, b = run.requests
    # At 6.5 a, with three tokens, needs a block of b, which has repeated its first one.
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)
    assert (a.last_token_s, b.first_token_s) == (9.25, 3.0)
    # A step, known after a hop at 8.0; a hop, three tokens, a hop; a hop, a copy, and a step.
    known_s = 6.5 + 1.25 + 0.25
    prefilled_s = known_s + 0.25 + 1.375 + 0.25
    second_s = prefilled_s + 0.25 + 0.5 + 1.25 + 0.25
    assert run.itl_s.tolist()[4:] == [second_s - 3.0, 1.25, 1.25, 1.25]
    assert (b.handoff_s, b.workers) == (2.25, ("p0", "d1"))
    d1, p0 = run.workers
    assert (p0.num_prefill_tokens, p0.num_reprefills) == (2 + 2 + 3, 1)
    assert p0.work == ((known_s, prefilled_s), (0.0, 1.75), (0.125, 3.0))
    assert (d1.num_prefill_tokens, d1.num_reprefills, d1.num_preemptions) == (0, 0, 1)


class Hasty(Scheduler):
    """Has every prompt computed again as soon as it is done."""

    def on_event(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        actions = super().on_event(event, now_s)
        if isinstance(event, ev.FirstToken):
            actions.append(ev.StartReprefill("again", event.request_id, "b0", 0))
        return actions


def test_a_prefill_of_what_was_not_lost_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "Scheduler", Hasty)
    spec = SimSpec(workers=box("b"), requests=(request("a"),))
    with pytest.raises(SimulationError, match="a is prefilled again and has its blocks"):
        simulate(spec)
