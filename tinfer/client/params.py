"""What a caller may ask for, each name declared once, and how a request's body is made of it.

Names and meanings are those of vLLM's OpenAI API. What is not given (or None) is not sent, so the
server's defaults hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

Messages = str | Sequence[Mapping[str, Any]]
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class Wishes(TypedDict, total=False):
    """What only a tinfer server knows: how long the answer is expected to be, its turn (lower goes
    first), how long it may take, and whether `usage` is to tell how long it was predicted to be."""

    expected_output_tokens: int
    priority: int
    deadline_ms: float
    include_prediction: bool


class SamplingParams(TypedDict, total=False):
    """Parameters of both endpoints."""

    model: str | None
    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    spaces_between_special_tokens: bool | None
    prompt_logprobs: int | None
    structured_outputs: Mapping[str, Any] | None
    response_format: Mapping[str, Any] | None
    add_special_tokens: bool | None
    return_token_ids: bool | None
    return_tokens_as_token_ids: bool | None
    request_id: str | None
    priority: int | None
    tinfer: Wishes | None


class CompletionParams(SamplingParams, total=False):
    """Parameters of `/v1/completions` beside the prompt."""

    echo: bool | None
    logprobs: int | None


class ChatParams(SamplingParams, total=False):
    """Parameters of `/v1/chat/completions` beside the messages."""

    max_completion_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None
    reasoning_effort: str | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    documents: Sequence[Mapping[str, str]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    return_prompt_text: bool | None
    echo: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    include_reasoning: bool | None


COMPLETION_NAMES = CompletionParams.__optional_keys__
CHAT_NAMES = ChatParams.__optional_keys__


def as_messages(messages: Messages) -> list[Mapping[str, Any]]:
    """A plain string is one message of the user."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]


def body(
    fixed: Mapping[str, Any],
    params: Mapping[str, Any],
    names: frozenset[str],
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The body of a request; `extra` is sent as it is and wins over all else.

    Raises `TypeError` for a parameter that is not among `names`.
    """
    for name in params:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"unknown parameter {name!r}{hint} (other fields of the server: extra={{...}})"
            )
    given = {name: value for name, value in params.items() if value is not None}
    return {**fixed, **given, **(extra or {})}
