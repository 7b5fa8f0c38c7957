"""What prompts make a step take: padded chunks and the tax of a predictor, worked out by hand; a
step takes 1 s, 1/8 s per prompt token and 1/4 s per decoding sequence."""

from __future__ import annotations

import pytest
from msgspec import ValidationError, convert, to_builtins
from msgspec.structs import replace

from tests.sim.box import SPEC, Lone
from tinfer.sim.spec import EngineSpec

PADDED = replace(SPEC, max_num_batched_tokens=8, pads_chunks=True)
TAXED = replace(SPEC, prefill_tax=0.5)


def test_the_last_chunk_takes_as_long_as_a_full_one() -> None:
    lone = Lone(PADDED)
    lone.start("a", prompt=10, out=3)
    lone.run()
    # 8 | 2 and 6 zeros | two decodes
    assert lone.tokens_s("a") == [4.0, 5.25, 6.5]
    assert lone.engine.num_prefill_tokens == 10


def test_a_chunk_of_several_prompts_is_padded_once() -> None:
    lone = Lone(PADDED)
    lone.start("a", prompt=3, out=1)
    lone.start("b", prompt=3, out=1)
    lone.run()
    assert lone.tokens_s("a") == lone.tokens_s("b") == [2.0]


def test_a_prefill_budget_does_not_make_the_chunk_smaller() -> None:
    lone = Lone(PADDED)
    lone.engine.set_budget(0.0, 1)
    lone.start("a", prompt=2, out=1)
    lone.run()
    assert lone.tokens_s("a") == [4.0]


def test_a_prompt_beside_decodes_is_not_padded() -> None:
    lone = Lone(PADDED)
    lone.start("a", prompt=8, out=3)
    lone.start("b", prompt=2, out=1, at_s=1.0)
    lone.run()
    assert lone.tokens_s("b") == [2.0 + 1.5]
    assert lone.tokens_s("a") == [2.0, 3.5, 4.75]


def test_zeros_look_back_at_nothing() -> None:
    lone = Lone(replace(PADDED, costs=replace(SPEC.costs, prefill_context_s=0.125)))
    lone.start("a", prompt=2, out=1)
    lone.run()
    # Its two tokens see 0 to 2 others, so 2 in all.
    assert lone.tokens_s("a") == [2.0 + 0.25]


def test_only_chunks_can_be_padded() -> None:
    with pytest.raises(ValueError, match="need chunked_prefill"):
        replace(PADDED, chunked_prefill=False)


def test_the_tax_is_on_all_of_a_step_of_prompts_and_on_what_they_add_to_another() -> None:
    lone = Lone(TAXED)
    lone.start("a", prompt=4, out=4)
    lone.start("b", prompt=2, out=1, at_s=1.0)
    lone.run()
    # 1.5 and half of it; a decode (1.25) and two prompt tokens (0.25 and half of it); two decodes.
    assert lone.tokens_s("a") == [2.25, 3.875, 5.125, 6.375]
    assert lone.tokens_s("b") == [3.875]
    assert lone.engine.busy_s == 6.375


def test_padding_is_taxed_too() -> None:
    lone = Lone(replace(PADDED, prefill_tax=0.5))
    lone.start("a", prompt=1, out=2)
    lone.run()
    assert lone.tokens_s("a") == [3.0, 4.25]


def test_a_tax_below_nothing_is_no_value() -> None:
    with pytest.raises(ValidationError, match="prefill_tax"):
        convert({**to_builtins(SPEC), "prefill_tax": -0.1}, EngineSpec)
