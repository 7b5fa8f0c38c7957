"""`Client`: the same client for code without asyncio.

The work is done by one thread with an event loop (`loop_thread.py`), so a client serves several
threads at once and works where another loop runs already, as in a notebook. The thread starts with
the first call and ends with `close()`.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, Unpack

import msgspec

from tinfer.client.aio import (
    DEFAULT_BASE_URL,
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_TIMEOUT_S,
    AsyncClient,
    Timeout,
)
from tinfer.client.errors import ConnectionFailed
from tinfer.client.loop_thread import LoopThread
from tinfer.client.params import ChatParams, CompletionParams, Messages, Prompt
from tinfer.client.results import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Health,
    JsonAnswer,
    Model,
    Tokens,
    ToolCall,
    Usage,
)
from tinfer.client.retries import BASE_DELAY_S
from tinfer.client.stream import AsyncStream, ChunkT, StreamedAnswer


class Stream(Generic[ChunkT]):
    """`with client.stream_chat(...) as stream: for chunk in stream: ...`; see `AsyncStream`."""

    def __init__(self, thread: LoopThread, stream: AsyncStream[ChunkT]) -> None:
        self._thread = thread
        self._stream = stream

    def __enter__(self) -> Self:
        try:
            self._thread.run(self._stream.__aenter__)
        except BaseException:
            # An interrupt may come just as the answer has begun.
            self._leave_quietly()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave_quietly()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ChunkT:
        chunk = self._thread.run(self._next)
        if chunk is None:
            raise StopIteration
        return chunk

    async def _next(self) -> ChunkT | None:
        return await anext(self._stream, None)

    async def _leave(self) -> None:
        self._stream.close()

    def _leave_quietly(self) -> None:
        try:
            self._thread.run(self._leave)
        except ConnectionFailed:
            pass  # the client was closed, and every connection with it

    @property
    def id(self) -> str:
        return self._stream.id

    @property
    def model(self) -> str:
        return self._stream.model

    @property
    def answers(self) -> dict[int, StreamedAnswer]:
        return self._stream.answers

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def token_ids(self) -> list[int]:
        return self._stream.token_ids

    @property
    def finish_reason(self) -> str | None:
        return self._stream.finish_reason

    @property
    def reasoning(self) -> str:
        return self._stream.reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls so far; the arguments of the last may not be whole before the end."""
        return self._stream.tool_calls

    @property
    def usage(self) -> Usage | None:
        return self._stream.usage

    @property
    def tinfer(self) -> dict[str, Any] | None:
        return self._stream.tinfer

    @property
    def ttft_s(self) -> float | None:
        """Seconds from sending the request to its first token."""
        return self._stream.ttft_s

    @property
    def itl_s(self) -> list[float]:
        """Seconds between chunks that carry tokens."""
        return self._stream.itl_s

    @property
    def e2el_s(self) -> float | None:
        """Seconds from sending the request to the last token so far."""
        return self._stream.e2el_s

    @property
    def tpot_s(self) -> float | None:
        """(E2EL - TTFT) / (output tokens - 1)."""
        return self._stream.tpot_s


