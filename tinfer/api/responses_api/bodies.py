"""The response that clients of `/v1/responses` read, and the items that it is made of.

Names, types and what is null are those of vLLM 0.32 `responses/protocol.py`, which leaves to the
types of the `openai` package what OpenAI defines. What is repeated from the request is as it was
sent, so that no field of it can be lost here.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from tinfer.api.responses import ChatLogprobEntry
from tinfer.api.responses_api.request import ResponsesRequest
from tinfer.api.serving import Counter, Job
from tinfer.api.trace import Foretold, Shown
from tinfer.core.sampling import SamplingSpec

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]
ErrorCode = Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]


class OutputText(Struct, tag="output_text", tag_field="type"):
    """The text of a message; `logprobs` on request."""

    text: str
    annotations: list[dict[str, Any]] = []
    logprobs: list[ChatLogprobEntry] | None = None


class ReasoningText(Struct, tag="reasoning_text", tag_field="type"):
    """What the model thought, as it thought it."""

    text: str


class MessageItem(Struct, tag="message", tag_field="type"):
    """What the model said; in one part, and none while it has said nothing."""

    id: str
    content: list[OutputText]
    status: ItemStatus
    role: str = "assistant"


class ReasoningItem(Struct, tag="reasoning", tag_field="type"):
    """What the model thought before; there is never a summary."""

    id: str
    content: list[ReasoningText]
    status: ItemStatus
    summary: list[dict[str, Any]] = []
    encrypted_content: None = None


class FunctionCallItem(Struct, tag="function_call", tag_field="type"):
    """What is to be called; `arguments` is JSON as text, as far as the model writes JSON."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


Item = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(Struct):
    """Where input tokens came from; what was written to the cache is not counted."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    """How many of the output tokens were reasoning, where a parser tells."""

    reasoning_tokens: int


class ResponseUsage(Struct):
    """Token counts of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    tinfer_prediction: Foretold | UnsetType = UNSET


class IncompleteDetails(Struct):
    """Why an answer is not complete."""

    reason: str


class ResponseError(Struct):
    """What went wrong with a stream that had begun; `type` and `param` as in an `ErrorBody`."""

    code: ErrorCode
    message: str
    type: str
    param: str | None


class Response(Struct, kw_only=True):
    """The body of `/v1/responses`, and of the events that begin and end its stream.

    `max_output_tokens` is what the answer could have at most, as in vLLM, asked for or not.
    """

    id: str
    object: str = "response"
    created_at: int
    status: ResponseStatus
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    model: str
    output: list[Item]
    usage: ResponseUsage | None = None
    max_output_tokens: int
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    max_tool_calls: int | None
    text: dict[str, Any] | None
    reasoning: dict[str, Any] | None
    truncation: str
    metadata: dict[str, str] | None
    user: str | None
    service_tier: str
    background: bool = False
    previous_response_id: None = None
    prompt: None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    input_messages: None = None
    output_messages: None = None
    tinfer: Shown | UnsetType = UNSET


def begun(job: Job, asked: ResponsesRequest, spec: SamplingSpec) -> Response:
    """The response before the first token."""
    return Response(
        id=job.id,
        created_at=job.created,
        status="in_progress",
        instructions=asked.instructions,
        model=job.model,
        output=[],
        max_output_tokens=spec.max_tokens,
        temperature=spec.temperature,
        top_p=spec.top_p,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        top_logprobs=spec.logprobs,
        tools=msgspec.to_builtins(asked.tools or []),
        tool_choice=msgspec.to_builtins(asked.tool_choice or "auto") if asked.tools else "none",
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        max_tool_calls=asked.max_tool_calls,
        text=_shown(asked.text),
        reasoning=_shown(asked.reasoning),
        truncation=asked.truncation or "disabled",
        metadata=asked.metadata,
        user=asked.user,
        service_tier=asked.service_tier or "auto",
    )


def used(counter: Counter) -> ResponseUsage:
    """The usage of a response that is over."""
    total = counter.total()
    return ResponseUsage(
        input_tokens=total.prompt_tokens,
        input_tokens_details=InputTokensDetails(counter.cached_tokens),
        output_tokens=total.completion_tokens,
        output_tokens_details=OutputTokensDetails(sum(counter.reasoning_tokens or ())),
        total_tokens=total.total_tokens,
        tinfer_prediction=total.tinfer_prediction,
    )


def _shown(asked: Struct | None) -> dict[str, Any] | None:
    """A field of the request without what it did not say."""
    if asked is None:
        return None
    return {
        name: _shown(value) if isinstance(value, Struct) else value
        for name, value in _named_values(asked)
        if value is not None
    }


def _named_values(asked: Struct) -> list[tuple[str, Any]]:
    return [
        (field.encode_name, getattr(asked, field.name)) for field in msgspec.structs.fields(asked)
    ]
