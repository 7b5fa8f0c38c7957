"""Logprobs of the engine in the shapes of OpenAI."""

from __future__ import annotations

import math

import msgspec

from tinfer.api.logprobs import chat_logprobs, completion_logprobs, next_offset, prompt_logprobs
from tinfer.core.sampling import TokenLogprobs

SAMPLED_SECOND = TokenLogprobs([7, 5, 7], [-1.0, -0.5, -1.0], [2, 1, 2], ["b", "a", "b"])
SAMPLED_FAR = TokenLogprobs([9, 5, 7], [-math.inf, -0.5, -1.0], [40, 1, 2], ["\u00e9", "a", "b"])


def test_completion_has_the_sampled_token_and_up_to_k_more() -> None:
    result = completion_logprobs([SAMPLED_SECOND, SAMPLED_FAR], 2, False, first_offset=3)
    assert msgspec.to_builtins(result) == {
        "tokens": ["b", "\u00e9"],
        "token_logprobs": [-1.0, -9999.0],
        "top_logprobs": [{"b": -1.0, "a": -0.5}, {"\u00e9": -9999.0, "a": -0.5, "b": -1.0}],
        "text_offset": [3, 4],
    }
    assert next_offset(result, 3) == 5


def test_completion_with_zero_shows_only_the_sampled_token() -> None:
    result = completion_logprobs([SAMPLED_SECOND], 0, False)
    assert result.top_logprobs == [{"b": -1.0}]
    assert completion_logprobs([SAMPLED_FAR], -1, False).top_logprobs[0] is not None


def test_completion_position_without_logprobs_is_its_text() -> None:
    result = completion_logprobs(["<s>", SAMPLED_SECOND], 1, False)
    assert (result.tokens, result.token_logprobs) == (["<s>", "b"], [None, -1.0])
    assert (result.top_logprobs[0], result.text_offset) == (None, [0, 3])


def test_no_tokens_leave_the_offset() -> None:
    assert next_offset(completion_logprobs([], 1, False, 9), 9) == 9


def test_tokens_as_ids() -> None:
    result = completion_logprobs([SAMPLED_SECOND], 1, True)
    assert result.tokens == ["token_id:7"]
    assert result.top_logprobs == [{"token_id:7": -1.0, "token_id:5": -0.5}]
    (entry,) = chat_logprobs([SAMPLED_SECOND], 1, True).content
    assert (entry.token, entry.bytes) == ("token_id:7", [98])
    assert entry.top_logprobs[0].bytes == list(b"token_id:7")


def test_chat_has_k_candidates_the_sampled_one_among_them() -> None:
    first, second = chat_logprobs([SAMPLED_SECOND, SAMPLED_FAR], 2, False).content
    assert [(t.token, t.logprob) for t in first.top_logprobs] == [("b", -1.0), ("a", -0.5)]
    assert [t.token for t in second.top_logprobs] == ["\u00e9", "a"]
    assert (second.logprob, second.bytes) == (-9999.0, [0xC3, 0xA9])
    assert chat_logprobs([SAMPLED_FAR], 0, False).content[0].top_logprobs == []


def test_prompt_positions_are_keyed_by_token_id() -> None:
    assert msgspec.to_builtins(prompt_logprobs([None, SAMPLED_FAR])) == [
        None,
        {
            "9": {"logprob": -9999.0, "rank": 40, "decoded_token": "\u00e9"},
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            "7": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
        },
    ]
