"""From segments to block hashes: equal leading segments are equal prefixes, and nothing else is."""

from __future__ import annotations

import pytest

from tinfer.sim.workload import sim_requests
from tinfer.workloads import Request, Segment, WorkloadSpec, make


def asked(name: str, *segments: tuple[str, int], out: int = 5) -> Request:
    parts = tuple(Segment(*one) for one in segments)
    return Request(request_id=name, arrival_s=1.5, task="T", segments=parts, output_tokens=out)


def hashes_of(*requests: Request, block_tokens: int = 4) -> list[tuple[int, ...]]:
    return [one.block_hashes for one in sim_requests(requests, block_tokens)]


def test_lengths_times_and_names_stay_what_they_are() -> None:
    (one,) = sim_requests([asked("a", ("s", 7), ("t", 2))], 4)
    assert (one.request_id, one.arrival_s, one.task) == ("a", 1.5, "T")
    assert (one.prompt_tokens, one.output_tokens, one.max_output_tokens) == (9, 5, 5)


@pytest.mark.parametrize(("most", "expected"), [(None, 5), (3, 5), (100, 100)])
def test_what_clients_allow_never_cuts_an_answer(most: int | None, expected: int) -> None:
    (one,) = sim_requests([asked("a", ("s", 7))], 4, max_output_tokens=most)
    assert (one.output_tokens, one.max_output_tokens) == (5, expected)


def test_equal_leading_segments_give_equal_hashes_per_whole_block() -> None:
    first, second = hashes_of(asked("a", ("system", 10), ("a", 9)), asked("b", ("system", 10)))
    assert first == second
    assert len(first) == 2  # of 10 shared tokens two whole blocks
    assert len(set(first)) == 2


def test_what_no_other_request_has_is_left_out() -> None:
    assert hashes_of(asked("a", ("x", 40)), asked("b", ("y", 40))) == [(), ()]


def test_the_chain_tells_equal_blocks_behind_different_ones_apart() -> None:
    ab, cb, *_ = hashes_of(
        asked("1", ("a", 4), ("b", 4)),
        asked("2", ("c", 4), ("b", 4)),
        asked("3", ("a", 4)),
        asked("4", ("c", 4)),
    )
    assert len(ab) == len(cb) == 2
    assert not set(ab) & set(cb)


def test_the_shorter_of_two_segments_of_one_seed_is_a_prefix_of_the_longer() -> None:
    short, long = hashes_of(asked("a", ("s", 9)), asked("b", ("s", 21)))
    assert (len(short), len(long)) == (2, 5)
    assert long[:2] == short


def test_a_block_over_a_seam_depends_on_both_sides_and_on_where_the_seam_is() -> None:
    one, same, other_tail, other_seam = hashes_of(
        asked("1", ("s", 6), ("t", 6)),
        asked("2", ("s", 6), ("t", 6)),
        asked("3", ("s", 6), ("u", 6)),
        asked("4", ("s", 5), ("t", 6), ("u", 1)),
    )
    assert one == same and len(one) == 3
    assert other_tail[0] == one[0] and not set(other_tail[1:]) & set(one)
    assert other_seam[0] == one[0] and other_seam[1] != one[1]


def test_hashes_do_not_depend_on_who_else_is_there_nor_on_the_order() -> None:
    a, b, c = (
        asked("a", ("s", 12), ("x", 3)),
        asked("b", ("s", 12)),
        asked("c", ("s", 8), ("z", 4)),
    )
    assert hashes_of(a, b) == hashes_of(a, b, c)[:2] == hashes_of(b, a)[::-1]


def test_a_conversations_later_turns_hold_the_earlier_ones() -> None:
    requests = make(WorkloadSpec(name="chat", num_requests=60, seed=1))
    simulated = sim_requests(requests, 16)
    by_id = {one.request_id: one for one in simulated}
    turns = [(one, by_id[one.after]) for one in requests if one.after]
    assert turns
    for later, earlier in turns:
        shared = by_id[later.request_id].block_hashes
        assert shared[: len(earlier.block_hashes)] == earlier.block_hashes
        assert len(shared) <= by_id[later.request_id].prompt_tokens // 16
