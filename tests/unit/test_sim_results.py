"""Figures of small runs, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec.structs import replace

from tinfer.sim.results import (
    RequestResult,
    SimRun,
    Slo,
    WorkerResult,
    covered_s,
    figures_of,
    ratios_of,
)


def answer(
    name: str = "a",
    at_s: float = 0.0,
    first_s: float | None = 1.0,
    last_s: float | None = 3.0,
    out: int = 5,
    task: str = "A",
    error: str | None = None,
) -> RequestResult:
    return RequestResult(
        request_id=name,
        task=task,
        arrival_s=at_s,
        prompt_tokens=7,
        output_tokens=out,
        first_token_s=first_s,
        last_token_s=last_s,
        started_s=at_s,
        handoff_s=None,
        route="whole",
        workers=("w",),
        cached_tokens=0,
        num_preemptions=0,
        error=error,
    )


def worker(*work: tuple[float, float], num_devices: int = 1) -> WorkerResult:
    return WorkerResult(
        worker_id="w",
        num_devices=num_devices,
        num_steps=3,
        step_s=2.0,
        num_prefill_tokens=14,
        num_preemptions=2,
        num_reprefills=1,
        work=work,
    )


def run_of(*requests: RequestResult, workers: tuple[WorkerResult, ...] = ()) -> SimRun:
    gaps = [0.5, 0.5, 0.5, 0.5, 2.0]
    return SimRun(
        requests=requests,
        workers=workers,
        itl_s=np.array(gaps),
        itl_owner=np.zeros(len(gaps), dtype=np.int64),
        duration_s=10.0,
    )


A = answer("a")
B = answer("b", at_s=2.0, first_s=5.0, last_s=6.0, out=3)
LOST = answer("c", at_s=4.0, first_s=None, last_s=None, out=0, error="refused")
SINGLE = answer("d", at_s=1.0, first_s=2.0, last_s=2.0, out=1)


def test_latencies_are_from_arrival_and_of_whole_answers() -> None:
    figures = figures_of(run_of(A, B, LOST, SINGLE))
    assert figures["mean_ttft_ms"] == pytest.approx(1000 * (1 + 3 + 1) / 3)
    assert figures["median_ttft_ms"] == 1000.0
    assert figures["p99_ttft_ms"] == pytest.approx(1000 + 2000 * 0.98)
    # An answer of one token has no TPOT.
    assert figures["mean_tpot_ms"] == 500.0
    assert figures["mean_e2el_ms"] == pytest.approx(1000 * (3 + 4 + 1) / 3)
    assert figures["p99_itl_ms"] == pytest.approx(500 + 1500 * 0.96)
    assert figures["num_failed"] == 1


def test_throughput_is_of_the_whole_run() -> None:
    figures = figures_of(run_of(A, B, LOST, SINGLE))
    assert figures["request_throughput"] == 0.3
    assert figures["output_throughput"] == 0.9


def test_goodput_is_the_share_of_good_answers_times_the_offered_rate() -> None:
    slos = {
        "loose": {"A": Slo(ttft_s=3.0, tpot_s=0.5)},
        "tight": {"A": Slo(ttft_s=1.0, tpot_s=0.5, e2el_s=2.5)},
    }
    run = run_of(A, B, LOST, SINGLE)
    figures = figures_of(run, slos, offered_rps=8.0)
    assert figures["goodput_loose"] == 8.0 * 3 / 4
    assert figures["goodput_tight"] == 8.0 * 1 / 4
    # Four requests, the last of them after 4 s.
    assert figures_of(run, slos)["goodput_loose"] == 3 / 4
    # All at once: no rate was offered.
    at_once = run_of(A, replace(A, request_id="b"))
    assert figures_of(at_once, slos)["goodput_loose"] == 0.2


def test_every_class_has_its_own_bounds() -> None:
    slos = {"loose": {"A": Slo(ttft_s=9.0), "B": Slo(ttft_s=0.5)}}
    run = run_of(A, replace(A, request_id="b", task="B"))
    assert figures_of(run, slos, offered_rps=2.0)["goodput_loose"] == 1.0


def test_resource_time_ends_on_each_device_with_the_last_work_there() -> None:
    workers = (
        worker((1.0, 2.0), (3.0, 7.0), num_devices=2),
        worker((2.0, 5.0), (4.0, 6.0)),
        worker(),
    )
    run = run_of(replace(A, arrival_s=0.5), workers=workers)
    assert run.resource_s == 2 * 6.5 + 5.5
    assert run.busy_s == 2 * 5.0 + 4.0
    figures = figures_of(run)
    assert figures["resource_s"] == 18.5 and figures["busy_s"] == 14.0
    assert figures["perf_per_dollar_reciprocal"] == pytest.approx(1 / (2.5 * 18.5))
    assert (figures["num_preemptions"], figures["num_reprefills"]) == (6, 3)


def test_covered_time_counts_what_overlaps_once() -> None:
    assert covered_s([]) == 0.0
    assert covered_s([(3.0, 4.0), (0.0, 2.0), (1.0, 1.5), (2.0, 3.5)]) == 4.0


def test_both_forms_of_performance_per_dollar() -> None:
    # The paper's own example: LPHD, E2EL -47 % at -38 % resource time, is 2.4 times.
    base = {"mean_e2el_ms": 100.0, "resource_s": 10.0, "perf_per_dollar_reciprocal": 1.0}
    ours = {
        "mean_e2el_ms": 53.0,
        "resource_s": 6.2,
        "perf_per_dollar_reciprocal": 1 / (0.53 * 0.62),
    }
    ratios = ratios_of(ours, base)
    assert ratios["perf_per_dollar_paper"] == pytest.approx(2.37, abs=0.01)
    assert ratios["perf_per_dollar_reciprocal"] == pytest.approx(3.04, abs=0.01)
    assert ratios["mean_e2el_ms"] == 0.53


def test_what_was_not_measured_is_no_number() -> None:
    figures = figures_of(run_of(LOST))
    for key in ("mean_ttft_ms", "p99_tpot_ms", "mean_e2el_ms", "perf_per_dollar_reciprocal"):
        assert math.isnan(figures[key])
    assert figures["request_throughput"] == 0.0
    ratios = ratios_of(figures, figures)
    assert math.isnan(ratios["mean_ttft_ms"]) and math.isnan(ratios["request_throughput"])


def test_a_failed_answer_meets_no_bound_and_one_token_has_no_tpot() -> None:
    assert not Slo().met_by(LOST)
    assert Slo(tpot_s=0.0).met_by(SINGLE)
    assert not Slo(e2el_s=2.9).met_by(A)
    assert Slo(ttft_s=1.0, tpot_s=0.5, e2el_s=3.0).met_by(A)
