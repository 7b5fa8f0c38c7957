"""A streamed answer: typed chunks as they arrive, and what they add up to.

Invariant: whichever way the block is left (the end, `break`, an error, cancellation), no request is
left running behind it: either the answer has ended, or its connection is closed, upon which the
server stops computing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import aiohttp
import msgspec
from msgspec import Struct, field

from tinfer.client.connection import BROKEN, Connection, now_s, read_error
from tinfer.client.errors import (
    RequestTimeout,
    StreamBroken,
    TinferClientError,
    UnexpectedAnswer,
)
from tinfer.client.limits import Deadlines, TimeLimits
from tinfer.client.results import (
    ChatChunk,
    CompletionChunk,
    Delta,
    ToolCall,
    Usage,
    add_call,
)
from tinfer.client.sse import EventTooLarge, SseParser

# How long a stream that has ended may take to free its connection for the next request.
DRAIN_S = 0.1

ChunkT = TypeVar("ChunkT", bound=CompletionChunk | ChatChunk)


class StreamedAnswer(Struct, kw_only=True):
    """One answer of a stream so far. Times are seconds since the request was sent.

    `ttft_s` is the time of the first token, retries included, and `last_s` that of the last;
    `itl_s` has one gap per further chunk (a chunk may carry several tokens). A chunk's time is that
    of the read which brought it, so a caller that dawdles between chunks sees its own delay.
    """

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    ttft_s: float | None = None
    last_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    tinfer: dict[str, Any] | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, delta: Delta, at_s: float) -> None:
        """Add what came `at_s` seconds after the request was sent."""
        has_tokens = bool(delta.text or delta.token_ids or delta.reasoning or delta.tool_calls)
        if delta.text:
            self.pieces.append(delta.text)
        self.reasoning += delta.reasoning
        for call in delta.tool_calls:
            add_call(self.tool_calls, call)
        self.token_ids += delta.token_ids or ()
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        # An answer may end at once, without a token that shows.
        if self.ttft_s is None and (has_tokens or delta.finish_reason is not None):
            self.ttft_s = self.last_s = at_s
        elif self.last_s is not None and has_tokens:
            self.itl_s.append(at_s - self.last_s)
            self.last_s = at_s


class AsyncStream(Generic[ChunkT]):
    """`async with client.stream_chat(...) as stream: async for chunk in stream: ...`

    Entering sends the request and returns when the server has begun to answer; leaving closes the
    connection if the answer has not ended, and the server then aborts the request. `text`,
    `finish_reason`, `tinfer`, `ttft_s` and `itl_s` are those of the first answer, `answers` has all
    by index; `usage` is there after the end. Raises `StreamBroken` where the answer ends before
    its end mark, `RequestTimeout`, and on entering whatever a whole answer raises.
    """

    def __init__(
        self,
        connection: Connection,
        chunk_type: type[ChunkT],
        path: str,
        body: dict[str, Any],
        limits: TimeLimits,
    ) -> None:
        self._connection = connection
        self._path = path
        self._body = body
        self._limits = limits
        self._decoder = msgspec.json.Decoder(chunk_type)
        self._parser = SseParser()
        self._ready: deque[ChunkT] = deque()
        self._failure: TinferClientError | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._deadlines: Deadlines | None = None
        self._sent_s = 0.0
        self._begun = False
        self._over = False
        self._drained = False
        self.id = ""
        self.model = ""
        self.usage: Usage | None = None
        self.answers: dict[int, StreamedAnswer] = {0: StreamedAnswer()}

    @property
    def text(self) -> str:
        return self.answers[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.answers[0].finish_reason

    @property
    def reasoning(self) -> str:
        return self.answers[0].reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls so far; the arguments of the last may not be whole before the end."""
        return self.answers[0].tool_calls

    @property
    def token_ids(self) -> list[int]:
        return self.answers[0].token_ids

    @property
    def tinfer(self) -> dict[str, Any] | None:
        """What the server says of how it served the answer, where it does."""
        return self.answers[0].tinfer

    @property
    def ttft_s(self) -> float | None:
        """Seconds from sending the request to its first token."""
        return self.answers[0].ttft_s

    @property
    def itl_s(self) -> list[float]:
        """Seconds between chunks that carry tokens."""
        return self.answers[0].itl_s

    @property
    def e2el_s(self) -> float | None:
        """Seconds from sending the request to the last token of any answer so far."""
        return max((a.last_s for a in self.answers.values() if a.last_s is not None), default=None)

    @property
    def tpot_s(self) -> float | None:
        """(E2EL - TTFT) / (output tokens - 1); None for under two tokens or several answers."""
        count = self.usage.completion_tokens if self.usage is not None else None
        if self.ttft_s is None or self.e2el_s is None or not count or count < 2:
            return None
        return None if len(self.answers) > 1 else (self.e2el_s - self.ttft_s) / (count - 1)

    async def __aenter__(self) -> Self:
        if self._deadlines is not None:
            raise RuntimeError("a stream is used once; ask for a new one")
        self._deadlines = Deadlines(self._limits)
        self._sent_s = now_s()
        response = await self._connection.open(
            "POST", self._path, self._body, self._deadlines, stream=True
        )
        if response.content_type != "text/event-stream":
            response.close()
            where = self._connection.base_url + self._path
            raise UnexpectedAnswer(f"{where} answers {response.content_type} and no event stream")
        self._response = response
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the answer where it is. Chunks that have arrived and were not read are gone."""
        self._over = self._drained = True
        self._ready.clear()
        self._failure = None
        if self._response is not None:
            # Without effect on a connection that has gone back to the pool.
            self._response.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChunkT:
        if self._response is None or self._deadlines is None:
            raise RuntimeError("a stream is read inside its block: `async with ... as stream:`")
        if self._begun:
            self._deadlines.await_next_token()
        while not self._ready:
            if self._failure is not None:
                failure = self._failure
                self.close()
                raise failure
            if self._over:
                await self._drain(self._response)
                raise StopAsyncIteration
            await self._read(self._response, self._deadlines)
        return self._ready.popleft()

    async def _read(self, response: aiohttp.ClientResponse, deadlines: Deadlines) -> None:
        """Wait for the next piece and take what it completes."""
        try:
            async with deadlines.kept():
                piece = await response.content.readany()
        except RequestTimeout as error:
            self.close()
            raise RequestTimeout(error.limit, self.text) from error
        except BROKEN as error:
            self._failure = StreamBroken(
                f"the connection broke in the middle of the answer: {error}", self.text
            )
            return
        if not piece:
            self._failure = StreamBroken("the answer ended without its end mark", self.text)
            return
        at_s = now_s() - self._sent_s
        try:
            for event in self._parser.feed(piece):
                if not self._over and self._failure is None:
                    self._take(event.data, at_s)
        except EventTooLarge as error:
            self._failure = StreamBroken(str(error), self.text)

    def _take(self, data: str, at_s: float) -> None:
        if data == "[DONE]":
            self._over = True
            return
        try:
            chunk = self._decoder.decode(data)
        except msgspec.DecodeError as error:
            said = read_error(data)
            if said is None:
                self._failure = StreamBroken(f"an event cannot be read: {error}", self.text)
            else:
                self._failure = StreamBroken(said.message, self.text, said.type, said.code)
            return
        self.id, self.model = chunk.id or self.id, chunk.model or self.model
        self.usage = chunk.usage or self.usage
        for delta in chunk.choices:
            answer = self.answers.setdefault(delta.index, StreamedAnswer())
            answer.add(delta, at_s)
            answer.tinfer = chunk.tinfer or answer.tinfer
            self._begun = self._begun or answer.ttft_s is not None
        self._ready.append(chunk)

    async def _drain(self, response: aiohttp.ClientResponse) -> None:
        """Read to the end of the response, so that its connection can serve the next request."""
        if self._drained:
            return
        self._drained = True
        try:
            async with asyncio.timeout(DRAIN_S):
                while await response.content.readany():
                    pass
        except (TimeoutError, *BROKEN):
            response.close()
