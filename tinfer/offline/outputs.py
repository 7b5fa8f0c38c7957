"""What a script gets: the attributes of vLLM's `RequestOutput`, made of the API's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from tinfer.client.results import ChatCompletion, Completion, Usage

# How `return_tokens_as_token_ids` writes a token.
_ID_PREFIX = "token_id:"


class Logprob(Struct, frozen=True):
    """Of one candidate token. The API tells its rank in prompts alone, and its text there and where
    a chat has sampled it.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Position = dict[int, Logprob]


class CompletionOutput(Struct, frozen=True, kw_only=True):
    """One answer. `logprobs` has the candidates of each token by id, the sampled one first."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[Position] | None = None
    cumulative_logprob: float | None = None


class RequestOutput(Struct, frozen=True, kw_only=True):
    """One input with its answers, `outputs`, of which there are `n`.

    `prompt` is its text, of a chat what the template made, None where it was given as ids;
    `prompt_logprobs` has None for its first token, which nothing predicts.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Position | None] | None = None
    usage: Usage | None = None


def of_completion(prompt: str | list[int], answer: Completion) -> RequestOutput:
    """One prompt's, with the ids that were asked for."""
    first = answer.choices[0]
    outputs = []
    for choice in answer.choices:
        told = choice.logprobs
        positions = None if told is None else [_ids(top) for top in told["top_logprobs"]]
        outputs.append(_output(choice, choice.text, positions))
    return RequestOutput(
        request_id=answer.id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=first.prompt_token_ids,
        outputs=outputs,
        prompt_logprobs=_of_prompt(first.prompt_logprobs),
        usage=answer.usage,
    )


def of_chat(answer: ChatCompletion) -> RequestOutput:
    """One conversation's, with the ids that were asked for."""
    outputs = []
    for choice in answer.choices:
        told = choice.logprobs
        positions = None if told is None else [_candidates(entry) for entry in told["content"]]
        outputs.append(_output(choice, choice.text, positions))
    return RequestOutput(
        request_id=answer.id,
        prompt=answer.prompt_text,
        prompt_token_ids=answer.prompt_token_ids,
        outputs=outputs,
        prompt_logprobs=_of_prompt(answer.prompt_logprobs),
        usage=answer.usage,
    )


def _output(choice: Any, text: str, logprobs: list[Position] | None) -> CompletionOutput:
    total = None
    if logprobs is not None:
        total = sum(next(iter(position.values())).logprob for position in logprobs)
    return CompletionOutput(
        index=choice.index,
        text=text,
        token_ids=choice.token_ids or [],
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        logprobs=logprobs,
        cumulative_logprob=total,
    )


def _ids(top: Mapping[str, float]) -> Position:
    return {_id(token): Logprob(value) for token, value in top.items()}


def _candidates(entry: Mapping[str, Any]) -> Position:
    """The sampled one first; it is among the others too where they reach so far."""
    # Ids stand in for tokens, and only the sampled one's bytes are still of its text.
    text = None if entry["bytes"] is None else bytes(entry["bytes"]).decode(errors="replace")
    position = {_id(entry["token"]): Logprob(entry["logprob"], decoded_token=text)}
    for other in entry["top_logprobs"]:
        position.setdefault(_id(other["token"]), Logprob(other["logprob"]))
    return position


def _id(token: str) -> int:
    return int(token.removeprefix(_ID_PREFIX))


def _of_prompt(told: Sequence[Any] | None) -> list[Position | None] | None:
    if told is None:
        return None
    return msgspec.convert(told, list[dict[int, Logprob] | None], strict=False)
