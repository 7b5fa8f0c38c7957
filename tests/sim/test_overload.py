"""Three times as many requests as there is time for, with an SLO: few are late, little is lost."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from tinfer.core.types import Role, SchedulerConfig
from tinfer.sim import presets
from tinfer.sim.cluster import simulate
from tinfer.sim.results import SimRun
from tinfer.sim.spec import SimSpec, WorkerSpec
from tinfer.sim.workload import sim_requests
from tinfer.workloads import WorkloadSpec, make

ENGINE = replace(
    presets.PAPER_ENGINE,
    prefill_order="srpt",
    victim="least-progress",
    max_num_batched_tokens=512,
    prefix_caching=False,
)
WORKERS = (
    WorkerSpec(worker_id="p", role=Role.PREFILL, engine=ENGINE),
    WorkerSpec(worker_id="d", role=Role.DECODE, engine=ENGINE),
)
LASTS_S = 40.0
# About what the two do per second; what they do is measured below.
PEAK_RPS = 28.0


def run(rate_rps: float, **slo: Any) -> SimRun:
    spec = WorkloadSpec(name="LPLD", num_requests=int(rate_rps * LASTS_S), rate_rps=rate_rps)
    config = SchedulerConfig(
        costs=ENGINE.costs, max_num_queued_reqs=4096, ttft_deadline_s=slo.get("slo_ttft_s"), **slo
    )
    requests = sim_requests(make(spec), 16, max_output_tokens=600)
    return simulate(SimSpec(workers=WORKERS, requests=requests, scheduler=config))


def done_rps(run: SimRun) -> float:
    ends = [one.last_token_s for one in run.requests if one.ok and one.last_token_s is not None]
    return sum(end <= LASTS_S for end in ends) / LASTS_S


def test_at_three_times_the_peak_the_slo_holds_and_throughput_too() -> None:
    peak_rps = max(done_rps(run(rate)) for rate in (PEAK_RPS, 1.5 * PEAK_RPS))
    over = run(3 * PEAK_RPS, slo_ttft_s=2.0, slo_tpot_s=0.12)
    assert {one.error for one in over.requests} == {None, "slo"}
    taken = [one for one in over.requests if one.ok]
    in_time = [(one.ttft_s or 0.0) <= 2.0 and (one.tpot_s or 0.0) <= 0.12 for one in taken]
    assert sum(in_time) >= 0.9 * len(taken)
    assert done_rps(over) >= 0.95 * peak_rps
    # Without it, prompts crowd out the answers that are under way.
    assert done_rps(over) > 1.2 * done_rps(run(3 * PEAK_RPS))
