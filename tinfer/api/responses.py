"""The bodies that clients read, field for field those of `vllm serve` 0.32.

Whole responses carry every field, null where it says nothing; a stream's chunks leave out what
vLLM leaves out, which is what `UNSET` marks.
"""

from __future__ import annotations

import uuid

from msgspec import UNSET, Struct, UnsetType

from tinfer.api.trace import Foretold, Shown, Trace


def new_id() -> str:
    """64 random bits as 16 hex digits, as vLLM names its requests."""
    return uuid.uuid4().hex[:16]


class PromptTokensDetails(Struct):
    """Where prompt tokens came from; a stream leaves out all but the first."""

    cached_tokens: int
    created_cache_tokens: int | None | UnsetType = None
    multimodal_tokens: dict[str, int] | None | UnsetType = None


class CompletionTokensDetails(Struct):
    """How many tokens of the answers were reasoning, as their parser counts."""

    reasoning_tokens: int


class Usage(Struct):
    """Token counts over all prompts and answers of one request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None | UnsetType = None
    completion_tokens_details: CompletionTokensDetails | None | UnsetType = None
    tinfer_prediction: Foretold | UnsetType = UNSET


class CompletionLogprobs(Struct):
    """Logprobs of `/v1/completions`: four lists with one entry per token."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class ChatLogprob(Struct):
    """One candidate token of a chat answer."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprobEntry(Struct):
    """One token of a chat answer and the candidates it was chosen from."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[ChatLogprob] = []


class ChatLogprobs(Struct):
    """Logprobs of `/v1/chat/completions`."""

    content: list[ChatLogprobEntry]


class PromptLogprob(Struct):
    """One candidate at one position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(Struct):
    """One answer of `/v1/completions`."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    routed_experts: None = None


class Completion(Struct):
    """The body of `/v1/completions`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: str = "text_completion"
    service_tier: None = None
    system_fingerprint: str | None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    metrics: None = None
    tinfer: Shown | UnsetType = UNSET


class CompletionDelta(Struct):
    """One answer's share of a chunk of `/v1/completions`."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_token_ids: list[int] | None
    token_ids: list[int] | None


class FunctionCall(Struct):
    """What is called; `arguments` is JSON as text, as far as the model writes JSON."""

    name: str
    arguments: str


class ToolCall(Struct):
    """One call of a tool."""

    id: str
    function: FunctionCall
    type: str = "function"


class ChatMessage(Struct):
    """What the model said; `tool_calls` is left out where there are none, as in vLLM."""

    role: str
    content: str | None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning: str | None = None


class ChatChoice(Struct):
    """One answer of `/v1/chat/completions`."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    routed_experts: None = None


class ChatCompletion(Struct):
    """The body of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    service_tier: None = None
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    metrics: None = None
    tinfer: Shown | UnsetType = UNSET


class DeltaFunctionCall(Struct):
    """What is new of a call: its name once, then pieces of its arguments."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class DeltaToolCall(Struct):
    """What is new of the call at `index`; id and type come once, with its name."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: DeltaFunctionCall | UnsetType = UNSET


class DeltaMessage(Struct):
    """What is new in a chat message; the role comes once, at the start."""

    content: str | UnsetType = UNSET
    role: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[DeltaToolCall] | UnsetType = UNSET


class ChatDelta(Struct):
    """One answer's share of a chunk of `/v1/chat/completions`."""

    index: int
    delta: DeltaMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None | UnsetType = UNSET
    token_ids: list[int] | None | UnsetType = UNSET


class ChunkHead(Struct):
    """What all chunks of one stream share."""

    id: str
    object: str
    created: int
    model: str


class ChunkTail(Struct):
    """What a chunk may carry behind its choices."""

    usage: Usage | UnsetType = UNSET
    system_fingerprint: str | UnsetType = UNSET
    prompt_token_ids: list[int] | None | UnsetType = UNSET
    prompt_text: str | None | UnsetType = UNSET
    tinfer: Trace | UnsetType = UNSET


class ModelPermission(Struct):
    """What OpenAI's model objects once carried; all of it constant."""

    id: str
    created: int
    object: str = "model_permission"
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class ModelObject(Struct):
    """One entry of `/v1/models`."""

    id: str
    created: int
    root: str
    max_model_len: int
    permission: list[ModelPermission]
    object: str = "model"
    owned_by: str = "tinfer"
    parent: None = None


class ModelList(Struct):
    """The body of `/v1/models`."""

    data: list[ModelObject]
    object: str = "list"


class Version(Struct):
    """The body of `/version`."""

    version: str


class ErrorInfo(Struct):
    """What went wrong, for a person (`message`) and for a program (the rest)."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(Struct):
    """The body of every answer that is not a success, and the last event of a failed stream."""

    error: ErrorInfo
