"""What the overload and soak benchmarks make of what they have seen."""

from __future__ import annotations

import pytest

from benchmarks.overload import capacity_rps, percentiles, throughput_rps
from benchmarks.soak import levels
from tinfer.bench.outcome import LoadRun, Outcome


def run_of(ends_s: list[float], num_refused: int = 0) -> LoadRun:
    """Answers that end then; the refused end at once."""
    ok = [
        Outcome(
            request_id=f"r{at_s}",
            due_s=0.0,
            prompt_tokens=1,
            asked_tokens=1,
            chunk_s=[at_s],
            end_s=at_s,
            status=200,
        )
        for at_s in ends_s
    ]
    refused = [
        Outcome(request_id=f"x{n}", due_s=0.0, prompt_tokens=1, asked_tokens=1, error="full")
        for n in range(num_refused)
    ]
    return LoadRun(outcomes=[*ok, *refused], duration_s=99.0, cpu_s=0.0)


def test_capacity_is_the_pace_in_the_middle() -> None:
    # Slow to fill up and to run empty, ten per second in between.
    ends_s = [5.0 * n for n in range(18)] + [100 + 0.1 * n for n in range(64)]
    ends_s += [110.0 + 5.0 * n for n in range(18)]
    assert capacity_rps(run_of(ends_s)) == pytest.approx(10.0)


def test_capacity_is_not_told_of_a_run_with_failures() -> None:
    with pytest.raises(ValueError, match="2 requests were not answered"):
        capacity_rps(run_of([1.0, 2.0, 3.0], num_refused=2))


def test_throughput_counts_answers_of_the_steady_part_and_no_refusals() -> None:
    run = run_of([0.5 * n for n in range(100)], num_refused=500)
    assert throughput_rps(run, last_arrival_s=40.0) == pytest.approx(2.0)


def test_percentiles_are_in_milliseconds() -> None:
    assert percentiles([]) == {"num": 0}
    assert percentiles([0.001 * n for n in range(101)]) == {
        "num": 101,
        "p50": 50.0,
        "p99": 99.0,
        "max": 100.0,
    }


def test_what_is_taken_in_the_warm_up_is_no_rise() -> None:
    level = [{"requests": n, "master": [1000, 5000, 20]} for n in range(100)]
    for n, sample in enumerate(level[:15]):
        sample["master"] = [10 * n, 5000, 20]
    assert levels(level, "master")["slope_bytes_per_request"] == 0.0
    leak = [{"requests": n, "master": [1000 + 3 * n, 5000, 20 + n]} for n in range(100)]
    found = levels(leak, "master")
    assert found["slope_bytes_per_request"] == pytest.approx(3.0)
    assert found["most_descriptors"] == 119
    assert found["uss_at_the_end_bytes"] - found["uss_after_warm_up_bytes"] > 200
