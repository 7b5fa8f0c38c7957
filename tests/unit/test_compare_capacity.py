"""Which probes have a bounded queue, and how the full load is searched."""

from __future__ import annotations

import numpy as np
import pytest

from tinfer.bench.compare.capacity import (
    DRAIN_SHARE,
    DRAIN_UNLOADED,
    MAX_PROBES,
    TOLERANCE,
    RateSearch,
    judge,
    max_drain_s,
)

ALONE = [0.1] * 200


def served(rate_rps: float, capacity_rps: float, num: int = 200) -> tuple[list[float], list[float]]:
    """Even arrivals at one server that takes 1 / capacity for each, in their order."""
    sent = [i / rate_rps for i in range(num)]
    end, free_s = [], 0.0
    for at_s in sent:
        free_s = max(free_s, at_s) + 1.0 / capacity_rps
        end.append(free_s)
    return sent, end


@pytest.mark.parametrize(("rate_rps", "bounded"), [(5.0, True), (9.9, True), (12.0, False)])
def test_a_queue_is_bounded_below_the_capacity(rate_rps: float, bounded: bool) -> None:
    verdict = judge(*served(rate_rps, 10.0), ALONE, num_failed=0, longest_unloaded_s=0.1)
    assert verdict.bounded is bounded
    assert verdict.growth_rps == pytest.approx(max(0.0, rate_rps - 10.0), abs=0.15)


def test_a_backlog_from_the_first_half_that_stays_is_no_growth() -> None:
    sent = [i / 10 for i in range(100)]
    end = [at_s + 3.0 for at_s in sent]
    verdict = judge(sent, end, [1.0] * 100, 0, longest_unloaded_s=1.0)
    assert verdict.bounded and verdict.growth_rps == pytest.approx(0.0, abs=0.2)
    assert verdict.drain_s == pytest.approx(3.0)


def test_a_queue_that_drains_too_late_is_not_bounded() -> None:
    sent = [i / 10 for i in range(100)]
    end = [*(at_s + 0.1 for at_s in sent[:-1]), 100.0]
    verdict = judge(sent, end, [1.0] * 100, 0, longest_unloaded_s=1.0)
    assert not verdict.bounded and verdict.growth_rps < 0.5
    assert verdict.max_drain_s == pytest.approx(DRAIN_UNLOADED * 1.0 + DRAIN_SHARE * 9.9)
    assert verdict.max_drain_s == max_drain_s(9.9, 1.0)


def test_failures_are_not_bounded() -> None:
    assert not judge(*served(1.0, 10.0), ALONE, num_failed=1, longest_unloaded_s=0.1).bounded


def test_everything_at_once_is_judged_by_its_drain() -> None:
    assert judge([0.0] * 5, [1.0] * 5, [1.0] * 5, 0, longest_unloaded_s=1.0).bounded
    assert not judge([0.0] * 5, [5.0] * 5, [1.0] * 5, 0, longest_unloaded_s=1.0).bounded


def searched(first_rps: float, capacity_rps: float) -> tuple[float | None, list[float]]:
    search, probed = RateSearch(first_rps), []
    while search.next_rps is not None:
        probed.append(search.next_rps)
        search.tell(search.next_rps <= capacity_rps)
    return search.best_rps, probed


@pytest.mark.parametrize("first_rps", [0.3, 1.0, 7.0, 50.0])
def test_the_search_encloses_the_capacity(first_rps: float) -> None:
    best, probed = searched(first_rps, 7.0)
    assert best is not None and best <= 7.0 < best * TOLERANCE * 1.001
    assert len(probed) <= MAX_PROBES and len(set(probed)) == len(probed)


def test_nothing_passes() -> None:
    best, probed = searched(1.0, 0.0)
    assert best is None and len(probed) == MAX_PROBES
    assert probed == list(1.0 * np.power(0.5, range(MAX_PROBES)))


def test_a_search_that_is_over_takes_no_answer() -> None:
    search = RateSearch(1.0)
    while search.next_rps is not None:
        search.tell(search.next_rps < 3.0)
    with pytest.raises(ValueError, match="over"):
        search.tell(True)


def test_chance_alone_is_no_growth() -> None:
    """Few requests that each take long, on a server that never lets any wait."""
    num_bounded = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sent = np.cumsum(rng.exponential(1 / 2.3, 46))
        verdict = judge(list(sent), list(sent + 2.6), [0.8] * 46, 0, longest_unloaded_s=2.6)
        num_bounded += verdict.bounded
    assert num_bounded >= 196


def test_growth_is_seen_through_chance() -> None:
    """Half as much again as a server of one request at a time keeps up with."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        sent = np.cumsum(rng.exponential(1 / 6.0, 120))
        end, free_s = [], 0.0
        for at_s in sent:
            free_s = max(free_s, at_s) + 1 / 4.0
            end.append(free_s)
        assert not judge(list(sent), end, [0.25] * 120, 0, longest_unloaded_s=0.25).bounded
