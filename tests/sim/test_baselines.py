"""What tinfer is compared with: replicas against queueing theory, the cap, the hybrid, the SLOs."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.sim.box import COSTS, SPEC, request
from tinfer.core.types import Role
from tinfer.sim import presets
from tinfer.sim.baselines import (
    HybridSpec,
    ReplicasSpec,
    simulate_hybrid,
    simulate_replicas,
    unloaded_slos,
)
from tinfer.sim.results import SimRun, figures_of, ratios_of
from tinfer.sim.spec import EngineSpec, SimRequest, WorkerSpec
from tinfer.sim.workload import sim_requests
from tinfer.workloads import WorkloadSpec, make


def replicas(
    requests: tuple[SimRequest, ...],
    engine: EngineSpec = SPEC,
    num: int = 1,
    message_s: float = 0.0,
) -> SimRun:
    return simulate_replicas(
        ReplicasSpec(engine=engine, num_replicas=num, requests=requests, message_s=message_s)
    )


def workload(
    name: str, num: int, rate_rps: float | None = None, seed: int = 0
) -> tuple[SimRequest, ...]:
    spec = WorkloadSpec(name=name, num_requests=num, rate_rps=rate_rps, seed=seed)
    return sim_requests(make(spec), 16)


def test_one_server_of_constant_service_waits_as_long_as_theory_says() -> None:
    # One token per answer and one seat: an M/D/1 queue of 0.5 s per request.
    engine = replace(
        SPEC,
        costs=replace(COSTS, base_s=0.375),
        max_num_seqs=1,
        max_num_batched_tokens=8,
        num_blocks=4,
    )
    load = 0.7
    arrivals = make(WorkloadSpec(name="LPLD", num_requests=20_000, rate_rps=load / 0.5, seed=5))
    requests = tuple(
        request(one.request_id, prompt=1, out=1, at_s=one.arrival_s) for one in arrivals
    )
    waits_s = [one.ttft_s - 0.5 for one in replicas(requests, engine).requests if one.ttft_s]
    expected_s = load * 0.5 / (2 * (1 - load))
    assert sum(waits_s) / len(waits_s) == pytest.approx(expected_s, rel=0.05)


def test_a_replica_is_one_hop_away() -> None:
    (one,) = replicas((request("a", prompt=4, out=2, at_s=3.0),), message_s=0.25).requests
    assert (one.ttft_s, one.e2el_s) == (2.0, 3.25)
    assert (one.route, one.workers, one.started_s) == ("whole", ("replica-000",), 3.0)


def test_the_balancer_goes_by_outstanding_tokens() -> None:
    requests = (
        request("long", prompt=16, out=8),
        request("one", prompt=4, out=2, at_s=0.5),
        request("two", prompt=4, out=2, at_s=0.5),
        # By then the first replica has 11 of 24 tokens left, the second one none.
        request("three", prompt=4, out=2, at_s=12.0),
    )
    run = replicas(requests, num=2)
    assert [one.workers[0][-1] for one in run.requests] == ["0", "1", "1", "1"]


def test_two_replicas_share_what_one_cannot_serve() -> None:
    requests = workload("Mixed", num=200, rate_rps=2.0)
    one, two = (figures_of(replicas(requests, presets.PAPER_REPLICA, num)) for num in (1, 2))
    assert two["mean_e2el_ms"] < 0.7 * one["mean_e2el_ms"]
    assert two["num_failed"] == 0


def test_a_cap_of_16_sequences_makes_the_others_wait_for_a_seat() -> None:
    requests = workload("LPHD", num=64)
    capped = replicas(requests, presets.PAPER_VLLM)
    uncapped = replicas(requests, replace(presets.PAPER_VLLM, max_num_seqs=128))
    first_s = sorted(one.ttft_s for one in capped.requests if one.ttft_s is not None)
    # The first 16 have their token after one step of prompts; the others wait for whole answers.
    assert first_s[15] < 2.0 < first_s[16]
    ratios = ratios_of(figures_of(uncapped), figures_of(capped))
    assert ratios["mean_ttft_ms"] < 0.1
    # Batches of 64 take longer per step, and far less in all.
    assert ratios["mean_tpot_ms"] > 1.2
    assert ratios["mean_e2el_ms"] < 0.8


def test_steps_of_prompts_alone_stall_every_decode() -> None:
    requests = (
        request("decodes", prompt=18, out=40),
        request("prompt", prompt=900, out=1, at_s=0.5),
    )
    plain = replicas(requests, presets.PAPER_VLLM)
    chunked = replicas(requests, presets.PAPER_ENGINE)
    prompt_s = presets.PAPER_ENGINE.costs.step_s(900, 0, 0)
    assert plain.itl_s.max() > prompt_s
    assert chunked.itl_s.max() < 0.7 * prompt_s


def hybrid_workers(num_decode: int = 1) -> tuple[WorkerSpec, ...]:
    return presets.workers(SPEC, 1, SPEC, num_decode)


def test_the_hybrid_splits_by_length() -> None:
    requests = (
        request("short", prompt=7, out=3),
        request("long", prompt=8, out=3),
        request("long, one token", prompt=8, out=1),
    )
    spec = HybridSpec(
        workers=hybrid_workers(), requests=requests, split_from_tokens=8, message_s=0.0
    )
    run = simulate_hybrid(spec)
    assert [(one.route, one.workers) for one in run.requests] == [
        ("whole", ("d000",)),
        ("split", ("p000", "d000")),
        ("split", ("p000",)),
    ]
    assert all(one.ok for one in run.requests)
    # Prefill: two steps of 1.5 s. d steps until 4.125 and then until 5.375, beside the copy.
    assert run.requests[1].ttft_s == 3.0
    assert run.requests[1].handoff_s == 5.375 - 3.0


def test_the_hybrid_spreads_over_decode_workers_and_clients_may_leave() -> None:
    requests = tuple(
        request(f"r{n}", prompt=4 + n % 9, out=9, at_s=n / 2, patience_s=12.0 if n % 3 else None)
        for n in range(60)
    )
    spec = HybridSpec(workers=hybrid_workers(2), requests=requests, split_from_tokens=8)
    run = simulate_hybrid(spec)
    assert {one.error for one in run.requests} == {None, "cancelled"}
    assert {one.workers[-1] for one in run.requests if one.ok} == {"d000", "d001"}
    assert all(one.ok for one in run.requests[::3])


def test_a_hybrid_needs_both_kinds() -> None:
    lonely = (WorkerSpec(worker_id="p", role=Role.PREFILL, engine=SPEC),)
    with pytest.raises(ValueError, match="prefill and a decode worker"):
        simulate_hybrid(HybridSpec(workers=lonely, requests=(), split_from_tokens=1))


def test_what_fits_no_replica_is_refused_and_who_leaves_is_let_go() -> None:
    requests = (
        request("big", prompt=190, out=20),
        request("gone", prompt=4, out=90, patience_s=3.0),
        request("here", prompt=4, out=3, at_s=1.0),
    )
    run = replicas(requests)
    assert [one.error for one in run.requests] == ["refused", "cancelled", None]
    assert run.duration_s < 20.0


def test_unloaded_times_give_the_bounds_of_each_class() -> None:
    requests = (
        request("a", prompt=4, out=3, task="A"),
        request("b", prompt=8, out=3, task="B", at_s=1.0),
        request("c", prompt=12, out=5, task="B", at_s=1.0),
        request("d", prompt=16, out=5, task="B", at_s=1.0),
        request("e", prompt=4, out=1, task="C", at_s=1.0),
    )
    slos = unloaded_slos(SPEC, requests, message_s=0.0)
    assert slos["loose"]["A"].ttft_s == 5 * 1.5
    assert slos["loose"]["A"].tpot_s == 4 * 1.25
    assert slos["tight"]["A"].tpot_s == 2 * 1.25
    assert slos["tight"]["B"].ttft_s == 5 * 4.5  # the median of 3, 4.5 and 6
    assert slos["loose"]["C"].tpot_s is None


@pytest.mark.parametrize(
    ("name", "num", "shown_s"),
    [
        ("LPLD", 128, 21.7),
        ("LPHD", 128, 181.0),
        ("HPLD", 32, 12.7),
        ("HPHD", 32, 69.0),
        ("Mixed", 128, 108.0),
    ],
)
def test_the_papers_vllm_needs_as_long_as_the_paper_shows(
    name: str, num: int, shown_s: float
) -> None:
    # Resource seconds read off its figures 11 to 15; over four draws of the lengths.
    taken_s = [
        replicas(workload(name, num, seed=seed), presets.PAPER_VLLM).duration_s for seed in range(4)
    ]
    assert sum(taken_s) / 4 == pytest.approx(shown_s, rel=0.13)


# --- presets -----------------------------------------------------------------------------------


def test_the_papers_figures_are_what_the_preset_says() -> None:
    costs = presets.PAPER_ENGINE.costs
    # Figure 2 at the threshold: about 3570 tokens/s; a decode iteration alone takes about 27 ms.
    assert 512 / costs.step_s(512, 0, 0) == pytest.approx(3570, rel=0.09)
    assert costs.step_s(0, 1, 100) == pytest.approx(0.027, rel=0.09)
    for link, expected_s in (("roce", 16.8e-3), ("nvlink", 1.4e-3)):
        prefill, decode = presets.paper_workers(link=link)
        assert decode.engine.costs.handoff_total_s(512) == pytest.approx(expected_s, rel=0.01)
        assert decode.engine.costs.base_s == costs.base_s
        assert 1 + prefill.engine.prefill_tax == pytest.approx(3470 / 3080)
        assert decode.engine.prefill_tax == 0.0
    with pytest.raises(ValueError, match="no link"):
        presets.paper_workers(link="wire")


def test_the_cpu_preset_gives_what_was_measured() -> None:
    costs = presets.CPU_52M.costs
    for tokens, expected_s in ((256, 83e-3), (1024, 367e-3)):
        assert costs.prefill_s(tokens, 2048) == pytest.approx(expected_s, rel=0.07)
    for num, kv_tokens, expected_s in (
        (1, 82, 6.2e-3),
        (1, 1042, 6.7e-3),
        (8, 651, 8.8e-3),
        (8, 8332, 13.0e-3),
        (16, 1300, 11.5e-3),
        (32, 2598, 18.0e-3),
        (64, 5187, 29.1e-3),
    ):
        assert costs.decode_step_s(num, kv_tokens) == pytest.approx(expected_s, rel=0.07)
    assert presets.CPU_52M.num_blocks * presets.CPU_52M.block_tokens == 209_664


def test_every_engine_serves_and_says_where_its_costs_are_from() -> None:
    for engine in presets.ENGINES.values():
        assert engine.costs.source
        run = replicas(workload("Mixed", num=8), presets.replica_of(engine, 512), num=2)
        assert all(one.ok for one in run.requests)
