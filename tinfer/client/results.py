"""What the server says, typed: OpenAI's shapes, with the fields that vLLM and tinfer add.

Every type reads over fields that it does not know, and most fields have a default, so that an older
or newer server, or another one, can be read too. `text`, `finish_reason` and `token_ids` of a whole
answer are those of its first choice.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from msgspec import Struct, field


class PromptTokensDetails(Struct):
    """Where prompt tokens came from."""

    cached_tokens: int | None = None


class CompletionTokensDetails(Struct):
    """What answers were made of; there on a server with a reasoning parser."""

    reasoning_tokens: int | None = None


class Predicted(Struct):
    """How long a tinfer server expected an answer to be when the request came, in tokens: the
    median, and what it was to lie between with 80 %. Of a request with several answers `answers`
    has those of each, and the rest is empty."""

    predictor: str = ""
    median_tokens: float | None = None
    low_tokens: float | None = None
    high_tokens: float | None = None
    answers: list[Predicted] = []


class Usage(Struct):
    """Token counts over all prompts and answers of one request; the prediction is there on request
    (`tinfer={"include_prediction": True}`)."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None
    tinfer_prediction: Predicted | None = None


class CompletionChoice(Struct):
    """One answer of `/v1/completions`; ids are there with `return_token_ids`."""

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: dict[str, Any] | None = None
    prompt_logprobs: list[Any] | None = None


class Completion(Struct):
    """A whole answer of `/v1/completions`; `tinfer` is what the server adds of itself."""

    choices: list[CompletionChoice]
    id: str = ""
    model: str = ""
    created: int = 0
    usage: Usage | None = None
    system_fingerprint: str | None = None
    tinfer: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None

    @property
    def token_ids(self) -> list[int] | None:
        return self.choices[0].token_ids if self.choices else None


class FunctionCall(Struct):
    """What is to be called; `arguments` is JSON as text, which a model may get wrong."""

    name: str = ""
    arguments: str = ""


class ToolCall(Struct):
    """One call of a tool; its `id` goes back with the result, as `tool_call_id`."""

    id: str = ""
    function: FunctionCall = field(default_factory=FunctionCall)
    type: str = "function"


class ChatMessage(Struct):
    """What the model said."""

    role: str = "assistant"
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Struct):
    """One answer of `/v1/chat/completions`; ids are there with `return_token_ids`."""

    message: ChatMessage
    index: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return self.message.content or ""


class ChatCompletion(Struct):
    """A whole answer of `/v1/chat/completions`; `tinfer` is what the server adds of itself.

    `prompt_text` is what the chat template made, with `return_prompt_text`.
    """

    choices: list[ChatChoice]
    id: str = ""
    model: str = ""
    created: int = 0
    usage: Usage | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
    prompt_logprobs: list[Any] | None = None
    tinfer: dict[str, Any] | None = None

    @property
    def message(self) -> ChatMessage:
        """What to append to the history to go on."""
        return self.choices[0].message if self.choices else ChatMessage()

    @property
    def text(self) -> str:
        return self.message.content or ""

    @property
    def tool_calls(self) -> list[ToolCall]:
        return self.message.tool_calls or []

    @property
    def reasoning(self) -> str:
        return self.message.reasoning or ""

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None

    @property
    def token_ids(self) -> list[int] | None:
        return self.choices[0].token_ids if self.choices else None


class Delta(Protocol):
    """What the deltas of both endpoints have in common."""

    index: int
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None

    @property
    def text(self) -> str: ...

    @property
    def reasoning(self) -> str: ...

    @property
    def tool_calls(self) -> list[ToolCallDelta]: ...


class CompletionDelta(Struct):
    """One answer's share of a chunk of `/v1/completions`."""

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def reasoning(self) -> str:
        return ""

    @property
    def tool_calls(self) -> list[ToolCallDelta]:
        return []


class FunctionDelta(Struct):
    """What is new of a call: its name, or a piece of its arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Struct):
    """What is new of the call at `index`; id and type come once."""

    index: int = 0
    id: str | None = None
    type: str | None = None
    function: FunctionDelta | None = None


def add_call(calls: list[ToolCall], new: ToolCallDelta) -> None:
    """Add what is new to the calls so far; a first piece of a call makes it."""
    if new.index >= len(calls):
        calls.append(ToolCall())
    call = calls[max(0, min(new.index, len(calls) - 1))]
    call.id = new.id or call.id
    if new.function is not None:
        call.function.name += new.function.name or ""
        call.function.arguments += new.function.arguments or ""


class MessageDelta(Struct):
    """What is new in a chat message."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatDelta(Struct):
    """One answer's share of a chunk of `/v1/chat/completions`."""

    index: int = 0
    delta: MessageDelta = field(default_factory=MessageDelta)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return self.delta.content or ""

    @property
    def reasoning(self) -> str:
        return self.delta.reasoning or ""

    @property
    def tool_calls(self) -> list[ToolCallDelta]:
        return self.delta.tool_calls or []


class CompletionChunk(Struct):
    """One event of a stream of `/v1/completions`; the one with `usage` has no choices."""

    choices: list[CompletionDelta]
    id: str = ""
    model: str = ""
    created: int = 0
    usage: Usage | None = None
    system_fingerprint: str | None = None
    tinfer: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The new text of the first answer."""
        return "".join(delta.text for delta in self.choices if delta.index == 0)


class ChatChunk(Struct):
    """One event of a stream of `/v1/chat/completions`; the one with `usage` has no choices."""

    choices: list[ChatDelta]
    id: str = ""
    model: str = ""
    created: int = 0
    usage: Usage | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None
    tinfer: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The new text of the first answer."""
        return "".join(delta.text for delta in self.choices if delta.index == 0)

    @property
    def reasoning(self) -> str:
        """The new reasoning of the first answer."""
        return "".join(delta.reasoning for delta in self.choices if delta.index == 0)


class Model(Struct):
    """One entry of `/v1/models`."""

    id: str
    created: int = 0
    owned_by: str = ""
    root: str | None = None
    max_model_len: int | None = None


class ModelList(Struct):
    """The body of `/v1/models`."""

    data: list[Model]


class Tokens(Struct):
    """The body of `/tokenize`; `token_strs` is there when asked for."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Text(Struct):
    """The body of `/detokenize`."""

    prompt: str


class JsonAnswer(Struct, frozen=True):
    """Any successful answer: `body` is its JSON, without spaces between and else as it came.

    `request_id` is the header `X-Request-Id`, which not every server sends.
    """

    status: int
    body: msgspec.Raw
    request_id: str | None = None


class Health(Struct, frozen=True):
    """Whether the server can serve, and why not."""

    ok: bool
    reason: str = ""


class ErrorInfo(Struct):
    """OpenAI's error object."""

    message: str
    type: str | None = None
    param: str | None = None
    code: int | str | None = None


class ErrorBody(Struct):
    """The body of a refusal, and the last event of a stream that fails midway."""

    error: ErrorInfo
