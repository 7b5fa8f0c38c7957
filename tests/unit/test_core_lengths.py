"""Length distributions, what a step costs, and where a worker's KV is going."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinfer.core.costs import CostModel
from tinfer.core.lengths import NUM_BUCKET_POINTS, Lengths, bucket, certain
from tinfer.core.outlook import BIN_STEPS, NUM_BINS, NUM_ENDS, KvOutlook
from tinfer.core.prefixes import PrefixIndex

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


# --- outlook ---------------------------------------------------------------------------------

Given = list[tuple[int, tuple[float, ...]]]


def outlook_of(residents: Given, now: int = 0) -> KvOutlook:
    outlook = KvOutlook()
    outlook.advance(now)
    for place, (tokens, remaining) in enumerate(residents):
        outlook.add(str(place), tokens, remaining)
    return outlook


def mean_at(residents: Given, after: float) -> float:
    return sum(
        (tokens + after) * sum(end > after for end in remaining) / len(remaining)
        for tokens, remaining in residents
    )


def test_two_that_end_one_after_the_other() -> None:
    outlook = outlook_of([(1000, (100.0,)), (500, (300.0,))])
    # Right before 100 they have 1100 + 600; kept is step 128, for which both still count.
    assert outlook.peak(0.0) == (1128 + 628, 1128 + 628)
    assert outlook.tokens_now == 1500
    outlook.remove("0")
    assert outlook.peak(0.0).expected == 500 + 320
    outlook.remove("1")
    outlook.remove("1")
    assert outlook.peak(3.0) == (0, 0)


def test_who_outlives_an_end_is_likelier_to_be_long() -> None:
    outlook = outlook_of([(100, (10.0, 1000.0))])
    before = outlook.peak(0.0).expected
    outlook.advance(10)
    assert outlook.peak(0.0).expected == pytest.approx(2 * before, rel=0.05)
    outlook.advance(1000)  # and one that outlives all goes on by a tenth
    assert outlook.tokens_now == 1100
    assert 1200 <= outlook.peak(0.0).expected <= 1100 + 110 + 2 * BIN_STEPS


RESIDENT = st.tuples(
    st.integers(1, 3000),
    st.lists(st.integers(1, 6000), min_size=1, max_size=NUM_ENDS).map(
        lambda ends: tuple(sorted(float(end) for end in ends))
    ),
)


@given(st.lists(RESIDENT, max_size=5), RESIDENT, st.sampled_from([0.0, 1.64]), st.integers(0, 300))
def test_one_more_is_as_if_it_had_been_there(
    residents: Given, more: tuple[int, tuple[float, ...]], z: float, now: int
) -> None:
    apart = outlook_of(residents, now).peak_with(*more, z)
    together = outlook_of([*residents, more], now).peak(z)
    assert apart == pytest.approx(together)


@given(st.lists(RESIDENT, min_size=1, max_size=5), st.integers(0, 300))
def test_the_expected_peak_is_never_less_than_that_of_any_step(residents: Given, now: int) -> None:
    in_sight = BIN_STEPS * (NUM_BINS - 1)
    expected = max(mean_at(residents, float(after)) for after in range(in_sight))
    found = outlook_of(residents, now).peak(0.0).expected
    # A bin counts as there who ends within it, and has all of them grow to its end.
    assert expected - 1e-6 <= found
    slack = sum(BIN_STEPS + (tokens + 6000) / len(ends) for tokens, ends in residents)
    assert found <= expected + slack


@given(
    st.lists(RESIDENT, min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 9)), max_size=30),
)
def test_coming_and_going_leaves_what_a_fresh_look_would_find(
    residents: Given, moves: list[tuple[int, int]]
) -> None:
    outlook = outlook_of(residents)
    there = {str(place): (0, one) for place, one in enumerate(residents)}
    now = 0
    for steps, who in moves:
        now += steps
        outlook.advance(now)
        outlook.remove(str(who))
        there.pop(str(who), None)
    fresh = KvOutlook()
    fresh.advance(now)
    for name, (_, (tokens, ends)) in there.items():
        left = tuple(end - now for end in ends if end > now)
        if not left:
            return  # how much longer is a guess that was made when it outlived its last end
        fresh.add(name, tokens + now, left)
    assert outlook.peak(1.64) == pytest.approx(fresh.peak(1.64), rel=1e-6, abs=1e-3)
    assert outlook.tokens_now == fresh.tokens_now


def test_a_long_gap_is_passed_at_once() -> None:
    residents: Given = [(100, (10.0, 1e6)), (300, (2e4, 5e5)), (7, (50.0,))]
    end = 3 * BIN_STEPS * NUM_BINS + 5
    slow, fast = outlook_of(residents), outlook_of(residents)
    for step in range(0, end, BIN_STEPS):
        slow.advance(step)
    for outlook in (slow, fast):
        outlook.advance(end)
    assert fast.peak(1.64) == pytest.approx(slow.peak(1.64))
    assert fast.tokens_now == slow.tokens_now
    fast.advance(2**60)  # bin by bin it would take until the end of days
    assert fast.peak(0.0).expected > 0.0


def test_what_is_gone_is_not_remembered_until_its_end_would_have_come() -> None:
    """Predictions may be a hundred times longer than answers, and a worker is never empty."""
    outlook = outlook_of([(100, (1e6,)), (300, (5.0, 2e6))])
    for number in range(1000):
        outlook.add(f"r{number}", 10, (1e6,))
        outlook.remove(f"r{number}")
    assert len(outlook._next_ends) < 100
    outlook.advance(5)
    assert outlook.peak(0.0).expected == pytest.approx(400 + 2 * BIN_STEPS * NUM_BINS)


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = random.Random(1)
    ends = (20.0, 100.0, 300.0, 700.0)
    residents: Given = [(rng.randrange(50, 500), ends) for _ in range(40)]
    bound = outlook_of(residents).peak(1.64).rare
    num_over = 0
    for _ in range(400):
        drawn = [(tokens, rng.choice(ends)) for tokens, _ in residents]
        use = [sum(h + c for h, e in drawn if e > c) for c in (19, 99, 299, 699)]
        num_over += max(use) > bound
    assert num_over <= 0.1 * 400


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