class Client:
    """`AsyncClient` without asyncio: same parameters, results and errors.

        with tinfer.Client() as client:
            print(client.chat("Count from 1 to 5.").text)
            with client.stream_chat("Tell me a story.") as stream:
                for chunk in stream:
                    print(chunk.text, end="", flush=True)

    May be shared by threads. Ctrl-C in a call cancels its request, also on the server. Without
    `with`, call `close()`.
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
        self._client = AsyncClient(
            base_url,
            api_key,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            first_token_timeout_s=first_token_timeout_s,
            token_gap_timeout_s=token_gap_timeout_s,
            max_retries=max_retries,
            backoff_s=backoff_s,
            max_connections=max_connections,
            headers=headers,
            trace=trace,
            ssl_context=ssl_context,
        )
        self._thread = LoopThread(self._client.close)

    @property
    def base_url(self) -> str:
        """The server's address, without `/v1`."""
        return self._client.base_url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection and end the thread; calls of other threads fail."""
        self._thread.close()

    def completions(
        self,
        prompt: Prompt,
        *,
        extra: Mapping[str, Any] | None = None,
        timeout_s: Timeout = msgspec.UNSET,
        **params: Unpack[CompletionParams],
    ) -> Completion:
        """Continue a prompt: text, token ids, or a list of either, with one answer each."""
        return self._thread.run(
            lambda: self._client.completions(prompt, extra=extra, timeout_s=timeout_s, **params)
        )

    def chat(
        self,
        messages: Messages,
        *,
        extra: Mapping[str, Any] | None = None,
        timeout_s: Timeout = msgspec.UNSET,
        **params: Unpack[ChatParams],
    ) -> ChatCompletion:
        """Answer a conversation; a string is one message of the user."""
        return self._thread.run(
            lambda: self._client.chat(messages, extra=extra, timeout_s=timeout_s, **params)
        )

    def stream_completions(
        self,
        prompt: Prompt,
        *,
        extra: Mapping[str, Any] | None = None,
        timeout_s: Timeout = msgspec.UNSET,
        **params: Unpack[CompletionParams],
    ) -> Stream[CompletionChunk]:
        """`completions`, chunk by chunk; the request is sent by `with`."""
        stream = self._client.stream_completions(prompt, extra=extra, timeout_s=timeout_s, **params)
        return Stream(self._thread, stream)

    def stream_chat(
        self,
        messages: Messages,
        *,
        extra: Mapping[str, Any] | None = None,
        timeout_s: Timeout = msgspec.UNSET,
        **params: Unpack[ChatParams],
    ) -> Stream[ChatChunk]:
        """`chat`, chunk by chunk; the request is sent by `with`."""
        stream = self._client.stream_chat(messages, extra=extra, timeout_s=timeout_s, **params)
        return Stream(self._thread, stream)

    def post(self, path: str, asked: object, *, timeout_s: Timeout = msgspec.UNSET) -> JsonAnswer:
        """What any endpoint answers to a body, both as they are: `path` begins with a slash."""
        return self._thread.run(lambda: self._client.post(path, asked, timeout_s=timeout_s))

    def models(self) -> list[Model]:
        """The names that the server answers to."""
        return self._thread.run(self._client.models)

    def health(self) -> Health:
        """Whether the server can serve now. Raises `ConnectionFailed` where no server is."""
        return self._thread.run(self._client.health)

    def tokenize(
        self,
        text: str | Sequence[Mapping[str, Any]],
        *,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        return_token_strs: bool | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Tokens:
        """The token ids of a prompt, or of a list of messages under the chat template."""
        return self._thread.run(
            lambda: self._client.tokenize(
                text,
                add_special_tokens=add_special_tokens,
                add_generation_prompt=add_generation_prompt,
                return_token_strs=return_token_strs,
                extra=extra,
            )
        )

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return self._thread.run(lambda: self._client.detokenize(tokens))

    def ledger(self) -> dict[str, Any]:
        """tinfer's account of open requests, leases and held blocks; `idle` when all are zero."""
        return self._thread.run(self._client.ledger)

    def state(self) -> dict[str, Any]:
        """Workers, requests by phase and what waits, as the server's `/debug/state` tells."""
        return self._thread.run(self._client.state)

    def metrics(self) -> str:
        """What `/metrics` shows, as text in Prometheus' format."""
        return self._thread.run(self._client.metrics)

    def trace(self, request_id: str | None = None, seconds: float | None = None) -> bytes:
        """What the server did in the last seconds (60, at most 3600), or of one request all that it
        keeps, as the JSON of a Chrome trace. Raises `NotFound` for a request that it does not know.
        """
        return self._thread.run(lambda: self._client.trace(request_id, seconds))

    def drain(self, worker: str, drain_timeout_s: float = 30.0) -> None:
        """Begin to take a worker out of service: it starts nothing new, and stops once it is empty.

        What it still has after `drain_timeout_s` goes on elsewhere. `state` shows how far it is.
        """
        self._thread.run(lambda: self._client.drain(worker, drain_timeout_s))

    def restart(self, worker: str, drain_timeout_s: float = 30.0) -> None:
        """The same, and start the worker anew; one that is down is started at once."""
        self._thread.run(lambda: self._client.restart(worker, drain_timeout_s))
