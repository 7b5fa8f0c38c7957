"""Length distributions, what a step costs, and where a worker's KV is going."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinfer.core.costs import CostModel
from tinfer.core.lengths import NUM_BUCKET_POINTS, Lengths, bucket, certain
from tinfer.core.prefixes import PrefixIndex
from tinfer.core.projection import NUM_ENDS, NUM_MOMENTS, Projection, Resident

# --- lengths ---------------------------------------------------------------------------------


def test_a_certain_length_counts_down() -> None:
    one = certain(10)
    assert [one.mean_remaining(g) for g in (0, 4, 9)] == [10, 6, 1]
    assert one.remaining(4) == (6.0,)
    assert (one.share_over(9), one.share_over(10)) == (1.0, 0.0)


def test_an_answer_that_outlives_its_prediction_goes_on_by_a_tenth() -> None:
    one = certain(10)
    assert one.survivors(10) == ()
    assert [one.mean_remaining(g) for g in (5, 10, 200)] == [5, 1.0, 20.0]
    assert one.remaining(200) == (20.0,)
    assert (one.share_over(150, 200), one.share_over(300, 200)) == (1.0, 0.0)


def test_what_has_come_conditions_what_will() -> None:
    one = Lengths((10, 20, 100, 400))
    assert one.mean_remaining() == 132.5
    assert one.mean_remaining(20) == 230.0
    assert one.share_over(128) == 0.25 and one.share_over(128, 50) == 0.5
    assert one.remaining(50) == (50.0, 350.0)
    assert one.low == 10 and not one.is_heavy


def test_a_bucket_is_flat_and_its_low_end_is_what_the_paper_reserves() -> None:
    one = bucket(200, 400)
    assert one.low == 200 and max(one.points) < 400 and len(one.points) == NUM_BUCKET_POINTS
    assert one.is_heavy and not bucket(0, 200).is_heavy
    assert bucket(0, 3).points == (1, 1, 2) or bucket(0, 3).low == 1
    assert bucket(7, 7).points == (7,)


def test_a_cut_answer_is_no_longer_than_its_cut() -> None:
    assert bucket(200, 400).up_to(250).points[-1] == 250
    assert certain(9).up_to(250) == certain(9)


# --- costs -----------------------------------------------------------------------------------


def test_a_prefill_is_its_chunks() -> None:
    costs = CostModel(base_s=0.01, prefill_token_s=0.001)
    assert costs.prefill_s(1000, 512) == pytest.approx(0.02 + 1.0)
    assert costs.prefill_s(1000, 512, cached_tokens=900) == pytest.approx(0.01 + 0.1)
    assert costs.prefill_s(10, 512, cached_tokens=10) == pytest.approx(0.011)


def test_a_step_adds_up() -> None:
    costs = CostModel(
        base_s=1, prefill_token_s=2, prefill_context_s=3, decode_seq_s=4, kv_token_s=5
    )
    assert costs.step_s(1, 10, 100, 1000) == 1 + 2 + 3000 + 40 + 500
    assert costs.decode_step_s(10, 100) == 541


# --- projection ------------------------------------------------------------------------------


def brute_mean(residents: list[Resident], after: float) -> float:
    return sum(
        (one.held_tokens + after) * sum(end > after for end in one.remaining) / len(one.remaining)
        for one in residents
    )


def test_two_that_end_one_after_the_other() -> None:
    residents = [Resident(100, (10.0,)), Resident(50, (30.0,))]
    # At 9: 109 + 59; at 29: 79.
    assert Projection(residents).peak_tokens() == 168
    assert Projection(residents).peak_tokens(after_steps=10) == 79
    assert Projection([]).peak_tokens(3.0) == 0


def test_one_more_counts_at_its_own_end_too() -> None:
    projection = Projection([Resident(100, (10.0,))])
    # At its own end the other is counted as at the end after it, which is more.
    assert projection.peak_with(Resident(10, (5.0,))) == 109 + 14
    assert projection.peak_with(Resident(10, (50.0,))) == 109 + 19
    assert projection.peak_with(Resident(200, (500.0,))) == 699
    assert Projection([]).peak_with(Resident(7, (3.0,))) == 9


ONE = st.builds(
    lambda held, ends: Resident(held, tuple(sorted(float(end) for end in ends))),
    st.integers(1, 3000),
    st.lists(st.integers(1, 800), min_size=1, max_size=NUM_ENDS),
)


@given(st.lists(ONE, min_size=1, max_size=5))
def test_the_expected_peak_is_that_of_every_step(residents: list[Resident]) -> None:
    expected = max(brute_mean(residents, float(after)) for after in range(801))
    assert Projection(residents).peak_tokens() == pytest.approx(expected)


@given(st.lists(ONE, max_size=5), ONE, st.sampled_from([0.0, 1.64]))
def test_one_more_is_as_if_it_had_been_there(
    residents: list[Resident], more: Resident, z: float
) -> None:
    together = Projection([*residents, more]).peak_tokens(z)
    apart = Projection(residents).peak_with(more, z)
    # Between two ends the next one stands for all before it: never less, and little more.
    assert apart >= together * (1 - 1e-9)
    if z == 0.0:
        assert apart <= together + 800 * (1 + len(residents))


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = random.Random(1)
    ends = (20.0, 100.0, 300.0, 700.0)
    residents = [Resident(rng.randrange(50, 500), ends) for _ in range(40)]
    bound = Projection(residents).peak_tokens(1.64)
    num_over = 0
    for _ in range(400):
        drawn = [(one.held_tokens, rng.choice(ends)) for one in residents]
        use = [sum(h + c for h, e in drawn if e > c) for c in (19, 99, 299, 699)]
        num_over += max(use) > bound
    assert num_over <= 0.1 * 400


def test_many_residents_are_thinned_without_losing_the_peak() -> None:
    rng = random.Random(2)
    residents = [
        Resident(rng.randrange(9, 900), (float(rng.randrange(1, 900)),)) for _ in range(300)
    ]
    projection = Projection(residents)
    assert len(projection.moments) <= NUM_MOMENTS + 1
    expected = max(brute_mean(residents, float(after)) for after in range(900))
    assert projection.peak_tokens() == pytest.approx(expected)


# --- prefixes --------------------------------------------------------------------------------


def test_a_hit_ends_at_the_first_block_that_is_not_there() -> None:
    index = PrefixIndex(10)
    index.use((1, 2, 3))
    assert [index.num_hits(h) for h in ((1, 2, 3, 4), (1, 9, 3), (9, 3), ())] == [3, 1, 0, 0]


def test_the_last_blocks_of_what_was_used_longest_ago_go_first() -> None:
    index = PrefixIndex(4)
    index.use((1, 2))
    index.use((5, 6))
    index.use((1, 7))
    assert len(index) == 4
    assert index.num_hits((1, 7)) == 2 and index.num_hits((1, 2)) == 1
    assert index.num_hits((5, 6)) == 2


def test_the_index_is_bounded() -> None:
    index = PrefixIndex(5)
    for start in range(0, 100, 3):
        index.use(tuple(range(start, start + 3)))
    assert len(index) == 5
    assert index.num_hits((99, 100, 101)) == 3


def test_pairs_of_lengths_are_ordered() -> None:
    for low, high in itertools.pairwise(range(0, 1000, 100)):
        points = bucket(low, high).points
        assert list(points) == sorted(points)
