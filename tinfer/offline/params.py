"""What a script asks for, as the fields of a request's body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import msgspec
from msgspec import Struct

Conversation = Sequence[Mapping[str, Any]]
# One or several, of which each may be a text: a message of the user.
Conversations = str | Conversation | Sequence[Conversation | str]
# Text, token ids, or {"prompt": text}, or {"prompt_token_ids": ids}, as vLLM's `LLM` takes them.
Prompt = str | Sequence[int] | Mapping[str, Any]

# What a mapping of sampling parameters must not replace.
_NOT_SAMPLING = ("prompt", "messages", "stream", "stream_options")
# Ids are what outputs and their log probabilities are known by.
_ALWAYS: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How to sample, by vLLM's names; None leaves it to the server: its default, or the model's.

    `max_tokens` None: 16 of `generate`, as far as the context reaches of `chat`. `logprobs`: how
    many candidates per token are told beside the sampled one. `n`: answers per prompt.
    """

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[str, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: Mapping[str, Any] | None = None


# A mapping holds fields of the API, which are sent as they are.
Sampling = SamplingParams | Mapping[str, Any]


def completion_fields(sampling: Sampling | None) -> dict[str, Any]:
    """The body of `/v1/completions` beside its prompt. Raises `ValueError`, `TypeError`."""
    return {**_fields(sampling), **_ALWAYS}


def chat_fields(sampling: Sampling | None) -> dict[str, Any]:
    """The body of `/v1/chat/completions` beside its messages. Raises `ValueError`, `TypeError`."""
    fields = _fields(sampling)
    if isinstance(sampling, SamplingParams) and sampling.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return {**fields, **_ALWAYS, "return_prompt_text": True}


def per_input(
    sampling: Sampling | Sequence[Sampling] | None, num_inputs: int
) -> list[Sampling | None]:
    """One for each input. Raises `ValueError` where there are as many of neither."""
    if sampling is None or isinstance(sampling, SamplingParams | Mapping):
        return [sampling] * num_inputs
    if len(sampling) != num_inputs:
        raise ValueError(f"{len(sampling)} sampling parameters for {num_inputs} inputs")
    return [*sampling]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    """Each as the API takes it. Raises `TypeError` for what is no prompt."""
    if isinstance(prompts, str | Mapping) or _are_ids(prompts):
        return [_prompt(prompts)]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"not a prompt: {prompts!r}")
    return [_prompt(prompt) for prompt in prompts]


def as_conversations(messages: Conversations) -> list[Conversation]:
    """One, or each of several; text is a message of the user. Raises `TypeError`."""
    if isinstance(messages, str):
        return [[{"role": "user", "content": messages}]]
    if all(isinstance(message, Mapping) for message in messages) and messages:
        return [messages]  # type: ignore[list-item]
    found: list[Conversation] = []
    for conversation in messages:
        if isinstance(conversation, Mapping):
            raise TypeError("messages and conversations in one list")
        found += as_conversations(conversation)
    return found


def _fields(sampling: Sampling | None) -> dict[str, Any]:
    if sampling is None:
        return {}
    if isinstance(sampling, SamplingParams):
        told = msgspec.structs.asdict(sampling)
        return {name: value for name, value in told.items() if value is not None}
    if not isinstance(sampling, Mapping):
        raise TypeError(f"neither SamplingParams nor a mapping: {sampling!r}")
    for name in _NOT_SAMPLING:
        if name in sampling:
            raise ValueError(f"{name} is no sampling parameter")
    return dict(sampling)


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if _are_ids(prompt):
        return [*prompt]
    if isinstance(prompt, Mapping):
        ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
        if _are_ids(ids):
            return [*ids]
        if isinstance(text, str):
            return text
    raise TypeError(f"not a prompt: {prompt!r}")


def _are_ids(found: object) -> TypeGuard[Sequence[int]]:
    return (
        isinstance(found, Sequence)
        and not isinstance(found, str | bytes)
        and bool(found)
        and all(isinstance(token_id, int) for token_id in found)
    )
