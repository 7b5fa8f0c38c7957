"""What a client may send to `/v1/responses`, and the same as a chat.

Names and types are those of OpenAI and of vLLM 0.32 `responses/protocol.py`, as far as a server
takes them that stores nothing and has no tools of its own; the rest is judged by `fields.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from tinfer.api.fields import RESPONSES, Undeclared
from tinfer.api.limits import (
    INT64_MAX,
    MAX_METADATA_ENTRIES,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_VALUE_CHARS,
)
from tinfer.api.responses_api.history import InputItem, continues, messages_of
from tinfer.api.schemas import (
    ChatRequest,
    GeneratingFields,
    NamedFunction,
    NamedTool,
    ReasoningEffort,
    Tool,
    ToolFunction,
)
from tinfer.errors import InvalidRequest

LOGPROBS = "message.output_text.logprobs"
Metadata = Annotated[
    dict[
        Annotated[str, Meta(max_length=MAX_METADATA_KEY_CHARS)],
        Annotated[str, Meta(max_length=MAX_METADATA_VALUE_CHARS)],
    ],
    Meta(max_length=MAX_METADATA_ENTRIES),
]
# Those after the first tell of what this server does not have, so there is nothing to include.
Included = Literal[
    "message.output_text.logprobs",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
]


class TextFormat(Struct):
    """What the text of the answer has to be; the last four fields are of `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: dict[str, Any] | None = msgspec.field(default=None, name="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Struct):
    """The field `text`; nothing here makes an answer more or less verbose."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Struct):
    """The field `reasoning`: `effort` goes to the chat's template. As in vLLM there are no
    summaries, whatever is asked."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class FunctionTool(Struct):
    """A function that the model may have called; the parameters are a JSON schema."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Struct):
    """`tool_choice` as an object: this function and no other."""

    type: Literal["function"]
    name: str


class ResponsesRequest(GeneratingFields, kw_only=True):
    """`POST /v1/responses`. `store` changes nothing: no response is kept."""

    undeclared: ClassVar[Undeclared] = RESPONSES

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Meta(ge=0, le=INT64_MAX)] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[Included] | None = None
    top_logprobs: int | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    user: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    store: bool | None = None
    # vLLM
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None


def as_chat(asked: ResponsesRequest) -> ChatRequest:
    """The chat that gives the same answer. Raises `InvalidRequest`."""
    shared = {name: getattr(asked, name) for name in GeneratingFields.__struct_fields__}
    is_continued = continues(asked.input)
    return ChatRequest(
        **shared,
        messages=messages_of(asked.instructions, asked.input),
        max_completion_tokens=asked.max_output_tokens,
        logprobs=_logprobs(asked),
        top_logprobs=asked.top_logprobs,
        reasoning_effort=None if asked.reasoning is None else asked.reasoning.effort,
        response_format=_response_format(asked.text),
        chat_template_kwargs=asked.chat_template_kwargs,
        add_generation_prompt=not is_continued,
        continue_final_message=is_continued,
        tools=_tools(asked.tools),
        tool_choice=_tool_choice(asked),
        parallel_tool_calls=asked.parallel_tool_calls,
        include_reasoning=asked.include_reasoning,
    )


def _logprobs(asked: ResponsesRequest) -> bool:
    included = LOGPROBS in (asked.include or ())
    if asked.top_logprobs and not included:
        raise InvalidRequest(f'needs `include: ["{LOGPROBS}"]`', param="top_logprobs")
    return included


def _response_format(text: TextConfig | None) -> msgspec.Raw:
    """As chats name it, absent where any text will do."""
    form = None if text is None else text.format
    if form is None or form.type == "text":
        return msgspec.Raw()
    shown: dict[str, Any] = {"type": form.type}
    if form.type == "json_schema":
        for name, value in (("name", form.name), ("schema", form.json_schema)):
            if value is None:
                raise InvalidRequest("is required for a json_schema", param=f"text.format.{name}")
        shown["json_schema"] = {"name": form.name, "schema": form.json_schema}
    return msgspec.Raw(msgspec.json.encode(shown))


def _tools(tools: list[FunctionTool] | None) -> list[Tool] | None:
    """None for no tools: unlike a chat's, a response's may be an empty list."""
    if not tools:
        return None
    return [
        Tool(ToolFunction(tool.name, tool.description, tool.parameters, tool.strict))
        for tool in tools
    ]


def _tool_choice(
    asked: ResponsesRequest,
) -> Literal["none", "auto", "required"] | NamedTool | None:
    """Without tools "auto" calls none, as in vLLM."""
    choice = asked.tool_choice
    if isinstance(choice, FunctionChoice):
        return NamedTool(NamedFunction(choice.name))
    return None if choice == "auto" and not asked.tools else choice
