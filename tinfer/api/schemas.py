"""What a client may send to `/v1/completions`, `/v1/chat/completions` and the two of tokens.

Names and types are those of vLLM 0.32; null always means the default, so every field is optional.
Ranges are checked in `sampling.py`; what is not declared here is judged by `fields.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from tinfer.api.fields import USUAL, Undeclared
from tinfer.api.limits import INT64_MAX, INT64_MIN, MAX_DEADLINE_MS, MAX_EXPECTED_TOKENS

# Lower goes first. As vLLM's, which some clients set to a time.
Priority = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(Struct):
    """What a stream tells of usage; `continuous_usage_stats` needs `include_usage`, and
    `include_prediction` is the same as `Wishes.include_prediction`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_prediction: bool | None = None


class Wishes(Struct, forbid_unknown_fields=True):
    """The field `tinfer`: what a client knows of its request that no other field says.

    `expected_output_tokens`: how long it thinks that the answer will be, a weak sample beside what
    the server has learnt; `priority`: the one of vLLM; `deadline_ms`: how long the answer may take,
    as `X-Request-Timeout` in seconds; `include_prediction`: have `usage` tell how long the answer
    was predicted to be.
    """

    expected_output_tokens: Annotated[int, Meta(ge=1, le=MAX_EXPECTED_TOKENS)] | None = None
    priority: Priority | None = None
    deadline_ms: Annotated[float, Meta(gt=0, le=MAX_DEADLINE_MS)] | None = None
    include_prediction: bool | None = None


class StructuredOutputs(Struct):
    """vLLM's `structured_outputs`: exactly one of the first six, and how to apply it."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class JsonSchemaFormat(Struct):
    """The inner object of `response_format` = json_schema; `schema` is under its own key."""

    name: str
    json_schema: dict[str, Any] | None = msgspec.field(default=None, name="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """OpenAI's `response_format`; for `structural_tag` the object as sent is the tag itself."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None


class Addressed(Struct, kw_only=True):
    """What every request body may name: the model it is for."""

    undeclared: ClassVar[Undeclared] = USUAL

    model: str | None = None


class GeneratingFields(Addressed, kw_only=True):
    """The fields that all endpoints that generate share."""

    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    request_id: str | None = None
    priority: Priority | None = None
    tinfer: Wishes | None = None


class SamplingFields(GeneratingFields, kw_only=True):
    """The fields that completions and chats share."""

    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    response_format: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    """`POST /v1/completions`. A list prompt is all strings, all token ids or all id lists."""

    prompt: str | list[str | int | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None


class Message(Struct):
    """One message of a chat; parts of a content list are kept as sent until they are read."""

    role: str
    content: str | list[str | dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ToolFunction(Struct):
    """What a tool is called and takes; the parameters are a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class Tool(Struct):
    """A tool that the chat's template tells the model of."""

    function: ToolFunction
    type: Literal["function"] = "function"
    defer_loading: bool | None = None


class NamedFunction(Struct):
    """The name of the one tool that is to be called."""

    name: str


class NamedTool(Struct):
    """`tool_choice` as an object: this tool and no other."""

    function: NamedFunction
    type: Literal["function"] = "function"


class ChatRequest(SamplingFields, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_prompt_text: bool | None = None
    echo: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None


class TokenizeRequest(Addressed, kw_only=True):
    """`POST /tokenize`: `prompt` or `messages`, and from `add_generation_prompt` on for these."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(Addressed, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[int]
