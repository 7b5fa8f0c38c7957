"""Arrival processes and the draws below them, against their textbook moments."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from statistics import fmean, pvariance

import pytest

from tinfer.workloads import arrivals, draws, percentile
from tinfer.workloads.catalogue import AZURE_CONVERSATION_RPS, WORKLOADS, conversation_arrivals
from tinfer.workloads.requests import Request, Segment
from tinfer.workloads.summary import interarrival_cv, shared_prefix_tokens, summarise

NUM = 50_000


def stream(purpose: str = "") -> random.Random:
    return random.Random(f"test {purpose}")


def figures(times_s: Iterator[float]) -> tuple[float, float | None]:
    """Mean rate and coefficient of variation of the gaps."""
    taken = arrivals.take(times_s, NUM)
    return len(taken) / taken[-1], interarrival_cv(taken)


@pytest.mark.parametrize("burstiness", [0.25, 0.5, 1.0, 2.0, 16.0])
def test_gamma_gaps_have_the_rate_and_the_variation_asked_for(burstiness: float) -> None:
    rate_rps, cv = figures(arrivals.gamma(stream(), 4.0, burstiness))
    assert rate_rps == pytest.approx(4.0, rel=0.03)
    assert cv == pytest.approx(burstiness**-0.5, rel=0.03)


def test_burstiness_one_is_poisson_and_infinity_is_even() -> None:
    poisson = arrivals.take(arrivals.poisson(stream(), 3.0), 100)
    assert arrivals.take(arrivals.gamma(stream(), 3.0, 1.0), 100) == poisson
    even = arrivals.take(arrivals.gamma(stream(), 4.0, math.inf), 100)
    assert even == [0.25 * count for count in range(1, 101)]


def test_burstiness_of_a_variation() -> None:
    assert arrivals.burstiness_of(2.0) == 0.25
    assert arrivals.burstiness_of(0.0) == math.inf


def test_two_rates_take_turns() -> None:
    times_s = arrivals.mmpp(stream(), (10.0, 1.0), (5.0, 15.0))
    rate_rps, cv = figures(times_s)
    assert rate_rps == pytest.approx((10.0 * 5.0 + 1.0 * 15.0) / 20.0, rel=0.05)
    assert cv is not None and cv > 1.5


@pytest.mark.parametrize(("cv", "on_share"), [(3.0, 0.5), (3.0, 0.1), (8.0, 0.2)])
def test_silence_gives_the_variation_asked_for(cv: float, on_share: float) -> None:
    rate_rps, drawn_cv = figures(arrivals.on_off(stream(), 2.0, cv, on_share))
    assert rate_rps == pytest.approx(2.0, rel=0.10)
    assert drawn_cv == pytest.approx(cv, rel=0.08)


def test_azure_code_waves_have_the_measured_variation() -> None:
    cv = WORKLOADS["azure-code"].options["cv"].default
    _, drawn_cv = figures(arrivals.on_off(stream("waves"), 2.57, cv, 0.2))
    assert drawn_cv == pytest.approx(13.0, rel=0.10)


def test_conversations_swell_as_measured() -> None:
    times_s = arrivals.take(conversation_arrivals(stream(), AZURE_CONVERSATION_RPS), NUM)
    assert interarrival_cv(times_s) == pytest.approx(1.09, rel=0.02)
    for window_s, measured in ((1, 1.4), (10, 4.0), (60, 20.6)):
        counts = Counter(int(time_s / window_s) for time_s in times_s)
        full = [counts[window] for window in range(int(times_s[-1] / window_s))]
        assert pvariance(full) / fmean(full) == pytest.approx(measured, rel=0.20)


def test_a_faster_rate_is_the_same_trace_played_faster() -> None:
    slow = arrivals.take(arrivals.on_off(stream(), 1.0, 3.0, 0.2), 500)
    fast = arrivals.take(arrivals.on_off(stream(), 10.0, 3.0, 0.2), 500)
    assert fast == pytest.approx([time_s / 10.0 for time_s in slow])


def test_take_stretches_to_the_rate() -> None:
    assert arrivals.take(iter([1.0, 2.0, 4.0]), 3, rate_rps=0.5) == [1.5, 3.0, 6.0]
    assert arrivals.take(iter([1.0, 2.0, 4.0]), 3) == [1.0, 2.0, 4.0]
    assert arrivals.take(arrivals.at_once(), 2, rate_rps=1.0) == [0.0, 0.0]


def test_draws_have_their_moments() -> None:
    rng = stream("draws")
    normals = [draws.normal(rng) for _ in range(NUM)]
    assert fmean(normals) == pytest.approx(0.0, abs=0.02)
    assert pvariance(normals) == pytest.approx(1.0, rel=0.03)
    for shape in (0.3, 1.0, 7.5):
        gammas = [draws.gamma(rng, shape) for _ in range(NUM)]
        assert fmean(gammas) == pytest.approx(shape, rel=0.03)
        assert pvariance(gammas) == pytest.approx(shape, rel=0.06)


def test_pick_follows_its_weights() -> None:
    rng = stream("pick")
    counts = Counter(draws.pick(rng, [1.0, 0.0, 3.0]) for _ in range(8000))
    assert set(counts) == {0, 2}
    assert counts[2] == pytest.approx(6000, rel=0.03)


def test_zipf_weights() -> None:
    assert draws.zipf_weights(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert draws.zipf_weights(2, 0.0) == [0.5, 0.5]


def test_percentiles_are_linear_between_neighbours() -> None:
    assert [percentile([1, 2, 4], rank) for rank in (0, 25, 50, 75, 100)] == [1, 1.5, 2, 3, 4]
    assert percentile([5], 99) == 5


def prompts(*rows: list[tuple[str, int]]) -> list[Request]:
    count = itertools.count()
    return [
        Request(f"r{next(count)}", 0.0, "t", tuple(Segment(*each) for each in row), 1)
        for row in rows
    ]


def test_shared_prefixes_are_counted_up_to_where_prompts_part() -> None:
    requests = prompts(
        [("system", 10), ("a", 5)],
        [("system", 10), ("b", 7)],
        [("system", 10), ("a", 5), ("answer", 3)],
        [("system", 4), ("a", 5)],
        [("a", 5)],
    )
    assert shared_prefix_tokens(requests) == 0 + 10 + 15 + 4 + 0
    assert summarise(requests).shared_prefix_share == pytest.approx(29 / (15 + 17 + 18 + 9 + 5))


def test_a_workload_at_once_has_no_rate_and_an_empty_one_no_summary() -> None:
    summary = summarise(prompts([("a", 5)], [("b", 7)]))
    assert (summary.rate_rps, summary.interarrival_cv, summary.duration_s) == (None, None, 0.0)
    assert (summary.prompt_tokens.p50, summary.prompt_tokens.max) == (6.0, 7)
    with pytest.raises(ValueError, match="no requests"):
        summarise([])
