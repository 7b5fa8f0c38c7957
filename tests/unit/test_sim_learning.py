"""The simulator tells a predictor that learns of every end, when it comes, and what it has learnt
changes what is decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from tests.sim.box import SPEC, request
from tinfer.config import load
from tinfer.core.lengths import Lengths, certain
from tinfer.core.types import Role, SchedulerConfig
from tinfer.master.scheduling import scheduler_config
from tinfer.predict.asked import End
from tinfer.sim.arms import run_arm, tinfer_arm
from tinfer.sim.boxes import preset_box
from tinfer.sim.cluster import simulate
from tinfer.sim.spec import SimRequest, SimSpec, WorkerSpec
from tinfer.sim.workload import sim_requests
from tinfer.workloads import WorkloadSpec, make

WORKERS = (WorkerSpec(worker_id="b", role=Role.BOTH, engine=SPEC),)


@dataclass
class Listener:
    """In one list what it is asked and what it is told, in order."""

    heard: list[Any] = field(default_factory=list)

    def predict(self, asked: SimRequest) -> Lengths:
        self.heard.append(asked.request_id)
        return certain(asked.max_output_tokens)

    def observe(self, asked: SimRequest, output_tokens: int, end: End) -> None:
        self.heard.append((asked.request_id, output_tokens, end))


def heard_of(*requests: SimRequest, **config: Any) -> list[Any]:
    listener = Listener()
    scheduler = SchedulerConfig(route="whole", **config)
    simulate(SimSpec(workers=WORKERS, requests=requests, scheduler=scheduler, predictor=listener))
    return listener.heard


def test_ends_are_told_as_they_come_and_for_what_they_are() -> None:
    short = request("short", prompt=5, out=3, most=9)
    cut = request("cut", prompt=5, out=6, most=6)
    late = request("late", prompt=5, out=3, at_s=1e4, most=9)
    assert heard_of(short, cut, late) == [
        "short",
        "cut",
        ("short", 3, End.STOP),
        ("cut", 6, End.LENGTH),
        "late",
        ("late", 3, End.STOP),
    ]


def test_a_client_that_leaves_and_a_request_that_is_refused() -> None:
    first = replace(request("first", prompt=5, out=100), patience_s=5.0)
    queued = [request(f"q{i}", prompt=5, out=4) for i in range(40)]
    heard = heard_of(first, *queued, max_num_queued_reqs=1)
    ends = {one[0]: one[1:] for one in heard if isinstance(one, tuple)}
    assert len(ends) == 41
    assert ends["first"][1] is End.ABORT
    assert End.ERROR in {end for _, end in ends.values()}
    assert all(tokens == 0 for tokens, end in ends.values() if end is End.ERROR)


@pytest.mark.parametrize("name", ["prior", "online"])
def test_each_run_learns_anew_and_gives_the_same(name: str) -> None:
    config = load({"predictor": name})
    arm = tinfer_arm("tinfer", preset_box("cpu-52m"), 1, 1, config, scheduler_config)
    spec = WorkloadSpec(name="multi-tenant", num_requests=60, max_prompt_tokens=1000)
    requests = sim_requests(make(spec), 16, max_output_tokens=1500)
    first, again = (run_arm(arm, requests) for _ in range(2))
    assert first.requests == again.requests


def test_what_a_simulated_prompt_is_known_by() -> None:
    spec = WorkloadSpec(name="multi-tenant", num_requests=200, max_prompt_tokens=3000)
    drawn = make(spec)
    simulated = sim_requests(drawn, 16)
    heads: dict[str, set[int]] = {one.tenant: set() for one in drawn}
    for one, known in zip(drawn, simulated, strict=True):
        heads[one.tenant].add(known.features.head)
    assert all(len(each) == 1 for each in heads.values())
    assert len({head for each in heads.values() for head in each}) == len(heads) > 1
