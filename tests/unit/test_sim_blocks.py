"""What an engine finds in its blocks: prefixes, and what eviction leaves of them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.sim.box import SPEC, Lone
from tinfer.sim.jobs import Kind, What

CACHING = replace(SPEC, prefix_caching=True)
HASHES = (11, 12, 13)


def test_a_shared_prefix_is_computed_once() -> None:
    lone = Lone(CACHING)
    lone.start("a", prompt=8, out=1, hashes=HASHES)
    lone.start("b", prompt=8, out=1, at_s=9.0, hashes=(*HASHES[:2], 99))
    lone.run()
    assert lone.tokens_s("a") == [3.0]
    # Two blocks of 2 tokens are there: 4 tokens are left, one step.
    assert lone.tokens_s("b") == [10.5]
    assert lone.tickets["b"].cached_tokens == 4
    assert lone.engine.num_prefill_tokens == 12


def test_the_last_token_is_always_computed() -> None:
    lone = Lone(CACHING)
    lone.start("a", prompt=4, out=1, hashes=HASHES[:2])
    lone.start("b", prompt=4, out=1, at_s=9.0, hashes=HASHES[:2])
    lone.run()
    assert lone.tickets["b"].cached_tokens == 2
    assert lone.tokens_s("b") == [10.25]


def test_who_is_let_in_right_behind_shares_the_blocks() -> None:
    lone = Lone(replace(CACHING, max_num_batched_tokens=8))
    lone.start("a", prompt=5, out=5, hashes=HASHES[:2])
    lone.start("b", prompt=5, out=5, hashes=HASHES[:2])
    lone.run(until_s=0.0)
    # a: 3 blocks; b: its last one.
    assert lone.num_free == 96
    lone.run()
    assert lone.tickets["b"].cached_tokens == 4
    assert lone.num_free == 100 and lone.engine.is_idle


def test_a_cache_that_is_off_finds_nothing() -> None:
    lone = Lone()
    lone.start("a", prompt=8, out=1, hashes=HASHES)
    lone.start("b", prompt=8, out=1, at_s=9.0, hashes=HASHES)
    lone.run()
    assert lone.tickets["b"].cached_tokens == 0


@pytest.mark.parametrize(("hashes", "cached_tokens"), [(HASHES, 2), ((21, 22, 23), 4)])
def test_what_was_freed_longest_ago_is_taken_first_and_its_tail_before_its_head(
    hashes: tuple[int, ...], cached_tokens: int
) -> None:
    lone = Lone(replace(CACHING, num_blocks=8))
    lone.start("old", prompt=6, out=1, hashes=HASHES)
    lone.start("young", prompt=4, out=1, at_s=10.0, hashes=(21, 22))
    # 3 blocks never held anything; two more come from the end of the oldest prefix.
    lone.start("big", prompt=10, out=1, at_s=20.0)
    lone.start("again", prompt=6, out=1, at_s=30.0, hashes=hashes)
    lone.run()
    assert lone.tickets["again"].cached_tokens == cached_tokens


def test_free_blocks_that_hold_a_prefix_are_free() -> None:
    lone = Lone(replace(CACHING, num_blocks=4))
    lone.start("a", prompt=6, out=1, hashes=HASHES)
    lone.start("b", prompt=8, out=1, at_s=10.0)
    lone.run()
    assert lone.said(What.FINISHED) == [("a", 2.75), ("b", 13.0)]


def test_a_hit_on_free_blocks_takes_them() -> None:
    # Beside x only 2 blocks are free, both of them a's: a again fits just so.
    lone = Lone(replace(CACHING, num_blocks=5))
    lone.start("a", prompt=4, out=1, hashes=HASHES[:2])
    lone.start("x", prompt=5, out=2, at_s=10.0)
    lone.start("a again", prompt=5, out=1, at_s=10.5, hashes=HASHES[:2])
    lone.run()
    # It needs a third block for its last token, so it waits until x is over.
    assert lone.tickets["a again"].cached_tokens == 4
    assert lone.tokens_s("a again")[0] > lone.tokens_s("x")[-1]


def test_after_a_preemption_a_request_finds_what_nobody_took() -> None:
    lone = Lone(replace(CACHING, num_blocks=4))
    lone.start("a", prompt=2, out=5)
    lone.start("b", prompt=2, out=5)
    lone.run()
    # As without a cache, but of b's two blocks a took only the second one: when b comes back, its
    # first block is there and 3 of 5 tokens are computed again.
    assert lone.tokens_s("b") == [1.5, 3.0, 4.5, 8.375, 9.625]
    assert lone.num_free == 4


def test_a_pull_copies_only_what_is_not_here() -> None:
    costs = replace(SPEC.costs, handoff_token_s=0.25)
    lone = Lone(replace(CACHING, costs=costs))
    lone.start("a", prompt=5, out=2, hashes=HASHES[:2], kind=Kind.DECODE)
    lone.run()
    lone.start("b", prompt=5, out=2, at_s=20.0, hashes=HASHES[:2], kind=Kind.DECODE)
    lone.run()
    assert [until_s for _, until_s in lone.reads] == [0.5 + 5 * 0.25, 20.0 + 0.5 + 0.25]


def test_an_aborted_pull_leaves_nothing_to_find() -> None:
    lone = Lone(CACHING)
    lone.start("a", prompt=5, out=2, hashes=HASHES[:2], kind=Kind.DECODE)
    lone.run(until_s=0.25)
    lone.engine.abort(0.25, "a")
    lone.start("b", prompt=5, out=1, at_s=9.0, hashes=HASHES[:2])
    lone.run()
    assert lone.tickets["b"].cached_tokens == 0
    assert lone.num_free == 100


def test_two_pulls_of_one_prefix_at_once_hold_it_twice_and_free_it_whole() -> None:
    lone = Lone(CACHING)
    for name in ("a", "b"):
        lone.start(name, prompt=5, out=2, hashes=HASHES[:2], kind=Kind.DECODE)
    lone.run(until_s=0.25)
    assert lone.num_free == 94
    lone.run()
    assert lone.num_free == 100
    lone.start("c", prompt=5, out=1, at_s=9.0, hashes=HASHES[:2])
    lone.run()
    assert lone.tickets["c"].cached_tokens == 4


def test_held_blocks_can_be_shared_and_outlive_the_lease() -> None:
    lone = Lone(CACHING)
    lone.start("a", prompt=5, out=2, hashes=HASHES[:2], kind=Kind.PREFILL)
    lone.run()
    lone.start("b", prompt=5, out=1, at_s=9.0, hashes=HASHES[:2])
    lone.run(until_s=9.0)
    assert lone.num_free == 96
    (held,) = [one.lease for one in lone.outputs if one.what is What.PREFILLED]
    assert held is not None
    lone.engine.end_lease(9.5, held)
    lone.run()
    lone.start("c", prompt=5, out=1, at_s=30.0, hashes=HASHES[:2])
    lone.run()
    assert lone.tickets["c"].cached_tokens == 4
    assert lone.num_free == 100


def test_one_step_after_a_preemption_somebody_is_let_in_again() -> None:
    lone = Lone(replace(CACHING, num_blocks=8, max_num_batched_tokens=5))
    lone.start("a", prompt=5, out=10, hashes=HASHES[:2])
    lone.start("b", prompt=4, out=3, at_s=7.0, hashes=HASHES[:2])
    lone.run()
    # b gives way at 10.875. Then both of its hashed blocks are a's, so one free block is enough,
    # and its last two tokens are computed beside a's last one.
    assert lone.tickets["b"].num_preemptions == 1
    assert lone.tokens_s("a")[-2:] == [12.125, 13.625]
    assert lone.tokens_s("b") == [9.375, 10.875, 13.625]
