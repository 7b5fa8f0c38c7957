"""Which runs a comparison has: every arm the same requests, no prompt twice, all interleaved."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace

from tinfer.bench.compare.limits import Unloaded
from tinfer.bench.compare.options import (
    CompareOptions,
    parse_cores,
    parse_loads,
    parse_rates,
    parse_workloads,
)
from tinfer.bench.compare.steps import (
    MIN_PROBE_REQUESTS,
    Point,
    expected_s,
    points_of,
    probe_of,
    requests_of,
    steps_of,
    unloaded_requests,
)
from tinfer.workloads import WORKLOADS

OPTIONS = CompareOptions(
    workloads=("Mixed", "burst"), loads=(0.5, 0.9), repetitions=3, num_requests=40
)
ARMS = ["a", "b", "c"]


def test_every_arm_runs_every_repetition_of_every_point() -> None:
    for residency in ("together", "alone"):
        steps = steps_of(replace(OPTIONS, residency=residency), ARMS)
        counted = Counter((step.point, step.repetition, step.arm) for step in steps)
        assert len(counted) == len(steps) == 4 * 3 * 3


def test_arms_that_are_up_together_follow_each_other_in_random_order() -> None:
    steps = steps_of(OPTIONS, ARMS)
    orders = [tuple(step.arm for step in steps[i : i + 3]) for i in range(0, len(steps), 3)]
    assert all(sorted(order) == ARMS for order in orders) and len(set(orders)) > 1
    assert steps == steps_of(OPTIONS, ARMS) != steps_of(replace(OPTIONS, seed=1), ARMS)


def test_arms_that_are_up_alone_change_as_seldom_as_repetitions_allow() -> None:
    steps = steps_of(replace(OPTIONS, residency="alone"), ARMS)
    arms = [step.arm for step in steps]
    changes = sum(one != other for one, other in zip(arms, arms[1:], strict=False))
    assert changes <= 3 * 3 - 1
    assert [step.repetition for step in steps] == [0] * 12 + [1] * 12 + [2] * 12


def test_a_repetition_has_requests_of_its_own_and_a_load_plays_them_faster() -> None:
    slow = requests_of(OPTIONS, Point("Mixed", 0.5), 0, full_load_rps=4.0)
    fast = requests_of(OPTIONS, Point("Mixed", 1.0), 0, full_load_rps=4.0)
    other = requests_of(OPTIONS, Point("Mixed", 0.5), 1, full_load_rps=4.0)
    lengths = [(one.prompt_tokens, one.output_tokens) for one in slow]
    assert lengths == [(one.prompt_tokens, one.output_tokens) for one in fast]
    assert lengths != [(one.prompt_tokens, one.output_tokens) for one in other]
    assert slow[-1].arrival_s == pytest.approx(40 / 2.0)
    halves = [one.arrival_s / 2 for one in slow]  # times are rounded to microseconds
    assert halves == pytest.approx([one.arrival_s for one in fast], abs=1e-6)


def test_no_two_runs_of_an_arm_have_one_salt_and_seed() -> None:
    steps = [step for step in steps_of(OPTIONS, ARMS) if step.arm == "a"]
    salts = {(step.point.workload, step.salt) for step in steps}
    assert len(salts) == len(steps)


def test_probes_are_poisson_whatever_the_workload_is() -> None:
    probe = probe_of(OPTIONS, "burst", 5.0)
    assert len(probe) == 100 and probe[-1].arrival_s == pytest.approx(20.0)
    gaps = [b.arrival_s - a.arrival_s for a, b in zip(probe, probe[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert 0.7 < variance**0.5 / mean < 1.4  # the workload's own gaps have 3
    faster = probe_of(replace(OPTIONS, probe_s=10.0), "burst", 10.0)
    assert [one.output_tokens for one in faster] == [one.output_tokens for one in probe]
    assert len(probe_of(OPTIONS, "burst", 0.01)) == MIN_PROBE_REQUESTS


def test_each_class_has_its_unloaded_requests_once() -> None:
    options = replace(OPTIONS, workloads=("Mixed", "LPHD", "burst"), num_unloaded=4)
    counted = Counter(request.task for request in unloaded_requests(options))
    assert counted == dict.fromkeys((*WORKLOADS["Mixed"].tasks, "burst"), 4)


def test_the_time_expected_is_that_of_the_arrivals_and_the_slowest_answers() -> None:
    one = Unloaded(num_requests=1, ttft_s=0.1, tpot_s=0.1, mean_e2el_s=1.0, longest_e2el_s=3.0)
    options = replace(OPTIONS, workloads=("burst",), loads=(0.5,), repetitions=2)
    steps = steps_of(options, ["a"])
    assert expected_s(options, steps, {"burst": 8.0}, {"burst": one}) == pytest.approx(
        2 * (40 / 4.0 + 6.0)
    )
    assert points_of(options) == [Point("burst", 0.5)]


def test_parsing() -> None:
    assert parse_workloads("Mixed, burst,Mixed") == ("Mixed", "burst")
    assert parse_loads("0.5,.95") == (0.5, 0.95)
    assert parse_rates(["Mixed=4", "burst=0.5"]) == {"Mixed": 4.0, "burst": 0.5}
    assert parse_cores("0-2,5") == (0, 1, 2, 5)
    for bad in ("nonsense", ""):
        with pytest.raises(ValueError):
            parse_workloads(bad)
    for bad in ("0", "x", ""):
        with pytest.raises(ValueError):
            parse_loads(bad)
    for bad in ("Mixed", "Mixed=0", "Mixed=inf", "none=1"):
        with pytest.raises(ValueError):
            parse_rates([bad])
