"""Python clients of a running server: `AsyncClient` on asyncio, `Client` without.

Both need only the server's address, and use nothing else of tinfer. See `AsyncClient` for how to
use them, and `tinfer.client.errors` for what they raise.
"""

from __future__ import annotations

from tinfer.client.aio import AsyncClient
from tinfer.client.errors import (
    ApiError,
    BadRequest,
    ConnectionFailed,
    NotFound,
    Overloaded,
    RequestTimeout,
    ServerUnavailable,
    StreamBroken,
    TinferClientError,
    Unauthorized,
    UnexpectedAnswer,
)
from tinfer.client.results import (
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    Completion,
    CompletionChunk,
    FunctionCall,
    Health,
    JsonAnswer,
    Model,
    Predicted,
    Tokens,
    ToolCall,
    Usage,
)
from tinfer.client.stream import AsyncStream, StreamedAnswer
from tinfer.client.sync import Client, Stream

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncStream",
    "BadRequest",
    "ChatChunk",
    "ChatCompletion",
    "ChatMessage",
    "Client",
    "Completion",
    "CompletionChunk",
    "ConnectionFailed",
    "FunctionCall",
    "Health",
    "JsonAnswer",
    "Model",
    "NotFound",
    "Overloaded",
    "Predicted",
    "RequestTimeout",
    "ServerUnavailable",
    "Stream",
    "StreamBroken",
    "StreamedAnswer",
    "TinferClientError",
    "Tokens",
    "ToolCall",
    "Unauthorized",
    "UnexpectedAnswer",
    "Usage",
]
