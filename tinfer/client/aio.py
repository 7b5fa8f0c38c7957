"""`AsyncClient`: the client on asyncio."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack
from urllib.parse import urlencode

import msgspec

from tinfer.client.connection import Connection
from tinfer.client.errors import ApiError
from tinfer.client.limits import Deadlines, TimeLimits
from tinfer.client.params import (
    CHAT_NAMES,
    COMPLETION_NAMES,
    ChatParams,
    CompletionParams,
    Messages,
    Prompt,
    as_messages,
    body,
)
from tinfer.client.results import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Health,
    JsonAnswer,
    Model,
    ModelList,
    Text,
    Tokens,
)
from tinfer.client.retries import BASE_DELAY_S, Retries
from tinfer.client.stream import AsyncStream

DEFAULT_BASE_URL: Final = "http://127.0.0.1:8000"
# Source of these two: openai-python 3.52.0.
DEFAULT_TIMEOUT_S: Final = 600.0
DEFAULT_MAX_CONNECTIONS: Final = 1000
TRACE_HEADER: Final = "X-Tinfer-Trace"
_COMPLETIONS = "/v1/completions"
_CHATS = "/v1/chat/completions"
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}

ResultT = TypeVar("ResultT")

# A call's own total limit; UNSET takes the client's.
Timeout = float | None | msgspec.UnsetType


class AsyncClient:
    """A client of a tinfer server (or any with vLLM's API), used inside one event loop.

        async with tinfer.AsyncClient() as client:
            answer = await client.chat("Count from 1 to 5.", max_tokens=40)
            print(answer.text, answer.finish_reason, answer.usage)
            async with client.stream_chat("Tell me a story.") as stream:
                async for chunk in stream:
                    print(chunk.text, end="", flush=True)
            print(stream.usage, stream.ttft_s)

    `base_url` may be `unix:PATH` too. A server with a certificate of an own authority needs a
    `ssl_context` that trusts it (or `SSL_CERT_FILE` in the environment).

    Times are in seconds, None is no limit: `timeout_s` for a whole request with all its attempts
    (a call can have its own), `connect_timeout_s` for the connection, and for streams
    `first_token_timeout_s` and `token_gap_timeout_s`. At most `max_retries` further attempts are
    made, after `backoff_s`, doubled each time, or the server's `Retry-After`, and only while
    nothing of an answer has come: after a refused or broken connection, 429, 502, 503, 504. Such a
    request may have run; that costs time on the server and changes nothing else. A stream that has
    begun is never repeated.

    Parameters of requests are vLLM's, by name; what is not given is not sent; other fields go in
    `extra`. With `trace`, a tinfer server says in `tinfer` of an answer which workers served it and
    how long each phase took. All methods raise `TinferClientError`; its classes are listed in
    `tinfer.client.errors`.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        api_key: str | None = None,
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float | None = 5.0,
        first_token_timeout_s: float | None = None,
        token_gap_timeout_s: float | None = None,
        max_retries: int = 2,
        backoff_s: float = BASE_DELAY_S,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        headers: Mapping[str, str] | None = None,
        trace: bool = False,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        limits = TimeLimits(
            connect_s=connect_timeout_s,
            first_token_s=first_token_timeout_s,
            token_gap_s=token_gap_timeout_s,
            total_s=timeout_s,
        )
        retries = Retries(num_retries=max_retries, base_delay_s=backoff_s)
        self._limits = limits
        sent = {**({TRACE_HEADER: "1"} if trace else {}), **(headers or {})}
        self._connection = Connection(
            base_url, api_key, sent, limits, retries, max_connections, ssl_context
        )

    @property
    def base_url(self) -> str:
        """The server's address, without `/v1`; `unix:PATH` for its Unix socket."""
        return self._connection.base_url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; what is under way fails with `ConnectionFailed`."""
        await self._connection.close()

    async def completions(
        self,
        prompt: Prompt,
        *,
        extra: Mapping[str, Any] | None = None,
        timeout_s: Timeout = msgspec.UNSET,
        **params: Unpack[CompletionParams],
    ) -> Completion:
        """Continue a prompt: text, token ids, or a list of either, with one answer each."""
        asked = body({"prompt": prompt}, params, COMPLETION_NAMES, extra)
        return await self._post(Completion, _COMPLETIONS, asked, timeout_s)

    async def chat(
        self,
        messages: Messages,
        *,
        extra: Mapping[str, Any] | None = None,
        timeout_s: Timeout = msgspec.UNSET,
        **params: Unpack[ChatParams],
    ) -> ChatCompletion:
        """Answer a conversation; a string is one message of the user."""
        asked = body({"messages": as_messages(messages)}, params, CHAT_NAMES, extra)
        return await self._post(ChatCompletion, _CHATS, asked, timeout_s)

    def stream_completions(
        self,
        prompt: Prompt,
        *,
        extra: Mapping[str, Any] | None = None,
        timeout_s: Timeout = msgspec.UNSET,
        **params: Unpack[CompletionParams],
    ) -> AsyncStream[CompletionChunk]:
        """`completions`, chunk by chunk; the request is sent by `async with`."""
        asked = body({"prompt": prompt, **_STREAMED}, params, COMPLETION_NAMES, extra)
        limits = self._limits_of(timeout_s)
        return AsyncStream(self._connection, CompletionChunk, _COMPLETIONS, asked, limits)

    def stream_chat(
        self,
        messages: Messages,
        *,
        extra: Mapping[str, Any] | None = None,
        timeout_s: Timeout = msgspec.UNSET,
        **params: Unpack[ChatParams],
    ) -> AsyncStream[ChatChunk]:
        """`chat`, chunk by chunk; the request is sent by `async with`."""
        fixed = {"messages": as_messages(messages), **_STREAMED}
        asked = body(fixed, params, CHAT_NAMES, extra)
        limits = self._limits_of(timeout_s)
        return AsyncStream(self._connection, ChatChunk, _CHATS, asked, limits)

    async def post(
        self, path: str, asked: object, *, timeout_s: Timeout = msgspec.UNSET
    ) -> JsonAnswer:
        """What any endpoint answers to a body, both as they are: `path` begins with a slash.

        `asked` is what msgspec can encode; `msgspec.Raw` is sent as it stands.
        """
        deadlines = Deadlines(self._limits_of(timeout_s))
        return await self._connection.fetch_json("POST", path, asked, deadlines)

    async def models(self) -> list[Model]:
        """The names that the server answers to."""
        return (await self._get(ModelList, "/v1/models")).data

    async def health(self) -> Health:
        """Whether the server can serve now; asked once, without retries.

        Raises `ConnectionFailed` where no server is.
        """
        try:
            async with Deadlines(self._limits).kept():
                (await self._connection.once("GET", "/health", None)).close()
        except ApiError as error:
            return Health(False, error.message)
        return Health(True)

    async def tokenize(
        self,
        text: str | Sequence[Mapping[str, Any]],
        *,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        return_token_strs: bool | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Tokens:
        """The token ids of a prompt, or of a list of messages under the chat template."""
        fixed = {"prompt": text} if isinstance(text, str) else {"messages": [*text]}
        params = {
            "add_special_tokens": add_special_tokens,
            "add_generation_prompt": add_generation_prompt,
            "return_token_strs": return_token_strs,
        }
        asked = body(fixed, params, frozenset(params), extra)
        return await self._post(Tokens, "/tokenize", asked, msgspec.UNSET)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        asked = {"tokens": tokens}
        return (await self._post(Text, "/detokenize", asked, msgspec.UNSET)).prompt

    async def ledger(self) -> dict[str, Any]:
        """tinfer's account of open requests, leases and held blocks; `idle` when all are zero."""
        return await self._get(dict[str, Any], "/debug/ledger")

    async def state(self) -> dict[str, Any]:
        """Workers, requests by phase and what waits, as the server's `/debug/state` tells."""
        return await self._get(dict[str, Any], "/debug/state")

    async def metrics(self) -> str:
        """What `/metrics` shows, as text in Prometheus' format."""
        return await self._connection.fetch_text("GET", "/metrics", Deadlines(self._limits))

    async def trace(self, request_id: str | None = None, seconds: float | None = None) -> bytes:
        """What the server did in the last seconds (60, at most 3600), or of one request all that it
        keeps, as the JSON of a Chrome trace. Raises `NotFound` for a request that it does not know.
        """
        wishes = {"request_id": request_id, "seconds": seconds}
        query = urlencode({name: value for name, value in wishes.items() if value is not None})
        return bytes(await self._get(msgspec.Raw, "/debug/trace" + (query and f"?{query}")))

    async def drain(self, worker: str, drain_timeout_s: float = 30.0) -> None:
        """Begin to take a worker out of service: it starts nothing new, and stops once it is empty.

        What it still has after `drain_timeout_s` goes on elsewhere. `state` shows how far it is.
        """
        await self._leave("drain", worker, drain_timeout_s)

    async def restart(self, worker: str, drain_timeout_s: float = 30.0) -> None:
        """The same, and start the worker anew; one that is down is started at once."""
        await self._leave("restart", worker, drain_timeout_s)

    async def _leave(self, action: str, worker: str, drain_timeout_s: float) -> None:
        wish = {"worker": worker, "timeout_s": drain_timeout_s}
        await self._post(dict[str, Any], f"/admin/{action}", wish, msgspec.UNSET)

    def _limits_of(self, timeout_s: Timeout) -> TimeLimits:
        if isinstance(timeout_s, msgspec.UnsetType):
            return self._limits
        return msgspec.structs.replace(self._limits, total_s=timeout_s)

    async def _post(
        self, result: type[ResultT], path: str, asked: object, timeout_s: Timeout
    ) -> ResultT:
        deadlines = Deadlines(self._limits_of(timeout_s))
        return await self._connection.fetch(result, "POST", path, asked, deadlines)

    async def _get(self, result: type[ResultT], path: str) -> ResultT:
        return await self._connection.fetch(result, "GET", path, None, Deadlines(self._limits))
