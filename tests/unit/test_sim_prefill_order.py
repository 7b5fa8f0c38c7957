"""Prompts by fewest tokens left, against step sequences worked out by hand: a step takes 1 s, 1/8 s
per prompt token and 1/4 s per decoding sequence; blocks have 2 tokens, a step has 4 or 64."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.sim.box import SPEC, Lone
from tinfer.sim.jobs import Kind, What
from tinfer.sim.spec import EngineSpec

SRPT = replace(SPEC, prefill_order="srpt")
ORDERS = {"fcfs": SPEC, "srpt": SRPT}


def holding_three_of_six(spec: EngineSpec) -> Lone:
    """Six blocks, of which three are under a lease from 2.75 on."""
    lone = Lone(replace(spec, num_blocks=6))
    lone.start("held", prompt=6, out=2, kind=Kind.PREFILL)
    lone.run(until_s=2.75)
    assert lone.num_free == 3
    return lone


def end_lease(lone: Lone, at_s: float) -> None:
    (held,) = [one for one in lone.outputs if one.what is What.PREFILLED]
    assert held.lease is not None
    lone.engine.end_lease(at_s, held.lease)


@pytest.mark.parametrize(("order", "short_s"), [("fcfs", 143.5), ("srpt", 27.0)])
def test_a_short_prompt_is_in_the_very_next_step(order: str, short_s: float) -> None:
    lone = Lone(replace(ORDERS[order], num_blocks=600, max_num_batched_tokens=64))
    lone.start("long", prompt=1000, out=1)
    lone.start("short", prompt=20, out=1, at_s=10.0)
    lone.run(until_s=27.0)
    # 64 | 64, in which it comes | 20 + 44, or 64 more
    computed = {"fcfs": 192, "srpt": 172}[order]
    assert lone.engine.take_progress() == (("long", computed),)
    lone.run()
    assert lone.tokens_s("short") == [short_s]
    # 172 by 27.0, twelve times 64, and 60; or fifteen times 64, and 40 + 20.
    assert lone.tokens_s("long") == [143.5]


@pytest.mark.parametrize(
    ("order", "expected_s"), [("fcfs", (3.0, 4.5, 6.0)), ("srpt", (6.0, 1.5, 3.0))]
)
def test_of_what_waits_the_shortest_is_first_and_of_equals_who_came_first(
    order: str, expected_s: tuple[float, ...]
) -> None:
    lone = Lone(ORDERS[order])
    for name, prompt in (("a", 8), ("b", 4), ("c", 4)):
        lone.start(name, prompt=prompt, out=1)
    lone.run()
    assert tuple(lone.tokens_s(name)[0] for name in "abc") == expected_s


@pytest.mark.parametrize(("prompt", "a_s", "b_s"), [(4, 4.5, 6.0), (3, 5.875, 4.5)])
def test_what_counts_is_what_is_left(prompt: int, a_s: float, b_s: float) -> None:
    lone = Lone(SRPT)
    lone.start("a", prompt=12, out=1)
    lone.start("b", prompt=prompt, out=1, at_s=2.0)
    lone.run()
    # At 3.0 a has 4 of its 12 tokens left and came first.
    assert (lone.tokens_s("a"), lone.tokens_s("b")) == ([a_s], [b_s])


def test_several_prompts_under_way_go_on_in_that_order() -> None:
    lone = Lone(SRPT)
    lone.start("a", prompt=20, out=1)
    lone.start("b", prompt=10, out=1, at_s=1.0)
    lone.start("c", prompt=5, out=1, at_s=2.0)
    lone.run()
    # 4 of a | 4 of b | 4 of c | c and 3 of b | 3 of b and 1 of a | 4 of a, three times | 3 of a
    assert lone.tokens_s("c") == [6.0]
    assert lone.tokens_s("b") == [7.5]
    assert lone.tokens_s("a") == [7.5 + 4.5 + 1.375]


def test_a_found_prefix_makes_a_prompt_short() -> None:
    lone = Lone(replace(SRPT, prefix_caching=True))
    lone.start("first", prompt=8, out=1, hashes=(1, 2, 3, 4))
    lone.start("new", prompt=6, out=1, at_s=20.0)
    lone.start("known", prompt=9, out=1, at_s=20.0, hashes=(1, 2, 3, 4))
    lone.run()
    # The one token that is left of it and three of the other; then three.
    assert lone.tokens_s("known") == [21.5]
    assert lone.tokens_s("new") == [22.875]


def test_without_a_seat_a_short_prompt_waits_and_the_long_one_goes_on() -> None:
    lone = Lone(replace(SRPT, max_num_seqs=1))
    lone.start("long", prompt=8, out=1)
    lone.start("short", prompt=1, out=1, at_s=1.0)
    lone.run()
    assert lone.tokens_s("long") == [3.0]
    assert lone.tokens_s("short") == [4.125]


def test_without_its_blocks_a_short_prompt_waits_and_the_long_one_goes_on() -> None:
    lone = holding_three_of_six(SRPT)
    lone.start("long", prompt=6, out=1, at_s=3.0)
    lone.start("short", prompt=1, out=1, at_s=4.0)
    lone.run()
    # At 4.5 one block is free, and beside the short one's the long one's last chunk needs it.
    assert lone.tokens_s("long") == [5.75]
    assert lone.tokens_s("short") == [6.875]
    assert lone.engine.num_preemptions == 0


def test_all_of_a_short_prompt_must_fit_beside_what_the_long_one_then_computes() -> None:
    lone = holding_three_of_six(SRPT)
    lone.start("long", prompt=5, out=1, at_s=3.0)
    lone.start("short", prompt=4, out=1, at_s=4.0)
    end_lease(lone, 4.25)
    lone.run()
    # One token of the long one is left, and less than the short one's: both in one step, and then
    # the short one's last.
    assert lone.tokens_s("long") == [6.0]
    assert lone.tokens_s("short") == [7.125]


@pytest.mark.parametrize("order", ["fcfs", "srpt"])
def test_a_pull_keeps_its_place_before_what_came_later(order: str) -> None:
    lone = holding_three_of_six(ORDERS[order])
    lone.start("pull", prompt=8, out=2, at_s=3.0, kind=Kind.DECODE)
    lone.start("short", prompt=1, out=1, at_s=3.0)
    end_lease(lone, 9.0)
    lone.run()
    # The four blocks of the pull are not free before, and until then nobody passes it.
    assert [until_s for _, until_s in lone.reads] == [9.5]
    assert lone.tokens_s("short") == [10.125]


@pytest.mark.parametrize(
    ("order", "pull_s", "short_s"), [("fcfs", 9.5, 14.625), ("srpt", 3.5, 4.125)]
)
def test_a_pull_does_not_wait_for_a_prompt_whose_turn_it_is_not(
    order: str, pull_s: float, short_s: float
) -> None:
    lone = holding_three_of_six(ORDERS[order])
    lone.start("long", prompt=8, out=1, at_s=3.0)
    lone.start("pull", prompt=3, out=2, at_s=3.0, kind=Kind.DECODE)
    lone.start("short", prompt=1, out=1, at_s=3.0)
    end_lease(lone, 9.0)
    lone.run()
    # At 3.0 the blocks of the long prompt are not free, those of the other two are. Where it comes
    # first, 4 of it | 3 of it, a decode | 1 of it, a decode | the short one, for whose block it
    # waits from 10.5 on.
    assert [until_s for _, until_s in lone.reads] == [pull_s]
    assert lone.tokens_s("short")[0] == short_s


def test_what_lost_its_blocks_counts_as_the_tokens_that_it_computes_again() -> None:
    lone = Lone(replace(SRPT, num_blocks=4))
    lone.start("a", prompt=2, out=5)
    lone.start("b", prompt=2, out=5)
    lone.start("c", prompt=1, out=1, at_s=4.0)
    lone.run()
    # At 4.5 b gives way with five tokens to compute again. c has one, and from 5.75 on its block
    # is free beside a's last step; b computes 4 and 1 and has one token more to come.
    assert lone.tokens_s("a") == [1.5, 3.0, 4.5, 5.75, 7.125]
    assert lone.tokens_s("c") == [7.125]
    assert lone.tokens_s("b") == [1.5, 3.0, 4.5, 9.75, 11.0]
    assert lone.engine.take_preempted() == ("b",)


def test_the_prefill_budget_goes_to_the_shortest() -> None:
    lone = Lone(SRPT)
    lone.engine.set_budget(0.0, 1)
    lone.start("a", prompt=3, out=1)
    lone.start("b", prompt=1, out=1, at_s=1.0)
    lone.run()
    # a | b | a | a, a token each
    assert lone.tokens_s("b") == [2.25]
    assert lone.tokens_s("a") == [4.5]


def test_a_prompt_that_waits_in_that_order_can_be_aborted() -> None:
    lone = Lone(replace(SRPT, max_num_seqs=1))
    for name, prompt in (("a", 4), ("b", 3), ("c", 2)):
        lone.start(name, prompt=prompt, out=1)
    lone.engine.abort(1.0, "b")
    lone.run()
    # c | a, and b had gone
    assert lone.said(What.ABORTED) == [("b", 1.25)]
    assert lone.tokens_s("a") == [2.75]
    assert lone.engine.is_idle and lone.num_free == 100


def test_only_chunks_can_be_put_in_that_order() -> None:
    with pytest.raises(ValueError, match="need chunked_prefill"):
        replace(SRPT, chunked_prefill=False)
