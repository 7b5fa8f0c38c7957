"""What a cluster does with a request that lost its blocks, whatever the scheduler says: going on
where it is, or with what another worker has computed again."""

from __future__ import annotations

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


class Scripted(Scheduler):
    """The real one, which is told of no preemption; each is answered by the script beside it.

    `helper` is the worker that computes again what was lost; None: who lost it does. Blocks that
    nobody needs any more are released, and what computes them is aborted.
    """

    helper: ClassVar[str | None] = None

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.prefills: dict[str, ev.Stepped | None] = {}  # by id; None once nobody needs it
        self.leases: set[LeaseKey] = set()
        self.pulling: set[str] = set()
        self.num_asked = 0

    def on_event(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        match event:
            case ev.Stepped(preempted=lost) if lost:
                actions = super().on_event(replace(event, preempted=()), now_s)
                return actions + [self.answer(request_id, event) for request_id in lost]
            case ev.Prefilled(prefill_id, lease=lease) if prefill_id in self.prefills:
                return [self.prefilled(prefill_id, lease)]
            case ev.WorkerFinished(prefill_id) if prefill_id in self.prefills:
                wanted = self.prefills.pop(prefill_id)
                return [] if wanted is None else [resume(prefill_id.split("/")[0], wanted)]
            case ev.WorkerFinished(request_id) | ev.Cancelled(request_id):
                return super().on_event(event, now_s) + self.forget(request_id)
            case ev.LeaseEnded(lease) if lease in self.leases:
                self.leases.remove(lease)
                return []
            case ev.Pulled(request_id) if request_id in self.pulling:
                self.pulling.remove(request_id)
                return []
        return super().on_event(event, now_s)

    def answer(self, request_id: str, event: ev.Stepped) -> ev.Action:
        if self.helper in (None, event.worker_id) or request_id in self.prefills:
            return resume(request_id, event)
        self.num_asked += 1
        prefill_id = f"{request_id}/{self.num_asked}"
        self.prefills[prefill_id] = event
        assert self.helper is not None
        return ev.StartReprefill(prefill_id, request_id, self.helper, 0)

    def prefilled(self, prefill_id: str, lease: LeaseKey) -> ev.Action:
        wanted = self.prefills.pop(prefill_id)
        self.leases.add(lease)
        if wanted is None:
            return ev.ReleaseLease(lease)
        request_id = prefill_id.split("/")[0]
        self.pulling.add(request_id)
        return resume(request_id, wanted, lease)

    def forget(self, request_id: str) -> list[ev.Action]:
        aborts: list[ev.Action] = []
        for prefill_id, wanted in self.prefills.items():
            if prefill_id.split("/")[0] == request_id and wanted is not None:
                self.prefills[prefill_id] = None
                assert self.helper is not None
                aborts.append(ev.AbortOn(prefill_id, self.helper, 0))
        return aborts


def resume(request_id: str, event: ev.Stepped, lease: LeaseKey | None = None) -> ev.Resume:
    return ev.Resume(request_id, event.worker_id, event.generation, lease)


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
    letters=st.sampled_from(["pd", "bb", "pdd", "pbd"]),
    engine=ENGINES,
    asked=growing(),
    caching=st.booleans(),
    helper=st.integers(0, 1),
    message_s=st.sampled_from([0.0, 0.3]),
)
def test_whatever_happens_every_request_ends_once(
    letters: str,
    engine: EngineSpec,
    asked: tuple[SimRequest, ...],
    caching: bool,
    helper: int,
    message_s: float,
) -> None:
    class Script(Scripted):
        pass

    Script.helper = f"{letters[helper]}{helper}"
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
